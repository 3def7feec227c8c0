"""The clauses of a verification, and the verdicts on them."""

from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from truestep_spec_tests.implementation import CALLBACKS, Implementation
from truestep_spec_tests.meta import specification
from truestep_spec_tests.verify.clauses.display import progress
from truestep_spec_tests.verify.clauses.running import Outcome, run
from truestep_spec_tests.verify.clauses.verdicts import Verdict, judge


def choose_clauses(prefixes: Sequence[str] | None, callbacks: Sequence[str] | None) -> list[str]:
    """The clauses that are asked for, in the order of the specification.

    Args:
        prefixes: Only these: `RICH` or `RICH-3`.
        callbacks: Only those of these callbacks.

    Raises:
        ValueError: There are none.
    """
    clauses = specification.clauses()
    for prefix in prefixes or ():
        if not any(_has_prefix(clause, prefix) for clause in clauses):
            raise ValueError(
                f"--only {prefix}: there is no such clause; there are {', '.join(specification.statuses())}"
            )
    found = [
        clause
        for clause in clauses
        if _callback(clause) in (callbacks or CALLBACKS)
        and (not prefixes or any(_has_prefix(clause, prefix) for prefix in prefixes))
    ]
    if not found:
        raise ValueError(f"--only {' '.join(prefixes or ())}: --callback {' '.join(callbacks or ())} has other clauses")
    return found


def verify_clauses(
    implementation: Implementation,
    clauses: Sequence[str],
    is_known: Callable[[Outcome, str], bool],
    console: Console,
    log: Path,
    *,
    seed: int,
    timeout: float,
    seconds: float,
) -> tuple[list[Verdict], list[Outcome]]:
    """Test clauses, whatever comes of each test.

    Args:
        implementation: What is tested.
        clauses: The clauses.
        is_known: Whether a test is known to fail a clause.
        console: Where progress is shown.
        log: A file for tracebacks.
        seed: Seeds Hypothesis's examples.
        timeout: Seconds that one test may take.
        seconds: Seconds that all may take together.

    Returns:
        The verdicts, and the tests that they rest on.
    """
    offered = [clause for clause in clauses if _callback(clause) in implementation.offered]
    tests: list[Outcome] = []
    if offered:
        with progress(console) as on_progress:
            tests = run(
                implementation.name,
                offered,
                seed=seed,
                timeout=timeout,
                seconds=seconds,
                log=log,
                on_progress=on_progress,
            )
    verdicts = [
        judge(clause, tests, is_known) if clause in offered else Verdict(clause, "not offered") for clause in clauses
    ]
    return verdicts, tests


def _callback(clause: str) -> str:
    """Name of the callback that a clause is about."""
    return specification.statuses()[clause.partition("-")[0]][0]


def _has_prefix(clause: str, prefix: str) -> bool:
    return f"{clause}-".startswith(f"{prefix}-")
