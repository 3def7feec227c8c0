"""BEMA's contestants on one model: a plain copy of the parameters, truestep's callback and TRL's."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import trl
import truestep
from accelerate.utils import extract_model_from_parallel
from measuring import (
    COPY,
    Copy,
    allocated_peak,
    interleave,
    page_faults,
    resident_bytes,
    resident_peak,
    tensor_bytes,
)
from models import build, parameter_bytes
from torch import nn
from transformers import TrainerControl, TrainerState
from truestep_fixtures.topologies import place, training_arguments


def new_callbacks(update_freq: int = 1) -> dict[str, Any]:
    """Both callbacks, fresh, with the defaults of the documentation but for the frequency of updates."""
    return {
        "truestep": truestep.BEMACallback(update_freq=update_freq),
        "TRL": trl.BEMACallback(update_freq=update_freq),
    }


class Contest:
    """A model that lies in a topology, with every contestant ready to follow its next step.

    Args:
        family: A key of `MODELS`.
        size: A key of `MODELS[family]`.
        dtype: What the parameters are.
        topology: "single" or "ddp".

    Attributes:
        model: The unwrapped model.
        actions: By name, what each contestant does at an update instant.
    """

    def __init__(self, family: str, size: float, dtype: torch.dtype, topology: str) -> None:
        model = build(family, size)
        extract_model_from_parallel(model)  # imports every engine that is installed, which is not a callback's memory
        # The engine is let go of: its gradient buckets, as large as the model, take no part in this.
        self.model: nn.Module = place(model, topology, dtype).model
        with tempfile.TemporaryDirectory() as unused:
            self._args = training_arguments(topology, unused)
        self._state, self._control = TrainerState(), TrainerControl()
        self.actions: dict[str, Callable[[], object]] = {COPY: Copy(self.model.parameters())}
        self._callbacks = new_callbacks()
        self._resident: dict[str, int] = {}
        for name in self._callbacks:
            before = resident_bytes()
            self._begin(name)
            self._resident[name] = resident_bytes() - before
        self.take_step()
        for name in self._callbacks:
            before = resident_bytes()
            self.actions[name]()
            self._resident[name] += resident_bytes() - before

    @torch.no_grad()
    def take_step(self) -> None:
        """Stand in for an optimizer step: every parameter changes a little."""
        self._state.global_step += 1
        for parameter in self.model.parameters():
            parameter.mul_(0.999)

    def largest_difference(self) -> float:
        """The largest distance between the two shadows, over the largest weight."""
        ours, theirs = self._callbacks["truestep"].shadow_state_dict(), self._callbacks["TRL"].running_model
        pairs = [(ours[name].float(), value.detach().float()) for name, value in theirs.named_parameters()]
        largest: float = max(value.abs().max().item() for _, value in pairs)
        return max((mine - value).abs().max().item() for mine, value in pairs) / largest

    def take_apart(self) -> dict[str, dict[str, int]]:
        """Measure what the callbacks need in memory, and let go of them.

        It comes after all timing: a profiler leaves free memory on the heap, which an update can then reuse without
        page faults.

        Returns:
            By callback, bytes on this rank: its tensors (`buffers`), what it added to the resident memory (`resident`),
            and what one update needs on top, as tensors (`peak allocated`) and as resident memory (`peak resident`);
            and how many `page faults` an update takes.
        """
        memory = {
            name: {
                "page faults": page_faults(self.actions[name]),
                "resident": self._resident[name],
                "peak resident": resident_peak(self.actions[name]),
                "peak allocated": allocated_peak(self.actions[name]),
            }
            for name in self._callbacks
        }
        for name in memory:
            before = tensor_bytes()
            del self._callbacks[name], self.actions[name]
            gc.collect()
            memory[name]["buffers"] = before - tensor_bytes()
        return memory

    def _begin(self, name: str) -> None:
        callback, event = self._callbacks[name], (self._args, self._state, self._control)
        callback.on_train_begin(*event, model=self.model)
        self.actions[name] = lambda: callback.on_step_end(*event, model=self.model)


def compare_in_one_process(
    family: str, size: float, dtype: torch.dtype, threads: int, rounds: int, patience: float
) -> dict[str, Any]:
    """Measure the contestants in this process.

    Returns:
        A row of the report: what was measured, `seconds` by contestant, `memory` by callback.
    """
    torch.set_num_threads(threads)
    contest = Contest(family, size, dtype, "single")
    seconds = interleave(contest.actions, rounds, between_rounds=contest.take_step, patience=patience)
    difference = contest.largest_difference()
    return {
        "model": family,
        "parameters": sum(parameter.numel() for parameter in contest.model.parameters()),
        "bytes": parameter_bytes(contest.model),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": threads,
        "seconds": seconds,
        "largest difference": difference,
        "memory": contest.take_apart(),
    }
