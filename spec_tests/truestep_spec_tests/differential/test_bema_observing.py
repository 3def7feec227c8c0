"""A training does not notice that it is observed: weights, optimizer and random numbers end bitwise as without."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from truestep_fixtures.ranks import RankPool
from truestep_fixtures.topologies import read_parameters
from truestep_fixtures.training import train

from truestep_spec_tests.differential.bema_cases import placements, require
from truestep_spec_tests.implementation import Implementation
from truestep_spec_tests.runs import Setup, same_bits

Ranks = Callable[[int], RankPool]


# ── What the ranks do ─────────────────────────────────────────────────────────


class OptimizerProbe(TrainerCallback):
    """Gets hold of the training's optimizer, without its wrappers."""

    def on_train_end(self, args: Any, state: Any, control: Any, *, optimizer: Any, **kwargs: Any) -> None:
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        self.optimizer: torch.optim.Optimizer = optimizer

    def tensors(self) -> list[Tensor]:
        """This rank's part of what the optimizer steps, under ZeRO its master copies, and of its moments."""
        tensors = [tensor for key, moments in self.optimizer.state.items() for tensor in (key, *moments.values())]
        local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
        return [tensor.detach().clone() for tensor in local]


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


def state_after_training(setup: Setup, directory: Path, *, observed: bool, read: bool = False) -> dict[str, Any]:
    """All that a training leaves on this rank, with the callback under test or without."""
    subject, probe = setup.subject(), OptimizerProbe()
    observers: Sequence[TrainerCallback] = [subject, Reader(subject)] if read else [subject] if observed else []
    result = train(
        setup.topology,
        setup.build_model(),
        output_dir=directory,
        callbacks=[*observers, probe],
        steps=setup.steps,
        dtype=setup.torch_dtype,
        seed=setup.seed,
        save_strategy="steps",
        save_steps=2,
    )
    python, numpy, pytorch = random.getstate(), np.random.get_state(), torch.get_rng_state()
    return {
        "optimizer": probe.tensors(),
        "weights": list(read_parameters(result.model).values()),
        "buffers": [buffer.clone() for buffer in result.model.buffers()],
        "random": [torch.tensor(python[1]), torch.tensor(numpy[1].tolist()), torch.tensor(numpy[2]), pytorch],
    }


# ── Tests ─────────────────────────────────────────────────────────────────────


def assert_same_states(expected: list[dict[str, Any]], actual: list[dict[str, Any]]) -> None:
    for rank, (expected_state, actual_state) in enumerate(zip(expected, actual, strict=True)):
        for what, tensors in expected_state.items():
            pairs = zip(tensors, actual_state[what], strict=True)
            assert all(same_bits(one, other) for one, other in pairs), f"{what} of rank {rank}"


TRAININGS = [
    *((topology, count, "gpt2", "float32") for topology, count in placements(2)),
    ("zero2", 2, "gpt2", "bfloat16"),
    ("zero3", 2, "gpt2", "bfloat16"),
    ("ddp", 2, "batchnorm", "float32"),
    ("fsdp2", 2, "lora", "float32"),
]


@pytest.mark.clause("BEMA-13")
@pytest.mark.parametrize(("topology", "count", "model", "dtype"), TRAININGS)
def test_a_training_with_the_callback_ends_bitwise_like_one_without(
    implementation: Implementation,
    ranks: Ranks,
    tmp_path: Path,
    topology: str,
    count: int,
    model: str,
    dtype: str,
) -> None:
    arguments = {"update_freq": 1, "update_after": 1}
    setup = Setup(implementation.name, topology, count, dtype, model, steps=5, hyperparameters=arguments)
    without = ranks(count).run(state_after_training, setup, tmp_path / "without", observed=False)
    observed = ranks(count).run(state_after_training, setup, tmp_path / "with", observed=True)
    assert all(state["optimizer"] for state in without)
    assert_same_states(without, observed)


@pytest.mark.clause("BEMA-13", "BEMA-16", "BEMA-17")
@pytest.mark.parametrize(("topology", "count"), placements(2))
def test_reading_the_shadow_and_evaluating_with_it_at_each_step_changes_nothing(
    implementation: Implementation, ranks: Ranks, tmp_path: Path, topology: str, count: int
) -> None:
    require(implementation, "shadow_state_dict", "shadow_weights")
    setup = Setup(implementation.name, topology, count, model="gpt2", steps=4, hyperparameters={"update_freq": 1})
    without = ranks(count).run(state_after_training, setup, tmp_path / "without", observed=False)
    read = ranks(count).run(state_after_training, setup, tmp_path / "with", observed=True, read=True)
    assert_same_states(without, read)
