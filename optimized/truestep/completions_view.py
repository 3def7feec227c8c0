"""Completions in a terminal or a pipe.

On a terminal there are tables, or records where it is narrow. Elsewhere there is plain text, all of it, with no control
codes, and without rich.
"""

import io
import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from truestep.completions_file import columns_of

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

READABLE_WIDTH = 28
"""Columns that a text needs to be read with ease. Where it would get fewer, there are records instead of a table."""

COLUMN_GAP = 3
"""Columns between those of a table."""

# What acts on a terminal or on the text around it, or cannot be encoded: control characters but tab and newline, the
# line separators of Unicode, directional overrides and isolates, surrogates.
_UNPRINTABLE = re.compile(r"([\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff])")


class View(NamedTuple):
    """What is shown together: the prompts of a step, or the steps of a prompt.

    Attributes:
        title: Its heading.
        common: Columns that are the same in all rows; they are shown once.
        label: What the rows are told apart by: `#` or `step`.
        rows: Of each row, the number or the step, and the other columns.
    """

    title: str
    common: dict[str, Any]
    label: str
    rows: list[tuple[int, dict[str, Any]]]


def show(views: list[View], summary: str, lines: int) -> None:
    """Print views to standard output.

    Args:
        views: What is shown, one below the other.
        summary: A line for the end.
        lines: Lines of each text that a terminal shows, 0 for all.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal need not have all of Unicode
    try:
        from rich.console import Console
    except ModuleNotFoundError:
        _print_plain(views, summary)
        return
    console = Console(highlight=False)
    if console.is_terminal:
        _print_rich(console, views, summary, lines)
    else:
        _print_plain(views, summary)


def printable(text: str) -> str:
    """Text of which nothing acts on a terminal: what would is shown by its code."""
    return _UNPRINTABLE.sub(lambda found: _escape(found[0]), text)


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def count(number: int, what: str) -> str:
    """A number of things."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def _label(view: View, number: int) -> str:
    return f"#{number}" if view.label == "#" else f"{view.label} {number}"


def _print_plain(views: list[View], summary: str) -> None:
    for view in views:
        print(view.title)
        _print_cells(view.common, indent=2)
        for number, cells in view.rows:
            print(f"\n  {_label(view, number)}")
            _print_cells(cells, indent=4)
        print()
    print(printable(summary))


def _print_cells(cells: dict[str, Any], indent: int) -> None:
    for name, cell in cells.items():
        # What continues a text is further in than names are, so that it is not taken for one.
        text = printable(str(cell)).replace("\n", "\n" + " " * (indent + 2))
        print(f"{' ' * indent}{printable(name)}: {text}")


def _print_rich(console: "Console", views: list[View], summary: str, lines: int) -> None:
    from rich.padding import Padding
    from rich.text import Text

    for view in views:
        console.print(Text(view.title, style="bold"))
        if view.common:
            console.print(Padding(_record(view.common, lines), (0, 0, 1, 2), expand=False))
        names = columns_of(cells for _, cells in view.rows)
        rows = list(_without_repetition(view))
        if _fits(console, names, view):
            console.print(_table(view, names, rows, lines))
        else:
            for number, cells in rows:
                console.print(Text(f"  {_label(view, number)}", style="bold cyan"))
                console.print(Padding(_record(cells, lines), (0, 0, 1, 4), expand=False))
        console.print()
    console.print(Text(printable(summary), style="dim"), soft_wrap=True)


def _without_repetition(view: View) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows over time, where a completion that is the one of the step before need not be read again."""
    before = None
    for number, cells in view.rows:
        is_repeated = view.label == "step" and cells["completion"] == before
        before = cells["completion"]
        yield number, (cells | {"completion": Remark("unchanged")} if is_repeated else cells)


def _fits(console: "Console", names: list[str], view: View) -> bool:
    """Whether a table leaves each column that needs it a readable width."""
    label = max(len(view.label), *(len(str(number)) for number, _ in view.rows))
    needed = label + sum(COLUMN_GAP + min(_width(view, name), READABLE_WIDTH) for name in names)
    return needed <= console.width


def _width(view: View, name: str) -> int:
    """Columns that the widest line of a column takes."""
    from rich.cells import cell_len

    texts = [name, *(str(cells.get(name, "")) for _, cells in view.rows)]
    return max(cell_len(line) for text in texts for line in printable(text).expandtabs().split("\n"))


def _table(view: View, names: list[str], rows: list[tuple[int, dict[str, Any]]], lines: int) -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    is_long = any("\n" in str(cell) or len(str(cell)) > READABLE_WIDTH for _, cells in rows for cell in cells.values())
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, leading=int(is_long))
    table.add_column(view.label, justify="right", no_wrap=True, style="bold cyan")
    for name in names:
        table.add_column(Text(printable(name)))
    for number, cells in rows:
        table.add_row(str(number), *(CellText(cells.get(name, Remark("")), lines) for name in names))
    return table


def _record(cells: dict[str, Any], lines: int) -> "Table":
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column()
    for name, cell in cells.items():
        grid.add_row(Text(printable(name)), CellText(cell, lines))
    return grid


class Remark(str):
    """What stands in the place of a cell."""

    __slots__ = ()


class CellText:
    """A cell on a terminal: its text literally, what is not printable escaped, and the middle of a long text left out.

    Args:
        content: The cell, or a remark in its place.
        lines: How many lines are shown, 0 for all.
    """

    def __init__(self, content: Any, lines: int) -> None:
        self._text = _rich_text(content)
        self._lines = lines

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        wrapped = list(self._text.wrap(console, options.max_width, overflow="fold"))
        # With a line to say so, there has to be more than one line to leave out.
        if not self._lines or len(wrapped) <= self._lines + 1:
            yield from wrapped
            return
        beginning, end = (self._lines + 1) // 2, self._lines // 2
        yield from wrapped[:beginning]
        yield _left_out(len(wrapped) - self._lines)
        yield from wrapped[len(wrapped) - end :]

    def __rich_measure__(self, console: "Console", options: "ConsoleOptions") -> "Measurement":
        from rich.measure import Measurement

        measured = Measurement.get(console, options, self._text)
        left_out = self._text.plain.count("\n") - self._lines
        if not self._lines or left_out <= 0:
            return measured
        return Measurement(measured.minimum, max(measured.maximum, _left_out(left_out + 1).cell_len))


def _left_out(lines: int) -> "Text":
    from rich.text import Text

    return Text(f"⋮ {count(lines, 'more line')}", style="dim italic", no_wrap=True, overflow="ellipsis")


def _rich_text(content: Any) -> "Text":
    from rich.text import Text

    if isinstance(content, Remark):
        return Text(content, style="dim italic")
    text = Text()
    for index, part in enumerate(_UNPRINTABLE.split(str(content))):
        text.append(_escape(part) if index % 2 else part, style="dim" if index % 2 else None)
    text.expand_tabs(8)  # before it is measured
    return text or Text("empty", style="dim italic")
