"""A training that was stopped, killed or moved goes on as if nothing had happened, or says what is wrong."""

import json
import pickle
import re
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Trainer, TrainerCallback
from truestep_fixtures.data import language_dataset
from truestep_fixtures.ranks import RankFailure, RankPool
from truestep_fixtures.topologies import training_arguments
from truestep_fixtures.training import train

from truestep_spec_tests.differential.cases import Death, error_of, full_disk, logged_warnings, odd, placements, require
from truestep_spec_tests.implementation import Implementation
from truestep_spec_tests.lockstep import Comparisons
from truestep_spec_tests.lockstep.bema import lockstep
from truestep_spec_tests.observe import Watcher, shadow_at_event
from truestep_spec_tests.runs import Setup, Walk, same_bits, walked

Ranks = Callable[[int], RankPool]

ARGUMENTS = {"update_freq": 2, "update_after": 1, "lag": 3}
STATE = "truestep_bema"


# ── What the ranks do ─────────────────────────────────────────────────────────


def train_once(
    setup: Setup,
    directory: Path,
    *,
    before: list[TrainerCallback] | None = None,
    after: list[TrainerCallback] | None = None,
    resume_from: Path | None = None,
) -> list[str]:
    """Trains, and returns the callback's warnings."""
    with logged_warnings() as warnings:
        train(
            setup.topology,
            setup.build_model(),
            output_dir=directory,
            callbacks=[*(before or []), setup.subject(), *(after or [])],
            steps=setup.steps,
            dtype=setup.torch_dtype,
            seed=setup.seed,
            resume_from_checkpoint=resume_from,
            save_strategy="steps",
            **setup.training,
        )
    return [message for message in warnings if STATE in message]


def resume_from_the_last_checkpoint(setup: Setup, directory: Path) -> None:
    """Resumes as most people do, by `resume_from_checkpoint=True`."""
    args = training_arguments("single", directory, max_steps=setup.steps, seed=setup.seed)
    dataset = language_dataset(24, setup.seed)
    trainer = Trainer(setup.build_model(), args, train_dataset=dataset, callbacks=[setup.subject()])
    trainer.train(resume_from_checkpoint=True)


def walk_in_lockstep(setup: Setup, directory: Path, scratch: Path, first: int) -> Comparisons:
    """Subject and reference resume at a step, and are compared from there on."""
    callbacks, comparisons = lockstep(setup.subject(), setup.reference(), scratch)
    walk = Walk(setup, directory, callbacks)
    walk.begin(first)
    walk.go_to(setup.steps)
    return comparisons


def warnings_on_resuming(setup: Setup, directory: Path, first: int) -> list[str]:
    walk = Walk(setup, directory, [setup.subject()])
    with logged_warnings() as warnings:
        walk.begin(first)
        walk.go_to(setup.steps)
    return warnings


def error_on_resuming(setup: Setup, directory: Path, first: int) -> str | None:
    walk = Walk(setup, directory, [setup.subject()])
    return error_of(lambda: walk.begin(first))


def save_on_full_disk(
    setup: Setup, directory: Path, saves: list[int], full_at: int, victim: int | None
) -> tuple[dict[str, Tensor], list[str]]:
    """Saves at some steps; at the save of number `full_at` the disk is full for the rank `victim`, or for all.

    Returns:
        The shadow at the end, and the warnings.
    """
    subject = setup.subject()
    watcher = Watcher(partial(shadow_at_event, subject))
    walk = Walk(setup, directory, [subject, watcher])
    walk.begin()
    with logged_warnings() as warnings:
        for number, step in enumerate(saves):
            walk.go_to(step)
            is_full = number == full_at and victim in (None, walk.events.args.process_index)
            with full_disk() if is_full else nullcontext():
                walk.events.save()
        walk.go_to(setup.steps)
    return {name: watcher.shown[name] for name in walk.points[0]}, warnings


