"""The comparison of evaluations in Weave can fail: whatever is wrong in one is reported, and nothing else is."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from truestep_fixtures.ranks import RankPool
from truestep_reference import WeaveCallback as ReferenceWeaveCallback
from truestep_reference.weave_eval import Evaluation, Prediction

from truestep_spec_tests.lockstep import Comparisons
from truestep_spec_tests.lockstep.weave_eval import COUNT, SCORERS
from truestep_spec_tests.runs import (
    Outcome,
    Setup,
    first_difference_in_one_process,
    follow_in_lockstep,
    train_in_lockstep,
)

Ranks = Callable[[int], RankPool]

CALLBACK = "WeaveCallback"
STEP = 4
LAST = 1
"""The number of the evaluation of that step."""


# ── Subjects ──────────────────────────────────────────────────────────────────


class Right(ReferenceWeaveCallback):
    """The reference itself."""

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_evaluate(args, state, control, **kwargs)
        if state.global_step == STEP and self.evaluations:
            self.evaluations[LAST:] = self.with_a_mistake(self.evaluations[LAST])

    def with_a_mistake(self, evaluation: Evaluation) -> list[Evaluation]:
        """What is shown in the place of one evaluation."""
        return [evaluation]


class AnotherName(Right):
    def with_a_mistake(self, evaluation: Evaluation) -> list[Evaluation]:
        return [evaluation._replace(dataset_name="another")]


class AnotherConfig(Right):
    def with_a_mistake(self, evaluation: Evaluation) -> list[Evaluation]:
        return [evaluation._replace(generation_config=evaluation.generation_config | {"top_k": 3})]


class _AnotherPrediction(Right):
    def with_a_mistake(self, evaluation: Evaluation) -> list[Evaluation]:
        first, *others = evaluation.predictions
        return [evaluation._replace(predictions=[self.another(first), *others])]

    def another(self, prediction: Prediction) -> Prediction:
        raise NotImplementedError


class AnotherLetter(_AnotherPrediction):
    def another(self, prediction: Prediction) -> Prediction:
        return prediction._replace(completion=f"{prediction.completion}!")


class AnotherBit(_AnotherPrediction):
    def another(self, prediction: Prediction) -> Prediction:
        return prediction._replace(scores=prediction.scores | {"share": prediction.scores["share"] * (1 + 2**-52)})


class TruthIsNoNumber(_AnotherPrediction):
    def another(self, prediction: Prediction) -> Prediction:
        return prediction._replace(scores=prediction.scores | {"is-short": bool(prediction.scores["is-short"])})


class ScoresInAnotherOrder(_AnotherPrediction):
    def another(self, prediction: Prediction) -> Prediction:
        return prediction._replace(scores=dict(reversed(prediction.scores.items())))


class PredictionsInAnotherOrder(Right):
    def with_a_mistake(self, evaluation: Evaluation) -> list[Evaluation]:
        return [evaluation._replace(predictions=evaluation.predictions[::-1])]


class AnotherMean(Right):
    def with_a_mistake(self, evaluation: Evaluation) -> list[Evaluation]:
        assert evaluation.summary is not None
        return [evaluation._replace(summary=evaluation.summary | {"avg_later": 0.0})]


class NoSummary(Right):
    def with_a_mistake(self, evaluation: Evaluation) -> list[Evaluation]:
        return [evaluation._replace(summary=None)]


class Lost(Right):
    def with_a_mistake(self, evaluation: Evaluation) -> list[Evaluation]:
        return []


class Twice(Right):
    def with_a_mistake(self, evaluation: Evaluation) -> list[Evaluation]:
        return [evaluation, evaluation]


class LateOnes(Right):
    """What comes when the training has ended is compared as well."""

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_end(args, state, control, **kwargs)
        self.evaluations += self.evaluations[:1]


class CompletesBesideTheTraining(Right):
    """Has other predictions where there are ranks."""

    def with_a_mistake(self, evaluation: Evaluation) -> list[Evaluation]:
        return [evaluation._replace(predictions=[])] if dist.is_initialized() else [evaluation]


def setup_of(subject: type[Any], topology: str = "ddp", ranks: int = 2, **changes: Any) -> Setup:
    implementation = f"{CALLBACK}={subject.__module__}.{subject.__qualname__}"
    training = {"eval_strategy": "steps", "eval_steps": 2}
    setup = Setup(implementation, topology, ranks, "float64", steps=STEP, callback=CALLBACK, training=training)
    settings = {"hyperparameters": {"num_prompts": 2}, "generation": {"max_new_tokens": 3}, "scorers": list(SCORERS)}
    return setup.on(**settings | changes)


def compare(setup: Setup, ranks: Ranks, directory: Path, function: Any = follow_in_lockstep) -> Comparisons:
    outcomes: list[Outcome] = ranks(setup.ranks).run(function, setup, directory)
    first = outcomes[0].comparisons
    for outcome in outcomes[1:]:
        assert repr(outcome.comparisons) == repr(first)
    return first


# ── Comparison ────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("scorers", [None, list(SCORERS)])
@pytest.mark.parametrize("prompts", ["conversations", "two"])
@pytest.mark.parametrize("function", [train_in_lockstep, follow_in_lockstep])
def test_what_is_right_passes_at_every_step(
    function: Any, prompts: str, scorers: list[str] | None, ranks: Ranks, tmp_path: Path
) -> None:
    comparisons = compare(setup_of(ReferenceWeaveCallback, prompts=prompts, scorers=scorers), ranks, tmp_path, function)
    assert comparisons.divergence is None
    assert list(comparisons.steps) == list(range(STEP + 1))
    assert comparisons.worst == 0.0


@pytest.mark.parametrize(
    ("subject", "part"),
    [
        (AnotherName, "dataset"),
        (AnotherConfig, "attributes"),
        (AnotherLetter, "prediction 0"),
        (AnotherBit, "prediction 0"),
        (TruthIsNoNumber, "prediction 0"),
        (ScoresInAnotherOrder, "prediction 0"),
        (PredictionsInAnotherOrder, "rows"),
        (AnotherMean, "summary"),
        (NoSummary, "summary"),
        (Lost, "project"),
    ],
)
def test_what_differs_is_shown_beside_what_is_right(
    subject: type[Right], part: str, ranks: Ranks, tmp_path: Path
) -> None:
    comparisons = compare(setup_of(subject), ranks, tmp_path)
    divergence = comparisons.divergence
    assert divergence is not None
    assert list(comparisons.steps) == list(range(STEP + 1))
    assert (divergence.step, divergence.rank, divergence.parameter) == (STEP, 0, f"evaluation {LAST}, {part}")
    assert divergence.subject != divergence.reference
    assert f"step {STEP}, rank 0, evaluation {LAST}, {part}: subject {divergence.subject}, reference" in str(divergence)


@pytest.mark.parametrize("subject", [Twice, LateOnes])
def test_an_evaluation_too_many_is_reported(subject: type[Right], ranks: Ranks, tmp_path: Path) -> None:
    divergence = compare(setup_of(subject), ranks, tmp_path).divergence
    assert divergence is not None
    assert (divergence.step, divergence.parameter) == (STEP, COUNT)
    assert (divergence.subject, divergence.reference) == (LAST + 2, LAST + 1)


def test_a_real_training_ends_at_the_first_divergence(ranks: Ranks, tmp_path: Path) -> None:
    comparisons = compare(setup_of(AnotherLetter, steps=8), ranks, tmp_path, train_in_lockstep)
    assert list(comparisons.steps) == list(range(STEP + 1))


# ── One process ───────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("subject", "differs"), [(Right, False), (CompletesBesideTheTraining, True)])
def test_the_recorded_trajectory_is_followed_in_a_single_process(
    subject: type[Any], differs: bool, ranks: Ranks, tmp_path: Path
) -> None:
    recording = tmp_path / "recording"
    setup = setup_of(subject, seed=3, generation={"max_new_tokens": 3, "do_sample": True}, prompts="uneven")
    ranks(2).run(train_in_lockstep, setup, tmp_path, recording=recording)
    difference = first_difference_in_one_process(setup, recording, tmp_path / "alone")
    assert difference == (f"step {STEP}, evaluation {LAST}, rows" if differs else None)
