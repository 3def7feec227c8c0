"""A training does not notice that it is observed: weights, optimizer and random numbers end bitwise as without."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainerCallback
from truestep_fixtures.ranks import RankPool

from truestep_spec_tests.differential.cases import placements, require
from truestep_spec_tests.differential.observing import assert_same_states, state_after_training
from truestep_spec_tests.implementation import Implementation
from truestep_spec_tests.runs import Setup

Ranks = Callable[[int], RankPool]
States = list[dict[str, Any]]


# ── What the ranks do ─────────────────────────────────────────────────────────


class Reader(TrainerCallback):
    """At each step, reads the shadow and evaluates a batch with it."""

    def __init__(self, callback: Any) -> None:
        self._callback = callback

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        self._callback.shadow_state_dict(dtype=torch.float64)
        with self._callback.shadow_weights(model), torch.no_grad():
            model.eval()
            model(input_ids=torch.arange(24).view(2, 12))
            model.train()


def train_observed(setup: Setup, directory: Path, *, read: bool = False) -> dict[str, Any]:
    subject = setup.subject()
    return state_after_training(setup, directory, [subject, Reader(subject)] if read else [subject])


# ── Tests ─────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def alone(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Setup], States]:
    """What a training without a callback leaves on each rank, trained once for each setup."""
    known: dict[str, States] = {}

    def states(setup: Setup) -> States:
        key = str(setup.on(hyperparameters={}))
        if key not in known:
            known[key] = ranks(setup.ranks).run(state_after_training, setup, tmp_path_factory.mktemp("alone"))
        return known[key]

    return states


TRAININGS = [
    ("single", 1, "gpt2", "float32"),
    ("ddp", 2, "batchnorm", "float32"),
    ("zero1", 2, "gpt2", "float32"),
    ("zero2", 2, "gpt2", "bfloat16"),
    ("zero3", 2, "gpt2", "bfloat16"),
    ("zero3_persistent", 2, "gpt2", "float32"),
    ("fsdp2", 2, "lora", "float32"),
]


@pytest.mark.clause("BEMA-13")
@pytest.mark.parametrize(("topology", "count", "model", "dtype"), TRAININGS)
def test_a_training_with_the_callback_ends_bitwise_like_one_without(
    implementation: Implementation,
    ranks: Ranks,
    alone: Callable[[Setup], States],
    tmp_path: Path,
    topology: str,
    count: int,
    model: str,
    dtype: str,
) -> None:
    arguments = {"update_freq": 1, "update_after": 1}
    setup = Setup(implementation.name, topology, count, dtype, model, steps=5, hyperparameters=arguments)
    without = alone(setup)
    observed = ranks(count).run(train_observed, setup, tmp_path)
    assert all(state["optimizer"] for state in without)
    assert_same_states(without, observed)


@pytest.mark.clause("BEMA-13", "BEMA-16", "BEMA-17")
@pytest.mark.parametrize(("topology", "count"), placements(2))
def test_reading_the_shadow_and_evaluating_with_it_at_each_step_changes_nothing(
    implementation: Implementation,
    ranks: Ranks,
    alone: Callable[[Setup], States],
    tmp_path: Path,
    topology: str,
    count: int,
) -> None:
    require(implementation, "shadow_state_dict", "shadow_weights")
    setup = Setup(implementation.name, topology, count, model="gpt2", steps=5, hyperparameters={"update_freq": 1})
    read = ranks(count).run(train_observed, setup, tmp_path, read=True)
    assert_same_states(alone(setup), read)