def save_with_a_late_main_process(setup: Setup, directory: Path) -> list[str]:
    """The warnings of a save that the other ranks begin first, as with `save_only_model` of the Trainer."""
    walk = Walk(setup, directory, [setup.subject()])
    walk.begin()
    walk.go_to(setup.steps)
    if walk.events.state.is_world_process_zero:
        time.sleep(0.3)
        (directory / f"checkpoint-{setup.steps}").mkdir(parents=True)
    with logged_warnings() as warnings:
        walk.events.fire("on_save")
    return warnings


# ── Stopped and resumed ───────────────────────────────────────────────────────


def assert_same_result(expected: Path, actual: Path) -> None:
    """The two trainings left bitwise the same shadow."""
    expected_weights, actual_weights = (load_file(out / "bema" / "model.safetensors") for out in (expected, actual))
    assert expected_weights.keys() == actual_weights.keys()
    assert all(same_bits(value, actual_weights[name]) for name, value in expected_weights.items())


def assert_continues(
    expected: dict[int, dict[str, Tensor]], actual: dict[int, dict[str, Tensor]], steps: range
) -> None:
    assert list(steps) == list(actual)
    for step in steps:
        for name, value in expected[step].items():
            assert same_bits(value, actual[step][name]), f"step {step}, {name}"


@pytest.mark.clause("BEMA-11")
@pytest.mark.parametrize(
    ("topology", "count", "model"),
    [
        ("single", 1, "gpt2"),
        ("ddp", 2, "batchnorm"),
        ("zero2", 2, "tied"),
        ("zero3", 2, "qwen2"),
        ("fsdp2", 2, "frozen"),
    ],
)
def test_a_killed_training_that_is_resumed_ends_with_the_bits_of_one_that_was_not(
    implementation: Implementation, ranks: Ranks, tmp_path: Path, topology: str, count: int, model: str
) -> None:
    setup = Setup(
        implementation.name,
        topology,
        count,
        model=model,
        steps=7,
        hyperparameters=ARGUMENTS,
        training={"save_steps": 3},
    )
    ranks(count).run(train_once, setup.on(training={"save_steps": 100}), tmp_path / "whole")
    with pytest.raises(RankFailure) as killed:
        ranks(count).run(train_once, setup, tmp_path / "killed", after=[Death("on_step_end", 5)])
    assert {"died"} == {report.outcome for report in killed.value.reports}
    assert not (tmp_path / "killed" / "bema").exists()
    checkpoint = tmp_path / "killed" / "checkpoint-3"
    assert [[]] * count == ranks(count).run(train_once, setup, tmp_path / "killed", resume_from=checkpoint)
    assert_same_result(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.clause("BEMA-11", "BEMA-12")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "placements",
    [
        [("ddp", 2), ("single", 1), ("ddp", 4)],
        [("zero3", 2), ("zero3", 1), ("zero3", 4)],
        [("zero3", 3), ("zero3_persistent", 2), ("zero2", 4)],
        [("fsdp2", 2), ("fsdp2", 4), ("fsdp2", 3)],
        [("zero3", 4), ("ddp", 2), ("single", 1)],
        [("single", 1), ("fsdp2", 4), ("zero1", 2)],
    ],
    ids=lambda placements: "-".join(f"{topology}{count}" for topology, count in placements),
)
def test_the_shadow_goes_on_bitwise_on_other_ranks_and_in_other_topologies(
    implementation: Implementation, ranks: Ranks, tmp_path: Path, placements: list[tuple[str, int]], dtype: str
) -> None:
    setup = Setup(implementation.name, dtype=dtype, model=odd(implementation), steps=9, hyperparameters=ARGUMENTS)
    (expected,) = ranks(1).run(walked, setup, tmp_path / "alone")
    for first, (topology, count) in zip((0, 3, 6), placements, strict=True):
        moved = setup.on(topology=topology if count > 1 else "single", ranks=count)
        for actual in ranks(count).run(walked, moved, tmp_path / "out", first, first + 3, save=True):
            assert_continues(expected, actual, range(first, first + 4))


