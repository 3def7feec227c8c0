"""The reference model is part of a checkpoint: what is there, what is read back, and what is refused."""

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor
from truestep_fixtures.ranks import RankFailure, RankPool
from truestep_fixtures.training import train

from truestep_spec_tests.differential.cases import Death, error_of, full_disk, logged_warnings, skip_the_reference
from truestep_spec_tests.differential.ref_sync_cases import syncing
from truestep_spec_tests.implementation import Implementation
from truestep_spec_tests.options import require
from truestep_spec_tests.runs import Setup, Walk, same_bits, walked

Ranks = Callable[[int], RankPool]
Weights = dict[str, Tensor]

STATE = "truestep_ref_model"

pytestmark = pytest.mark.clause("SYNC-12")


@pytest.fixture(autouse=True)
def needs_the_option(implementation: Implementation) -> None:
    require(implementation.SyncRefModelCallback, ["save_reference"])


# ── What the ranks do ─────────────────────────────────────────────────────────


def train_once(
    setup: Setup, directory: Path, *, killed_at: int | None = None, resume_from: Path | None = None
) -> tuple[Weights, list[str]]:
    """Trains, and returns the reference model and the callback's warnings."""
    placed = setup.place_ref_model()
    deaths = [] if killed_at is None else [Death("on_step_end", killed_at)]
    with logged_warnings() as warnings:
        train(
            setup.topology,
            setup.build_model(),
            output_dir=directory,
            callbacks=[setup.subject(placed.engine, None), *deaths],
            steps=setup.steps,
            dtype=setup.torch_dtype,
            seed=setup.seed,
            resume_from_checkpoint=resume_from,
            **({"save_strategy": "steps"} | setup.training),
        )
    return placed.read(), [message for message in warnings if STATE in message]


def begin_at(setup: Setup, directory: Path, step: int) -> tuple[Weights, list[str], str | None]:
    """The reference model, the warnings and the error of a training that begins at a step."""
    placed = setup.place_ref_model()
    walk = Walk(setup, directory, [setup.subject(placed.engine, None)])
    with logged_warnings() as warnings:
        error = error_of(lambda: walk.begin(step))
    return placed.read(), [message for message in warnings if STATE in message], error


def save_at(setup: Setup, directory: Path, step: int, *, full_on: int | None = None) -> tuple[Weights, list[str]]:
    """Walks to a step and saves, on a full disk for one of the ranks; then walks on to the end."""
    placed = setup.place_ref_model()
    walk = Walk(setup, directory, [setup.subject(placed.engine, None)])
    walk.begin()
    walk.go_to(step)
    with logged_warnings() as warnings, full_disk() if walk.events.args.process_index == full_on else nullcontext():
        walk.events.save()
    walk.go_to(setup.steps)
    return placed.read(), [message for message in warnings if STATE in message]


def given_weights(setup: Setup) -> Weights:
    return {name: parameter.detach().cpu() for name, parameter in setup.build_ref_model().named_parameters()}


# ── Stopped and resumed ───────────────────────────────────────────────────────


def assert_same(expected: Weights, actual: Weights) -> None:
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        assert same_bits(value, actual[name]), name


