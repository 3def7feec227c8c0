"""`SyncRefModelCallback` in TRL's DPOTrainer, in the place of TRL's own."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from truestep_fixtures.ranks import RankPool

pytest.importorskip("trl")

from truestep_spec_tests.implementation import Implementation
from truestep_spec_tests.options import require
from truestep_spec_tests.trainers.trl_training import (
    ALPHA,
    STEPS,
    SYNC_STEPS,
    Course,
    blends,
    difference,
    train,
)

Ranks = Callable[[int], RankPool]

PLACEMENTS = [("single", 1), ("ddp", 2), ("zero3", 2)]

# Under ZeRO-2 the reference is whole, but an engine of DeepSpeed all the same.
EVERY_PLACEMENT = [*PLACEMENTS, ("zero2", 2), ("zero3_persistent", 2)]


def losses(course: Course) -> list[float]:
    return [figures["loss"] for figures in course.figures.values()]


@pytest.mark.clause("SYNC-3", "SYNC-6")
@pytest.mark.parametrize(("topology", "count"), EVERY_PLACEMENT)
def test_right_after_a_full_sync_the_loss_is_that_of_two_equal_models(
    topology: str, count: int, subject: Implementation, model: Path, ranks: Ranks, tmp_path: Path
) -> None:
    course, *_ = ranks(count).run(train, "DPO", subject, topology, model, tmp_path, ref_model_mixup_alpha=1.0)
    log_2 = torch.tensor(math.log(2), dtype=torch.float32).item()
    # A step's figures are those before its update, so they show the models of the step before.
    are_equal = {step: (step - 1) % SYNC_STEPS == 0 for step in range(1, STEPS + 1)}
    assert {step: figures["loss"] == log_2 for step, figures in course.figures.items()} == are_equal
    assert {step: figures["rewards/margins"] == 0 for step, figures in course.figures.items()} == are_equal


@pytest.mark.clause("SYNC-1", "SYNC-4", "SYNC-6")
@pytest.mark.parametrize(("topology", "count"), PLACEMENTS)
def test_the_reference_differs_from_trls_by_what_both_may_round(
    topology: str, count: int, subject: Implementation, model: Path, ranks: Ranks, tmp_path: Path
) -> None:
    own, found = (
        ranks(count).run(train, "DPO", callback, topology, model, tmp_path)[0] for callback in (None, subject)
    )
    # Up to the first sync nothing differs, so both blend the same there.
    for step in range(1, SYNC_STEPS + 1):
        assert own.figures[step] == found.figures[step]
    # Later the policies differ as well, for their losses have seen references that were rounded differently. Each
    # reference has its own bound therefore.
    own_blends, found_blends = blends(own), blends(found)
    for step in range(SYNC_STEPS, STEPS + 1):
        (own_values, own_bounds), (values, bounds) = own_blends[step], found_blends[step]
        for name, value in own.reference[step].items():
            assert ((value - own_values[name]).abs() <= own_bounds[name]).all(), f"TRL, step {step}, {name}"
            apart = (values[name] - own_values[name]).abs()
            between = (found.reference[step][name].double() - value.double()).abs()
            assert (between <= apart + bounds[name] + own_bounds[name]).all(), f"step {step}, {name}"
            if step == SYNC_STEPS:
                assert apart.max() == 0


@pytest.mark.clause("SYNC-1")
@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"sync_ref_model": False}, id="no sync"),
        pytest.param({"ref_model_sync_steps": SYNC_STEPS + 1}, id="a step late"),
        pytest.param({"ref_model_mixup_alpha": ALPHA + 2**-20}, id="another α"),
    ],
)
def test_the_losses_after_a_wrong_sync_are_others(
    fields: dict[str, Any], model: Path, ranks: Ranks, tmp_path: Path
) -> None:
    # With TRL's own callback: what the comparisons of this package can tell apart, whoever syncs.
    (right,), (wrong,) = (
        ranks(1).run(train, "DPO", None, "single", model, tmp_path, dtype=torch.float64, **changed)
        for changed in ({}, fields)
    )
    assert losses(right)[:SYNC_STEPS] == losses(wrong)[:SYNC_STEPS]
    assert losses(right)[SYNC_STEPS:] != losses(wrong)[SYNC_STEPS:]


@pytest.mark.clause("SYNC-12")
@pytest.mark.parametrize(("topology", "count"), PLACEMENTS)
def test_a_resumed_training_has_the_losses_of_one_that_was_not_interrupted(
    topology: str, count: int, subject: Implementation, model: Path, ranks: Ranks, tmp_path: Path
) -> None:
    require(subject.SyncRefModelCallback, ["save_reference"])
    between = SYNC_STEPS + 1
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    saving = {"save_strategy": "steps", "save_steps": between}
    expected = ranks(count).run(train, "DPO", subject, topology, model, whole, **saving)
    checkpoint = whole / f"checkpoint-{between}"
    found = ranks(count).run(train, "DPO", subject, topology, model, resumed, resume_from=checkpoint, **saving)
    for one, other in zip(expected, found, strict=True):
        assert sorted(other.reference) == list(range(between, STEPS + 1))
        assert difference(one.reference, other.reference) is None
        assert difference(one.policy, other.policy) is None
        for step, figures in other.figures.items():
            # TRL counts the tokens since the training was started or resumed.
            assert figures == one.figures[step] | {"num_tokens": figures["num_tokens"]}
