"""In every trainer of TRL that syncs a reference model, the callback under test is as good as TRL's own."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from truestep_fixtures.ranks import RankPool

pytest.importorskip("trl")

from truestep_spec_tests.implementation import Implementation
from truestep_spec_tests.trainers.trl_training import STEPS, TRAINERS, blends, difference, train

Ranks = Callable[[int], RankPool]

WHOLE = [("single", 1), ("ddp", 2)]
PLACEMENTS = [*WHOLE, ("zero3", 2)]

every_trainer = pytest.mark.parametrize("trainer", TRAINERS)
every_placement = pytest.mark.parametrize(("topology", "count"), PLACEMENTS)


@pytest.mark.clause("SYNC-1", "SYNC-3", "SYNC-5", "SYNC-6")
@every_trainer
@every_placement
def test_a_reference_that_becomes_the_policy_makes_bitwise_the_training_that_trls_own_makes(
    trainer: str, topology: str, count: int, subject: Implementation, model: Path, ranks: Ranks, tmp_path: Path
) -> None:
    owns, founds = (
        ranks(count).run(train, trainer, callback, topology, model, tmp_path, ref_model_mixup_alpha=1.0)
        for callback in (None, subject)
    )
    for own, found in zip(owns, founds, strict=True):
        assert list(own.figures) == list(range(1, STEPS + 1))
        assert own.figures == found.figures
        assert difference(own.policy, found.policy) is None
        assert difference(own.reference, found.reference) is None


@pytest.mark.clause("SYNC-1", "SYNC-4", "SYNC-6")
@every_trainer
@every_placement
def test_the_reference_is_the_blend_of_the_policies_that_the_training_went_through(
    trainer: str, topology: str, count: int, subject: Implementation, model: Path, ranks: Ranks, tmp_path: Path
) -> None:
    for course in ranks(count).run(train, trainer, subject, topology, model, tmp_path):
        for step, (values, bounds) in blends(course).items():
            for name, value in values.items():
                error = (course.reference[step][name] - value).abs()
                assert (error <= bounds[name]).all(), f"step {step}, {name}"


@pytest.mark.clause("SYNC-1", "SYNC-4", "SYNC-5")
@every_trainer
@pytest.mark.parametrize(("topology", "count"), WHOLE)
def test_two_float64_blends_that_round_differently_make_the_same_training(
    trainer: str, topology: str, count: int, subject: Implementation, model: Path, ranks: Ranks, tmp_path: Path
) -> None:
    # TRL blends by two operations, so the references differ, here in the last of 53 bits. But TRL computes
    # log-probabilities in float32 whatever the dtype of the weights: it rounds hidden states and the head to 24 bits
    # first. A difference 2²⁹ times as fine as these changes none of them, unless a value lies so near the middle
    # between two float32 numbers that it is rounded to the other one. That befalls one in some 10⁷, and here some 10⁴
    # are rounded. So every figure is the same in every digit, and so are the policies, which see nothing else of the
    # reference.
    owns, founds = (
        ranks(count).run(train, trainer, callback, topology, model, tmp_path, dtype=torch.float64)
        for callback in (None, subject)
    )
    for own, found in zip(owns, founds, strict=True):
        assert own.figures == found.figures
        assert difference(own.policy, found.policy) is None
        _, bounds = blends(own)[STEPS]
        for name, value in own.reference[STEPS].items():
            assert value.dtype == torch.float64
            assert ((found.reference[STEPS][name] - value).abs() <= 2 * bounds[name]).all(), name