@pytest.mark.parametrize(
    ("topology", "count", "dtype"),
    [("single", 1, "float32"), ("ddp", 2, "bfloat16"), ("zero3", 2, "bfloat16")],
)
def test_a_killed_training_that_is_resumed_ends_with_the_reference_model_of_one_that_was_not(
    implementation: Implementation, ranks: Ranks, tmp_path: Path, topology: str, count: int, dtype: str
) -> None:
    setup = syncing(implementation.name, topology, count, dtype=dtype, steps=7, training={"save_steps": 3})
    setup = setup.on(hyperparameters={"master_weights": dtype == "bfloat16"})
    expected = ranks(count).run(train_once, setup, tmp_path / "whole")
    with pytest.raises(RankFailure):
        ranks(count).run(train_once, setup, tmp_path / "killed", killed_at=5)
    checkpoint = tmp_path / "killed" / "checkpoint-3"
    resumed = ranks(count).run(train_once, setup, tmp_path / "killed", resume_from=checkpoint)
    for (whole, _), (actual, warnings) in zip(expected, resumed, strict=True):
        assert warnings == []
        assert_same(whole, actual)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "placements",
    [
        [("ddp", 2), ("single", 1), ("ddp", 4)],
        [("zero3", 2), ("zero3_persistent", 3), ("ddp", 2)],
        [("fsdp2", 3), ("zero3", 4), ("fsdp2", 2)],
    ],
    ids=lambda placements: "-".join(f"{topology}{count}" for topology, count in placements),
)
def test_the_reference_model_goes_on_bitwise_on_other_ranks_and_in_other_topologies(
    implementation: Implementation, ranks: Ranks, tmp_path: Path, placements: list[tuple[str, int]], dtype: str
) -> None:
    setup = syncing(implementation.name, dtype=dtype, alpha=0.02, model="odd", steps=9)
    setup = setup.on(hyperparameters={"master_weights": True})
    (expected,) = ranks(1).run(walked, setup, tmp_path / "alone")
    for first, (topology, count) in zip((0, 3, 6), placements, strict=True):
        moved = setup.on(topology=topology, ranks=count)
        for actual in ranks(count).run(walked, moved, tmp_path / "out", first, first + 3, save=True):
            for step in range(first, first + 4):
                assert_same(expected[step], actual[step])


def test_other_settings_may_follow(implementation: Implementation, ranks: Ranks, tmp_path: Path) -> None:
    setup = syncing(implementation.name, dtype="bfloat16", model="odd", steps=4)
    ((saved, _),) = ranks(1).run(save_at, setup, tmp_path, 4)
    for master_weights in (False, True):
        other = syncing(implementation.name, dtype="bfloat16", model="odd", every=1, alpha=0.9, steps=6)
        other = other.on(hyperparameters={"master_weights": master_weights})
        ((actual, warnings, error),) = ranks(1).run(begin_at, other, tmp_path, 4)
        assert (error, warnings) == (None, [])
        assert_same(saved, actual)


def test_the_master_copy_begins_with_the_weights_where_the_state_has_none(
    implementation: Implementation, ranks: Ranks, tmp_path: Path
) -> None:
    setup = syncing(implementation.name, dtype="bfloat16", alpha=0.02, model="odd", steps=6)
    ranks(1).run(save_at, setup.on(steps=4), tmp_path, 4)
    with_copy = setup.on(hyperparameters={"master_weights": True})
    (without,) = ranks(1).run(walked, setup, tmp_path, 4)
    (copied,) = ranks(1).run(walked, with_copy, tmp_path, 4)
    assert_same(without[6], copied[6])  # the first sync from the same weights rounds once either way


# ── What is written ───────────────────────────────────────────────────────────


@pytest.mark.parametrize(("topology", "count"), [("single", 1), ("ddp", 3), ("zero3", 2), ("fsdp2", 2)])
def test_a_checkpoint_after_the_first_sync_has_a_file_for_each_rank_and_an_index(
    implementation: Implementation, ranks: Ranks, tmp_path: Path, topology: str, count: int
) -> None:
    skip_the_reference(implementation, "has files of its own kind")
    setup = syncing(implementation.name, topology, count, dtype="bfloat16", model="odd", steps=3)
    setup = setup.on(hyperparameters={"master_weights": True})
    ((saved, _), *_) = ranks(count).run(save_at, setup, tmp_path, 3)
    directory = tmp_path / "checkpoint-3" / STATE
    files = {f"rank-{rank:05d}-of-{count:05d}.safetensors" for rank in range(count)}
    assert {"index.json", *files} == {file.name for file in directory.iterdir()}
    index = json.loads((directory / "index.json").read_text())
    assert index["metadata"]["step"] == 3
    assert saved.keys() == index["parameters"].keys()
    sizes: dict[str, int] = {}
    for file in files:
        for key, tensor in load_file(directory / file).items():
            sizes[key] = sizes.get(key, 0) + tensor.numel()
    expected = {f"{kind}/{name}": value.numel() for kind in ("reference", "master") for name, value in saved.items()}
    assert expected == sizes


