"""BEMA's contestants on one model: a plain copy of the parameters, truestep's callback and TRL's."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import torch
import trl
import truestep
from accelerate.utils import extract_model_from_parallel
from measuring import allocated_peak, interleave, page_faults, resident_bytes, resident_peak, tensor_bytes
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    TrainerControl,
    TrainerState,
)
from truestep_fixtures.topologies import place, training_arguments

COPY = "copy_"
"""The floor: the model's parameters copied to other memory of the same size and dtype."""


def qwen2(vocabulary: int, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int) -> Qwen2Config:
    """A configuration of the Qwen2 family: tied embeddings, grouped queries."""
    return Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=True,
    )


def llama(vocabulary: int, hidden: int, intermediate: int, layers: int, heads: int) -> LlamaConfig:
    """A configuration of the Llama family: embeddings and head apart."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        tie_word_embeddings=False,
    )


# The largest of each family has the real vocabulary: most of a small model is its embeddings.
MODELS: Mapping[str, Mapping[float, PreTrainedConfig]] = {
    "qwen2": {
        1e6: qwen2(4_096, 128, 352, 3, 2, 1),
        1e7: qwen2(32_000, 192, 512, 10, 3, 1),
        1e8: qwen2(151_936, 512, 1_408, 8, 8, 2),
    },
    "llama": {
        1e6: llama(2_000, 128, 352, 2, 2),
        1e7: llama(8_000, 256, 704, 7, 4),
        1e8: llama(32_000, 640, 1_728, 12, 10),
    },
}
"""Configurations by family and approximate number of parameters."""


def build(family: str, size: float) -> PreTrainedModel:
    """A model with random weights, the same on every rank; `family` and `size` are keys of `MODELS`."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(MODELS[family][size])
    return model


def new_callbacks(update_freq: int = 1) -> dict[str, Any]:
    """Both callbacks, fresh, with the defaults of the documentation but for the frequency of updates."""
    return {
        "truestep": truestep.BEMACallback(update_freq=update_freq),
        "TRL": trl.BEMACallback(update_freq=update_freq),
    }


class ParameterCopy:
    """Copies the parameters of a model to memory that it holds for them."""

    def __init__(self, model: nn.Module) -> None:
        self._pairs = [(torch.empty_like(source), source.detach()) for source in model.parameters()]

    def __call__(self) -> None:
        """Copy all of them."""
        for destination, source in self._pairs:
            destination.copy_(source)


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
        self.actions: dict[str, Callable[[], object]] = {COPY: ParameterCopy(self.model)}
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


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters, tied ones once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


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
