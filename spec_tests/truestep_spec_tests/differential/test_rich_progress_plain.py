"""What a pipe or a log file gets of a real training: a plain line now and then."""

import io
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer, TrainerCallback
from truestep_fixtures.data import language_dataset
from truestep_fixtures.training import TrainResult, train

from truestep_spec_tests.differential.cases import skip_the_reference
from truestep_spec_tests.implementation import Implementation
from truestep_spec_tests.properties.rich_progress_cases import require_view

LOGGING = {"logging_strategy": "steps"}


@pytest.fixture(autouse=True)
def _prints(implementation: Implementation) -> None:
    skip_the_reference(implementation, "prints nothing")


def trained(display: TrainerCallback, directory: Path, **training: Any) -> TrainResult:
    usual = {"steps": 20, "logging_steps": 5} | LOGGING
    return train("single", "odd", output_dir=directory, callbacks=[display], **usual | training)


def lines_of(printed: str) -> list[str]:
    """Lines of the display, among others."""
    return [line for line in printed.splitlines() if line.startswith(("training ", "evaluation ", "prediction "))]


def beginnings(lines: list[str]) -> list[str]:
    """How lines begin, up to the first comma or colon."""
    return [line.replace(":", ",").partition(",")[0] for line in lines]


@pytest.mark.clause("RICH-5")
def test_there_is_something_to_read_while_the_training_goes_on_and_no_control_code(
    implementation: Implementation, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    printed: list[str] = []

    class Reading(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            printed.append(capsys.readouterr().out)

    display = implementation.RichProgressCallback()
    train("single", "odd", output_dir=tmp_path, callbacks=[display, Reading()], steps=20)
    assert "\x1b" not in "".join([*printed, capsys.readouterr().out])
    assert len("".join(printed).splitlines()) > 1


@pytest.mark.clause("RICH-5")
def test_there_are_lines_at_the_start_whenever_a_part_of_the_steps_is_done_and_at_the_end(
    implementation: Implementation, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    require_view(implementation)
    trained(implementation.RichProgressCallback(plain_percent=30), tmp_path)
    printed = capsys.readouterr()
    begin, *middle, end = lines_of(printed.out)
    assert beginnings(middle) == [f"training at step {step}/20" for step in (6, 12, 18)]
    assert begin == "training begins at step 0/20, epoch 0.00/2"
    assert end.startswith("training ended at step 20/20, epoch 1.67/2, 0:")
    assert "\x1b" not in printed.out + printed.err
    assert "%|" not in printed.err


@pytest.mark.clause("RICH-5")
def test_a_line_has_the_metrics_that_no_line_has_had_and_the_last_one_has_all(
    implementation: Implementation, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    require_view(implementation)
    trained(implementation.RichProgressCallback(plain_percent=20), tmp_path, logging_steps=6)
    _, *middle, end = lines_of(capsys.readouterr().out)
    assert [", learning_rate " in line for line in middle] == [False, True, True, False, True]
    assert all(f" {name} " in end for name in ("loss", "learning_rate", "train_loss"))


@pytest.mark.clause("RICH-5")
def test_there_is_a_line_when_enough_time_has_passed(
    implementation: Implementation, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    require_view(implementation)
    now = 1000.0

    class Slow(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            nonlocal now
            now += 0.5

    monkeypatch.setattr(time, "monotonic", lambda: now)
    display = implementation.RichProgressCallback(plain_percent=1000, plain_seconds=3)
    train("single", "odd", output_dir=tmp_path, callbacks=[display, Slow()], steps=20)
    _, *middle, end = lines_of(capsys.readouterr().out)
    assert beginnings(middle) == [f"training at step {step}/20" for step in (6, 12, 18)]
    assert middle[0].endswith(", 0:03 elapsed, 2 steps/s, 0:07 left")
    assert end.startswith("training ended at step 20/20, epoch 1.67/2, 0:10 elapsed, 2 steps/s")


@pytest.mark.clause("RICH-5")
def test_there_is_one_line_for_each_evaluation_or_prediction(
    implementation: Implementation, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    require_view(implementation)
    datasets = {"math": language_dataset(4), "code": language_dataset(4)}
    display = implementation.RichProgressCallback(plain_percent=1000)
    trainer = trained(display, tmp_path, eval_dataset=datasets, eval_strategy="steps", eval_steps=10).trainer
    assert isinstance(trainer, Trainer)
    _, *middle, _ = lines_of(capsys.readouterr().out)
    expected = [f"evaluation of eval_{part} at step {step}/20" for step in (10, 20) for part in datasets]
    assert expected == beginnings(middle)
    assert all(line.count("_loss ") == 1 for line in middle)
    trainer.evaluate()
    trainer.predict(datasets["code"])
    outside = ["evaluation of eval_math ended", "evaluation of eval_code ended", "prediction ended"]
    lines = lines_of(capsys.readouterr().out)
    assert outside == beginnings(lines)
    metrics = [line.partition(": ")[2].split()[0] for line in lines]
    assert metrics == ["eval_math_loss", "eval_code_loss", "test_loss"]


@pytest.mark.clause("RICH-5")
def test_a_resumed_training_begins_at_its_step(
    implementation: Implementation, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    require_view(implementation)
    saved = {"save_strategy": "steps", "save_steps": 10}
    trained(implementation.RichProgressCallback(), tmp_path, **saved)
    capsys.readouterr()
    trained(implementation.RichProgressCallback(), tmp_path, resume_from_checkpoint=tmp_path / "checkpoint-10", **saved)
    assert capsys.readouterr().out.startswith("training begins at step 10/20, epoch 0.83/2\ntraining at step 12/20")


@pytest.mark.clause("RICH-4", "RICH-5")
def test_a_training_that_raised_is_not_said_to_have_ended(
    implementation: Implementation, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    require_view(implementation)

    class Raising(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise RuntimeError("no more")

    display = implementation.RichProgressCallback()
    with pytest.raises(RuntimeError, match="no more"):
        train("single", "odd", output_dir=tmp_path, callbacks=[display, Raising()], steps=4)
    train("single", "odd", output_dir=tmp_path, callbacks=[display], steps=4)
    found = [line.split(" at ")[0] for line in lines_of(capsys.readouterr().out)]
    assert [line for line in found if line != "training"] == [
        "training begins",
        "training interrupted",
        "training begins",
        "training ended",
    ]


@pytest.mark.clause("RICH-4")
@pytest.mark.parametrize("output", ["full disk", "closed pipe", "closed stream", "none"])
def test_output_that_takes_no_line_does_not_end_the_training(
    implementation: Implementation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    stream: Any = None
    if output == "full disk":
        stream = open("/dev/full", "w", encoding="utf-8")  # noqa: SIM115, PTH123
    elif output == "closed pipe":
        reader, writer = os.pipe()
        os.close(reader)
        stream = os.fdopen(writer, "w")
    elif output == "closed stream":
        stream = io.StringIO()
        stream.close()
    monkeypatch.setattr(sys, "stdout", stream)
    assert trained(implementation.RichProgressCallback(), tmp_path).state.global_step == 20
    monkeypatch.undo()
    if output in ("full disk", "closed pipe"):
        with suppress(OSError):
            stream.close()  # with what it could not write


@pytest.mark.clause("RICH-5")
def test_what_the_encoding_does_not_have_is_escaped(
    implementation: Implementation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_view(implementation)

    class Named(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            logs["größer"] = 1.0

    file = tmp_path / "log"
    with file.open("w", encoding="ascii") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        display = implementation.RichProgressCallback()
        train(
            "single",
            "odd",
            output_dir=tmp_path,
            callbacks=[Named(), display],
            logging_strategy="steps",
            logging_steps=1,
        )
    assert r"gr\xf6\xdfer 1.000" in file.read_text(encoding="ascii").splitlines()[-1]
