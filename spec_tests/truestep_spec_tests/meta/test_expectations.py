"""What is known to fail: how it is written down, and what is said where it is not true."""

from pathlib import Path

from truestep_spec_tests.lockstep import Comparison, Comparisons
from truestep_spec_tests.meta import specification
from truestep_spec_tests.meta.specification import PACKAGE
from truestep_spec_tests.runs import Setup
from truestep_spec_tests.verify.clauses.findings import FAILURES, Finding
from truestep_spec_tests.verify.clauses.running import Outcome
from truestep_spec_tests.verify.clauses.verdicts import judge
from truestep_spec_tests.verify.expectations import Expectations
from truestep_spec_tests.verify.trainings.check import Result
from truestep_spec_tests.verify.trainings.plan import SHORT, identity, plan


def outcome(verdict: str, test: str, clause: str = "BEMA-1") -> Outcome:
    return Outcome(test, (clause,), Finding(verdict))


def training(topology: str, ranks: int, steps: int) -> Result:
    """A training of one step, of which some were compared."""
    setup = Setup("mine", topology, ranks, steps=1)
    return Result(setup, Comparisons({step: Comparison() for step in range(steps)}), seconds=1.0)


def test_known_failures_that_pass_or_are_nowhere_are_reported() -> None:
    tests = [
        outcome("passes", "a.py::test_a[0]"),
        outcome("fails", "a.py::test_b", "BEMA-2"),
        outcome("skipped", "a.py::c"),
    ]
    verdicts = [judge(clause, tests, Expectations().has_test) for clause in ("BEMA-1", "BEMA-2")]
    results = [training("zero3", 2, steps=2), training("zero3", 3, steps=1)]
    expectations = Expectations(
        (
            *("BEMA-1", "BEMA-2", "BEMA-3", "BEMA-99"),
            *("a.py::test_a", "a.py::test_b", "a.py::test_c", "a.py::c"),
            "properties/test_bema.py::test_that_was_left_out",
            *("BEMA zero3 2 float32", "BEMA zero3 3 float32", "BEMA fsdp2 3 float32", "BEMA zero4 2 float32"),
        )
    )
    assert expectations.problems(results, verdicts, tests) == [
        "BEMA-1: passes now",
        "BEMA-99: there is no such clause, test or training",
        "a.py::test_a: passes now",
        "a.py::test_c: there is no such clause, test or training",
        "BEMA zero3 2 float32: passes now",
        "BEMA zero4 2 float32: there is no such clause, test or training",
    ]


def test_a_training_is_known_by_the_first_columns_of_its_row() -> None:
    expectations = Expectations(("BEMA zero3 3 float32",))
    assert expectations.has_training(training("zero3", 3, steps=1).setup)
    assert not expectations.has_training(training("zero3", 2, steps=1).setup)


def test_ids_of_known_failures_stand_one_a_line_beside_comments(tmp_path: Path) -> None:
    file = tmp_path / "known"
    file.write_text(
        f"\ufeffA-0\n# a comment\nA-1\n\n  BEMA   zero3 2 float32  # another\n{PACKAGE}/a.py::test_a[b c#d]\n"
    )
    assert Expectations.read(file).ids == ("A-0", "A-1", "BEMA zero3 2 float32", "a.py::test_a[b c#d]")


def test_what_is_kept_of_trl_is_what_is_known_of_it(checkout: Path) -> None:
    directory = checkout / "spec_tests" / "conformance"
    known = Expectations.read(directory / "trl-known-failures.txt").ids
    rows = [
        [cell.strip() for cell in line.strip("| ").split(" | ")]
        for line in (directory / "trl.md").read_text(encoding="utf-8").splitlines()
    ]
    clauses = {row[0]: row[2] for row in rows if row[0] in specification.clauses()}
    trainings = {(SHORT[row[0]], *row[1:4]): row[4] for row in rows if row[0] in SHORT}
    assert list(clauses) == specification.clauses()
    assert list(trainings) == [identity(setup) for setup in plan(implementation="trl", callbacks=list(SHORT))]
    failing = [name for name, verdict in clauses.items() if verdict in FAILURES]
    assert [*failing, *(" ".join(name) for name, verdict in trainings.items() if verdict != "equal")] == list(known)
