"""Where rows go: the local file and real trackers, and what becomes of them when one fails."""

import importlib
import json
import math
import shutil
import sqlite3
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from datasets import load_dataset
from transformers import TrainerCallback
from transformers.integrations import CometCallback, TensorBoardCallback, WandbCallback
from truestep_fixtures import data, models, trackers
from truestep_fixtures.ranks import RankPool
from truestep_fixtures.training import train

from truestep_spec_tests.differential.cases import full_disk, logged_warnings, skip_the_reference
from truestep_spec_tests.differential.log_completions_cases import completing
from truestep_spec_tests.implementation import Implementation
from truestep_spec_tests.options import require, takes
from truestep_spec_tests.runs import Setup, Walk

Ranks = Callable[[int], RankPool]
Rows = list[dict[str, Any]]

MARKUP = "\n\r\t\x0b\x00\x1b |\"'`,;:<>&*_~#[]()\\!$-+=^{}%0"
"""What means something to Markdown, HTML, CSV, JSON or a terminal."""

PROMPTS: Rows = [
    {"prompt": "a | b \\| c\n\n| --- |\r\n\n  \n", "topic": None, "hard": True, "difficulty": None, "weight": 1e-300},
    {"prompt": '"quoted", \'so\' ""\n,;', "topic": "null", "hard": None, "difficulty": 0, "weight": 0.1},
    {"prompt": "\u2028\u2029\x85\x0c\ufeff\u200b", "topic": '"x"', "hard": True, "difficulty": 7, "weight": None},
    {"prompt": "<b>&amp;</b><br>&#124;<!--", "topic": "", "hard": False, "difficulty": 2**53 + 1, "weight": -0.0},
    {"prompt": "*a* _b_ `c` [d](e) ~~f~~ # g", "topic": "5", "hard": None, "difficulty": -1, "weight": 1e22},
    {"prompt": "👩‍👩‍👧 é e\u0301 猫 \U0010ffff", "topic": " a  b ", "hard": True, "difficulty": 1, "weight": 2.0},
    {"prompt": "\x00\x1b[31m\x7f $x$ =1+1", "topic": "NaN", "hard": False, "difficulty": 3, "weight": math.pi},
    {"prompt": "", "topic": "\ud83d is half of a pair", "hard": False, "difficulty": 4, "weight": 0.5},
]
"""Text that breaks tables that are written carelessly, and values of all types, with some that only look like them."""

FEWER = 3
"""How many of the prompts a second callback completes."""


# ── What the ranks do ─────────────────────────────────────────────────────────


class AtStep(TrainerCallback):
    """Does something at the end of a step, before the callbacks that are added later."""

    def __init__(self, step: int, action: Callable[[], object]) -> None:
        self.step, self.action = step, action

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.action()


def train_reporting(
    setup: Setup,
    directory: Path,
    storage: Path,
    *,
    callbacks: int = 1,
    spoil: Callable[[Any, Path], Sequence[TrainerCallback]] | None = None,
) -> list[str]:
    """Trains with text that is hard to write, and returns the callbacks' warnings.

    Args:
        setup: The run.
        directory: The `output_dir`.
        storage: Where the trackers write.
        callbacks: How many callbacks there are. The second completes fewer prompts, and at every step.
        spoil: Has trackers of a trainer fail, now or by callbacks; the trackers write to the path.
    """
    config = setup.build_generation_config()
    second = setup.on(hyperparameters=setup.hyperparameters | {"num_prompts": FEWER, "freq": 1})

    def attach(trainer: Any) -> list[TrainerCallback]:
        before = [] if spoil is None else spoil(trainer, storage)
        return [*before, *[one.subject(trainer, config) for one in (setup, second)][:callbacks]]

    model = models.speaking(models.build(setup.model, setup.torch_dtype, setup.seed), data.END)
    with trackers.storage(storage), logged_warnings() as warnings:
        train(
            setup.topology,
            model,
            output_dir=directory,
            attach=attach,
            steps=setup.steps,
            dtype=setup.torch_dtype,
            seed=setup.seed,
            **setup.evaluation() | {"eval_dataset": data.Rows(PROMPTS)},
            **setup.training,
        )
    return [message for message in warnings if "LogCompletions" in message]


