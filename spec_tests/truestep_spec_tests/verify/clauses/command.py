"""The command `truestep verify --clauses`."""

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from truestep_spec_tests.implementation import Implementation
from truestep_spec_tests.meta import specification
from truestep_spec_tests.verify.clauses.display import command, progress, show
from truestep_spec_tests.verify.clauses.running import run
from truestep_spec_tests.verify.clauses.verdicts import Verdict, judge, known_failures, unmet
from truestep_spec_tests.verify.environment import environment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that only this kind of verification takes."""
    group = parser.add_argument_group(
        "clause by clause",
        "Run the suite's tests of an implementation and say of each clause of SPEC.md whether it holds. Of the options "
        "above, --implementation, --timeout (of one test) and --output are for this too.",
    )
    group.add_argument("--clauses", action="store_true", help="do this instead")
    group.add_argument("--only", action="append", metavar="CLAUSE", help="only RICH, or RICH-3 (may be repeated)")
    group.add_argument(
        "--expect", type=Path, metavar="FILE", help="clauses or tests that are known to fail, one a line"
    )
    group.add_argument("--time", type=float, default=7200.0, help="seconds that all tests may take (default 7200)")


def verify_clauses(options: argparse.Namespace) -> int:
    """Verify an implementation clause by clause.

    Args:
        options: The command's arguments.

    Returns:
        0 if every clause that was tested holds, or was known not to; 1 otherwise.

    Raises:
        ValueError: The arguments do not fit.
        RuntimeError: The tests could not be run.
    """
    for option in ("callback", "topology", "ranks", "dtype", "replay"):
        if getattr(options, option) is not None:
            raise ValueError(f"--{option}: cannot be given together with --clauses")
    implementation = Implementation(options.implementation or "truestep")
    clauses = _chosen(options.only)
    offered = [clause for clause in clauses if _callback(clause) in implementation.offered]
    known = known_failures(options.expect) if options.expect else []
    options.output.mkdir(parents=True, exist_ok=True)
    console, log = Console(), options.output / "pytest.log"
    tests = []
    if offered:
        with progress(console) as bar:
            show_progress = partial(bar.update, bar.add_task("", total=None))
            tests = run(implementation.name, offered, options.timeout, options.time, log, show_progress)
    verdicts = [
        judge(clause, tests, frozenset(known)) if clause in offered else Verdict(clause, "not offered")
        for clause in clauses
    ]
    problems = unmet(known, verdicts, tests, specification.clauses())
    passed = not problems and all(verdict.is_fine for verdict in verdicts)
    console.print(f"implementation: {implementation}")
    show(console, verdicts, implementation.name)
    for problem in problems:
        console.print(f"{options.expect}: {problem}", style="red", markup=False, soft_wrap=True)
    file = options.output / "clauses.json"
    contents = {
        "implementation": str(implementation),
        "environment": environment(),
        "passed": passed,
        "known_failures": {"ids": known, "problems": problems},
        **_as_dict(verdicts, implementation.name),
    }
    file.write_text(json.dumps(contents, indent=2), encoding="utf-8")
    console.print(f"report: {file}, tracebacks: {log}", soft_wrap=True)
    return 0 if passed else 1


def _chosen(prefixes: Sequence[str] | None) -> list[str]:
    """The clauses that are asked for, in the order of the specification."""
    clauses = specification.clauses()
    for prefix in prefixes or ():
        if not any(_has_prefix(clause, prefix) for clause in clauses):
            raise ValueError(
                f"--only {prefix}: there is no such clause; there are {', '.join(specification.statuses())}"
            )
    return [clause for clause in clauses if not prefixes or any(_has_prefix(clause, prefix) for prefix in prefixes)]


def _has_prefix(clause: str, prefix: str) -> bool:
    return f"{clause}-".startswith(f"{prefix}-")


def _callback(clause: str) -> str:
    return specification.statuses()[clause.partition("-")[0]][0]


def _as_dict(verdicts: Sequence[Verdict], implementation: str) -> dict[str, Any]:
    """Clauses and tests, as JSON can hold them."""
    tests = dict.fromkeys(test for verdict in verdicts for test in verdict.tests)
    return {
        "clauses": [
            {
                "clause": verdict.clause,
                "verdict": verdict.verdict,
                "note": verdict.note,
                "evidence": None if verdict.evidence is None else verdict.evidence.id,
            }
            for verdict in verdicts
        ],
        "tests": [
            {
                "test": test.id,
                "clauses": test.clauses,
                **test.finding._asdict(),
                "command": command(test, implementation),
            }
            for test in tests
        ],
    }
