"""Completions of a model on a GPU."""

from pathlib import Path
from typing import Any

import pytest
import torch

from truestep_spec_tests.differential.log_completions_cases import SAMPLING, completing, train_completing
from truestep_spec_tests.differential.observing import assert_same_states, state_after_training
from truestep_spec_tests.implementation import Implementation
from truestep_spec_tests.runs import train_in_lockstep

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

GPU = {"use_cpu": False}


@pytest.mark.clause("LOGC-5")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_training_on_a_gpu_that_logs_ends_bitwise_like_one_that_does_not(
    implementation: Implementation, tmp_path: Path, dtype: str
) -> None:
    setup = completing(implementation.name, dtype=dtype, model="gpt2", generation=SAMPLING, training=GPU)
    without = state_after_training(setup, tmp_path / "without")
    assert_same_states([without], [train_completing([setup], tmp_path / "with")])


@pytest.mark.clause("LOGC-3", "LOGC-10")
@pytest.mark.parametrize("generation", [{"max_new_tokens": 4}, SAMPLING], ids=["greedy", "sampling"])
def test_rows_of_a_training_on_a_gpu_are_the_references(
    implementation: Implementation, tmp_path: Path, generation: dict[str, Any]
) -> None:
    setup = completing(implementation.name, generation=generation, training=GPU)
    comparisons = train_in_lockstep(setup, tmp_path).comparisons
    assert comparisons.divergence is None, str(comparisons.divergence)