@pytest.mark.clause("BEMA-11")
@pytest.mark.parametrize(("topology", "count"), [("single", 1), ("zero2", 2)])
def test_the_state_comes_from_the_checkpoint_that_the_training_resumes_from(
    implementation: Implementation, ranks: Ranks, tmp_path: Path, topology: str, count: int
) -> None:
    require(implementation, "shadow_weights")
    setup = Setup(
        implementation.name,
        topology,
        count,
        model="odd",
        steps=5,
        hyperparameters=ARGUMENTS,
        training={"save_steps": 3},
    )
    ranks(count).run(train_once, setup, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "elsewhere" / "kept")
    ranks(count).run(train_once, setup.on(seed=1), tmp_path / "another")
    assert (tmp_path / "another" / "checkpoint-3" / STATE).is_dir()
    resumed = ranks(count).run(train_once, setup, tmp_path / "another", resume_from=tmp_path / "elsewhere" / "kept")
    assert [[]] * count == resumed
    assert_same_result(tmp_path / "whole", tmp_path / "another")


@pytest.mark.clause("BEMA-11")
def test_the_last_checkpoint_is_found_without_naming_it(
    implementation: Implementation, ranks: Ranks, tmp_path: Path
) -> None:
    setup = Setup(
        implementation.name, model=odd(implementation), steps=5, hyperparameters=ARGUMENTS, training={"save_steps": 3}
    )
    ranks(1).run(train_once, setup, tmp_path / "whole")
    with pytest.raises(RankFailure):
        ranks(1).run(train_once, setup, tmp_path / "killed", after=[Death("on_step_end", 4)])
    ranks(1).run(resume_from_the_last_checkpoint, setup, tmp_path / "killed")
    assert_same_result(tmp_path / "whole", tmp_path / "killed")


# ── The files ─────────────────────────────────────────────────────────────────


def leaves(value: Any) -> Iterator[Any]:
    """The keys and values of JSON."""
    if isinstance(value, dict):
        yield from value
    if isinstance(value, dict | list):
        for child in value.values() if isinstance(value, dict) else value:
            yield from leaves(child)
    else:
        yield value


def state_files(count: int) -> set[str]:
    return {"index.json", *(f"rank-{rank:05d}-of-{count:05d}.safetensors" for rank in range(count))}


@pytest.mark.clause("BEMA-11")
@pytest.mark.parametrize(("topology", "count"), placements(2))
def test_a_checkpoint_has_a_file_for_each_rank_and_an_index_that_describes_them(
    implementation: Implementation, ranks: Ranks, tmp_path: Path, topology: str, count: int
) -> None:
    require(implementation, "shadow_weights")
    setup = Setup(implementation.name, topology, count, "bfloat16", "odd", steps=3, hyperparameters=ARGUMENTS)
    ranks(count).run(walked, setup, tmp_path, save=True)
    directory = tmp_path / "checkpoint-3" / STATE
    assert state_files(count) == {file.name for file in directory.iterdir()}
    recorded = list(leaves(json.loads((directory / "index.json").read_text())))
    assert {3, *ARGUMENTS, *ARGUMENTS.values()} <= {*recorded}
    for name, parameter in setup.build_model().named_parameters():
        assert name in recorded
        assert {*parameter.shape} <= {*recorded}
    for file in directory.glob("*.safetensors"):
        assert file.name in recorded
        for key, tensor in load_file(file).items():
            assert str(tensor.dtype).removeprefix("torch.") in str(recorded)
            assert zlib.crc32(tensor.view(torch.uint8).numpy()) in recorded, key


