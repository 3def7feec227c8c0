"""The document to keep: what an implementation does, without times and paths, so that two of them can be compared."""

import re
import shlex
import sysconfig
import tempfile
from collections.abc import Mapping
from typing import Any

from truestep_spec_tests.lockstep import Divergence
from truestep_spec_tests.meta.specification import PACKAGE
from truestep_spec_tests.verify.clauses.findings import FAILURES
from truestep_spec_tests.verify.report.templates import templates


def document(contents: Mapping[str, Any]) -> str:
    """The document, as Markdown.

    Args:
        contents: Of `truestep_spec_tests.verify.report.contents`.
    """
    environment = templates(autoescape=False)
    environment.filters |= {"cell": _cell, "ratio": _ratio}
    tests = {test["test"]: test for test in contents["tests"]}
    failing = [clause for clause in contents["clauses"] if clause["verdict"] in FAILURES]
    evidence = {
        test: [clause["clause"] for clause in failing if clause["evidence"] == test]
        for test in dict.fromkeys(clause["evidence"] for clause in failing)
    }
    text = environment.get_template("document.md").render(
        {**contents, "command": _without_files(contents["command"])},
        versions=_versions(contents["environment"]),
        where={number: _where(run) for number, run in enumerate(contents["runs"])},
        evidence=[(clauses, tests[test]) for test, clauses in evidence.items()],
    )
    return _portable(text)


def _versions(environment: Mapping[str, str]) -> str:
    machine = ("platform", "cpu", "gpu", "commit")
    return ", ".join(f"{name} {value}" for name, value in environment.items() if name not in machine)


def _without_files(command: str) -> str:
    """A command without the options that say where something comes from or goes to."""
    kept: list[str] = []
    words = iter(shlex.split(command))
    for word in words:
        option, _, value = word.partition("=")
        if option not in ("--report", "--markdown", "--expect"):
            kept.append(word)
        elif not value:
            next(words, None)
    return shlex.join(kept)


def _where(run: Mapping[str, Any]) -> str:
    """Where a run first was not the reference's."""
    if run["crash"] is not None:
        return str(run["endings"][0])
    if run["divergence"] is not None:
        found = Divergence(**run["divergence"])
        return f"step {found.step}, {found.parameter}: {found.subject}, reference {found.reference}"
    return run["bitwise_difference"] or ""


def _ratio(value: float | str | None) -> str:
    """An error ÷ bound; infinities are strings in JSON."""
    return "–" if value is None else f"{float(value):.3g}"


def _cell(text: str, characters: int = 200) -> str:
    """Text as a cell of a table can hold it."""
    text = " ".join(text.split()).replace("|", r"\|")
    return text if len(text) <= characters else f"{text[:characters]}…"


def _portable(text: str) -> str:
    """Text with names of files as they are in any environment, and no addresses in memory."""
    for directory in (sysconfig.get_path("purelib"), *map(str, (PACKAGE.parents[1], PACKAGE.parent))):
        text = text.replace(f"{directory}/", "")
    text = re.sub(r"\b0x[0-9a-f]{6,}\b", "0x…", text)
    return re.sub(rf"{re.escape(tempfile.gettempdir())}/[^\s'\"]*/", "", text)
