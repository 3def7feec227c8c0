"""All that a verification found, as JSON can hold it; the page and the document are made from it."""

from collections.abc import Sequence
from typing import Any

from truestep_spec_tests.implementation import Implementation
from truestep_spec_tests.meta import specification
from truestep_spec_tests.verify.clauses.display import command
from truestep_spec_tests.verify.clauses.running import Outcome
from truestep_spec_tests.verify.clauses.verdicts import Verdict
from truestep_spec_tests.verify.environment import environment
from truestep_spec_tests.verify.expectations import Expectations
from truestep_spec_tests.verify.trainings.check import Result


def contents(
    implementation: Implementation,
    arguments: str,
    seed: int,
    results: Sequence[Result],
    verdicts: Sequence[Verdict],
    tests: Sequence[Outcome],
    expectations: Expectations,
) -> dict[str, Any]:
    """The report.

    Args:
        implementation: What was verified.
        arguments: The command's.
        seed: The seed of the tests.
        results: Of trainings.
        verdicts: On clauses.
        tests: Those of the clauses.
        expectations: What was known to fail.
    """
    problems = expectations.problems(results, verdicts, tests)
    titles = specification.titles()
    tested = {verdict.clause for verdict in verdicts if verdict.tests}
    runs = [
        result.as_dict() | {"known": not result.passed and expectations.has_training(result.setup)}
        for result in results
    ]
    return {
        "implementation": str(implementation),
        "command": f"truestep verify {arguments}".rstrip(),
        "environment": environment(),
        "passed": not problems
        and all(run["verdict"] == "equal" or run["known"] for run in runs)
        and all(verdict.is_fine for verdict in verdicts),
        "known_failures": {"ids": expectations.ids, "problems": problems},
        "runs": runs,
        "clauses": [_clause(verdict, titles[verdict.clause]) for verdict in verdicts],
        "tests": [_test(test, implementation, seed) for test in tests if not tested.isdisjoint(test.clauses)],
    }


def _clause(verdict: Verdict, title: str) -> dict[str, Any]:
    return {
        "clause": verdict.clause,
        "title": title,
        "verdict": verdict.verdict,
        "known": verdict.is_known,
        "note": verdict.note,
        "evidence": None if verdict.evidence is None else verdict.evidence.id,
    }


def _test(test: Outcome, implementation: Implementation, seed: int) -> dict[str, Any]:
    own = {"test": test.id, "clauses": test.clauses, "command": command(test, implementation.name, seed)}
    return own | test.finding._asdict()
