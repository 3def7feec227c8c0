"""What the tests of `truestep verify` have in common: a quick run, and how to read what it prints and leaves."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from truestep_spec_tests.verify.trainings.plan import SHORT

# Of arguments: the exit status and what is printed.
Verify = Callable[[str], tuple[int, str]]

QUICK = "--callback BEMACallback --dtype float32 --steps 4 --report out"


def report(directory: Path) -> dict[str, Any]:
    """The report, which any reader of JSON has to understand: Python's own writes and reads `NaN` besides."""
    text = (directory / "out" / "report.json").read_text(encoding="utf-8")
    contents: dict[str, Any] = json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
    return contents


def rows(printed: str) -> list[list[str]]:
    """The cells of the table's rows."""
    return [cells for line in printed.splitlines() if (cells := line.split()) and cells[0] in SHORT.values()]


def assert_one_of_two_ranks_reports(printed: str, directory: Path) -> None:
    """A quick run under DDP was made once, in a world of two ranks, and equals the reference."""
    ((*row, _, bitwise, _, verdict),) = rows(printed)
    assert row == ["BEMA", "ddp", "2", "float32", "5"]
    assert (bitwise, verdict) == ("yes", "equal")
    assert printed.count("report: ") == 1
    assert report(directory)["runs"][0]["setup"]["ranks"] == 2
