"""Standard output, standard error and the question for input while a live display is on."""

import builtins
import logging
import os
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

REST_OF_SCREEN = "\x1b[J"
"""Erases what is on a terminal from the cursor on."""

Write = Callable[["Redirected", str], None]
"""Writes text for one of the streams."""


class Redirected:
    """A stream on a terminal, of which something else takes what is written, in this process.

    Args:
        original: The stream.
        write: What takes the text.

    Attributes:
        original: The stream.
        pending: The beginning of a line that has not ended yet.
    """

    def __init__(self, original: Any, write: Write) -> None:
        self.original = original
        self.pending = ""
        self._write: Write | None = write
        self._process = os.getpid()

    def write(self, text: str) -> int:
        """Write text, above the display while that is on."""
        write = self._write
        if write is None or not isinstance(text, str):
            self.original.write(text)
        elif os.getpid() != self._process:
            # On the terminal the cursor is where the display begins, and who draws that will do so again.
            self.original.write(REST_OF_SCREEN + text if is_terminal(self.original) else text)
        else:
            write(self, text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Nothing is kept but the beginning of a line."""
        self.original.flush()

    def let_through(self) -> None:
        """Be the stream itself from now on: others may hold on to this object."""
        self._write = None

    def take(self, text: str) -> list[str]:
        """The lines that are complete with this text, as they look when carriage returns have done their work."""
        *lines, pending = (self.pending + text).split("\n")
        self.pending = _overwritten(pending) + ("\r" if pending.endswith("\r") else "")
        return [_overwritten(line) for line in lines]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.original, name)


class Redirection:
    """Puts other streams in the place of those of standard output and standard error that are on a terminal.

    Handlers of `logging` that hold one of them get the other one too.

    Args:
        write: What takes what is written.
        aside: Within it there is no display; `input`, with which `breakpoint` asks too, writes past the streams.
    """

    def __init__(self, write: Write, aside: Callable[[], AbstractContextManager[None]]) -> None:
        self.streams: dict[str, Redirected] = {}
        self._write = write
        self._aside = aside
        self._ask = builtins.input
        self._process = os.getpid()

    def begin(self) -> None:
        """Take the places."""
        for name in ("stdout", "stderr"):
            original = getattr(sys, name)
            if is_terminal(original):
                stream = self.streams[name] = Redirected(original, self._write)
                setattr(sys, name, stream)
                _hand_over(original, stream)
        self._ask, builtins.input = builtins.input, self._ask_aside

    def end(self) -> None:
        """Give everything its place back."""
        for name, stream in self.streams.items():
            stream.let_through()
            if getattr(sys, name) is stream:
                setattr(sys, name, stream.original)
            _hand_over(stream, stream.original)
        if builtins.input == self._ask_aside:
            builtins.input = self._ask

    def _ask_aside(self, prompt: object = "", /) -> str:
        with self._aside() if os.getpid() == self._process else nullcontext():
            return self._ask(prompt)


def is_terminal(stream: Any) -> bool:
    """Whether a stream ends at a terminal."""
    try:
        return bool(stream.isatty() and os.isatty(stream.fileno()))
    except (AttributeError, OSError, ValueError):  # there is none, or it is closed
        return False


def _hand_over(stream: Any, other: Any) -> None:
    """Give handlers of `logging` that hold a stream another one."""
    loggers = [logging.root, *logging.Logger.manager.loggerDict.values()]
    for handler in {handler for logger in loggers for handler in getattr(logger, "handlers", ())}:
        if vars(handler).get("stream") is stream:
            # Not by `setStream`: it waits for who logs just now, who may wait for the display.
            handler.stream = other


def _overwritten(line: str) -> str:
    return line.rstrip("\r").rpartition("\r")[2]
