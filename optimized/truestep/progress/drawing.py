"""A view of progress as rows of styled text, for a terminal or a notebook."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from math import ceil
from typing import NamedTuple

from rich.cells import cell_len, set_cell_size
from rich.segment import Segment
from rich.style import Style

from truestep.progress.view import Bar, Group, View

Row = list[Segment]
"""A row: pieces of text with their styles."""

Draw = Callable[[int, int, bool], list[Row]]
"""Draws for so many columns and rows, with or without more characters than those of ASCII."""

# Only what every theme of a terminal defines for itself.
BOLD = Style(bold=True)
DIM = Style(dim=True)
DONE = Style(color="green")
TREND = Style(color="cyan")

LABEL = 12
"""Columns of what a bar is called, and of the space before what belongs to it."""

SHORTEST_BAR = 10
LONGEST_BAR = 60
LONGEST_NAME = 32
LONGEST_VALUE = 24
TREND_WIDTH = 16
GAP = 4
"""Columns between columns of the table."""

FEWEST_ROWS = 4
"""Rows of the table before it has another column."""

LEVELS = "▁▂▃▄▅▆▇█"
LARGEST = 1e300
"""Numbers from here on are drawn like those that are not finite."""


class Times(NamedTuple):
    """What time has to do with a view.

    Attributes:
        elapsed: Seconds since the training, or else the evaluation, began.
        rate: Steps in a second, or None as long as that is not known.
        since_log: Seconds since the last log, or None.
    """

    elapsed: float
    rate: float | None = None
    since_log: float | None = None


def rows(
    view: View,
    times: Times,
    evaluation: tuple[str, str],
    memory: str | None,
    width: int,
    height: int,
    has_unicode: bool,
) -> list[Row]:
    """Draw a view.

    Args:
        view: The view.
        times: See there.
        evaluation: What the evaluation bar is called, and what else tells it from others.
        memory: The state of the GPU's memory, if there is one.
        width: Columns that a row may have.
        height: Rows that there may be.
        has_unicode: Whether there are more characters than those of ASCII.

    Returns:
        Rows for the bars, then, after an empty one, the table.
    """
    drawn: list[Row] = []
    if view.training is not None:
        epoch = [] if view.epoch is None else [f"epoch {view.epoch}"]
        drawn.append(_bar("training", view.training, "steps", epoch, width, has_unicode))
    if view.evaluation is not None:
        label, part = evaluation
        drawn.append(_bar(label, view.evaluation, "batches", [part] if part else [], width, has_unicode))
    if drawn and len(drawn) < height:
        remarks = _remarks(view.training, times, memory)
        drawn.insert(1, [Segment(" " * LABEL), Segment(_joined(remarks, width - LABEL, has_unicode), DIM)])
    room = height - len(drawn) - bool(drawn)
    table = _table_rows(view.groups, width, room, has_unicode) if room > 0 else []
    if drawn and table:
        drawn.append([])
    return [_shortened(row, width) for row in (*drawn, *table)][:height]


def summary(view: View, outcome: Sequence[str], width: int, height: int, has_unicode: bool) -> list[Row]:
    """Draw what stays of a view when it is over.

    Args:
        view: The view.
        outcome: How it has ended, in parts of a line.
        width: Columns that a row may have.
        height: Rows that there may be.
        has_unicode: Whether there are more characters than those of ASCII.
    """
    first = [Segment(_joined(outcome, width, has_unicode), BOLD)]
    return [_shortened(row, width) for row in (first, *_table_rows(view.groups, width, height - 1, has_unicode))]


def duration(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, second = divmod(int(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


def speed(rate: float) -> str:
    """A rate, as steps in a second or seconds for a step."""
    return f"{rate:.3g} steps/s" if rate >= 1 else f"{1 / rate:.3g} s/step"


# Bars


def _bar(label: str, bar: Bar, unit: str, more: Sequence[str], width: int, has_unicode: bool) -> Row:
    if bar.total is None:
        counts = [f"{bar.completed} {unit}", *more]
        return [_label(label), Segment(_joined(counts, width - LABEL, has_unicode, gap="  "))]
    counts = [f"{bar.completed}/{bar.total}", f"{100 * bar.completed // bar.total}%" if bar.total else "", *more]
    # What has no room beside the shortest bar is left out, but for the first.
    while len(counts) > 1 and LABEL + SHORTEST_BAR + 2 + len("  ".join(counts)) > width:
        counts.pop()
    text = "  ".join(counts)
    length = max(0, min(LONGEST_BAR, width - LABEL - 2 - len(text)))
    full, half, rest = ("━", "╸", "─") if has_unicode else ("#", "#", "-")
    halves = 2 * length * bar.completed // bar.total if bar.total else 2 * length
    done = full * (halves // 2) + half * (halves % 2)
    return [_label(label), Segment(done, DONE), Segment(rest * (length - len(done)), DIM), Segment(f"  {text}")]


def _shortened(row: Row, width: int) -> Row:
    """A row as far as there is room; only on the narrowest terminals there is not enough."""
    return Segment.adjust_line_length(row, width, pad=False)


def _label(label: str) -> Segment:
    return Segment(set_cell_size(label, LABEL - 1) + " ", BOLD)


def _remarks(training: Bar | None, times: Times, memory: str | None) -> list[str]:
    remarks = [] if times.rate is None else [speed(times.rate)]
    remarks.append(f"{duration(times.elapsed)} elapsed")
    if training is not None and training.total is not None and times.rate:
        remarks.append(f"{duration((training.total - training.completed) / times.rate)} left")
    if times.since_log is not None:
        remarks.append(f"last log {duration(times.since_log)} ago")
    if memory is not None:
        remarks.append(memory)
    return remarks


def _joined(parts: Iterable[str], width: int, has_unicode: bool, gap: str = "") -> str:
    """As many parts as there is room for, the first in any case."""
    gap = gap or (" · " if has_unicode else ", ")
    first, *others = parts
    text = _cropped(first, width, has_unicode)
    for part in others:
        if cell_len(text + gap + part) > width:
            break
        text += gap + part
    return text


def _cropped(text: str, width: int, has_unicode: bool) -> str:
    """Text of no more than so many columns."""
    if cell_len(text) <= width:
        return text
    mark = "…" if has_unicode else "..."
    return (set_cell_size(text, max(0, width - len(mark))) + mark)[: max(0, width)]


def _padded(text: str, width: int, has_unicode: bool) -> str:
    """Text of just so many columns."""
    if text.isascii() and len(text) <= width:
        return text.ljust(width)
    return set_cell_size(_cropped(text, width, has_unicode), width)


# The table


class _Entry(NamedTuple):
    """A heading, which has no value, or a metric."""

    name: str
    value: str | None = None
    trend: str = ""
    group: str | None = None


def _table_rows(groups: Sequence[Group], width: int, height: int, has_unicode: bool) -> list[Row]:
    """Draw the table: in columns side by side, without trends where there is no room for them.

    Args:
        groups: The groups of metrics.
        width: Columns that a row may have.
        height: Rows that there may be.
        has_unicode: Whether there are more characters than those of ASCII, which a trend needs.
    """
    entries = list(_entries(groups, has_unicode))
    if not entries or height <= 0:
        return []
    for has_trends in (True, False) if any(entry.trend for entry in entries) else (False,):
        table = _Table(entries, width, has_trends, has_unicode)
        if table.height <= height and (not has_trends or table.has_room):
            return table.rows(table.height)
    return table.rows(height)


def _entries(groups: Sequence[Group], has_unicode: bool) -> Iterator[_Entry]:
    for group in groups:
        if group.name is not None:
            yield _Entry(group.name)
        indent = "" if group.name is None else "  "
        for metric in group.metrics:
            trend = sparkline(metric.trend) if has_unicode and len(metric.trend) > 1 else ""
            yield _Entry(indent + metric.name, metric.value, trend, group.name)


def sparkline(numbers: Sequence[int | float]) -> str:
    """Numbers as blocks between the lowest and the highest of them; what is not finite is a gap."""
    finite = [number for number in numbers if -LARGEST < number < LARGEST]
    low, high = (min(finite), max(finite)) if finite else (0, 0)
    if low == high:
        blocks = [LEVELS[3]] * len(finite)
    else:
        span, levels = high - low, LEVELS + LEVELS[-1]  # the highest number is a level of its own
        blocks = [levels[int(8 * ((number - low) / span))] for number in finite]
    if len(finite) == len(numbers):
        return "".join(blocks)
    block = iter(blocks)
    return "".join(next(block) if -LARGEST < number < LARGEST else " " for number in numbers)


class _Table:
    """Entries in columns side by side."""

    def __init__(self, entries: list[_Entry], width: int, has_trends: bool, has_unicode: bool) -> None:
        self._entries = entries
        self._has_unicode = has_unicode
        trend = 1 + TREND_WIDTH if has_trends else 0
        value = max(cell_len(entry.value) for entry in entries if entry.value is not None)
        self._value = min(value, LONGEST_VALUE)
        name = min(LONGEST_NAME, max(cell_len(entry.name) for entry in entries))
        self.has_room = name + 2 + self._value + trend <= width
        self._name = max(0, min(name, width - 2 - self._value - trend))
        self._trend = trend
        self._width = self._name + 2 + self._value + trend
        self._columns = max(1, min((width + GAP) // (self._width + GAP), ceil(len(entries) / FEWEST_ROWS)))

    @property
    def height(self) -> int:
        """The least height at which all entries are there."""
        height = ceil(len(self._entries) / self._columns)
        while len(self._split(height)) > self._columns:
            height += 1
        return height

    def rows(self, height: int) -> list[Row]:
        """The rows, at most so many."""
        columns = self._split(height)
        if len(columns) > self._columns:
            del columns[self._columns :], columns[-1][height - 1 :]
            left_out = _metrics(self._entries) - sum(map(_metrics, columns))
            columns[-1].append(_Entry(f"{'…' if self._has_unicode else '...'} {left_out} more"))
        depth = max(map(len, columns))
        return [self._row([column[i] if i < len(column) else None for column in columns]) for i in range(depth)]

    def _split(self, height: int) -> list[list[_Entry]]:
        """The entries in columns of no more than so many rows.

        No column ends in a heading, and one that goes on with a group begins with its heading.
        """
        columns: list[list[_Entry]] = [[]]
        has_room_for_headings = height > 1
        for entry in self._entries:
            is_heading = entry.value is None
            if len(columns[-1]) + (is_heading and has_room_for_headings) >= height:
                columns.append([])
                if entry.group is not None and has_room_for_headings:
                    columns[-1].append(_Entry(entry.group))
            columns[-1].append(entry)
        return columns

    def _row(self, entries: Sequence[_Entry | None]) -> Row:
        row: Row = []
        for index, entry in enumerate(entries):
            if entry is None:
                row.append(Segment(" " * (self._width + GAP)))
                continue
            if entry.value is None:
                row.append(Segment(_padded(entry.name, self._width, self._has_unicode), BOLD))
            else:
                value = _cropped(entry.value, self._value, self._has_unicode)
                gap = " " * (2 + self._value - cell_len(value))
                row.append(Segment(f"{_padded(entry.name, self._name, self._has_unicode)}{gap}{value}"))
                if self._trend:
                    row.append(Segment(f" {entry.trend:{TREND_WIDTH}}", TREND))
            if index < len(entries) - 1:
                row.append(Segment(" " * GAP))
        return row


def _metrics(entries: Iterable[_Entry]) -> int:
    return sum(entry.value is not None for entry in entries)