@pytest.mark.clause("BEMA-11")
@pytest.mark.parametrize(("topology", "count"), [("single", 1), ("zero2", 2)])
def test_the_state_is_rotated_out_with_its_checkpoint(
    implementation: Implementation, ranks: Ranks, tmp_path: Path, topology: str, count: int
) -> None:
    require(implementation, "shadow_weights")
    setup = Setup(
        implementation.name,
        topology,
        count,
        model="odd",
        steps=4,
        hyperparameters=ARGUMENTS,
        training={"save_steps": 1, "save_total_limit": 2},
    )
    ranks(count).run(train_once, setup, tmp_path)
    assert {"checkpoint-3", "checkpoint-4", "bema"} == {entry.name for entry in tmp_path.iterdir()}
    for step in (3, 4):
        assert state_files(count) == {file.name for file in (tmp_path / f"checkpoint-{step}" / STATE).iterdir()}


@pytest.mark.clause("BEMA-11")
@pytest.mark.parametrize("topology", ["ddp", "fsdp2"])
def test_a_rank_may_come_to_a_save_before_the_main_process_has_written_the_checkpoint(
    implementation: Implementation, ranks: Ranks, tmp_path: Path, topology: str
) -> None:
    require(implementation, "shadow_weights")
    setup = Setup(implementation.name, topology, 2, model="odd", steps=2)
    assert ranks(2).run(save_with_a_late_main_process, setup, tmp_path) == [[], []]
    assert state_files(2) == {file.name for file in (tmp_path / "checkpoint-2" / STATE).iterdir()}


@pytest.mark.clause("BEMA-11")
@pytest.mark.parametrize(("topology", "count"), placements(2))
def test_before_the_snapshot_nothing_is_written_and_nothing_is_missed(
    implementation: Implementation, ranks: Ranks, tmp_path: Path, topology: str, count: int
) -> None:
    arguments = ARGUMENTS | {"update_after": 4}
    setup = Setup(implementation.name, topology, count, model=odd(implementation), steps=7, hyperparameters=arguments)
    ranks(count).run(walked, setup, tmp_path / "out", 0, 3, save=True)
    assert [entry.name for entry in (tmp_path / "out" / "checkpoint-3").iterdir()] == ["trainer_state.json"]
    assert [[]] * count == ranks(count).run(warnings_on_resuming, setup, tmp_path / "out", 3)
    (expected,) = ranks(1).run(walked, setup.on(topology="single", ranks=1), tmp_path / "alone")
    for actual in ranks(count).run(walked, setup, tmp_path / "out", 3):
        assert_continues(expected, actual, range(3, 8))


# ── Missing ───────────────────────────────────────────────────────────────────


@pytest.mark.clause("BEMA-2", "BEMA-11")
@pytest.mark.parametrize("torn", [False, True], ids=["no_state", "torn"])
@pytest.mark.parametrize(("topology", "count"), [("single", 1), ("ddp", 2), ("zero3", 2), ("fsdp2", 2)])
def test_without_an_index_the_main_process_warns_once_and_a_new_average_begins(
    implementation: Implementation, ranks: Ranks, tmp_path: Path, topology: str, count: int, torn: bool
) -> None:
    require(implementation, "shadow_weights")
    setup = Setup(implementation.name, topology, count, model="odd", steps=8, hyperparameters=ARGUMENTS)
    ranks(count).run(walked, setup, tmp_path / "out", 0, 4, save=True)
    directory = tmp_path / "out" / "checkpoint-4" / STATE
    if torn:
        (directory / "index.json").unlink()
    else:
        shutil.rmtree(directory)
    (warning,), *others = ranks(count).run(warnings_on_resuming, setup, tmp_path / "out", 4)
    assert [[]] * (count - 1) == others
    assert str(directory) in warning
    assert "lost" in warning
    for comparisons in ranks(count).run(walk_in_lockstep, setup, tmp_path / "out", tmp_path / "reference", 4):
        assert comparisons.divergence is None, str(comparisons.divergence)
        assert list(comparisons.steps) == [4, 5, 6, 7, 8]


