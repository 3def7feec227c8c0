"""From what tests found to a verdict on each clause."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from truestep_spec_tests.meta.specification import PACKAGE
from truestep_spec_tests.verify.clauses.findings import FAILURES, severity
from truestep_spec_tests.verify.clauses.running import NOT_RUN, Outcome


@dataclass(frozen=True)
class Verdict:
    """What an implementation does of what a clause says.

    Attributes:
        clause: The clause.
        verdict: `passes`; `fails`, `hangs` or `crashes`, the first of these that one of its tests does; `expected`,
            where all that fails was known; `not tested`; `not offered`, where the implementation lacks the callback.
        tests: The tests that name the clause.
        evidence: Of the tests that have the verdict, the one that says it with the fewest words.
    """

    clause: str
    verdict: str
    tests: Sequence[Outcome] = ()
    evidence: Outcome | None = None

    @property
    def is_fine(self) -> bool:
        """Whether nothing was found that was not known, and nothing was cut short."""
        return self.verdict not in FAILURES and not _is_cut(self.tests)

    @property
    def note(self) -> str:
        """How many tests stand behind it, without those that were skipped; or why none does."""
        if self.verdict in ("not tested", "not offered"):
            reasons = Counter(test.finding.message for test in self.tests if test.finding.verdict != "passes")
            return reasons.most_common(1)[0][0] if reasons else ""
        failing = sum(test.finding.verdict in FAILURES for test in self.tests)
        count = sum(test.finding.verdict != "skipped" for test in self.tests)
        counted = f"{count} test{'s' if count > 1 else ''}"
        return f"{failing} of {counted}" if failing else counted


def judge(clause: str, tests: Iterable[Outcome], known: Set[str] = frozenset()) -> Verdict:
    """The verdict on a clause.

    Args:
        clause: The clause.
        tests: All tests, of whichever clauses.
        known: Clauses and tests that are known to fail.
    """
    of_clause = [test for test in tests if clause in test.clauses]
    failing = [test for test in of_clause if test.finding.verdict in FAILURES]
    surprising = [test for test in failing if clause not in known and not any(map(test.is_called, known))]
    if surprising:
        worst = max((test.finding for test in surprising), key=severity).verdict
        shown = [test for test in surprising if test.finding.verdict == worst]
        return Verdict(clause, worst, of_clause, min(shown, key=_words))
    if failing:
        return Verdict(clause, "expected", of_clause)
    has_passed = any(test.finding.verdict == "passes" for test in of_clause)
    return Verdict(clause, "passes" if has_passed and not _is_cut(of_clause) else "not tested", of_clause)


def _is_cut(tests: Iterable[Outcome]) -> bool:
    return any(test.finding == NOT_RUN for test in tests)


def _words(test: Outcome) -> int:
    return len(test.finding.message) + len(test.finding.example)


def known_failures(file: Path) -> list[str]:
    """The ids in a file: of clauses or tests, one a line; `#` begins a comment."""
    lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in file.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line]


def unmet(
    known: Iterable[str], verdicts: Sequence[Verdict], tests: Sequence[Outcome], clauses: Iterable[str]
) -> list[str]:
    """What is wrong with ids of known failures: those that nothing has, and those of what passes now.

    Args:
        known: The ids.
        verdicts: The clauses that were tested.
        tests: All tests.
        clauses: All clauses.
    """
    existing, passing = set(clauses), {verdict.clause for verdict in verdicts if verdict.verdict == "passes"}
    problems = []
    for name in known:
        called = [test for test in tests if test.is_called(name)]
        if name not in existing and not called and not _is_elsewhere(name, tests):
            problems.append(f"{name}: there is no such clause or test")
        elif name in passing or (called and all(test.finding.verdict == "passes" for test in called)):
            problems.append(f"{name}: passes now")
    return problems


def _is_elsewhere(name: str, tests: Iterable[Outcome]) -> bool:
    """Whether a test's id is of a file that was left out."""
    file = name.partition("::")[0]
    return (PACKAGE / file).is_file() and not any(test.id.startswith(f"{file}::") for test in tests)
