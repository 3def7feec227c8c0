"""The comparison of completions can fail: a row that is wrong by a letter is reported, and nothing else is."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from truestep_fixtures.ranks import RankPool
from truestep_reference import LogCompletionsCallback as ReferenceLogCompletionsCallback

from truestep_spec_tests.lockstep import Comparison, Comparisons
from truestep_spec_tests.lockstep.log_completions import COUNT
from truestep_spec_tests.observe import completions
from truestep_spec_tests.recording import Recorded
from truestep_spec_tests.runs import (
    Outcome,
    Setup,
    first_difference_in_one_process,
    follow_in_lockstep,
    same_bits,
    train_in_lockstep,
    walked,
)

Ranks = Callable[[int], RankPool]

CALLBACK = "LogCompletionsCallback"
STEP, ROW = 4, 5


# ── Subjects ──────────────────────────────────────────────────────────────────


class Right(ReferenceLogCompletionsCallback):
    """The reference itself, which writes its table to the file that users read."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_step_end(args, state, control, **kwargs)
        rows = [dict(row) for row in self.table]
        if state.global_step == STEP:
            self.make_a_mistake(rows)
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        if state.is_world_process_zero:
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            Path(args.output_dir, "completions.jsonl").write_text("".join(lines), encoding="utf-8")

    def make_a_mistake(self, rows: list[dict[str, Any]]) -> None:
        """Changes what is shown at one step."""


class AnotherLetter(Right):
    def make_a_mistake(self, rows: list[dict[str, Any]]) -> None:
        rows[ROW]["completion"] += "!"


class StepAsText(Right):
    def make_a_mistake(self, rows: list[dict[str, Any]]) -> None:
        rows[ROW]["step"] = str(rows[ROW]["step"])


class OtherColumns(Right):
    def make_a_mistake(self, rows: list[dict[str, Any]]) -> None:
        rows[ROW]["rank"] = 0


class ColumnsInAnotherOrder(Right):
    def make_a_mistake(self, rows: list[dict[str, Any]]) -> None:
        rows[ROW]["step"] = rows[ROW].pop("step")


class RowsExchanged(Right):
    def make_a_mistake(self, rows: list[dict[str, Any]]) -> None:
        rows[ROW], rows[ROW - 1] = rows[ROW - 1], rows[ROW]


class LastRowMissing(Right):
    def make_a_mistake(self, rows: list[dict[str, Any]]) -> None:
        rows.pop()


class RowTwice(Right):
    def make_a_mistake(self, rows: list[dict[str, Any]]) -> None:
        rows.append(rows[-1])


class NotJSON(Right):
    def make_a_mistake(self, rows: list[dict[str, Any]]) -> None:
        rows[ROW]["completion"] = float("nan")


class WithoutAFile(ReferenceLogCompletionsCallback):
    """Shows its table as an attribute, with the values of rows alone and steps as text."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.table = [dict(zip(("step", "prompt", "completion"), row, strict=True)) for row in self.table]
        super().on_step_end(args, state, control, **kwargs)
        self.table = [(str(row["step"]), row["prompt"], row["completion"]) for row in self.table]


class CompletesBesideTheTraining(ReferenceLogCompletionsCallback):
    """Has other rows where there are ranks."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_step_end(args, state, control, **kwargs)
        for row in self.table if dist.is_initialized() else ():
            row["completion"] = "as many ranks would say"


def setup_of(subject: type[Any], topology: str = "ddp", ranks: int = 2, **changes: Any) -> Setup:
    implementation = f"{CALLBACK}={subject.__module__}.{subject.__qualname__}"
    hyperparameters = {"num_prompts": 3, "freq": 2}
    setup = Setup(implementation, topology, ranks, "float64", steps=5, callback=CALLBACK)
    return setup.on(**{"hyperparameters": hyperparameters, "generation": {"max_new_tokens": 3}} | changes)


def compare(setup: Setup, ranks: Ranks, directory: Path, function: Any = follow_in_lockstep) -> Comparisons:
    outcomes: list[Outcome] = ranks(setup.ranks).run(function, setup, directory)
    first = outcomes[0].comparisons
    for outcome in outcomes[1:]:
        assert repr(outcome.comparisons) == repr(first)
    return first


# ── Comparison ────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("subject", [Right, WithoutAFile])
@pytest.mark.parametrize("function", [train_in_lockstep, follow_in_lockstep])
def test_what_is_right_passes_at_every_step(subject: type[Any], function: Any, ranks: Ranks, tmp_path: Path) -> None:
    comparisons = compare(setup_of(subject), ranks, tmp_path, function)
    assert comparisons.divergence is None
    assert list(comparisons.steps) == list(range(6))
    assert comparisons.worst == 0.0


