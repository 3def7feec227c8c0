"""Copies of the package under test with one mistake in them, each with the check that finds it.

A mutant is a copy of the package `truestep` under another name in which one passage is replaced by a wrong one. What
the check does to it, it does to any implementation, so a mutant that survives shows a gap in the suite.
"""

import functools
import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from truestep_spec_tests.meta.checks.suspect import Check

ORIGINAL = "truestep"


@dataclass(frozen=True)
class Mutant:
    """A patch of the optimized code.

    Attributes:
        name: The mistake.
        clause: The clause that it breaks.
        module: The file that it is in.
        before: The right passage, which the file has exactly once.
        after: The wrong one in its place.
        killed_by: The check that finds it.
    """

    name: str
    clause: str
    module: str
    before: str
    after: str
    killed_by: Check

    def applied_to(self, source: str) -> str:
        """The file's text with the mistake in it.

        Raises:
            ValueError: The patch does not fit: the passage is not there exactly once, or remains.
        """
        count = source.count(self.before)
        if count != 1 or self.after == self.before:
            raise ValueError(f"mutant {self.name}: {self.module} has its passage {count} times:\n{self.before}")
        return source.replace(self.before, self.after)


def copy_package(directory: Path, name: str, mutant: Mutant | None = None) -> None:
    """Writes a copy of the installed package to `directory / name`, with one mistake or as it is."""
    for module, source in sources().items():
        if mutant is not None and module == mutant.module:
            source = mutant.applied_to(source)
        target = directory / name / module
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(re.sub(rf"\b(from|import) {ORIGINAL}\b", rf"\1 {name}", source), encoding="utf-8")


@functools.cache
def sources() -> Mapping[str, str]:
    """The files of the installed package, by their paths in it."""
    spec = importlib.util.find_spec(ORIGINAL)
    assert spec is not None
    assert spec.origin is not None
    root = Path(spec.origin).parent
    return {str(file.relative_to(root)): file.read_text(encoding="utf-8") for file in sorted(root.rglob("*.py"))}