COLUMNS = ("topic", "hard", "difficulty", "weight")


def hard_to_write(implementation: Implementation, topology: str = "single", ranks: int = 1, **changes: Any) -> Setup:
    """A run in which completions consist of markup, as prompts do, and all is reported at once."""
    tokens = {token for letter in MARKUP for token in data.tokenizer()(letter)["input_ids"]}
    training = {"report_to": list(trackers.TRACKERS), "logging_strategy": "steps", "logging_steps": 1}
    generation = {
        "max_new_tokens": 9,
        "do_sample": True,
        "suppress_tokens": [token for token in range(models.VOCABULARY) if token not in tokens],
    }
    return completing(
        implementation.name,
        topology,
        ranks,
        dtype="float32",
        hyperparameters={"columns": COLUMNS} if takes(implementation.LogCompletionsCallback, "columns") else {},
        generation=generation,
        training=training | changes.pop("training", {}),
        **changes,
    )


# ── What is on disk ───────────────────────────────────────────────────────────


def local_rows(directory: Path, table: str = "completions") -> Rows:
    """The rows of a local file. A line ends at a newline and nowhere else."""
    contents = (directory / f"{table}.jsonl").read_bytes().decode("utf-8")
    assert contents.endswith("\n")
    return [json.loads(line) for line in contents.removesuffix("\n").split("\n")]


def exactly(rows: Rows) -> list[list[tuple[str, type, str | bytes]]]:
    """Rows with the types of their values: `1 == True == 1.0`.

    Half of a surrogate pair, which UTF-8 has no bytes for, may be there as its escape.
    """
    return [
        [
            (name, type(value), value.encode("utf-8", "backslashreplace") if isinstance(value, str) else repr(value))
            for name, value in row.items()
        ]
        for row in rows
    ]


def metrics(storage: Path) -> dict[str, list[Any]]:
    """What Weights & Biases and Trackio have of the Trainer's metrics, with the steps that they count themselves."""
    with closing(sqlite3.connect(next((storage / "trackio").glob("*.db")))) as database:
        found = database.execute("SELECT step, metrics FROM metrics ORDER BY id").fetchall()
    lines = {
        "wandb": [(line["_step"], line) for line in trackers.history(storage)],
        "trackio": [(step, json.loads(line)) for step, line in found],
    }
    names = ("train/loss", "train/grad_norm", "train/epoch", "train/global_step", "loss", "grad_norm", "epoch")
    return {
        name: [
            (step, {key: value for key, value in line.items() if key in names})
            for step, line in of_tracker
            if any(key in names for key in line)
        ]
        for name, of_tracker in lines.items()
    }


# ── All at once ───────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def reported(implementation: Implementation, ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a training with two callbacks that reported to all trackers, in `out` and `storage`."""
    skip_the_reference(implementation, "writes no table and talks to no tracker")
    require(implementation.LogCompletionsCallback, ["columns"])
    directory = tmp_path_factory.mktemp("reported")
    task = (hard_to_write(implementation), directory / "out", directory / "storage")
    assert ranks(1).run(train_reporting, *task, callbacks=2) == [[]]
    return directory


@pytest.mark.clause("LOGC-6", "LOGC-11")
def test_all_trackers_have_the_rows_of_the_local_file_whatever_text_is_in_them(reported: Path) -> None:
    expected = {"completions": [2, 4], "completions_2": [1, 2, 3, 4]}
    for table, prompts in (("completions", PROMPTS), ("completions_2", PROMPTS[:FEWER])):
        rows = local_rows(reported / "out", table)
        assert [step for step in expected[table] for _ in prompts] == [row["step"] for row in rows]
        for number, row in enumerate(rows):
            completion = row.pop("completion")
            assert [prompts[number % len(prompts)]] == [{key: row[key] for key in row if key != "step"}]
            row["completion"] = completion
            assert set(completion) <= set(MARKUP)
        local = exactly(local_rows(reported / "out", table))
        for name in trackers.TRACKERS:
            assert local == exactly(trackers.rows(name, reported / "storage", table)), name


