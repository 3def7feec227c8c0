"""A live display at the bottom of a terminal."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from rich.console import Console
from rich.segment import Segment, Segments
from rich.text import Text

from truestep.progress.drawing import Draw, Row
from truestep.progress.keeper import Keeper
from truestep.progress.live import Live
from truestep.progress.streams import REST_OF_SCREEN, Redirected, Redirection

# Sequences for terminals. A terminal that does not know how to hold back what is being drawn ignores that it is to.
_HOLD, _SHOW = "\x1b[?2026h\x1b[?25l", "\x1b[?25h\x1b[?2026l"
_REST_OF_LINE = "\x1b[K"

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1a\x1c-\x1f\x7f]")
"""What would act on the terminal, but for sequences of colours and attributes."""

_BUFFER = 2**20
"""Bytes of what a terminal has not taken yet."""


class Terminal(Live):
    """The last rows of a terminal.

    Between writes the cursor is in the first of these rows, which is empty or has the beginning of a line that the
    program has written. So whatever else is written to the terminal, by whichever process, is above the display when
    that is drawn again, from the cursor on: nothing but the display is ever erased, also when the terminal's size has
    changed. No mode is set and the cursor is visible, so a process that is killed leaves nothing to restore but
    the cursor's row, which a `Keeper` sees to.
    """

    def __init__(self) -> None:
        super().__init__()
        self._terminal: int = sys.stdout.fileno()
        self._output = open(self._terminal, "wb", buffering=_BUFFER, closefd=False)  # noqa: SIM115
        self._console = Console(file=sys.stdout, force_terminal=True, width=1000, highlight=False, soft_wrap=True)
        self._has_unicode = not self._console.options.ascii_only
        self._rows: list[str] = []
        self._drawn: object = None
        self._is_aside = False
        self._last: Redirected | None = None  # the stream that was written to last
        self._redirection = Redirection(self._write_above, self._aside)
        self._keeper = Keeper(self._terminal)

    def _begin(self) -> None:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        # Where a line has been begun this ends in the next row, and otherwise where it was.
        self._guarded(lambda: self._emit(" " * (self._size()[0] - 1) + "\r"))
        self._keeper.begin()
        self._redirection.begin()

    def _refresh(self) -> None:
        if self._is_aside:
            return
        columns, lines = self._size()
        drawn = (columns, lines, self._pending, [source.key() for source in self._sources])
        if drawn == self._drawn:
            return
        rows: list[Row] = []
        for source in self._sources:
            # Of the terminal's rows, one has what the program has begun to write, and one what it has written.
            rows += source.draw(columns - 1, max(1, lines - 2 - len(rows)), self._has_unicode)
        self._rows = self._coded(rows)
        self._drawn = drawn
        self._emit(_HOLD + self._display() + _SHOW)

    def _leave(self, draw_summary: Draw) -> None:
        columns, lines = self._size()
        begun = "" if self._sources else self._ended_lines()
        summary = self._coded(draw_summary(columns - 1, max(1, lines - 1), self._has_unicode))
        self._rows, self._drawn = [], None
        self._emit(_HOLD + "\r" + REST_OF_SCREEN + begun + "".join(f"{row}\r\n" for row in summary) + _SHOW)
        if self._sources:
            self._refresh()

    def _finish(self) -> None:
        self._redirection.end()
        self._keeper.end()
        if self._fault is not None:  # which may have come in the middle of a frame
            with suppress(OSError):
                self._emit(_SHOW)

    def _write_above(self, stream: Redirected, text: str) -> None:
        self.end_what_is_over()
        with self._lock:
            if not self._sources or self._is_aside:
                stream.original.write(text)
                return
            lines = stream.take(text)
            self._last = stream
            if lines:
                self._guarded(lambda: self._emit(_HOLD + "\r" + REST_OF_SCREEN))
                try:
                    # Not past the stream: a tracker may have put something in the place of its `write`.
                    stream.original.write("".join(f"{line}\n" for line in lines))
                    stream.original.flush()
                finally:
                    self._guarded(lambda: self._emit(self._display() + _SHOW))

    @contextmanager
    def _aside(self) -> Iterator[None]:
        with self._lock:
            if self._sources:
                self._guarded(lambda: self._emit("\r" + REST_OF_SCREEN + self._pending))
            for stream in self._redirection.streams.values():
                stream.pending = ""
            self._keeper.tell(0)
            self._is_aside = True
        try:
            yield
        finally:
            with self._lock:
                self._is_aside, self._drawn = False, None

    # Parts

    def _display(self) -> str:
        """All rows, drawn from the cursor's on, and the cursor back in the first."""
        rows = [self._begun_line(), *self._rows]
        down = len(rows) - 1
        self._keeper.tell(down)
        text = f"{_REST_OF_LINE}\r\n".join(rows) + REST_OF_SCREEN
        return f"\r{text}\r" + (f"\x1b[{down}A" if down else "")

    def _begun_line(self) -> str:
        """What the program has begun to write, as far as it fits in a row."""
        if not self._pending:
            return ""
        text = Text.from_ansi(_CONTROLS.sub("", self._pending).expandtabs(), no_wrap=True, end="")
        text.truncate(self._size()[0] - 1, overflow="ellipsis" if self._has_unicode else "crop")
        return self._coded([list(text.render(self._console))])[0]

    @property
    def _pending(self) -> str:
        """The beginning of a line that was written last, if it has not ended."""
        return "" if self._last is None else self._last.pending.rstrip("\r")

    def _ended_lines(self) -> str:
        """What was begun and not ended, as lines."""
        begun = [stream.pending.rstrip("\r") for stream in self._redirection.streams.values()]
        return "".join(f"{line}\r\n" for line in begun if line)

    def _coded(self, rows: list[Row]) -> list[str]:
        """Rows as a terminal gets them."""
        with self._console.capture() as capture:
            self._console.print(Segments([part for row in rows for part in (*row, Segment.line())]), end="")
        return capture.get().split("\n")[: len(rows)]

    def _size(self) -> tuple[int, int]:
        columns, lines = os.get_terminal_size(self._terminal)
        return columns or 80, lines or 24

    def _emit(self, text: str) -> None:
        # What Ctrl-C, or a terminal that takes no more, has left in the buffer is written with what comes next. A
        # signal handler that prints in the middle of this call is refused by the buffer.
        with suppress(BlockingIOError, RuntimeError):
            self._output.write(text.encode(self._console.encoding, errors="replace"))
            self._output.flush()
