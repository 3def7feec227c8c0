"""How long BEMA's contestants hold up the steps of a real training."""

from __future__ import annotations

import tempfile
import time
from functools import partial
from typing import Any

import torch
from bema_contest import new_callbacks
from measuring import COPY, Copy, stopwatch
from models import MODELS, build, parameter_bytes
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from truestep_fixtures.data import language_dataset
from truestep_fixtures.topologies import training_arguments

_UPDATE_FREQ = 2  # so that every other step shows what a step without an update costs
_WARM_UP_STEPS = 2
_TOKENS = 64


class _Contestants(TrainerCallback):
    """Lets all contestants follow one training, and takes the times of its steps and of theirs.

    Attributes:
        step: Seconds of each step's forward, backward and optimizer.
        update: By contestant, seconds that it adds to a step with an update.
        between: By contestant, seconds that it adds to a step without one.
    """

    def __init__(self) -> None:
        self.step: list[float] = []
        self.update: dict[str, list[float]] = {}
        self.between: dict[str, list[float]] = {}
        self._callbacks = new_callbacks(_UPDATE_FREQ)
        self._begin = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._copy = Copy(kwargs["model"].parameters())
        for callback in self._callbacks.values():
            callback.on_train_begin(args, state, control, **kwargs)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._begin = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step > _WARM_UP_STEPS:
            self.step.append(time.perf_counter() - self._begin)
        seconds = {
            name: stopwatch(partial(callback.on_step_end, args, state, control, **kwargs))
            for name, callback in self._callbacks.items()
        }
        updates = state.global_step % _UPDATE_FREQ == 0
        if updates:
            seconds[COPY] = stopwatch(self._copy)
        if state.global_step > _WARM_UP_STEPS:
            for name, elapsed in seconds.items():
                (self.update if updates else self.between).setdefault(name, []).append(elapsed)


def compare_in_training(family: str, size: float, dtype: torch.dtype, threads: int, updates: int) -> dict[str, Any]:
    """Train in this process, on short sequences, with all contestants following.

    Returns:
        A row of the report: what was measured, and the times that `_Contestants` took.
    """
    torch.set_num_threads(threads)
    model = build(family, size).to(dtype)
    contestants = _Contestants()
    steps = _WARM_UP_STEPS + updates * _UPDATE_FREQ
    with tempfile.TemporaryDirectory() as directory:
        args = training_arguments("single", directory, dtype, max_steps=steps, per_device_train_batch_size=1)
        dataset = language_dataset(steps, length=_TOKENS, vocab=MODELS[family][size].vocab_size)
        trainer = Trainer(model=model, args=args, train_dataset=dataset, callbacks=[contestants])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return {
        "model": family,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "bytes": parameter_bytes(model),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": threads,
        "tokens": _TOKENS,
        "step": contestants.step,
        "update": contestants.update,
        "between": contestants.between,
    }
