"""Progress as a plain line now and then, for a pipe or a log file."""

import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from truestep.progress.drawing import Draw
from truestep.progress.session import Session, position
from truestep.progress.view import Progress, View


class Lines:
    """Prints lines of a training, or of an evaluation outside of one.

    Args:
        progress: What they are about.
        percent: A line whenever so much of the training's steps is done.
        seconds: A line whenever so much time has passed since the last one.
    """

    def __init__(self, progress: Progress, percent: float, seconds: float) -> None:
        self._progress = progress
        self._percent = percent
        self._seconds = seconds
        self._printed = time.monotonic()
        self._parts = self._parts_done()
        self._news = Progress()  # what no line has said yet

    def add(self, session: Session) -> None:
        """It begins."""
        self._session = session
        if self._progress.is_training:
            self._print("training begins at", position(self._progress.view))

    def remove(self, session: Session, draw_summary: Draw) -> None:
        """It has ended."""
        self._print("", session.outcome(), self._progress.view)

    def log(self, metrics: Mapping[Any, Any] | None) -> None:
        """Metrics have new values."""
        self._news.log(metrics)
        self.step()

    def step(self) -> None:
        """A step of the training is done, and has been logged if it is to be."""
        parts = self._parts_done()
        if parts > self._parts or time.monotonic() - self._printed >= self._seconds:
            self._parts = parts
            if self._progress.is_training:
                times = [*self._session.times(), *self._session.time_left()]
                self._print("training at", [*position(self._progress.view), *times], self._news.view)
                self._news.clear()

    def evaluation(self) -> None:
        """An evaluation that is part of the training has ended."""
        self._print(f"{self._session.name_of_evaluation} at", position(self._progress.view), self._news.view)
        self._news.clear()

    def _parts_done(self) -> int:
        step, steps, *_ = self._progress.position
        return int(100 * step / (steps * self._percent)) if steps > 0 else 0

    def _print(self, beginning: str, parts: Sequence[str], table: View | None = None) -> None:
        self._printed = time.monotonic()
        line = f"{beginning} {', '.join(parts)}".lstrip() + ("" if table is None else _metrics(table))
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        # A pipe that is closed, or a disk that is full, is no reason to end a training.
        with suppress(OSError, ValueError):
            print(line.encode(encoding, errors="backslashreplace").decode(encoding), flush=True)


def _metrics(table: View) -> str:
    metrics = [
        f"{metric.name if group.name is None else f'{group.name}/{metric.name}'} {metric.value}"
        for group in table.groups
        for metric in group.metrics
    ]
    return f": {', '.join(metrics)}" if metrics else ""
