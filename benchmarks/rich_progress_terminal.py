"""A pseudo-terminal that costs what it shows as little as possible: all of it is read at once, and none is drawn."""

from __future__ import annotations

import os
import sys
import termios
import threading
import time
from contextlib import suppress
from types import TracebackType

COLUMNS, ROWS = 100, 40


class DrainedTerminal:
    """A pseudo-terminal of which a thread reads all that is written; a context manager.

    Attributes:
        name: The file that a process opens to be on it; see `enter_terminal`.
    """

    def __init__(self) -> None:
        self._ours, self._theirs = os.openpty()
        self.name = os.ttyname(self._theirs)
        termios.tcsetwinsize(self._theirs, (ROWS, COLUMNS))
        self._read: list[tuple[float, bytes]] = []
        self._thread = threading.Thread(target=self._drain)
        self._thread.start()

    def written(self, begin: float, end: float) -> bytes:
        """What has been written between two moments of `time.monotonic`, by whichever process."""
        return b"".join(text for moment, text in self._read if begin <= moment <= end)

    def __enter__(self) -> DrainedTerminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._theirs)
        self._thread.join()
        os.close(self._ours)

    def _drain(self) -> None:
        with suppress(OSError):  # nobody has it open any longer
            while text := os.read(self._ours, 65536):
                self._read.append((time.monotonic(), text))


def enter_terminal(name: str) -> None:
    """Have standard output and standard error of this process on a terminal.

    Args:
        name: The terminal's.
    """
    terminal = os.open(name, os.O_RDWR | os.O_NOCTTY)
    for number, name_of_stream in ((1, "stdout"), (2, "stderr")):
        os.dup2(terminal, number)
        setattr(sys, name_of_stream, os.fdopen(number, "w", buffering=1, encoding="utf-8", closefd=False))
    os.close(terminal)
    os.environ["TERM"] = "xterm-256color"
    for variable in ("COLUMNS", "LINES"):  # they would count more than the terminal's size
        os.environ.pop(variable, None)