@pytest.mark.clause("LOGC-6")
def test_datasets_reads_the_local_file(reported: Path) -> None:
    file = reported / "out" / "completions_2.jsonl"
    read = load_dataset("json", data_files=str(file), split="train", cache_dir=str(reported / "cache"))
    assert exactly(local_rows(reported / "out", "completions_2")) == exactly(list(read))


@pytest.mark.clause("LOGC-6")
def test_no_step_of_a_run_is_consumed(implementation: Implementation, ranks: Ranks, reported: Path) -> None:
    setup = hard_to_write(implementation, training={"report_to": ["wandb", "trackio"]})
    ranks(1).run(train_reporting, setup, reported / "without", reported / "storage without", callbacks=0)
    expected = metrics(reported / "storage without")
    assert len(expected["wandb"]) > setup.steps
    assert expected == metrics(reported / "storage")


@pytest.mark.clause("LOGC-6", "LOGC-7")
def test_on_several_ranks_the_main_process_alone_reports(
    implementation: Implementation, ranks: Ranks, tmp_path: Path
) -> None:
    skip_the_reference(implementation, "writes no table and talks to no tracker")
    names = ["trackio", "tensorboard"]
    setup = hard_to_write(implementation, "ddp", 2, training={"report_to": names})
    # A process without a run would warn.
    assert ranks(2).run(train_reporting, setup, tmp_path / "out", tmp_path / "storage") == [[], []]
    local = local_rows(tmp_path / "out")
    assert [step for step in (2, 4) for _ in PROMPTS] == [row["step"] for row in local]
    for name in names:
        (rows,) = trackers.rows_of_runs(name, tmp_path / "storage").values()
        assert exactly(local) == exactly(rows), name


# ── Failing ───────────────────────────────────────────────────────────────────


def spoil_all_but_two(trainer: Any, storage: Path) -> list[TrainerCallback]:
    """Weights & Biases and MLflow fail after some rows, Comet has no experiment; the other two are well."""
    for callback in (WandbCallback, CometCallback):  # which would end the training themselves
        trainer.remove_callback(callback)
    wandb = importlib.import_module("wandb")
    wandb.init(project="of my own")

    def replace_artifacts() -> None:
        (artifacts,) = (storage / "mlflow").glob("*/*/artifacts/completions")
        shutil.rmtree(artifacts)
        artifacts.write_text("a file where a directory was")

    return [AtStep(3, wandb.finish), AtStep(5, replace_artifacts)]


@pytest.mark.clause("LOGC-7")
def test_a_tracker_that_fails_is_one_warning_and_affects_nothing_else(
    implementation: Implementation, ranks: Ranks, tmp_path: Path
) -> None:
    skip_the_reference(implementation, "writes no table and talks to no tracker")
    setup = hard_to_write(implementation, steps=10)
    task = (setup, tmp_path / "out", tmp_path / "storage")
    ((*warnings,),) = ranks(1).run(train_reporting, *task, spoil=spoil_all_but_two)
    for name, warning in zip(("comet_ml", "wandb", "mlflow"), warnings, strict=True):
        assert name in warning
    local = local_rows(tmp_path / "out")
    assert [step for step in (2, 4, 6, 8, 10) for _ in PROMPTS] == [row["step"] for row in local]
    for name, count in (("wandb", 1), ("comet_ml", 0), ("trackio", 5), ("tensorboard", 5)):
        rows = trackers.rows(name, tmp_path / "storage")
        assert exactly(local[: count * len(PROMPTS)]) == exactly(rows), name


