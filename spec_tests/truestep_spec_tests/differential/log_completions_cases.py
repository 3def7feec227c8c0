"""The runs that the differential tests of completions have in common."""

import random
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from truestep_spec_tests.differential.observing import state_after_training
from truestep_spec_tests.implementation import Implementation
from truestep_spec_tests.options import takes
from truestep_spec_tests.runs import Setup, Walk

CALLBACK = "LogCompletionsCallback"

SAMPLING = {"max_new_tokens": 4, "do_sample": True, "temperature": 1.5}
"""A generation config of which completions are drawn."""


def completing(
    implementation: str,
    topology: str = "single",
    ranks: int = 1,
    *,
    freq: int = 2,
    dtype: str = "float64",
    **changes: Any,
) -> Setup:
    """A run in which prompts are completed.

    Args:
        implementation: See `Implementation`.
        topology: Of the model.
        ranks: Number of ranks.
        freq: Interval in steps.
        dtype: In float64 completions do not depend on rounding.
        changes: Other attributes of `Setup`; `hyperparameters` come on top of the interval.
    """
    hyperparameters = {"freq": freq} | changes.pop("hyperparameters", {})
    setup = Setup(implementation, topology, ranks, dtype, callback=CALLBACK, hyperparameters=hyperparameters)
    return setup.on(**({"steps": 4} | changes))


def variants(implementation: Implementation, setup: Setup) -> list[Setup]:
    """A run in each of the ways in which a sharded model can complete prompts, if the implementation offers them."""
    is_sharded = setup.topology in ("zero3", "zero3_persistent", "fsdp2")
    if not is_sharded or not takes(implementation.LogCompletionsCallback, "gather"):
        return [setup]
    return [setup.on(hyperparameters=setup.hyperparameters | {"gather": gather}) for gather in (True, False)]


def small_batches(implementation: Implementation) -> dict[str, int]:
    """Hyperparameters with which few prompts are several batches, if the implementation has such."""
    return {"batch_tokens": 40} if takes(implementation.LogCompletionsCallback, "batch_tokens") else {}


def train_completing(setups: Sequence[Setup], directory: Path) -> dict[str, Any]:
    """What a training leaves on this rank that has a callback of each of the setups, which differ in nothing else."""
    return state_after_training(
        setups[0],
        directory,
        attach=lambda trainer: [setup.subject(trainer, setup.build_generation_config()) for setup in setups],
    )


def prompts_read(setup: Setup, directory: Path) -> int:
    """How many prompts this rank's model reads at one logging: rows of forwards that find no cache yet."""
    read: list[int] = []

    def count(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        if cache is None or cache.get_seq_length() == 0:
            read.append(len(kwargs["input_ids"]))

    config = setup.build_generation_config()
    walk = Walk(setup, directory, attach=lambda trainer: [setup.subject(trainer, config)])
    walk.begin()
    walk.placed.model.register_forward_pre_hook(count, with_kwargs=True)
    walk.go_to(2)
    return sum(read)


def modes(setup: Setup, directory: Path) -> list[bool]:
    """Whether modules are in train mode, each time that one is called, while a model in train mode generates."""
    found: list[bool] = []
    config = setup.build_generation_config()
    walk = Walk(setup, directory, attach=lambda trainer: [setup.subject(trainer, config)])
    walk.begin()
    walk.placed.model.train()
    for module in walk.placed.model.modules():
        module.register_forward_pre_hook(lambda module, args: found.append(module.training))
    walk.go_to(2)
    return found


class BrokenModelError(RuntimeError):
    """What a model raises that cannot go on."""


def disturbed(setup: Setup, directory: Path, failing_at: int | None) -> Walk:
    """A training of GPT-2 with all that is to be left as it was; its forwards leave traces, and one may fail."""
    config = setup.build_generation_config()
    walk = Walk(setup, directory, attach=lambda trainer: [setup.subject(trainer, config)])
    model: Any = walk.placed.model
    model.train()
    model.gradient_checkpointing_enable()
    model.config.use_cache = False
    model.transformer.h[0].eval()
    model.transformer.h[0].register_buffer("seen", torch.zeros(1))
    model.transformer.h[0].register_buffer("counted", torch.zeros(1))
    model.transformer.h[0].trace = []
    walk.events.processing_class.padding_side = "right"
    walk.events.processing_class("call", truncation=True, max_length=3, padding="max_length")
    forwards = 0

    def change_and_fail(module: Any, *_: Any) -> None:
        nonlocal forwards
        forwards += 1
        module.seen += 1
        module.counted.data.add_(1)  # which no version counter sees
        module.trace.append(forwards)
        module.forwards = forwards
        if forwards == failing_at:
            raise BrokenModelError

    model.transformer.h[0].register_forward_hook(change_and_fail)
    return walk


def everything(walk: Walk) -> dict[str, Any]:
    """What is to be left as it was."""
    model: Any = walk.placed.model
    tokenizer = walk.events.processing_class
    state: dict[str, Any] = {
        "config": model.config.to_dict(),
        "generation config": model.generation_config.to_dict(),
        "padding side": tokenizer.padding_side,
        "padding": tokenizer.backend_tokenizer.padding,
        "truncation": tokenizer.backend_tokenizer.truncation,
        "random numbers": [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()],
        "buffers": [buffer.tolist() for buffer in model.buffers()],
        "modes": [module.training for module in model.modules()],
        "gradient": torch.is_grad_enabled(),
    }
    plain = bool | int | float | str
    for name, module in model.named_modules():
        state[f"attributes of {name}"] = {
            # Of dicts the keys: of their values most are compared elsewhere.
            key: [item for item in value if isinstance(item, plain)] if isinstance(value, dict | list) else value
            for key, value in vars(module).items()
            if isinstance(value, plain | dict | list)
        }
    return deepcopy(state)
