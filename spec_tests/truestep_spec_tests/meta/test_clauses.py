"""Clauses and tests name each other: no clause without a test, no test of a clause that is not there."""

from itertools import chain
from pathlib import Path

import pytest

from truestep_spec_tests.meta import specification, strength
from truestep_spec_tests.meta.marks import TESTS, marked_tests
from truestep_spec_tests.meta.mutants import MUTANTS
from truestep_spec_tests.meta.specification import PACKAGE
from truestep_spec_tests.meta.strength import WITHOUT_MUTANT

# Ids are permanent, so a clause that was dropped leaves a gap, and is named here.
DROPPED: frozenset[str] = frozenset()


def demanded_clauses() -> list[str]:
    """The clauses of the callbacks that are implemented."""
    implemented = {prefix for prefix, (_, status) in specification.statuses().items() if status == "implemented"}
    assert implemented
    return [clause for clause in specification.clauses() if clause.partition("-")[0] in implemented]


def test_markers_are_found_wherever_they_stand(tmp_path: Path) -> None:
    file = tmp_path / "test_example.py"
    file.write_text(
        "pytestmark = [pytest.mark.gpu, pytest.mark.clause('A-1')]\n"
        "class TestB:\n"
        "    pytestmark = pytest.mark.clause('B-1')\n"
        "    @pytest.mark.clause('B-2', 'B-3')\n"
        "    @pytest.mark.parametrize('x', [pytest.param(1, marks=pytest.mark.clause('B-4'))])\n"
        "    def test_c(self): ...\n"
        "def test_d(): ...\n"
        "def cases(): return [pytest.param(1, marks=pytest.mark.clause('C-1'))]\n"
        "CASES = [pytest.param(1, marks=pytest.mark.clause('C-2'))]\n"
        "@pytest.mark.parametrize('x', cases())\n"
        "@pytest.mark.parametrize('y', CASES)\n"
        "def test_e(): ...\n"
        "def helper(): ...\n"
    )
    expected = [
        ("TestB::test_c", ("A-1", "B-1", "B-2", "B-3", "B-4")),
        ("test_d", ("A-1",)),
        ("test_e", ("A-1", "C-1", "C-2")),
    ]
    assert [(test.name, test.clauses) for test in marked_tests(file)] == expected


def test_every_clause_of_an_implemented_callback_is_named_by_a_test() -> None:
    named = set(chain.from_iterable(test.clauses for test in TESTS))
    assert [clause for clause in demanded_clauses() if clause not in named] == []


def test_every_clause_that_a_test_names_exists() -> None:
    existing = set(specification.clauses())
    unknown = [(str(test), clause) for test in TESTS for clause in test.clauses if clause not in existing]
    assert unknown == []


@pytest.mark.parametrize("folder", ["properties", "differential"])
def test_every_test_of_an_implementation_names_a_clause(folder: str) -> None:
    tests = [test for test in TESTS if test.file.is_relative_to(PACKAGE / folder)]
    assert tests
    assert [str(test) for test in tests if not test.clauses] == []


def test_every_clause_that_a_mutant_breaks_exists() -> None:
    existing = set(specification.clauses())
    assert {mutant.name: mutant.clause for mutant in MUTANTS if mutant.clause not in existing} == {}


def test_every_clause_of_an_implemented_callback_is_broken_by_a_mutant() -> None:
    broken = {mutant.clause for mutant in MUTANTS}
    assert [clause for clause in demanded_clauses() if clause not in broken | WITHOUT_MUTANT.keys()] == []
    assert broken.isdisjoint(WITHOUT_MUTANT)


def test_clauses_are_numbered_from_one_in_order_without_gaps() -> None:
    found = specification.clauses()
    for prefix, (callback, _) in specification.statuses().items():
        numbered = sorted(
            [clause for clause in (*found, *DROPPED) if clause.startswith(f"{prefix}-")],
            key=lambda clause: int(clause.partition("-")[2]),
        )
        assert numbered == [f"{prefix}-{number}" for number in range(1, len(numbered) + 1)], callback
        assert [clause for clause in numbered if clause not in DROPPED] == [
            clause for clause in found if clause.startswith(f"{prefix}-")
        ]


def test_every_clause_stands_in_the_section_of_its_callback() -> None:
    sections = specification.sections()
    for prefix, (callback, status) in specification.statuses().items():
        assert status in ("implemented", "specified")
        in_section = [clause for clause in specification.clauses() if f"**{clause}**" in sections[callback]]
        assert in_section == [clause for clause in specification.clauses() if clause.startswith(f"{prefix}-")]


def test_every_clause_belongs_to_a_callback_with_a_status() -> None:
    prefixes = {clause.partition("-")[0] for clause in specification.clauses()}
    assert prefixes == set(specification.statuses())


def test_the_document_of_the_suites_strength_is_up_to_date(checkout: Path) -> None:
    assert strength.document() == (checkout / strength.FILE).read_text(encoding="utf-8")
