"""The tests of the suite, and the clauses that they say they hold."""

import ast
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from truestep_spec_tests.meta.specification import PACKAGE


class MarkedTest(NamedTuple):
    """A test function as it stands in its file.

    Attributes:
        file: The file.
        name: The function's name, after that of its class if it is in one.
        clauses: What its own, its class's and its module's `clause` markers name.
    """

    file: Path
    name: str
    clauses: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.file.relative_to(PACKAGE)}::{self.name}"


def marked_tests(file: Path) -> list[MarkedTest]:
    """All tests of a file, whichever are selected in this session."""
    module = ast.parse(file.read_text(encoding="utf-8"), str(file))
    return list(_tests(module, file, prefix="", inherited=()))


def _tests(
    parent: ast.Module | ast.ClassDef, file: Path, prefix: str, inherited: tuple[str, ...]
) -> Iterator[MarkedTest]:
    own = [node.value for node in parent.body if isinstance(node, ast.Assign) and _assigns_marks(node)]
    inherited = (*inherited, *chain.from_iterable(map(_named_clauses, own)))
    for node in parent.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            clauses = (*inherited, *chain.from_iterable(map(_named_clauses, node.decorator_list)))
            if isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
                yield from _tests(node, file, f"{prefix}{node.name}::", clauses)
            elif isinstance(node, ast.FunctionDef) and node.name.startswith("test"):
                yield MarkedTest(file, f"{prefix}{node.name}", clauses)


def _assigns_marks(node: ast.Assign) -> bool:
    return any(isinstance(target, ast.Name) and target.id == "pytestmark" for target in node.targets)


def _named_clauses(expression: ast.expr) -> Iterator[str]:
    """The arguments of every `pytest.mark.clause(…)` in an expression, also within `pytest.param(…)`."""
    for node in ast.walk(expression):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.clause":
            yield from (ast.literal_eval(argument) for argument in node.args)


TESTS = [test for file in sorted(PACKAGE.rglob("test_*.py")) for test in marked_tests(file)]
"""All of them."""
