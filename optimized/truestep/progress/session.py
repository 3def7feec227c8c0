"""A training, or an evaluation outside of one, while it is displayed."""

import time
from collections import deque
from collections.abc import Callable

import torch

from truestep.progress.drawing import Row, Times, duration, rows, speed, summary
from truestep.progress.view import Progress, View
from truestep.trainer_frames import Call

WINDOW = 30.0
"""Seconds over which the rate is taken, if that many steps are in them."""

FEWEST_SAMPLES = 5


class Session:
    """What is displayed of it, and how it ends.

    Args:
        progress: The events of it.
        device: Where it computes.
        interrupt: Called when it has ended without an event.

    Attributes:
        evaluation: What the evaluation bar is called.
        part: What else tells the evaluation from others.
        is_interrupted: Whether it has ended without an event.
        logged: When there were metrics for the last time, in seconds of the clock.
    """

    def __init__(self, progress: Progress, device: torch.device, interrupt: Callable[[], None]) -> None:
        self.evaluation = "evaluation"
        self.part = ""
        self.logged: float | None = None
        self.is_interrupted = False
        self._interrupt = interrupt
        self._progress = progress
        self._device = device
        self._call = Call()
        self._begun = time.monotonic()
        self._first = progress.position[0]
        self._samples = deque([(self._begun, self._first)])

    @property
    def name_of_evaluation(self) -> str:
        """What its evaluation is called in a line of text."""
        return f"{self.evaluation} of {self.part}" if self.part else self.evaluation

    @property
    def is_over(self) -> bool:
        """Whether the Trainer's method that it was part of has returned or raised."""
        return not self._call.is_running

    def end(self) -> None:
        """Say that it has ended without an event."""
        self.is_interrupted = True
        self._interrupt()

    def key(self) -> object:
        """What changes whenever the rows do."""
        progress = self._progress
        return progress.position, progress.batches, progress.logs, progress.is_training, self._ages(time.monotonic())

    def draw(self, width: int, height: int, has_unicode: bool) -> list[Row]:
        """The bars and the table."""
        now = time.monotonic()
        view = self._progress.view
        elapsed, since_log = self._ages(now)
        times = Times(elapsed, None if view.training is None else self._rate(now), since_log)
        evaluation = (self.evaluation, self.part)
        return rows(view, times, evaluation, memory_in_use(self._device), width, height, has_unicode)

    def draw_summary(self, width: int, height: int, has_unicode: bool) -> list[Row]:
        """What stays."""
        return summary(self._progress.view, self.outcome(), width, height, has_unicode)

    def outcome(self) -> list[str]:
        """How far it has come, and in which time, in parts of a line."""
        view = self._progress.view
        how = "interrupted" if self.is_interrupted else "ended"
        if view.training is None:
            return [f"{self.name_of_evaluation} {how}", f"{duration(self._elapsed)} elapsed"]
        first, *others = position(view)
        return [f"training {how} at {first}", *others, *self.times()]

    def times(self) -> list[str]:
        """The time so far, and the mean rate, in parts of a line."""
        elapsed, steps = self._elapsed, self._steps
        return [f"{duration(elapsed)} elapsed", *([speed(steps / elapsed)] if steps > 0 and elapsed > 0 else [])]

    def time_left(self) -> list[str]:
        """The time that is left at the mean rate, if that is known, as a part of a line."""
        training, steps = self._progress.training, self._steps
        if training is None or training.total is None or steps <= 0:
            return []
        return [f"{duration((training.total - training.completed) * self._elapsed / steps)} left"]

    @property
    def _elapsed(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self._begun

    @property
    def _steps(self) -> int:
        """Steps since it began."""
        return self._progress.position[0] - self._first

    def _ages(self, now: float) -> tuple[int, int | None]:
        """Whole seconds since it began, and since the last log: both change together, and nothing is drawn twice."""
        elapsed = int(now - self._begun)
        return elapsed, None if self.logged is None else elapsed - int(self.logged - self._begun)

    def _rate(self, now: float) -> float | None:
        """Steps in a second, lately."""
        samples, step = self._samples, self._progress.position[0]
        if step != samples[-1][1]:
            samples.append((now, step))
        while len(samples) > FEWEST_SAMPLES and now - samples[1][0] > WINDOW:
            samples.popleft()
        (begun, first), (ended, last) = samples[0], samples[-1]
        return (last - first) / (ended - begun) if last > first and ended > begun else None


def position(view: View) -> list[str]:
    """The step and the epoch of a training, in parts of a line."""
    assert view.training is not None
    completed, total = view.training
    step = f"step {completed}" if total is None else f"step {completed}/{total}"
    return [step] if view.epoch is None else [step, f"epoch {view.epoch}"]


def memory_in_use(device: torch.device) -> str | None:
    """How much of a GPU's memory this process has taken, as text; None if it does not compute on one."""
    if device.type != "cuda" or not torch.cuda.is_initialized():
        return None
    taken = torch.cuda.memory_reserved(device)
    there = torch.cuda.get_device_properties(device).total_memory
    return f"GPU {taken / 2**30:.1f}/{there / 2**30:.1f} GiB"
