"""A training does not notice that its progress is shown, and of its ranks one alone shows it."""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from transformers import Trainer
from truestep_fixtures import models, topologies
from truestep_fixtures.data import language_dataset
from truestep_fixtures.ranks import RankPool
from truestep_fixtures.training import train

from truestep_spec_tests.differential.observing import assert_same_states, state_after_training
from truestep_spec_tests.implementation import Implementation
from truestep_spec_tests.runs import Setup

Ranks = Callable[[int], RankPool]

TRAINING = {"logging_strategy": "steps", "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 2}


def state_and_view(setup: Setup, directory: Path) -> tuple[dict[str, object], bool]:
    """What a training with the callback leaves on this rank, and whether there is a view there."""
    subject = setup.subject()
    return state_after_training(setup, directory, [subject]), getattr(subject, "view", None) is not None


@pytest.mark.clause("RICH-6", "RICH-8")
@pytest.mark.parametrize(("topology", "count"), [("single", 1), ("ddp", 2), ("zero3", 2)])
def test_a_training_that_is_shown_ends_bitwise_like_one_that_is_not(
    implementation: Implementation, ranks: Ranks, tmp_path: Path, topology: str, count: int
) -> None:
    setup = Setup(implementation.name, topology, count, model="gpt2", steps=4, callback="RichProgressCallback")
    setup = setup.on(hyperparameters={}, training=TRAINING)
    without = ranks(count).run(state_after_training, setup, tmp_path / "without")
    shown = ranks(count).run(state_and_view, setup, tmp_path / "shown")
    assert all(state["optimizer"] for state in without)
    assert_same_states(without, [state for state, _ in shown])
    if hasattr(implementation.RichProgressCallback, "view"):
        assert [True, *[False] * (count - 1)] == [has_view for _, has_view in shown]


class Batches(Trainer):
    """Knows which of the batches that it has evaluated are still there whenever there is another one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.logits: list[weakref.ref[Tensor]] = []
        self.left: list[list[int]] = []

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        loss, logits, labels = super().prediction_step(*args, **kwargs)
        self.left.append([number for number, one in enumerate(self.logits) if one() is not None])
        self.logits.append(weakref.ref(logits))
        return loss, logits, labels


@pytest.mark.clause("RICH-8")
def test_an_evaluation_holds_no_batch_longer_than_it_would(implementation: Implementation, tmp_path: Path) -> None:
    evaluating = {"max_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "batch_eval_metrics": True}
    trainer = Batches(
        models.build("qwen2"),
        topologies.training_arguments("single", tmp_path, **evaluating),
        train_dataset=language_dataset(2),
        eval_dataset=language_dataset(8),
        compute_metrics=lambda prediction, compute_result: {},
        callbacks=[implementation.RichProgressCallback()],
    )
    trainer.train()
    assert trainer.left == [[], [], [], []]


@pytest.mark.clause("RICH-8")
def test_what_a_program_knows_of_its_variables_is_left_alone(implementation: Implementation, tmp_path: Path) -> None:
    def variables_of_a_program(steps: int) -> dict[str, Any]:
        variables = locals()
        train("single", "odd", output_dir=tmp_path, callbacks=[implementation.RichProgressCallback()], steps=steps)
        return variables

    variables = variables_of_a_program(2)
    assert variables["steps"] == 2