@pytest.mark.clause("BEMA-11")
def test_a_save_in_which_a_rank_is_killed_leaves_no_state(
    implementation: Implementation, ranks: Ranks, tmp_path: Path
) -> None:
    require(implementation, "shadow_weights")
    setup = Setup(
        implementation.name,
        "ddp",
        2,
        model="odd",
        steps=5,
        hyperparameters=ARGUMENTS,
        training={"save_steps": 3},
    )
    with pytest.raises(RankFailure):
        ranks(2).run(train_once, setup, tmp_path, before=[Death("on_save", 3, rank=1)])
    checkpoint = tmp_path / "checkpoint-3"
    assert (checkpoint / "model.safetensors").is_file()
    (warning,), others = ranks(2).run(train_once, setup, tmp_path, resume_from=checkpoint)
    assert others == []
    assert str(checkpoint / STATE) in warning


# ── Damaged, foreign, unknown ─────────────────────────────────────────────────


class Payload:
    """Unpickling it creates a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def flip(file: Path, position: int) -> None:
    contents = bytearray(file.read_bytes())
    contents[position] ^= 1
    file.write_bytes(contents)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def with_unknown_version(file: Path) -> None:
    index = json.loads(file.read_text())
    (version,) = (key for key in index if "version" in key)
    file.write_text(json.dumps(index | {version: 999}))


FIRST, LAST, INDEX = "rank-00000-of-00002.safetensors", "rank-00001-of-00002.safetensors", "index.json"

DAMAGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "flipped bit in the tensors": (LAST, lambda file: flip(file, -1)),
    "flipped bit in the header": (LAST, lambda file: flip(file, 20)),
    "truncated file": (LAST, truncate),
    "empty file": (LAST, lambda file: file.write_bytes(b"")),
    "absent file": (LAST, lambda file: file.unlink()),
    "pickle for a file": (LAST, lambda file: file.write_bytes(pickle.dumps(Payload(file.parent / "executed")))),
    "another rank's file": (LAST, lambda file: shutil.copy(file.parent / FIRST, file)),
    "empty index": (INDEX, lambda file: file.write_bytes(b"")),
    "truncated index": (INDEX, truncate),
    "binary index": (INDEX, lambda file: file.write_bytes(b"\xff\x00\xfe")),
    "list for an index": (INDEX, lambda file: file.write_text("[]")),
    "index without content": (INDEX, lambda file: file.write_text("{}")),
    "unknown version": (INDEX, with_unknown_version),
}
"""The file that suffers, and what happens to it."""


@pytest.fixture(scope="module")
def checkpoint_of_two_ranks(
    implementation: Implementation, ranks: Ranks, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An output directory with a checkpoint at step 3 of two ranks, to be copied."""
    require(implementation, "shadow_weights")
    directory = tmp_path_factory.mktemp("saved")
    setup = Setup(implementation.name, "zero3", 2, model="odd", steps=6, hyperparameters=ARGUMENTS)
    ranks(2).run(walked, setup, directory, 0, 3, save=True)
    return directory


def assert_refused(messages: list[str | None], directory: Path, *files: str) -> None:
    """Every rank names a file, one of these, and the remedy."""
    for message in messages:
        assert message is not None
        assert any(str(directory / file) in message for file in files)
        assert re.search(f"delet.* {re.escape(str(directory))} .*afresh", message)


