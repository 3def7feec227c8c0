"""The table of a training that was killed, moved or begun anew, and what trackers then have of it."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback
from truestep_fixtures import trackers
from truestep_fixtures.ranks import RankFailure, RankPool
from truestep_fixtures.training import train

from truestep_spec_tests.differential.cases import Death, logged_warnings, skip_the_reference
from truestep_spec_tests.differential.log_completions_cases import completing
from truestep_spec_tests.implementation import Implementation
from truestep_spec_tests.runs import Setup, Walk, walked

Ranks = Callable[[int], RankPool]
Rows = list[dict[str, Any]]


# ── What the ranks do ─────────────────────────────────────────────────────────


class Adding(TrainerCallback):
    """Adds a callback to the training at the end of a step."""

    def __init__(self, trainer: Any, callback: TrainerCallback, step: int) -> None:
        self.trainer, self.callback, self.step = trainer, callback, step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.trainer.add_callback(self.callback)


class Patience(TrainerCallback):
    """Gives trackers time to write what they have queued, at the end of a step."""

    def __init__(self, step: int, seconds: float) -> None:
        self.step, self.seconds = step, seconds

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            time.sleep(self.seconds)


def train_once(
    setup: Setup,
    directory: Path,
    *,
    killed_at: int | None = None,
    patience: float = 0.0,
    resume_from: Path | None = None,
    storage: Path | None = None,
    variables: dict[str, str] | None = None,
    callbacks: int = 1,
    added_at: int | None = None,
    times: int = 1,
) -> list[str]:
    """Trains, and returns the callbacks' warnings.

    Args:
        setup: The run.
        directory: The `output_dir`.
        killed_at: The step at whose end the process is killed, after the callbacks.
        patience: Seconds that pass before that.
        resume_from: A checkpoint.
        storage: Where trackers write.
        variables: More of the environment.
        callbacks: How many callbacks there are; the second completes one prompt.
        added_at: The step at whose end the callbacks are added, instead of at the beginning.
        times: How often the objects are trained.
    """
    os.environ |= variables or {}  # the pool puts the environment back
    config = setup.build_generation_config()
    second = setup.on(hyperparameters=setup.hyperparameters | {"num_prompts": 1, "freq": 1})

    def attach(trainer: Any) -> list[TrainerCallback]:
        subjects: list[TrainerCallback] = [one.subject(trainer, config) for one in (setup, second)][:callbacks]
        if added_at is not None:
            subjects = [Adding(trainer, subject, added_at) for subject in subjects]
        if killed_at is not None:
            subjects += [Patience(killed_at, patience), Death("on_step_end", killed_at)]
        return subjects

    with trackers.storage(directory / "storage" if storage is None else storage), logged_warnings() as warnings:
        result = train(
            setup.topology,
            setup.build_model(),
            output_dir=directory,
            attach=attach,
            steps=setup.steps,
            dtype=setup.torch_dtype,
            seed=setup.seed,
            resume_from_checkpoint=resume_from,
            **setup.evaluation(),
            **({"save_strategy": "steps", "save_steps": 3} | setup.training),
        )
        for _ in range(times - 1):
            assert result.trainer is not None
            result.trainer.train()
    return [message for message in warnings if "LogCompletions" in message]


def walk_of(setup: Setup, directory: Path) -> Walk:
    config = setup.build_generation_config()
    return Walk(setup, directory, attach=lambda trainer: [setup.subject(trainer, config)])


def rows_of(directory: Path, table: str = "completions") -> Rows:
    contents = (directory / f"{table}.jsonl").read_bytes().decode("utf-8")
    assert contents.endswith("\n") or not contents
    return [json.loads(line) for line in contents.split("\n") if line]


def steps_of(rows: Rows) -> list[int]:
    """The steps in their order; every one of them has the same number of rows."""
    steps = [row["step"] for row in rows]
    distinct = list(dict.fromkeys(steps))
    assert [step for step in distinct for _ in range(len(steps) // len(distinct))] == steps
    return distinct


def table_of(implementation: Implementation, topology: str = "single", ranks: int = 1, **changes: Any) -> Setup:
    skip_the_reference(implementation, "writes no file")
    hyperparameters = {"num_prompts": 3} | changes.pop("hyperparameters", {})
    return completing(implementation.name, topology, ranks, **({"steps": 7} | changes), hyperparameters=hyperparameters)


# ── Killed and resumed ────────────────────────────────────────────────────────


@pytest.mark.clause("LOGC-6", "LOGC-8")
def test_a_killed_training_that_is_resumed_has_the_rows_of_one_that_was_not(
    implementation: Implementation, ranks: Ranks, tmp_path: Path
) -> None:
    setup = table_of(implementation)
    ranks(1).run(train_once, setup, tmp_path / "whole", callbacks=2)
    with pytest.raises(RankFailure) as killed:
        ranks(1).run(train_once, setup, tmp_path / "killed", killed_at=4, callbacks=2)
    assert {"died"} == {report.outcome for report in killed.value.reports}
    tables = {"completions": [2, 4], "completions_2": [1, 2, 3, 4]}
    for table, steps in tables.items():  # what a step has written outlives the process
        assert steps == steps_of(rows_of(tmp_path / "killed", table))
    checkpoint = tmp_path / "killed" / "checkpoint-3"
    assert ranks(1).run(train_once, setup, tmp_path / "killed", resume_from=checkpoint, callbacks=2) == [[]]
    for table in tables:
        assert rows_of(tmp_path / "whole", table) == rows_of(tmp_path / "killed", table)
    for file in (tmp_path / "killed").glob("*.jsonl"):
        assert file.stem in tables


@pytest.fixture(scope="module")
def uninterrupted(implementation: Implementation, ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """The rows of a walk in one process."""
    directory = tmp_path_factory.mktemp("uninterrupted")
    ranks(1).run(walked, table_of(implementation), directory)
    return rows_of(directory)


@pytest.mark.clause("LOGC-8")
@pytest.mark.parametrize(
    ("saved", "placements"),
    [  # when nothing was logged, at a logging step, and between two of them
        *((step, [("single", 1), ("single", 1), ("single", 1)]) for step in (1, 2, 3)),
        *((step, [("ddp", 2), ("single", 1), ("ddp", 3)]) for step in (1, 3)),
        (2, [("zero3", 2), ("fsdp2", 3), ("single", 1)]),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "-".join(f"{where}{count}" for where, count in value),
)
def test_the_table_goes_on_on_other_ranks_and_in_other_topologies(
    implementation: Implementation,
    ranks: Ranks,
    uninterrupted: Rows,
    tmp_path: Path,
    saved: int,
    placements: list[tuple[str, int]],
) -> None:
    setup = table_of(implementation)
    first, second, third = [setup.on(topology=topology, ranks=count) for topology, count in placements]
    ranks(first.ranks).run(walked, first, tmp_path, 0, saved, save=True)
    ranks(first.ranks).run(walked, first, tmp_path, saved, 5)  # ends without a word
    ranks(second.ranks).run(walked, second, tmp_path, saved, 6, save=True)
    ranks(third.ranks).run(walked, third, tmp_path, saved, 4)  # from the older checkpoint again
    ranks(third.ranks).run(walked, third, tmp_path, saved)
    assert steps_of(uninterrupted) == [2, 4, 6]
    assert uninterrupted == rows_of(tmp_path)


TORN = {
    "NUL bytes": lambda whole, begin: whole[: begin + 9] + bytes(200),
    "NUL bytes and a line": lambda whole, begin: whole[: begin + 9] + bytes(200) + b"\n" + whole[begin:],
    "half a character": lambda whole, begin: whole[:begin] + b'{"step": 4, "prompt": "\xc3',
    "another line's end": lambda whole, begin: whole[:begin] + whole[begin + 7 :],
    "no object": lambda whole, begin: whole[:begin] + b"4\n[]\nnull\n",
    "no step": lambda whole, begin: whole[:begin] + b'{"prompt": "a"}\n',
    "a blank line": lambda whole, begin: whole[:begin] + b"\n\n",
}
"""Ends of a file that a machine which crashed may leave, from the whole file and the byte at which step 4 begins."""


@pytest.mark.clause("LOGC-8")
def test_rows_that_were_torn_anywhere_are_cut_off(implementation: Implementation, tmp_path: Path) -> None:
    setup = table_of(implementation, hyperparameters={"num_prompts": 2})
    walk = walk_of(setup, tmp_path)
    walk.begin()
    walk.go_to(3)
    file = tmp_path / "completions.jsonl"
    before = file.read_bytes()
    walk.events.save()
    walk.go_to(4)
    whole = file.read_bytes()
    assert whole.startswith(before)
    ends = {f"at byte {end}": whole[:end] for end in [*range(len(before), len(whole), 3), len(whole) - 1, len(whole)]}
    resumed = walk_of(setup, tmp_path)
    for name, contents in (ends | {name: tear(whole, len(before)) for name, tear in TORN.items()}).items():
        file.write_bytes(contents)
        with logged_warnings() as warnings:
            resumed.begin(3)
        assert (before, []) == (file.read_bytes(), warnings), name
    resumed.go_to(4)
    assert whole == file.read_bytes()


@pytest.mark.clause("LOGC-8")
def test_the_table_goes_on_in_another_directory_whatever_is_there(
    implementation: Implementation, ranks: Ranks, tmp_path: Path
) -> None:
    setup = table_of(implementation, training={"report_to": ["tensorboard"]})
    ranks(1).run(train_once, setup, tmp_path / "first")
    whole = rows_of(tmp_path / "first")
    ranks(1).run(train_once, setup.on(seed=1), tmp_path / "other", storage=tmp_path / "storage of the other")
    other = rows_of(tmp_path / "other")
    assert other != whole
    checkpoint, storage = tmp_path / "first" / "checkpoint-3", tmp_path / "first" / "storage"
    for directory in ("new", "other", "other"):  # at last as if that had been killed before it could save
        arguments = {"resume_from": checkpoint, "storage": storage}
        assert ranks(1).run(train_once, setup, tmp_path / directory, **arguments) == [[]]
        assert whole == rows_of(tmp_path / directory)
    assert other == rows_of(tmp_path / "other", "completions.1")
    assert whole == rows_of(tmp_path / "first")
    assert whole == trackers.rows("tensorboard", storage)  # a run that is continued had all of them


@pytest.mark.clause("LOGC-8")
def test_without_the_rows_of_a_checkpoint_there_is_a_warning(implementation: Implementation, tmp_path: Path) -> None:
    setup = table_of(implementation)
    walk = walk_of(setup, tmp_path)
    with logged_warnings() as warnings:
        walk.begin(3)
        walk.go_to(4)
    (warning,) = warnings
    assert str(tmp_path / "completions.jsonl") in warning
    assert steps_of(rows_of(tmp_path)) == [4]


# ── From one training to the next ─────────────────────────────────────────────


@pytest.mark.clause("LOGC-8")
def test_a_training_that_begins_anew_keeps_the_tables_before_it(implementation: Implementation, tmp_path: Path) -> None:
    seen = []
    for seed in (0, 1, 2):
        walk = walk_of(table_of(implementation, seed=seed), tmp_path)
        walk.begin()
        walk.go_to(2)
        seen.append(rows_of(tmp_path))
    assert steps_of(seen[2]) == [2]
    kept = [rows_of(tmp_path, f"completions.{number}") for number in (1, 2)]
    assert seen == [*kept, rows_of(tmp_path)]
    assert seen[0] != seen[1] != seen[2]


@pytest.mark.clause("LOGC-7", "LOGC-8")
def test_objects_that_are_trained_twice_log_two_tables(
    implementation: Implementation, ranks: Ranks, tmp_path: Path
) -> None:
    setup = table_of(implementation, training={"report_to": ["tensorboard", "trackio"]}, steps=5)
    assert ranks(1).run(train_once, setup, tmp_path, times=2) == [[]]
    first, second = rows_of(tmp_path, "completions.1"), rows_of(tmp_path)
    assert [2, 4] == steps_of(first) == steps_of(second)
    for name in ("tensorboard", "trackio"):
        assert first + second == trackers.rows(name, tmp_path / "storage"), name


@pytest.mark.clause("LOGC-1", "LOGC-8")
def test_a_callback_that_is_added_in_the_middle_logs_from_there_on(
    implementation: Implementation, ranks: Ranks, tmp_path: Path
) -> None:
    setup = table_of(implementation)
    ranks(1).run(train_once, setup, tmp_path / "whole")
    whole = rows_of(tmp_path / "whole")
    for added_at, steps in ((2, [2, 4, 6]), (3, [4, 6])):
        directory = tmp_path / f"added at {added_at}"
        ((*warnings,),) = ranks(1).run(train_once, setup, directory, added_at=added_at)
        assert [row for row in whole if row["step"] in steps] == rows_of(directory)
        assert len(warnings) == (steps != [2, 4, 6])
    # In a new training, in a directory where a table is.
    ranks(1).run(train_once, setup, tmp_path / "added at 3", added_at=3)
    assert [row for row in whole if row["step"] in (4, 6)] == rows_of(tmp_path / "added at 3")
    assert (tmp_path / "added at 3" / "completions.1.jsonl").exists()
    # In a training that is resumed, at a step whose rows are there already.
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    assert ranks(1).run(train_once, setup, tmp_path / "whole", resume_from=checkpoint, added_at=4) == [[]]
    assert whole == rows_of(tmp_path / "whole")


# ── Trackers ──────────────────────────────────────────────────────────────────


@pytest.mark.clause("LOGC-6", "LOGC-8")
def test_runs_that_are_continued_get_what_they_lack_and_new_ones_everything(
    implementation: Implementation, ranks: Ranks, tmp_path: Path
) -> None:
    names = ["wandb", "trackio", "mlflow", "tensorboard"]
    setup = table_of(implementation, training={"report_to": names, "logging_strategy": "steps", "logging_steps": 1})
    storage = tmp_path / "storage"
    variables = {"WANDB_RUN_ID": "continued", "WANDB_RESUME": "allow"}
    with pytest.raises(RankFailure) as killed:
        ranks(1).run(
            train_once,
            setup,
            tmp_path / "out",
            storage=storage,
            variables=variables,
            killed_at=4,
            patience=1.5,  # trackio writes every half a second
        )
    assert [report.outcome for report in killed.value.reports] == ["died"]
    for name in names:
        ((run, rows),) = trackers.rows_of_runs(name, storage).items()
        assert steps_of(rows) == [2, 4], name
        if name == "mlflow":
            variables["MLFLOW_RUN_ID"] = run
    checkpoint = tmp_path / "out" / "checkpoint-3"
    resumed = {"resume_from": checkpoint, "storage": storage, "variables": variables}
    assert ranks(1).run(train_once, setup, tmp_path / "out", **resumed) == [[]]
    whole = rows_of(tmp_path / "out")
    assert steps_of(whole) == [2, 4, 6]
    for name in ("wandb", "mlflow", "tensorboard"):
        (rows,) = trackers.rows_of_runs(name, storage).values()
        assert whole == rows, name
    before, after = trackers.rows_of_runs("trackio", storage).values()  # the Trainer continues none
    assert (whole[: len(before)], whole) == (before, after)


@pytest.mark.clause("LOGC-8")
@pytest.mark.parametrize("saved", [3, 4])
def test_rows_that_were_written_but_not_sent_are_sent_after_resuming(
    implementation: Implementation, tmp_path: Path, saved: int
) -> None:
    """The process is killed at step 4, when the local file has its rows and the tracker does not."""
    setup = table_of(implementation, training={"report_to": ["tensorboard"]})
    out, storage, copy = (tmp_path / name for name in ("out", "storage", "copy"))
    with trackers.storage(storage):
        walk = reporting_walk(setup, out)
        walk.begin()
        walk.go_to(2)
        walk.events.callback_handler.callbacks[0].tb_writer.flush()
        for directory in (out, storage):
            shutil.copytree(directory, copy / directory.name)
        walk.go_to(3)
        if saved == 3:
            walk.events.save()
        walk.go_to(4)
        if saved == 4:
            walk.events.save()
        walk.events.train_end()
        # Everything but the table and the checkpoint is as it was after step 2.
        (copy / "out" / "completions.jsonl").unlink()
        for directory in (out, storage):
            shutil.copytree(copy / directory.name, directory, dirs_exist_ok=True)
        for file in storage.rglob("events.out.*"):
            if not (copy / file.relative_to(tmp_path)).exists():
                file.unlink()
        resumed = reporting_walk(setup, out)
        resumed.begin(saved)
        resumed.go_to(6)
        resumed.events.train_end()
    assert steps_of(rows_of(out)) == [2, 4, 6]
    assert rows_of(out) == trackers.rows("tensorboard", storage)


def reporting_walk(setup: Setup, directory: Path) -> Walk:
    walk = walk_of(setup, directory)
    walk.events.callback_handler.callbacks.insert(0, TensorBoardCallback())
    return walk
