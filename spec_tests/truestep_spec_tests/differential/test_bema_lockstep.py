"""Subject and reference at the same events, compared at every step on every rank, in every topology."""

from collections.abc import Callable
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from truestep_fixtures.ranks import RankPool
from truestep_fixtures.topologies import TOPOLOGIES

from truestep_spec_tests.differential.cases import (
    DTYPES,
    PLACEMENTS,
    SHARDED,
    assert_in_lockstep,
    require,
    several_ranks,
)
from truestep_spec_tests.implementation import Implementation
from truestep_spec_tests.properties.bema_cases import hyperparameters
from truestep_spec_tests.recording import Kind
from truestep_spec_tests.runs import Setup, follow_in_lockstep, train_in_lockstep

Ranks = Callable[[int], RankPool]


@pytest.mark.clause("BEMA-1", "BEMA-2", "BEMA-3", "BEMA-4", "BEMA-5", "BEMA-6", "BEMA-7", "BEMA-8", "BEMA-18")
@pytest.mark.parametrize(("topology", "count"), PLACEMENTS)
@several_ranks
@given(
    arguments=hyperparameters(),
    kind=st.sampled_from(["walk", "jumps", "cancelling"]),
    model=st.sampled_from(["odd", "batchnorm"]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_the_shadow_of_any_trajectory_stays_within_the_bound(
    implementation: Implementation,
    ranks: Ranks,
    tmp_path: Path,
    topology: str,
    count: int,
    arguments: dict[str, Any],
    kind: Kind,
    model: str,
    dtype: str,
    seed: int,
) -> None:
    require(implementation, "shadow_state_dict")
    setup = Setup(implementation.name, topology, count, dtype, model, seed=seed, hyperparameters=arguments)
    outcomes = ranks(count).run(follow_in_lockstep, setup, Path(mkdtemp(dir=tmp_path)), kind=kind)
    assert_in_lockstep(outcomes, setup.steps)


MODELS = ("qwen2", "llama", "gpt2", "tied", "frozen", "lora", "batchnorm", "odd")

TRAININGS: dict[str, dict[str, Any]] = {
    "every step": {"hyperparameters": {"update_freq": 1}},
    "gradient accumulation": {
        "hyperparameters": {"update_freq": 2, "update_after": 1},
        "training": {"gradient_accumulation_steps": 3},
    },
    "epochs": {
        "hyperparameters": {"update_freq": 2, "bias_power": 0.0},
        "training": {"max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 3},
    },
    "no update": {"hyperparameters": {"update_freq": 1, "update_after": 100}, "steps": 3},
}


def trainings() -> list[Any]:
    """Every topology in every dtype; numbers of ranks, models and kinds of training are dealt out."""
    cases = []
    for row, topology in enumerate(TOPOLOGIES):
        counts = [1] if topology == "single" else [2, 3]
        for column, dtype in enumerate(("float32", "bfloat16", "float64")):
            model = MODELS[(3 * row + column) % len(MODELS)]
            count = counts[(row // 2 + column) % len(counts)]
            kind = list(TRAININGS)[(row + column) % len(TRAININGS)]
            name = f"{topology}-{count}-{model}-{dtype}-{kind}".replace(" ", "_")
            marks = clauses_of(topology, model, dtype, kind)
            cases.append(pytest.param(topology, count, model, dtype, kind, id=name, marks=marks))
    return cases


def clauses_of(topology: str, model: str, dtype: str, kind: str) -> pytest.MarkDecorator:
    """What a training adds to one that is as plain as can be: what it is about."""
    if topology in SHARDED:
        return pytest.mark.clause("BEMA-18")
    if model not in ("qwen2", "llama", "gpt2", "tied"):
        return pytest.mark.clause("BEMA-7")
    if "update_after" in TRAININGS[kind]["hyperparameters"]:
        return pytest.mark.clause("BEMA-1")
    if "bias_power" in TRAININGS[kind]["hyperparameters"]:
        return pytest.mark.clause("BEMA-5")
    if dtype != "float32":
        return pytest.mark.clause("BEMA-8")
    return pytest.mark.clause("BEMA-2", "BEMA-3", "BEMA-4", "BEMA-6")


@pytest.mark.parametrize(("topology", "count", "model", "dtype", "kind"), trainings())
def test_the_shadow_of_a_real_training_stays_within_the_bound(
    implementation: Implementation,
    ranks: Ranks,
    tmp_path: Path,
    topology: str,
    count: int,
    model: str,
    dtype: str,
    kind: str,
) -> None:
    if model in ("batchnorm", "odd"):
        require(implementation, "shadow_state_dict")
    setup = Setup(implementation.name, topology, count, dtype, model, steps=5).on(**TRAININGS[kind])
    rows = 24  # of the default dataset
    steps = 2 * -(-rows // (3 * count)) if kind == "epochs" else setup.steps
    assert_in_lockstep(ranks(count).run(train_in_lockstep, setup, tmp_path), steps)
