"""The report as a page: what a browser shows of `report.json`."""

import math
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment
from markdown_it import MarkdownIt
from markupsafe import Markup

from truestep_spec_tests.meta import specification
from truestep_spec_tests.verify.report.plots import has_distances, marks, plots
from truestep_spec_tests.verify.report.templates import templates
from truestep_spec_tests.verify.trainings.plan import SHORT

TONES = {
    "equal": "good",
    "passes": "good",
    "diverges": "bad",
    "differs": "bad",
    "stops early": "bad",
    "fails": "bad",
    "crashes": "bad",
    "hangs": "bad",
}
"""How a verdict is shown; any other one says that there is nothing to judge."""

SIGNS = {"good": "✓", "bad": "✗", "known": "!", "none": "–"}
"""What says it to those who see no colours."""


def page(contents: Mapping[str, Any]) -> str:
    """A page of HTML that needs nothing but itself, and the files for replays beside it.

    Args:
        contents: What `report.json` holds.
    """
    runs = [_named(number, run) for number, run in enumerate(contents["runs"], start=1)]
    clauses = _clauses(contents["clauses"], contents["tests"])
    template = _environment().get_template("page.html")
    return template.render(
        contents,
        headline=_headline(contents),
        runs=runs,
        marks=marks(runs),
        runs_of=_by_callback(runs),
        clauses=clauses,
        clauses_of=_by_callback(clauses),
        failed_runs=_bad(runs),
        failed_clauses=_bad(clauses),
        largest=max((_number(run["largest_error_over_bound"]) for run in runs if run["steps"]), default=None),
    )


def _environment() -> Environment:
    environment = templates(autoescape=True)
    environment.filters |= {"tone": tone, "sign": _sign, "number": _shown, "counts": _counts}
    environment.globals |= {"plots": plots, "has_distances": has_distances, "distance": _distance}
    environment.filters |= {"file": _file, "shell": shlex.quote}
    return environment


def tone(judged: Mapping[str, Any]) -> str:
    """How the verdict on a run, clause or test is shown: `good`, `bad`, `known` (to fail) or `none`."""
    return "known" if judged.get("known") else TONES.get(judged["verdict"], "none")


def _sign(judged: Mapping[str, Any]) -> str:
    return SIGNS[tone(judged)]


def _bad(judged: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [one for one in judged if tone(one) == "bad"]


def _by_callback(judged: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    found = {callback: [one for one in judged if one["callback"] == callback] for callback in SHORT}
    return {callback: of_callback for callback, of_callback in found.items() if of_callback}


def _headline(contents: Mapping[str, Any]) -> tuple[str, str]:
    """The tone and the words of the answer."""
    runs, clauses = contents["runs"], contents["clauses"]
    if _bad(clauses):
        return "bad", "does not do what the specification says"
    if _bad(runs):
        return "bad", "does not do what the reference does"
    if not contents["passed"]:
        return "bad", "did not come out as expected"
    if any(one["known"] for one in (*clauses, *runs)):
        return "known", "does what the specification says, but for what was known to fail"
    if any(clause["verdict"] == "passes" for clause in clauses):
        return "good", "does what the specification says"
    return ("good", "does what the reference does") if runs else ("none", "was not verified")


# Runs


def _named(number: int, run: Mapping[str, Any]) -> dict[str, Any]:
    setup, short = run["setup"], SHORT[run["callback"]]
    ranks = f"{setup['ranks']} rank{'s' if setup['ranks'] > 1 else ''}"
    details = {name: setup[name] for name in ("model", "seed", "steps")} | setup["hyperparameters"] | setup["training"]
    if run["callback"] in ("LogCompletionsCallback", "WeaveCallback"):
        details |= {name: setup[name] for name in ("prompts", "scorers")} | setup["generation"]
    return {
        **run,
        "short": short,
        "anchor": f"run-{number}-{short}-{setup['topology']}-{setup['ranks']}-{setup['dtype']}",
        "ranks": ranks,
        "name": f"{short}, {setup['topology']}, {ranks}, {setup['dtype']}",
        "details": ", ".join(f"{name} {value}" for name, value in details.items()),
    }


def _distance(divergence: Mapping[str, Any]) -> float:
    return abs(float(divergence["subject"]) - float(divergence["reference"]))


def _file(path: str) -> str:
    """The address of a file that lies beside the page."""
    return quote(Path(path).name)


# Clauses


def _clauses(clauses: Sequence[Mapping[str, Any]], tests: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Clauses, each with its text, its failing tests, the evidence first, and the others by verdict.

    A failing test is shown with the first of its clauses, which is its `home`.
    """
    text, callbacks, markdown = specification.bodies(), specification.statuses(), _markdown()
    ids = [clause["clause"] for clause in clauses]
    homes = {test["test"]: next(name for name in ids if name in test["clauses"]) for test in tests}
    numbered = [
        {**test, "anchor": f"test-{number}", "home": homes[test["test"]]} for number, test in enumerate(tests, start=1)
    ]
    found = []
    for clause in clauses:
        of_clause = [test for test in numbered if clause["clause"] in test["clauses"]]
        others = [test for test in of_clause if tone(test) != "bad"]
        verdicts = dict.fromkeys(test["verdict"] for test in others)
        found.append(
            {
                **clause,
                "callback": callbacks[clause["clause"].partition("-")[0]][0],
                "text": Markup(markdown.render(text.get(clause["clause"], ""))),
                "failing": sorted(_bad(of_clause), key=partial(_severity, clause["evidence"])),
                "others": {name: [test for test in others if test["verdict"] == name] for name in verdicts},
            }
        )
    return found


def _severity(evidence: str | None, test: Mapping[str, Any]) -> tuple[bool, int]:
    return test["test"] != evidence, ("fails", "hangs", "crashes").index(test["verdict"])


def _markdown() -> MarkdownIt:
    """Markdown to HTML, without links, as what they lead to is not on the page."""
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    for end in ("link_open", "link_close"):
        markdown.add_render_rule(end, lambda *_: "")
    return markdown


# Words and numbers


def _number(value: float | str) -> float:
    """A number of the report, where what is not finite is a text."""
    return math.inf if math.isnan(float(value)) else float(value)


def _shown(value: float | str | None, format_: str = ".3f") -> str:
    if value is None:
        return "–"
    number = float(value)
    return format(number, format_) if math.isfinite(number) else str(number).replace("inf", "∞").replace("nan", "NaN")


def _counts(judged: Iterable[Mapping[str, Any]]) -> list[tuple[dict[str, Any], int]]:
    """Each verdict, known or not, and how many have it, the most frequent first."""
    counted = Counter((one["verdict"], one["known"]) for one in judged).most_common()
    return [({"verdict": verdict, "known": known}, count) for (verdict, known), count in counted]
