"""The comparison of views can fail: whatever is wrong in one is reported, and nothing else is."""

from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback
from truestep_reference import RichProgressCallback as ReferenceRichProgressCallback
from truestep_reference.rich_progress import Bar, Group, Metric, View

from truestep_spec_tests.lockstep import Comparisons
from truestep_spec_tests.lockstep.rich_progress import COUNT
from truestep_spec_tests.runs import Setup, first_difference_in_one_process, follow_in_lockstep, train_in_lockstep

CALLBACK = "RichProgressCallback"
STEP = 2
LAST = 4

# Subjects


class Right(ReferenceRichProgressCallback):
    """The reference itself."""

    @property
    def view(self) -> View | None:
        view = super().view
        return view if view is None or not self.is_wrong(view) else self.with_a_mistake(view)

    def is_wrong(self, view: View) -> bool:
        """Whether there is a mistake in what is shown: from a step on."""
        return view.training is not None and view.training.completed >= STEP

    def with_a_mistake(self, view: View) -> View | None:
        """What is shown instead."""
        return view


class AnotherStep(Right):
    def with_a_mistake(self, view: View) -> View:
        assert view.training is not None
        return view._replace(training=view.training._replace(completed=view.training.completed - 1))


class NoTotal(Right):
    def with_a_mistake(self, view: View) -> View:
        assert view.training is not None
        return view._replace(training=view.training._replace(total=None))


class NoEvaluation(Right):
    def with_a_mistake(self, view: View) -> View:
        return view._replace(evaluation=None)


class EvaluationThatStays(Right):
    def with_a_mistake(self, view: View) -> View:
        return view._replace(evaluation=view.evaluation or Bar(3, 3))


class AnotherEpoch(Right):
    def with_a_mistake(self, view: View) -> View:
        return view._replace(epoch=f"{view.epoch}.0")


class _AnotherMetric(Right):
    def with_a_mistake(self, view: View) -> View:
        (name, (first, *others)), *groups = view.groups
        return view._replace(groups=[Group(name, [self.another(first), *others]), *groups])

    def another(self, metric: Metric) -> Metric:
        raise NotImplementedError


class AnotherDigit(_AnotherMetric):
    def another(self, metric: Metric) -> Metric:
        return metric._replace(value=f"{metric.value}0")


class AnotherNumber(_AnotherMetric):
    def another(self, metric: Metric) -> Metric:
        return metric._replace(trend=[*metric.trend[:-1], metric.trend[-1] * (1 + 2**-52)])


class MetricsInAnotherOrder(Right):
    def with_a_mistake(self, view: View) -> View:
        return view._replace(groups=[Group(name, metrics[::-1]) for name, metrics in view.groups])


class NoTable(Right):
    def with_a_mistake(self, view: View) -> View:
        return view._replace(groups=[])


class AnotherGroup(Right):
    def with_a_mistake(self, view: View) -> View:
        return view._replace(groups=[*view.groups, Group("train", view.groups[0].metrics)])


class NoView(Right):
    def with_a_mistake(self, view: View) -> None:
        return None


class NoEnd(Right):
    """The end of a training is compared as well."""

    def is_wrong(self, view: View) -> bool:
        return view.training is None

    def with_a_mistake(self, view: View) -> View:
        return view._replace(training=Bar(LAST, LAST))


class WithoutAView(TrainerCallback):
    """Shows nothing that can be compared."""


class Elsewhere(Right):
    """Can be made wrong after the training."""

    is_another_process = False

    def is_wrong(self, view: View) -> bool:
        return self.is_another_process and super().is_wrong(view)

    def with_a_mistake(self, view: View) -> View:
        return view._replace(training=None)


def setup_of(subject: type[Any]) -> Setup:
    implementation = f"{CALLBACK}={subject.__module__}.{subject.__qualname__}"
    training = {"eval_strategy": "steps", "eval_steps": 2, "logging_strategy": "steps", "logging_steps": 1}
    return Setup(implementation, steps=LAST, callback=CALLBACK, hyperparameters={}, training=training)


def compare(setup: Setup, directory: Path) -> Comparisons:
    return train_in_lockstep(setup, directory).comparisons


# Comparison


@pytest.mark.parametrize("function", [train_in_lockstep, follow_in_lockstep])
def test_what_is_right_passes_at_every_step(function: Any, tmp_path: Path) -> None:
    comparisons = function(setup_of(ReferenceRichProgressCallback), tmp_path).comparisons
    assert comparisons.divergence is None
    assert list(comparisons.steps) == list(range(LAST + 1))
    assert comparisons.worst == 0.0


@pytest.mark.parametrize(
    ("subject", "part"),
    [
        (AnotherStep, "training"),
        (NoTotal, "training"),
        (NoEvaluation, "evaluation"),
        (EvaluationThatStays, "evaluation"),
        (AnotherEpoch, "epoch"),
        (AnotherDigit, "group 0"),
        (AnotherNumber, "group 0"),
        (MetricsInAnotherOrder, "group 0"),
        (NoTable, "group 0"),
    ],
)
def test_what_differs_is_shown_beside_what_is_right_and_ends_the_training(
    subject: type[Right], part: str, tmp_path: Path
) -> None:
    comparisons = compare(setup_of(subject), tmp_path)
    divergence = comparisons.divergence
    assert divergence is not None
    assert list(comparisons.steps) == list(range(STEP + 1))
    assert (divergence.step, divergence.rank, divergence.parameter) == (STEP, 0, part)
    assert divergence.subject != divergence.reference
    assert f"step {STEP}, rank 0, {part}: subject {divergence.subject}, reference" in str(divergence)


def test_a_group_too_many_is_reported(tmp_path: Path) -> None:
    divergence = compare(setup_of(AnotherGroup), tmp_path).divergence
    assert divergence is not None
    assert (divergence.step, divergence.parameter) == (STEP, COUNT)
    assert (divergence.subject, divergence.reference) == (5, 4)


@pytest.mark.parametrize(("subject", "step"), [(NoView, STEP), (WithoutAView, 0)])
def test_a_callback_that_shows_no_view_is_reported(subject: type[Any], step: int, tmp_path: Path) -> None:
    divergence = compare(setup_of(subject), tmp_path).divergence
    assert divergence is not None
    assert (divergence.step, divergence.parameter, divergence.subject) == (step, "training", "nothing")


def test_the_end_of_a_training_is_compared(tmp_path: Path) -> None:
    divergence = compare(setup_of(NoEnd), tmp_path).divergence
    assert divergence is not None
    assert (divergence.step, divergence.parameter) == (LAST, "training")
    assert (divergence.subject, divergence.reference) == (f"[{LAST}, {LAST}]", "null")


# One process


@pytest.mark.parametrize(("differs", "difference"), [(False, None), (True, f"step {STEP}, training")])
def test_the_recorded_trajectory_is_followed_in_a_single_process(
    differs: bool, difference: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recording, setup = tmp_path / "recording", setup_of(Elsewhere)
    assert train_in_lockstep(setup, tmp_path, recording=recording).comparisons.divergence is None
    monkeypatch.setattr(Elsewhere, "is_another_process", differs)
    assert difference == first_difference_in_one_process(setup, recording, tmp_path / "alone")
