"""A reference model on a GPU, and one that lies on another device than the policy."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from truestep_fixtures.topologies import Placed, read_parameters

from truestep_spec_tests.differential.ref_sync_cases import syncing
from truestep_spec_tests.implementation import Implementation
from truestep_spec_tests.runs import Setup, Walk, same_bits, sync_in_lockstep, train_in_lockstep

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


def walked_on(setup: Setup, directory: Path, policy: str, reference: str) -> dict[str, Tensor]:
    """The reference model at the end of a walk, with the models on these devices."""
    model, follower = setup.build_model().to(policy), setup.build_ref_model().to(reference)
    walk = Walk(setup, directory, [setup.subject(follower, None)], placed=Placed("single", model, model))
    walk.begin()
    walk.go_to(setup.steps)
    return read_parameters(follower)


@pytest.mark.clause("SYNC-4", "SYNC-6")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_a_walk_on_a_gpu_stays_within_the_bound(implementation: Implementation, tmp_path: Path, dtype: str) -> None:
    setup = syncing(implementation.name, dtype=dtype, model="odd")
    placed, callbacks, comparisons = sync_in_lockstep(setup)
    assert next(placed.model.parameters()).is_cuda
    walk = Walk(setup, tmp_path, callbacks)
    walk.begin()
    walk.go_to(setup.steps)
    assert comparisons.divergence is None, str(comparisons.divergence)


@pytest.mark.clause("SYNC-4", "SYNC-5")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_real_training_on_a_gpu_stays_within_the_bound(
    implementation: Implementation, tmp_path: Path, dtype: str
) -> None:
    setup = syncing(implementation.name, dtype=dtype, training={"use_cpu": False})
    comparisons = train_in_lockstep(setup, tmp_path).comparisons
    assert comparisons.divergence is None, str(comparisons.divergence)


@pytest.mark.clause("SYNC-4", "SYNC-6")
@pytest.mark.parametrize(("policy", "reference"), [("cuda", "cpu"), ("cpu", "cuda")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_reference_model_on_another_device_gives_the_bits_of_one_on_the_same(
    implementation: Implementation, tmp_path: Path, policy: str, reference: str, dtype: str
) -> None:
    setup = syncing(implementation.name, dtype=dtype, model="odd")
    expected = walked_on(setup, tmp_path, reference, reference)
    actual = walked_on(setup, tmp_path, policy, reference)
    assert all(same_bits(value, actual[name]) for name, value in expected.items())
