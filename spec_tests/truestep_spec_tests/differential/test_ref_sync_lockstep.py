"""The subject's reference model and the reference's, compared at every step, and by the logits of every forward."""

from collections.abc import Callable
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from truestep_fixtures.ranks import RankPool
from truestep_fixtures.topologies import TOPOLOGIES

from truestep_spec_tests.differential.cases import DTYPES, PLACEMENTS, SHARDED, assert_in_lockstep, several_ranks
from truestep_spec_tests.differential.ref_sync_cases import syncing
from truestep_spec_tests.implementation import Implementation
from truestep_spec_tests.options import takes
from truestep_spec_tests.recording import Kind
from truestep_spec_tests.runs import follow_in_lockstep, train_in_lockstep

Ranks = Callable[[int], RankPool]


def clauses_of(topology: str, dtype: str) -> pytest.MarkDecorator:
    """What a run is about: where the models lie, how a blend is rounded in a narrow type, or what it is."""
    if topology in SHARDED:
        return pytest.mark.clause("SYNC-6")
    return pytest.mark.clause("SYNC-4") if dtype != "float32" else pytest.mark.clause("SYNC-1", "SYNC-3", "SYNC-4")


def placed() -> list[Any]:
    """Every topology, for runs in any type."""
    return [pytest.param(topology, count, marks=clauses_of(topology, "any")) for topology, count in PLACEMENTS]


def options(implementation: Implementation, *, master_weights: bool) -> dict[str, Any]:
    """Arguments for the constructor, as far as the implementation has them."""
    has_option = takes(implementation.SyncRefModelCallback, "master_weights")
    return {"master_weights": True} if master_weights and has_option else {}


@pytest.mark.parametrize(("topology", "count"), placed())
@several_ranks
@given(
    every=st.integers(1, 4),
    alpha=st.sampled_from([0.0, 1.0, 0.5]) | st.floats(0, 1),
    master_weights=st.booleans(),
    kind=st.sampled_from(["walk", "jumps", "cancelling"]),
    model=st.sampled_from(["odd", "batchnorm"]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_the_reference_model_stays_within_the_bound_on_any_trajectory(
    implementation: Implementation,
    ranks: Ranks,
    tmp_path: Path,
    topology: str,
    count: int,
    every: int,
    alpha: float,
    master_weights: bool,
    kind: Kind,
    model: str,
    dtype: str,
    seed: int,
) -> None:
    setup = syncing(implementation.name, topology, count, every=every, alpha=alpha, dtype=dtype, model=model)
    hyperparameters = options(implementation, master_weights=master_weights)
    setup = setup.on(seed=seed, steps=4, hyperparameters=hyperparameters)
    outcomes = ranks(count).run(follow_in_lockstep, setup, Path(mkdtemp(dir=tmp_path)), kind=kind)
    assert_in_lockstep(outcomes, setup.steps)


MODELS = ("qwen2", "llama", "gpt2", "tied", "frozen", "lora", "batchnorm", "odd")


def trainings() -> list[Any]:
    """Every topology with some of the models; numbers of ranks, dtypes and settings are dealt out."""
    cases = []
    for row, topology in enumerate(TOPOLOGIES):
        counts = [1] if topology == "single" else [2, 3]
        for column in range(2):
            model = MODELS[(2 * row + column) % len(MODELS)]
            count, alpha = counts[(row // 2 + column) % len(counts)], (0.05, 0.6, 1.0)[(row + 2 * column) % 3]
            dtype = ("float32", "bfloat16")[(row + column) % 2]
            accumulated = 1 + (column == 1)
            name = f"{topology}-{count}-{model}-{dtype}-{alpha}"
            marks = clauses_of(topology, dtype)
            cases.append(pytest.param(topology, count, model, dtype, alpha, accumulated, id=name, marks=marks))
    return cases


@pytest.mark.parametrize(("topology", "count", "model", "dtype", "alpha", "accumulated"), trainings())
def test_the_reference_model_of_a_real_training_stays_within_the_bound(
    implementation: Implementation,
    ranks: Ranks,
    tmp_path: Path,
    topology: str,
    count: int,
    model: str,
    dtype: str,
    alpha: float,
    accumulated: int,
) -> None:
    setup = syncing(
        implementation.name,
        topology,
        count,
        alpha=alpha,
        dtype=dtype,
        model=model,
        steps=5,
        training={"gradient_accumulation_steps": accumulated},
    )
    assert_in_lockstep(ranks(count).run(train_in_lockstep, setup, tmp_path), setup.steps)
