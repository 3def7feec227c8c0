"""A training does not notice that its model completes prompts."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from truestep_fixtures.ranks import RankPool

from truestep_spec_tests.differential.cases import SHARDED, error_of
from truestep_spec_tests.differential.log_completions_cases import (
    SAMPLING,
    completing,
    disturbed,
    everything,
    modes,
    train_completing,
    variants,
)
from truestep_spec_tests.differential.observing import assert_same_states, state_after_training
from truestep_spec_tests.implementation import Implementation
from truestep_spec_tests.runs import Walk

Ranks = Callable[[int], RankPool]


TRAININGS = [
    ("single", 1, "gpt2", "float32"),
    *((topology, 2, "gpt2", "float32") for topology in ("ddp", "zero2", "zero3_persistent")),
    ("fsdp2", 3, "gpt2", "float32"),
    ("zero3", 2, "gpt2", "bfloat16"),
    ("ddp", 2, "lora", "float32"),
]


@pytest.mark.clause("LOGC-5")
@pytest.mark.parametrize(("topology", "count", "model", "dtype"), TRAININGS)
def test_a_training_that_logs_ends_bitwise_like_one_that_does_not(
    implementation: Implementation, ranks: Ranks, tmp_path: Path, topology: str, count: int, model: str, dtype: str
) -> None:
    setup = completing(implementation.name, topology, count, dtype=dtype, model=model)
    without = ranks(count).run(state_after_training, setup, tmp_path / "without")
    assert all(state["optimizer"] for state in without)
    drawing = setup.on(generation=SAMPLING)
    setups = variants(implementation, drawing) if topology in SHARDED else [setup, drawing]
    assert_same_states(without, ranks(count).run(train_completing, setups, tmp_path / "with"))


@pytest.mark.clause("LOGC-5")
@pytest.mark.parametrize("failing_at", [None, 1, 3], ids=["", "fails when it reads", "fails when it writes"])
def test_model_tokenizer_and_random_numbers_are_left_as_they_were(
    implementation: Implementation, tmp_path: Path, failing_at: int | None
) -> None:
    walk = disturbed(completing(implementation.name, model="gpt2", generation=SAMPLING), tmp_path, failing_at)
    before = everything(walk)
    assert before["truncation"]["max_length"] == 3
    walk.begin()
    raised = error_of(lambda: walk.go_to(2))
    after = everything(walk)
    assert (failing_at is not None) == (raised is not None)
    assert {key: value for key, value in before.items() if value != after[key]} == {}


@pytest.mark.clause("LOGC-5")
def test_every_module_is_in_eval_mode_while_it_generates(implementation: Implementation, tmp_path: Path) -> None:
    found = modes(completing(implementation.name, model="gpt2"), tmp_path)
    assert found
    assert not any(found)


@pytest.mark.clause("LOGC-5")
def test_a_config_that_is_given_is_not_changed(implementation: Implementation, tmp_path: Path) -> None:
    setup = completing(implementation.name, generation=SAMPLING)
    config = setup.build_generation_config()
    before = config.to_dict()
    walk = Walk(setup, tmp_path, attach=lambda trainer: [setup.subject(trainer, config)])
    walk.begin()
    walk.go_to(4)
    assert before == config.to_dict()


@pytest.mark.clause("LOGC-5")
def test_gradients_flow_after_completions_under_an_outer_autocast(
    implementation: Implementation, tmp_path: Path
) -> None:
    setup = completing(implementation.name, dtype="float32", model="gpt2")
    config = setup.build_generation_config()
    walk = Walk(setup, tmp_path, attach=lambda trainer: [setup.subject(trainer, config)])
    walk.begin()
    model = walk.placed.model
    tokens = torch.arange(12).view(1, 12)
    with torch.autocast("cpu", torch.bfloat16):
        walk.go_to(2)
        model(input_ids=tokens, labels=tokens)["loss"].backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