def test_before_the_first_sync_nothing_is_written_and_nothing_is_missed(
    implementation: Implementation, ranks: Ranks, tmp_path: Path
) -> None:
    setup = syncing(implementation.name, "ddp", 2, every=4, model="odd", steps=3)
    ranks(2).run(save_at, setup, tmp_path, 3)
    assert not list(tmp_path.glob(f"checkpoint-*/{STATE}/*"))
    for actual, warnings, error in ranks(2).run(begin_at, setup, tmp_path, 3):
        assert (warnings, error) == ([], None)
        assert_same(given_weights(setup), actual)


def test_state_that_an_earlier_training_has_left_is_removed(
    implementation: Implementation, ranks: Ranks, tmp_path: Path
) -> None:
    skip_the_reference(implementation, "has files of its own kind")
    setup = syncing(implementation.name, model="odd", steps=3)
    for later in (setup.on(hyperparameters={"save_reference": False}), syncing(implementation.name, every=4, steps=3)):
        ranks(1).run(save_at, setup, tmp_path, 3)
        assert (tmp_path / "checkpoint-3" / STATE / "index.json").exists()
        ranks(1).run(save_at, later, tmp_path, 3)
        assert not list(tmp_path.glob(f"checkpoint-*/{STATE}/*"))


def test_with_save_reference_off_nothing_is_written_read_or_missed(
    implementation: Implementation, ranks: Ranks, tmp_path: Path
) -> None:
    setup = syncing(implementation.name, model="odd", steps=3)
    off = setup.on(hyperparameters={"save_reference": False})
    ranks(1).run(save_at, off, tmp_path / "off", 3)
    assert not list((tmp_path / "off").glob(f"checkpoint-*/{STATE}/*"))
    ranks(1).run(save_at, setup, tmp_path / "on", 3)
    for directory in ("off", "on"):
        ((actual, warnings, error),) = ranks(1).run(begin_at, off, tmp_path / directory, 3)
        assert (warnings, error) == ([], None)
        assert_same(given_weights(setup), actual)


@pytest.mark.parametrize("full_on", [0, 1])
def test_a_full_disk_on_any_rank_is_a_warning_and_leaves_no_index(
    implementation: Implementation, ranks: Ranks, tmp_path: Path, full_on: int
) -> None:
    skip_the_reference(implementation, "has files of its own kind")
    setup = syncing(implementation.name, "ddp", 2, model="qwen2", steps=4)
    expected = ranks(2).run(save_at, setup, tmp_path / "roomy", 3)
    full = ranks(2).run(save_at, setup, tmp_path / "full", 3, full_on=full_on)
    assert [len(warnings) for _, warnings in full] == [1, 0]
    assert str(tmp_path / "full" / "checkpoint-3" / STATE) in full[0][1][0]
    assert not (tmp_path / "full" / "checkpoint-3" / STATE / "index.json").exists()
    for (whole, _), (actual, _) in zip(expected, full, strict=True):
        assert_same(whole, actual)


# ── What is refused ───────────────────────────────────────────────────────────


def test_a_checkpoint_without_the_reference_model_is_a_warning_of_the_main_process(
    implementation: Implementation, ranks: Ranks, tmp_path: Path
) -> None:
    skip_the_reference(implementation, "has files of its own kind")
    setup = syncing(implementation.name, "ddp", 2, model="odd", steps=4)
    (tmp_path / "checkpoint-4").mkdir()
    begun = ranks(2).run(begin_at, setup, tmp_path, 4)
    assert [len(warnings) for _, warnings, _ in begun] == [1, 0]
    assert str(tmp_path / "checkpoint-4" / STATE) in begun[0][1][0]
    for actual, _, error in begun:
        assert error is None
        assert_same(given_weights(setup), actual)


def flip_a_bit(directory: Path) -> str:
    file = directory / "rank-00001-of-00002.safetensors"
    contents = bytearray(file.read_bytes())
    contents[-1] ^= 1
    file.write_bytes(contents)
    return file.name


def lose_a_file(directory: Path) -> str:
    (directory / "rank-00001-of-00002.safetensors").unlink()
    return "rank-00001-of-00002.safetensors"


def tear_the_index(directory: Path) -> str:
    index = directory / "index.json"
    index.write_text(index.read_text()[:-100])
    return "index.json"


def change_the_version(directory: Path) -> str:
    return _change_the_index(directory, lambda index: index.update(format_version=99))