def walk_of(implementation: Implementation, directory: Path, **changes: Any) -> Walk:
    setup = completing(implementation.name, **({"hyperparameters": {"num_prompts": 2}, "steps": 10} | changes))
    config = setup.build_generation_config()
    return Walk(setup, directory, attach=lambda trainer: [setup.subject(trainer, config)])


def steps(directory: Path) -> list[int]:
    return [row["step"] for row in local_rows(directory)]


@pytest.mark.clause("LOGC-7")
@pytest.mark.parametrize("name", trackers.TRACKERS)
def test_a_tracker_that_is_not_installed_is_one_warning(
    implementation: Implementation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    skip_the_reference(implementation, "talks to no tracker")
    monkeypatch.setitem(sys.modules, name, None)  # importing it raises what it raises where it is not there
    walk = walk_of(implementation, tmp_path)
    walk.events.args.report_to = [name, "azure_ml"]  # the latter has no tables
    walk.begin()
    with logged_warnings() as warnings:
        walk.go_to(6)
        walk.events.train_end()
    assert [name] == [one for message in warnings for one in trackers.TRACKERS if one in message]
    assert steps(tmp_path) == [2, 2, 4, 4, 6, 6]


def log_on_full_disk(implementation: Implementation, directory: Path, room: int) -> tuple[list[str], list[str]]:
    """The local file after some steps of a training in which the disk is full meanwhile, and the warnings."""
    walk = walk_of(implementation, directory)
    file, contents = directory / "completions.jsonl", []
    walk.begin()
    with logged_warnings() as warnings:
        walk.go_to(2)
        contents.append(file.read_text())
        with full_disk(file.stat().st_size + room):
            walk.go_to(7)
            contents.append(file.read_text())
        walk.go_to(8)
        contents.append(file.read_text())
        with full_disk(file.stat().st_size + room):
            walk.go_to(10)
        walk.events.train_end()
        contents.append(file.read_text())
    return contents, warnings


@pytest.mark.clause("LOGC-7")
@pytest.mark.parametrize("room", [0, 50, 150])
def test_rows_that_found_no_room_are_written_once_there_is(
    implementation: Implementation, ranks: Ranks, tmp_path: Path, room: int
) -> None:
    skip_the_reference(implementation, "writes no table")
    ((contents, warnings),) = ranks(1).run(log_on_full_disk, implementation, tmp_path / "full", room)
    (warning,) = warnings
    assert str(tmp_path / "full" / "completions.jsonl") in warning
    before, full, after, end = contents
    assert before == full
    assert after.startswith(before)
    assert end.startswith(after)
    ranks(1).run(log_on_full_disk, implementation, tmp_path / "roomy", 1 << 20)
    assert (tmp_path / "roomy" / "completions.jsonl").read_text() == end


@pytest.mark.clause("LOGC-7")
def test_trackers_get_rows_that_no_local_file_can_take(implementation: Implementation, tmp_path: Path) -> None:
    skip_the_reference(implementation, "writes no table and talks to no tracker")
    directory = tmp_path / "out"
    with trackers.storage(tmp_path / "storage"), logged_warnings() as warnings:
        walk = walk_of(implementation, directory)
        walk.events.args.report_to = ["tensorboard"]
        walk.events.callback_handler.callbacks.insert(0, TensorBoardCallback())
        directory.write_text("a file where the directory of the training should be")
        walk.begin()
        walk.go_to(6)
        directory.unlink()
        walk.go_to(7)
        walk.events.save()
        assert steps(directory) == [2, 2, 4, 4, 6, 6]
        walk.go_to(8)
        walk.events.train_end()
    for file in ("completions.jsonl", "completions.sent.json"):
        assert len([message for message in warnings if str(directory / file) in message]) <= 1, file
    assert any(str(directory / "completions.jsonl") in message for message in warnings)
    assert exactly(local_rows(directory)) == exactly(trackers.rows("tensorboard", tmp_path / "storage"))
