"""How strong the suite is: for each clause, the tests that hold it, and the mutants that prove that they do.

`python -m truestep_spec_tests.meta.strength`, in the source tree, writes the document anew.
"""

from collections import Counter
from pathlib import Path

from truestep_spec_tests.meta import specification
from truestep_spec_tests.meta.marks import TESTS
from truestep_spec_tests.meta.mutants import MUTANTS
from truestep_spec_tests.meta.specification import PACKAGE

FILE = "spec_tests/STRENGTH.md"
"""The document, in the source tree."""

# What a clause without a mutant would take to break, and to notice.
WITHOUT_MUTANT = {"BEMA-9": "a second device"}

_HEAD = """# How strong the suite is

For each clause of [SPEC.md](../SPEC.md): the tests that hold it, as the number of test functions in each file, and the
mutants that prove that they do. A mutant is the optimized code with one mistake in it, and is found by the check after
its name. Many test functions are run with many parameters, models, topologies and examples.

`python -m truestep_spec_tests.meta.strength` writes this file; a test says when it has to.
"""


def document() -> str:
    """The document."""
    parts = [_HEAD]
    titles = specification.titles()
    for prefix, (callback, _) in specification.statuses().items():
        clauses = [clause for clause in specification.clauses() if clause.startswith(f"{prefix}-")]
        rows = [f"| {clause} | {titles[clause]} | {_tests(clause)} | {_mutants(clause)} |" for clause in clauses]
        parts.append("\n".join([f"## {callback}\n", "| Clause | | Tests | Mutants |", "|---|---|---|---|", *rows, ""]))
    return "\n".join(parts)


def _tests(clause: str) -> str:
    files = Counter(test.file.relative_to(PACKAGE).as_posix() for test in TESTS if clause in test.clauses)
    return "<br>".join(f"{file.removesuffix('.py')}: {count}" for file, count in sorted(files.items()))


def _mutants(clause: str) -> str:
    if clause in WITHOUT_MUTANT:
        return f"none: it would take {WITHOUT_MUTANT[clause]}"
    found = [mutant for mutant in MUTANTS if mutant.clause == clause]
    return "<br>".join(f"{mutant.name}: {mutant.killed_by.__name__}" for mutant in found)


if __name__ == "__main__":
    (PACKAGE.parent / Path(FILE).name).write_text(document(), encoding="utf-8")
