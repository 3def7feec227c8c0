"""A live display, which is drawn again whenever something has changed."""

import atexit
import contextvars
import logging
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol

from truestep.progress.drawing import Draw, Row

INTERVAL = 0.2
"""Seconds between two looks at whether something has changed."""

CHANGES = threading.RLock()
"""Held while a display begins or ends: another thread may want one too."""

logger = logging.getLogger(__name__)


class Source(Protocol):
    """What is drawn."""

    @property
    def is_over(self) -> bool:
        """Whether it has ended without saying so."""

    def key(self) -> object:
        """What changes whenever the rows do."""

    def draw(self, width: int, height: int, has_unicode: bool) -> list[Row]:
        """The rows."""

    def end(self) -> None:
        """Have itself removed."""


class Live(ABC):
    """Draws sources one below the other, in a thread that it has as long as there are any."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._sources: list[Source] = []
        self._process = os.getpid()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._fault: Exception | None = None

    @property
    def is_on(self) -> bool:
        """Whether something is drawn, by this process."""
        return bool(self._sources) and self._process == os.getpid()

    def add(self, source: Source) -> None:
        """Draw a source from now on."""
        with CHANGES, self._lock:
            self._sources.append(source)
            if self._thread is None:
                try:
                    self._begin()
                    atexit.register(self._end_all)
                    run = contextvars.copy_context().run
                    self._thread = threading.Thread(target=run, args=(self._run,), name="truestep", daemon=True)
                    self._thread.start()
                except BaseException:  # Ctrl-C may come here too
                    self._sources.clear()
                    self._give_back()
                    raise
            self._guarded(self._refresh)

    def remove(self, source: Source, draw_summary: Draw) -> None:
        """Draw a source no longer.

        Args:
            source: The source.
            draw_summary: Draws what stays of it.
        """
        if not self.is_on:
            return
        with CHANGES, self._lock:
            if source not in self._sources:
                return
            self._sources.remove(source)
            try:
                self._guarded(lambda: self._leave(draw_summary))
            finally:  # also when Ctrl-C has come
                if not self._sources:
                    self._give_back()
            if self._sources:
                return
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        # Not sooner: handlers of the log may be waiting for the lock.
        if self._fault is not None and not isinstance(self._fault, OSError):
            logger.warning("the display of the progress has failed: %r", self._fault)

    @abstractmethod
    def _begin(self) -> None:
        """Take the place."""

    @abstractmethod
    def _refresh(self) -> None:
        """Draw what has changed."""

    @abstractmethod
    def _leave(self, draw_summary: Draw) -> None:
        """Draw what stays of a source that is there no longer."""

    @abstractmethod
    def _finish(self) -> None:
        """Give the place back."""

    def _give_back(self) -> None:
        self._stop.set()
        atexit.unregister(self._end_all)
        self._finish()

    def _guarded(self, draw: Callable[[], None]) -> None:
        """Draw, if that has not failed yet: a terminal that is gone, or a mistake, is no reason to end a training."""
        if self._fault is None:
            try:
                draw()
            except Exception as error:
                self._fault = error

    def _run(self) -> None:
        while not self._stop.wait(INTERVAL):
            self.end_what_is_over()
            with self._lock:
                if self._sources:
                    self._guarded(self._refresh)

    def end_what_is_over(self) -> None:
        """Have the sources removed that have ended without saying so. The lock must be free: a thread may end."""
        for source in [source for source in self._sources if source.is_over]:
            source.end()

    def _end_all(self) -> None:
        for source in list(self._sources):
            source.end()