@pytest.mark.clause("BEMA-11")
@pytest.mark.parametrize(("topology", "count"), [("single", 1), ("ddp", 2), ("zero3", 2), ("fsdp2", 3)])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_state_is_an_error_on_every_rank_that_names_the_file(
    implementation: Implementation,
    ranks: Ranks,
    checkpoint_of_two_ranks: Path,
    tmp_path: Path,
    topology: str,
    count: int,
    damage: str,
) -> None:
    shutil.copytree(checkpoint_of_two_ranks, tmp_path / "out")
    directory = tmp_path / "out" / "checkpoint-3" / STATE
    file, inflict = DAMAGES[damage]
    inflict(directory / file)
    setup = Setup(implementation.name, topology, count, model="odd", steps=6, hyperparameters=ARGUMENTS)
    messages = ranks(count).run(error_on_resuming, setup, tmp_path / "out", 3)
    assert_refused(messages, directory, file)
    assert not (directory / "executed").exists()


FOREIGN: dict[str, dict[str, Any]] = {
    "another model": {"model": "batchnorm"},
    "another dtype": {"dtype": "bfloat16"},
    **{
        f"another {argument}": {"hyperparameters": ARGUMENTS | {argument: value}}
        for argument, value in {
            "update_freq": 3,
            "ema_power": 0.6,
            "bias_power": 0.0,
            "lag": 4,
            "update_after": 0,
            "multiplier": 2.0,
            "min_ema_multiplier": 0.01,
        }.items()
    },
    # At the step of the checkpoint, and after it: with these no state would have been missed.
    "update_after at this step": {"hyperparameters": ARGUMENTS | {"update_after": 3}},
    "update_after still to come": {"hyperparameters": ARGUMENTS | {"update_after": 5}},
}


@pytest.mark.clause("BEMA-11")
@pytest.mark.parametrize(("topology", "count"), [("single", 1), ("zero3", 2)])
@pytest.mark.parametrize("difference", FOREIGN)
def test_foreign_state_is_an_error_on_every_rank_that_says_what_differs(
    implementation: Implementation,
    ranks: Ranks,
    checkpoint_of_two_ranks: Path,
    tmp_path: Path,
    topology: str,
    count: int,
    difference: str,
) -> None:
    shutil.copytree(checkpoint_of_two_ranks, tmp_path / "out")
    setup = Setup(implementation.name, topology, count, model="odd", steps=6, hyperparameters=ARGUMENTS)
    foreign = setup.on(**FOREIGN[difference])
    messages = ranks(count).run(error_on_resuming, foreign, tmp_path / "out", 3)
    assert_refused(messages, tmp_path / "out" / "checkpoint-3" / STATE, INDEX, FIRST, LAST)
    for argument in foreign.hyperparameters.items() - ARGUMENTS.items():
        assert all(argument[0] in str(message) and str(argument[1]) in str(message) for message in messages)


