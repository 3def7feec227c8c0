"""Completions in trainings of every topology, beside the reference and beside a single process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from truestep_fixtures import data
from truestep_fixtures.ranks import RankPool

from truestep_spec_tests.differential.cases import SHARDED, assert_in_lockstep, placements, skip_the_reference
from truestep_spec_tests.differential.log_completions_cases import (
    SAMPLING,
    completing,
    prompts_read,
    small_batches,
    variants,
)
from truestep_spec_tests.implementation import Implementation
from truestep_spec_tests.runs import Setup, same_bits, train_in_lockstep, walked

Ranks = Callable[[int], RankPool]
Shown = dict[int, dict[str, Tensor]]


def assert_same_tables(expected: Shown, actual: Shown) -> None:
    assert list(expected) == list(actual)
    for step, rows in expected.items():
        assert list(rows) == list(actual[step])
        different = [name for name, row in rows.items() if not same_bits(row, actual[step][name])]
        assert different == [], f"step {step}"


def tables(ranks: Ranks, setup: Setup, directory: Path) -> Shown:
    """What every rank sees of the table at each step of a trajectory."""
    shown: list[Shown] = ranks(setup.ranks).run(walked, setup, directory)
    for of_rank in shown:
        assert_same_tables(shown[0], of_rank)
    return shown[0]


@pytest.fixture(scope="module")
def in_one_process(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Setup], Shown]:
    """The table at each step of a trajectory in a single process, computed once for each setup."""
    known: dict[str, Shown] = {}

    def shown(setup: Setup) -> Shown:
        alone = setup.on(topology="single", ranks=1)
        if str(alone) not in known:
            known[str(alone)] = tables(ranks, alone, tmp_path_factory.mktemp("alone"))
        return known[str(alone)]

    return shown


GREEDY = {"max_new_tokens": 4}

TRAININGS = [
    *((topology, count, GREEDY) for topology, count in placements(2) if topology not in ("zero3", "fsdp2")),
    *((topology, count, SAMPLING) for topology, count in placements(3, topologies=("single", "ddp", "zero3", "fsdp2"))),
]


@pytest.mark.clause("LOGC-1", "LOGC-3", "LOGC-4", "LOGC-6", "LOGC-10")
@pytest.mark.parametrize(("topology", "count", "generation"), TRAININGS)
def test_rows_of_a_training_are_the_references(
    implementation: Implementation, ranks: Ranks, tmp_path: Path, topology: str, count: int, generation: dict[str, Any]
) -> None:
    setup = completing(implementation.name, topology, count, generation=generation)
    outcomes = ranks(count).run(train_in_lockstep, setup, tmp_path)
    assert_in_lockstep(outcomes, setup.steps)


@pytest.mark.clause("LOGC-2", "LOGC-4")
@pytest.mark.parametrize(
    ("topology", "count", "prompts"),
    [("ddp", 2, "uneven"), ("ddp", 2, "conversations"), ("ddp", 2, "two"), ("fsdp2", 3, "uneven")],
)
def test_rows_of_all_kinds_of_prompts_are_the_references_on_several_ranks(
    implementation: Implementation, ranks: Ranks, tmp_path: Path, topology: str, count: int, prompts: str
) -> None:
    setup = completing(implementation.name, topology, count, prompts=prompts, model="llama")
    outcomes = ranks(count).run(train_in_lockstep, setup, tmp_path)
    assert_in_lockstep(outcomes, setup.steps)


@pytest.mark.clause("LOGC-4")
@pytest.mark.parametrize(
    ("topology", "count", "number"),
    [
        *((topology, count, 7) for topology, count in placements(2, topologies=("ddp", "zero2", *SHARDED))),
        *((topology, count, 1) for topology, count in placements(3, topologies=("ddp", *SHARDED))),
    ],
)
def test_rows_do_not_depend_on_topology_and_ranks_nor_on_how_a_sharded_model_generates(
    implementation: Implementation,
    ranks: Ranks,
    in_one_process: Callable[[Setup], Shown],
    tmp_path: Path,
    topology: str,
    count: int,
    number: int,
) -> None:
    changes: dict[str, Any] = {"generation": SAMPLING, "model": "gpt2", "hyperparameters": {"num_prompts": number}}
    setup = completing(implementation.name, topology, count, **changes)
    for index, variant in enumerate(variants(implementation, setup)):
        assert_same_tables(in_one_process(setup), tables(ranks, variant, tmp_path / str(index)))


@pytest.mark.clause("LOGC-4")
@pytest.mark.parametrize(
    ("topology", "dtype"), [("ddp", "float32"), *((topology, "bfloat16") for topology in ("ddp", *SHARDED))]
)
def test_the_number_of_ranks_changes_no_bit_in_any_type(
    implementation: Implementation, ranks: Ranks, tmp_path: Path, topology: str, dtype: str
) -> None:
    setup = completing(implementation.name, topology, 2, prompts="uneven", dtype=dtype, generation=SAMPLING)
    assert_same_tables(tables(ranks, setup, tmp_path / "two"), tables(ranks, setup.on(ranks=3), tmp_path / "three"))


@pytest.mark.clause("LOGC-4")
def test_the_trainers_batch_size_changes_nothing(implementation: Implementation, ranks: Ranks, tmp_path: Path) -> None:
    setup = completing(implementation.name, dtype="bfloat16")
    expected = tables(ranks, setup, tmp_path / "2")
    for size in (1, 5):
        changed = setup.on(training={"per_device_eval_batch_size": size})
        assert_same_tables(expected, tables(ranks, changed, tmp_path / str(size)))


@pytest.mark.clause("LOGC-4")
@pytest.mark.parametrize("count", [2, 3])
def test_no_prompt_is_completed_twice(implementation: Implementation, ranks: Ranks, tmp_path: Path, count: int) -> None:
    skip_the_reference(implementation, "completes every prompt on every rank")
    setup = completing(implementation.name, "ddp", count, hyperparameters=small_batches(implementation), model="gpt2")
    read = ranks(count).run(prompts_read, setup, tmp_path)
    assert len(data.prompts(setup.prompts)) == sum(read)
    assert all(read)
