"""The tests of the suite, and the clauses that they say they hold."""

import ast
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from truestep_spec_tests.meta.specification import PACKAGE


class MarkedTest(NamedTuple):
    """A test function as it stands in its file.

    Attributes:
        file: The file.
        name: The function's name, after that of its class if it is in one.
        clauses: What its own, its parameters', its class's and its module's `clause` markers name.
    """

    file: Path
    name: str
    clauses: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.file.relative_to(PACKAGE)}::{self.name}"


def marked_tests(file: Path) -> list[MarkedTest]:
    """All tests of a file, whichever are selected in this session."""
    module = ast.parse(file.read_text(encoding="utf-8"), str(file))
    return list(_tests(module, file, prefix="", inherited=(), defined=_defined(module)))


def _tests(
    parent: ast.Module | ast.ClassDef,
    file: Path,
    prefix: str,
    inherited: tuple[str, ...],
    defined: Mapping[str, ast.stmt],
) -> Iterator[MarkedTest]:
    own = [node.value for node in parent.body if isinstance(node, ast.Assign) and _assigns_marks(node)]
    inherited = (*inherited, *chain.from_iterable(_named_clauses(value, defined) for value in own))
    for node in parent.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            named = chain.from_iterable(_named_clauses(decorator, defined) for decorator in node.decorator_list)
            clauses = (*inherited, *dict.fromkeys(named))
            if isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
                yield from _tests(node, file, f"{prefix}{node.name}::", clauses, defined)
            elif isinstance(node, ast.FunctionDef) and node.name.startswith("test"):
                yield MarkedTest(file, f"{prefix}{node.name}", clauses)


def _assigns_marks(node: ast.Assign) -> bool:
    return any(isinstance(target, ast.Name) and target.id == "pytestmark" for target in node.targets)


def _defined(module: ast.Module) -> dict[str, ast.stmt]:
    """The functions and values of a module, by name."""
    found: dict[str, ast.stmt] = {}
    for node in module.body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign):
            found |= {target.id: node for target in node.targets if isinstance(target, ast.Name)}
    return found


def _named_clauses(tree: ast.AST, defined: Mapping[str, ast.stmt]) -> Iterator[str]:
    """The arguments of every `pytest.mark.clause(…)` in a piece of code, and in what it uses of its module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.clause":
            yield from (ast.literal_eval(argument) for argument in node.args)
        elif isinstance(node, ast.Name) and node.id in defined:
            others = {name: used for name, used in defined.items() if name != node.id}
            yield from _named_clauses(defined[node.id], others)


TESTS = [test for file in sorted(PACKAGE.rglob("test_*.py")) for test in marked_tests(file)]
"""All of them."""