def change_the_step(directory: Path) -> str:
    return _change_the_index(directory, lambda index: index["metadata"].update(step=2))


def lose_the_metadata(directory: Path) -> str:
    return _change_the_index(directory, lambda index: index["metadata"].pop("master_weights"))


def _change_the_index(directory: Path, change: Callable[[Any], Any]) -> str:
    contents = json.loads((directory / "index.json").read_text())
    change(contents)
    (directory / "index.json").write_text(json.dumps(contents))
    return "index.json"


@pytest.mark.parametrize(
    "spoil",
    [flip_a_bit, lose_a_file, tear_the_index, change_the_version, change_the_step, lose_the_metadata],
    ids=lambda spoil: spoil.__name__,
)
def test_a_damaged_state_is_an_error_of_every_rank_that_names_the_file(
    implementation: Implementation, ranks: Ranks, tmp_path: Path, spoil: Callable[[Path], str]
) -> None:
    skip_the_reference(implementation, "has files of its own kind")
    setup = syncing(implementation.name, "ddp", 2, model="odd", steps=4)
    ranks(2).run(save_at, setup, tmp_path, 4)
    named = spoil(tmp_path / "checkpoint-4" / STATE)
    for _, _, error in ranks(2).run(begin_at, setup, tmp_path, 4):
        assert error is not None
        assert str(tmp_path / "checkpoint-4" / STATE / named) in error
        assert f"delete {tmp_path / 'checkpoint-4' / STATE}" in error
    shutil.rmtree(tmp_path / "checkpoint-4" / STATE)
    assert [error for _, _, error in ranks(2).run(begin_at, setup, tmp_path, 4)] == [None, None]


def test_the_state_of_another_model_or_type_is_an_error_that_names_a_parameter(
    implementation: Implementation, ranks: Ranks, tmp_path: Path
) -> None:
    skip_the_reference(implementation, "has files of its own kind")
    setup = syncing(implementation.name, model="odd", steps=4)
    ranks(1).run(save_at, setup, tmp_path, 4)
    for other in (setup.on(dtype="bfloat16"), setup.on(model="batchnorm")):
        ((_, _, error),) = ranks(1).run(begin_at, other, tmp_path, 4)
        assert error is not None
        assert "embedding.weight" in error or "scale" in error
        assert str(tmp_path / "checkpoint-4" / STATE / "index.json") in error


# ── From one training to the next ─────────────────────────────────────────────


def train_twice(setup: Setup, directory: Path) -> None:
    """Two walks with one object; the second is saved before its first sync."""
    subject = setup.subject(setup.build_ref_model(), None)
    for last in (2, 1):
        walk = Walk(setup, directory, [subject])
        walk.begin()
        walk.go_to(last)
    walk.events.save()


@pytest.mark.clause("SYNC-13")
def test_a_reference_model_that_has_moved_in_an_earlier_training_is_saved_before_the_next_sync_too(
    implementation: Implementation, ranks: Ranks, tmp_path: Path
) -> None:
    skip_the_reference(implementation, "has files of its own kind")
    ranks(1).run(train_twice, syncing(implementation.name, model="odd"), tmp_path)
    assert (tmp_path / "checkpoint-1" / STATE / "index.json").is_file()


def search(setup: Setup, directory: Path) -> list[str]:
    """The warnings of a walk within a hyperparameter search, which is saved."""
    walk = Walk(setup, directory, [setup.subject(setup.build_ref_model(), None)])
    walk.events.reset()
    walk.events.state.is_hyper_param_search = True
    with logged_warnings() as warnings:
        walk.events.fire("on_train_begin")
        walk.go_to(2)
        walk.events.save()
    return warnings


def test_in_a_hyperparameter_search_nothing_is_saved_and_the_main_process_says_so(
    implementation: Implementation, ranks: Ranks, tmp_path: Path
) -> None:
    skip_the_reference(implementation, "knows of no searches")
    warnings = ranks(2).run(search, syncing(implementation.name, "ddp", 2, model="odd"), tmp_path)
    assert [len(of_rank) for of_rank in warnings] == [1, 0]
    assert not list(tmp_path.glob(f"checkpoint-*/{STATE}/*"))
