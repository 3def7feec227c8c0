"""Every mutant is found by the check that it names, and the check finds nothing in what was not changed."""

import ast
from collections.abc import Callable
from pathlib import Path

import pytest
from truestep_fixtures.ranks import RankPool

from truestep_spec_tests.meta.checks.suspect import Check, Suspect
from truestep_spec_tests.meta.mutants import MUTANTS
from truestep_spec_tests.meta.mutants.patch import ORIGINAL, Mutant, copy_package, sources

CHECKS = sorted({mutant.killed_by for mutant in MUTANTS}, key=lambda check: check.__name__)

Ranks = Callable[[int], RankPool]


@pytest.fixture(scope="session")
def unmutated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a copy of the package, `unmutated`, made in the way in which mutants are made."""
    directory = tmp_path_factory.mktemp("unmutated")
    copy_package(directory, "unmutated")
    return directory


def test_names_of_mutants_are_unique() -> None:
    names = [mutant.name for mutant in MUTANTS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_patch_fits_its_file_in_one_place(mutant: Mutant) -> None:
    compile(mutant.applied_to(sources()[mutant.module]), mutant.module, "exec")


def test_a_patch_that_does_not_fit_is_named() -> None:
    mutant = Mutant("example", "BEMA-1", "bema.py", "right", "wrong", lambda suspect: None)
    assert mutant.applied_to("it is right") == "it is wrong"
    for source in ("it is not", "right is right"):
        with pytest.raises(ValueError, match=r"mutant example: bema\.py has its passage [02] times"):
            mutant.applied_to(source)


def test_a_copy_imports_nothing_from_the_original(unmutated: Path) -> None:
    files = list(unmutated.rglob("*.py"))
    assert files
    for file in files:
        imported = [
            name
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in ([node.module] if isinstance(node, ast.ImportFrom) else [n.name for n in node.names])
        ]
        assert not [name for name in imported if name and name.split(".")[0] == ORIGINAL], file


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_checks_find_nothing_in_a_copy_without_a_mistake(
    check: Check, unmutated: Path, ranks: Ranks, tmp_path: Path
) -> None:
    assert check(Suspect("unmutated", unmutated, tmp_path, ranks)) is None


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutants_are_found(mutant: Mutant, ranks: Ranks, tmp_path: Path) -> None:
    copy_package(tmp_path, mutant.name, mutant)
    fault = mutant.killed_by(Suspect(mutant.name, tmp_path, tmp_path / "run", ranks))
    assert fault is not None, f"{mutant.name} survives: {mutant.killed_by.__name__} finds nothing"
