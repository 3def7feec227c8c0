"""Copies from a GPU that run beside the training instead of within it."""

import weakref
from collections.abc import Iterator, Set
from contextlib import contextmanager

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook


class SideStream:
    """A CUDA stream for copies of live parameters into pinned host memory.

    Three orders have to hold, and each is kept by an event on the device:

    - the copy starts after the optimizer step that wrote the parameters;
    - the next optimizer step writes them only after the copy has read them;
    - the host reads the copy only after it has arrived (`wait`).

    The second is kept by a hook that torch calls before any optimizer's step, since DeepSpeed steps inside its
    backward, before the Trainer's own events. Whoever else writes parameters has to `wait` first.

    Args:
        device: The GPU that holds the parameters.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._copied = torch.cuda.Event()
        self._training_may_overtake = False
        # The hook is global to the process, so it must not keep this object, and must go with it.
        hold_training = weakref.WeakMethod(self._hold_training)
        hook = register_optimizer_step_pre_hook(lambda *_: (hold := hold_training()) and hold())
        weakref.finalize(self, hook.remove)

    @classmethod
    def between(cls, sources: Set[torch.device], destination: torch.device) -> "SideStream | None":
        """A stream for copies from `sources` to `destination`, or None where copies do not need or cannot use one."""
        if len(sources) == 1 and destination.type == "cpu":
            (source,) = sources
            return cls(source) if source.type == "cuda" else None
        return None

    @contextmanager
    def copying(self) -> Iterator[None]:
        """Copies started within run on the side stream, after the work that the device has been given so far."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield
            self._copied.record()
        self._training_may_overtake = True

    def wait(self) -> None:
        """Block the host until the copies have arrived, and the device's next work until then too."""
        self._hold_training()
        self._copied.synchronize()

    def _hold_training(self) -> None:
        """Whatever the training stream is given from here on starts after the copies."""
        if self._training_may_overtake:
            torch.cuda.current_stream(self._device).wait_event(self._copied)
            self._training_may_overtake = False
