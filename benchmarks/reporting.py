"""Tables as plain text and as Markdown, and how figures are written in them."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from measuring import Spread

Row = Mapping[str, Any]
"""What was measured of one case: `model`, `parameters` and `dtype` say which, the rest is the benchmark's own."""


@dataclass(frozen=True)
class Table:
    """A table with a heading and a few words below it."""

    title: str
    note: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def as_text(self) -> str:
        """Columns aligned with spaces."""
        widths = [max(map(len, column)) for column in zip(self.header, *self.rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in (self.header, ["-" * width for width in widths], *self.rows)
        ]
        return "\n".join([self.title, "", *lines, "", textwrap.fill(self.note, 110)])

    def as_markdown(self) -> str:
        """A section with a table in it."""
        lines = [f"| {' | '.join(cells)} |" for cells in (self.header, ["---"] * len(self.header), *self.rows)]
        return "\n".join([f"### {self.title}", "", *lines, "", textwrap.fill(self.note, 110)])


def large(rows: Sequence[Row]) -> list[Row]:
    """The rows of models of about 100 million parameters, for which something is promised."""
    return [row for row in rows if 9e7 < row["parameters"] < 1.1e8]


def what(row: Row) -> tuple[str, str, str]:
    """The first cells of a row: model, parameters, dtype."""
    return row["model"], millions(row), short(row["dtype"])


def millions(row: Row) -> str:
    """The number of parameters."""
    return f"{row['parameters'] / 1e6:.1f}M"


def short(dtype: str) -> str:
    """The usual short name of a dtype."""
    return {"float32": "fp32", "bfloat16": "bf16"}.get(dtype, dtype)


def milliseconds(seconds: Sequence[float]) -> str:
    """The median of some times."""
    median = Spread.of(seconds).median * 1e3
    return f"{median:.1f}" if median >= 1 else f"{median:.3f}"


def in_words(spread: Spread, digits: int = 2) -> str:
    """A median with its quartiles."""
    return f"{spread.median:.{digits}f} [{spread.low:.{digits}f}–{spread.high:.{digits}f}]"


def verdict(holds: bool) -> str:
    """Whether what is promised was measured."""
    return "ok" if holds else "FAILED"
