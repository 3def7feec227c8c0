"""What is known to fail: an implementer's list, and whether it is true."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from truestep_fixtures.topologies import TOPOLOGIES

from truestep_spec_tests.meta import specification
from truestep_spec_tests.meta.specification import PACKAGE
from truestep_spec_tests.runs import Setup
from truestep_spec_tests.verify.clauses.running import Outcome
from truestep_spec_tests.verify.clauses.verdicts import Verdict
from truestep_spec_tests.verify.trainings.check import Result
from truestep_spec_tests.verify.trainings.plan import DTYPES, SHORT, identity


@dataclass(frozen=True)
class Expectations:
    """Known failures.

    Args:
        ids: Of clauses (`BEMA-5`), tests (`properties/test_bema.py::test_…`, with parameters or without) and trainings
            (`BEMA zero3 2 float32`, the first columns of a row).
    """

    ids: tuple[str, ...] = ()

    @classmethod
    def read(cls, file: Path) -> "Expectations":
        """Those in a file, one a line; `#` begins a comment. Tests may have the path that commands have."""
        lines = (re.sub(r"(^|\s)#.*", "", line) for line in file.read_text(encoding="utf-8-sig").splitlines())
        return cls(tuple(" ".join(line.split()).removeprefix(f"{PACKAGE}/") for line in lines if line.strip()))

    def has_test(self, test: Outcome, clause: str) -> bool:
        """Whether a test is known to fail, or all that a clause says."""
        return clause in self.ids or any(map(test.is_called, self.ids))

    def has_training(self, setup: Setup) -> bool:
        """Whether a training is known to fail."""
        return " ".join(identity(setup)) in self.ids

    def problems(self, results: Sequence[Result], verdicts: Sequence[Verdict], tests: Sequence[Outcome]) -> list[str]:
        """What is wrong with the ids: those that nothing has, and those of what passes now.

        Args:
            results: The trainings that were made.
            verdicts: The clauses that were tested.
            tests: All tests.
        """
        clauses = set(specification.clauses())
        passing = {verdict.clause for verdict in verdicts if verdict.verdict == "passes"}
        passing |= {" ".join(identity(result.setup)) for result in results if result.passed}
        problems = []
        for name in self.ids:
            called = [test for test in tests if test.is_called(name)]
            if name in passing or {test.finding.verdict for test in called} in ({"passes"}, {"passes", "skipped"}):
                problems.append(f"{name}: passes now")
            elif not called and name not in clauses and not _is_training(name) and not _is_elsewhere(name, tests):
                problems.append(f"{name}: there is no such clause, test or training")
        return problems


def _is_training(name: str) -> bool:
    """Whether an id can be that of a training, made or not."""
    match name.split():
        case [callback, topology, ranks, dtype]:
            return callback in SHORT.values() and topology in TOPOLOGIES and ranks.isdigit() and dtype in DTYPES
    return False


def _is_elsewhere(name: str, tests: Iterable[Outcome]) -> bool:
    """Whether a test's id is of a file that was left out."""
    file = name.partition("::")[0]
    return (PACKAGE / file).is_file() and not any(test.id.startswith(f"{file}::") for test in tests)
