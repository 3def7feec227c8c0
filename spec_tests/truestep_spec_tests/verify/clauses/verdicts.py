"""From what tests found to a verdict on each clause."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from truestep_spec_tests.verify.clauses.findings import FAILURES, NOT_RUN, severity
from truestep_spec_tests.verify.clauses.running import Outcome


@dataclass(frozen=True)
class Verdict:
    """What an implementation does of what a clause says.

    Attributes:
        clause: The clause.
        verdict: `passes`; `fails`, `hangs` or `crashes`, the first of these that one of its tests does; `not tested`;
            `not offered`, where the implementation lacks the callback.
        tests: The tests that name the clause.
        evidence: Of the tests that have the verdict, the one that names the fewest clauses and says it with the fewest
            words.
        is_known: Whether there are failures, and all of them were known. Where some were not, verdict and evidence are
            of these.
    """

    clause: str
    verdict: str
    tests: Sequence[Outcome] = ()
    evidence: Outcome | None = None
    is_known: bool = False

    @property
    def is_fine(self) -> bool:
        """Whether nothing was found that was not known, and nothing was cut short."""
        return (self.verdict not in FAILURES or self.is_known) and not _is_cut(self.tests)

    @property
    def note(self) -> str:
        """How many tests stand behind it, without those that were skipped; or why none does."""
        if self.verdict in ("not tested", "not offered"):
            verdict = NOT_RUN if _is_cut(self.tests) else "skipped"
            reasons = Counter(test.finding.message for test in self.tests if test.finding.verdict == verdict)
            return reasons.most_common(1)[0][0] if reasons else ""
        failing = sum(test.finding.verdict in FAILURES for test in self.tests)
        count = sum(test.finding.verdict != "skipped" for test in self.tests)
        counted = f"{count} test{'s' if count > 1 else ''}"
        return f"{failing} of {counted}" if failing else counted


def judge(clause: str, tests: Iterable[Outcome], is_known: Callable[[Outcome, str], bool]) -> Verdict:
    """The verdict on a clause.

    Args:
        clause: The clause.
        tests: All tests, of whichever clauses.
        is_known: Whether a test is known to fail a clause.
    """
    of_clause = [test for test in tests if clause in test.clauses]
    failing = [test for test in of_clause if test.finding.verdict in FAILURES]
    if failing:
        surprising = [test for test in failing if not is_known(test, clause)]
        worst = max((test.finding for test in surprising or failing), key=severity).verdict
        shown = [test for test in surprising or failing if test.finding.verdict == worst]
        return Verdict(clause, worst, of_clause, min(shown, key=_length), is_known=not surprising)
    has_passed = any(test.finding.verdict == "passes" for test in of_clause)
    return Verdict(clause, "passes" if has_passed and not _is_cut(of_clause) else "not tested", of_clause)


def _is_cut(tests: Iterable[Outcome]) -> bool:
    return any(test.finding.verdict == NOT_RUN for test in tests)


def _length(test: Outcome) -> tuple[int, int]:
    return len(test.clauses), len(test.finding.message) + len(test.finding.example)
