"""A training does not notice that a reference model follows it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from truestep_fixtures.ranks import RankPool

from truestep_spec_tests.differential.observing import assert_same_states, state_after_training
from truestep_spec_tests.differential.ref_sync_cases import syncing
from truestep_spec_tests.implementation import Implementation
from truestep_spec_tests.runs import Setup

Ranks = Callable[[int], RankPool]


def train_synced(setup: Setup, directory: Path) -> dict[str, Any]:
    placed = setup.place_ref_model()
    return state_after_training(setup, directory, [setup.subject(placed.engine, None)])


def train_alone(setup: Setup, directory: Path) -> dict[str, Any]:
    setup.place_ref_model()
    return state_after_training(setup, directory, [])


TRAININGS = [
    ("single", 1, "gpt2", "float32"),
    ("ddp", 2, "batchnorm", "bfloat16"),
    ("zero1", 2, "gpt2", "float32"),
    ("zero2", 2, "lora", "float32"),
    ("zero3", 2, "gpt2", "bfloat16"),
    ("zero3_persistent", 2, "gpt2", "float32"),
    ("fsdp2", 3, "gpt2", "float32"),
]


@pytest.mark.clause("SYNC-5")
@pytest.mark.parametrize(("topology", "count", "model", "dtype"), TRAININGS)
def test_a_training_with_a_reference_model_that_follows_ends_bitwise_like_one_without(
    implementation: Implementation,
    ranks: Ranks,
    tmp_path: Path,
    topology: str,
    count: int,
    model: str,
    dtype: str,
) -> None:
    setup = syncing(implementation.name, topology, count, every=1, model=model, dtype=dtype, steps=5)
    without = ranks(count).run(train_alone, setup, tmp_path / "without")
    synced = ranks(count).run(train_synced, setup, tmp_path / "with")
    assert all(state["optimizer"] for state in without)
    assert_same_states(without, synced)