@pytest.mark.parametrize(
    "subject", [AnotherLetter, StepAsText, OtherColumns, ColumnsInAnotherOrder, NotJSON, RowsExchanged]
)
def test_a_row_that_differs_is_shown_beside_the_one_that_is_right(
    subject: type[Right], ranks: Ranks, tmp_path: Path
) -> None:
    comparisons = compare(setup_of(subject), ranks, tmp_path)
    divergence = comparisons.divergence
    assert divergence is not None
    assert list(comparisons.steps) == list(range(STEP + 1))
    # As many rows as are wrong, however far their letters are apart.
    rows_outside = 1 + (subject is RowsExchanged)
    assert comparisons.steps[STEP] == Comparison(math.inf, 0.0, values=ROW + 2, outside=rows_outside)
    assert divergence.step == STEP
    assert divergence.parameter == f"row {ROW - (subject is RowsExchanged)}"
    assert f"step {STEP}, rank 0, {divergence.parameter}: subject {{" in str(divergence)
    assert f'reference {{"step": {STEP}, "prompt": ' in str(divergence)


def test_a_row_that_is_missing_is_reported(ranks: Ranks, tmp_path: Path) -> None:
    divergence = compare(setup_of(LastRowMissing), ranks, tmp_path).divergence
    assert divergence is not None
    assert (divergence.step, divergence.parameter, divergence.subject) == (STEP, f"row {ROW}", "nothing")


def test_a_row_too_many_is_reported(ranks: Ranks, tmp_path: Path) -> None:
    divergence = compare(setup_of(RowTwice), ranks, tmp_path).divergence
    assert divergence is not None
    assert (divergence.step, divergence.parameter) == (STEP, COUNT)
    assert (divergence.subject, divergence.reference) == (ROW + 2, ROW + 1)


def test_a_real_training_ends_at_the_first_divergence(ranks: Ranks, tmp_path: Path) -> None:
    comparisons = compare(setup_of(AnotherLetter), ranks, tmp_path, train_in_lockstep)
    assert list(comparisons.steps) == list(range(STEP + 1))


# ── One process ───────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("subject", "differs"), [(Right, False), (CompletesBesideTheTraining, True)])
def test_the_recorded_trajectory_is_followed_in_a_single_process(
    subject: type[Any], differs: bool, ranks: Ranks, tmp_path: Path
) -> None:
    recording = tmp_path / "recording"
    setup = setup_of(subject, seed=3, generation={"max_new_tokens": 3, "do_sample": True})
    ranks(2).run(train_in_lockstep, setup, tmp_path, recording=recording)
    assert set(Recorded(recording, "theta")[2]) == {name for name, _ in setup.build_model().named_parameters()}
    difference = first_difference_in_one_process(setup, recording, tmp_path / "alone")
    assert difference == ("step 2, row 0" if differs else None)


# ── What is compared says something ───────────────────────────────────────────


def rows(setup: Setup, directory: Path, **kwargs: Any) -> list[dict[str, Any]]:
    """The table of a walk in this process."""
    shown = walked(setup, directory, **kwargs)[setup.steps]
    return [json.loads(bytes(shown[f"row {number}"].tolist())) for number in range(int(shown[COUNT]))]


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("prompts", ["mixed", "uneven", "conversations", "two"])
def test_different_prompts_and_steps_have_different_completions(prompts: str, do_sample: bool, tmp_path: Path) -> None:
    setup = setup_of(Right, "single", 1, prompts=prompts, steps=4, hyperparameters={"freq": 2, "num_prompts": 3})
    found = rows(setup.on(generation={"max_new_tokens": 6, "do_sample": do_sample}), tmp_path)
    assert len({row["prompt"] for row in found}) == len(found) / 2
    assert len({row["completion"] for row in found}) > 0.7 * len(found)
    assert all(row["completion"].isprintable() for row in found[: len(found) // 2])


def test_walks_show_the_same_table_at_the_same_step(tmp_path: Path) -> None:
    setup = setup_of(Right, "single", 1)
    one, other = (walked(setup, tmp_path / name) for name in ("one", "other"))
    assert list(one) == list(range(6))
    assert [int(one[step][COUNT]) for step in one] == [0, 0, 3, 3, 6, 6]
    assert all(same_bits(value, other[step][name]) for step in one for name, value in one[step].items())


def test_a_file_is_read_before_an_attribute(tmp_path: Path) -> None:
    class State:
        is_world_process_zero = True

    class Args:
        output_dir = str(tmp_path)

    class Shows:
        table = ({"step": 1, "prompt": "ä", "completion": ""},)

    expected = '{"step": 1, "prompt": "ä", "completion": ""}'
    assert completions(Shows(), Args, State) == [expected]  # type: ignore[arg-type]
    (tmp_path / "completions.jsonl").write_text('{"step":2}\n{"step": NaN}\n')
    assert completions(Shows(), Args, State) == ['{"step": 2}', '{"step": NaN}']  # type: ignore[arg-type]