@pytest.mark.clause("BEMA-11")
@pytest.mark.parametrize(("saved", "resumed"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_state_of_other_types_is_an_error_even_where_only_the_average_is_kept(
    implementation: Implementation, ranks: Ranks, tmp_path: Path, saved: str, resumed: str
) -> None:
    require(implementation, "shadow_weights")
    arguments = ARGUMENTS | {"bias_power": 0.0}
    setup = Setup(implementation.name, dtype=saved, model="odd", steps=3, hyperparameters=arguments)
    ranks(1).run(walked, setup, tmp_path, save=True)
    messages = ranks(1).run(error_on_resuming, setup.on(dtype=resumed), tmp_path, 3)
    assert_refused(messages, tmp_path / "checkpoint-3" / STATE, INDEX, "rank-00000-of-00001.safetensors")


@pytest.mark.clause("BEMA-11")
def test_state_of_other_trainable_parameters_is_an_error(
    implementation: Implementation, ranks: Ranks, tmp_path: Path
) -> None:
    require(implementation, "shadow_weights")
    for saved, resumed in (("qwen2", "frozen"), ("frozen", "qwen2")):
        setup = Setup(implementation.name, "ddp", 2, model=saved, steps=3, hyperparameters=ARGUMENTS)
        ranks(2).run(walked, setup, tmp_path / saved, save=True)
        messages = ranks(2).run(error_on_resuming, setup.on(model=resumed), tmp_path / saved, 3)
        assert_refused(messages, tmp_path / saved / "checkpoint-3" / STATE, INDEX)
        assert all("model.embed_tokens.weight" in str(message) for message in messages)


@pytest.mark.clause("BEMA-11")
def test_state_of_another_step_is_an_error(
    implementation: Implementation, ranks: Ranks, checkpoint_of_two_ranks: Path, tmp_path: Path
) -> None:
    shutil.copytree(checkpoint_of_two_ranks / "checkpoint-3", tmp_path / "checkpoint-5")
    setup = Setup(implementation.name, "zero3", 2, model="odd", steps=6, hyperparameters=ARGUMENTS)
    messages = ranks(2).run(error_on_resuming, setup, tmp_path, 5)
    assert_refused(messages, tmp_path / "checkpoint-5" / STATE, INDEX)


@pytest.mark.clause("BEMA-11")
def test_the_device_may_differ(
    implementation: Implementation, ranks: Ranks, checkpoint_of_two_ranks: Path, tmp_path: Path
) -> None:
    shutil.copytree(checkpoint_of_two_ranks, tmp_path / "out")
    arguments = ARGUMENTS | {"device": "cpu:0"}
    setup = Setup(implementation.name, "ddp", 2, model="odd", steps=6, hyperparameters=arguments)
    assert ranks(2).run(error_on_resuming, setup, tmp_path / "out", 3) == [None, None]


# ── Not writable ──────────────────────────────────────────────────────────────


@pytest.mark.clause("BEMA-11")
@pytest.mark.parametrize(
    ("topology", "count", "victim"),
    [("single", 1, None), ("ddp", 2, 1), ("zero2", 2, 0), ("zero3", 2, 1), ("fsdp2", 3, 2), ("fsdp2", 2, None)],
)
def test_a_full_disk_is_a_warning_and_training_goes_on(
    implementation: Implementation, ranks: Ranks, tmp_path: Path, topology: str, count: int, victim: int | None
) -> None:
    require(implementation, "shadow_weights")
    setup = Setup(implementation.name, topology, count, model="odd", steps=6, hyperparameters=ARGUMENTS)
    (expected,) = ranks(1).run(walked, setup.on(topology="single", ranks=1), tmp_path / "alone")
    # The checkpoint of step 3 is saved twice: what the second save could not replace must not be left.
    outcomes = ranks(count).run(save_on_full_disk, setup, tmp_path, [3, 3, 5], full_at=1, victim=victim)
    for shadow, _ in outcomes:
        assert all(same_bits(value, shadow[name]) for name, value in expected[6].items())
    (warning,), *others = (warnings for _, warnings in outcomes)
    assert [[]] * (count - 1) == others
    file = f"rank-{victim or 0:05d}-of-{count:05d}.safetensors"
    assert str(tmp_path / "checkpoint-3" / STATE / file) in warning
    assert not (tmp_path / "checkpoint-3" / STATE / INDEX).exists()
    for actual in ranks(count).run(walked, setup, tmp_path, 5):
        assert_continues(expected, actual, range(5, 7))


@pytest.mark.clause("BEMA-11")
@pytest.mark.parametrize(("topology", "count"), [("single", 1), ("zero3", 2)])
def test_a_directory_that_cannot_be_made_is_a_warning_and_training_goes_on(
    implementation: Implementation, ranks: Ranks, tmp_path: Path, topology: str, count: int
) -> None:
    require(implementation, "shadow_weights")
    setup = Setup(implementation.name, topology, count, model="odd", steps=4, hyperparameters=ARGUMENTS)
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / STATE).touch()
    ((_, (warning,)), *others) = ranks(count).run(save_on_full_disk, setup, tmp_path, [3], full_at=-1, victim=None)
    assert [message for _, warnings in others for message in warnings] == []
    assert str(tmp_path / "checkpoint-3" / STATE) in warning
