"""What PEFT trains is what is saved, or an error before the first step; modules with odd state dicts are saved too."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from truestep_fixtures import models, topologies
from truestep_fixtures.events import Events
from truestep_fixtures.ranks import RankPool
from truestep_fixtures.training import train

from truestep_spec_tests.differential.cases import require
from truestep_spec_tests.implementation import Implementation
from truestep_spec_tests.observe import shadow
from truestep_spec_tests.runs import Setup, Walk, same_bits

Ranks = Callable[[int], RankPool]

ADAPTERS: dict[str, dict[str, Any]] = {
    "trained biases": {"target_modules": ["q_proj", "v_proj"], "bias": "all"},
    "a module of its own": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "adapted embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
}


def trained_but_saved_otherwise(setup: Setup, config: dict[str, Any], directory: Path) -> list[str]:
    """Names of trained parameters that the saved adapter does not give back as the shadow, after a real training."""
    subject = setup.subject()
    model = get_peft_model(models.build("qwen2"), LoraConfig(r=2, **config))
    ended = train(setup.topology, model, output_dir=directory, callbacks=[subject], steps=setup.steps)
    shown = shadow(subject)
    loaded = PeftModel.from_pretrained(models.build("qwen2"), directory / "bema").state_dict()
    trained = [name for name, parameter in ended.model.named_parameters() if parameter.requires_grad]
    assert trained
    return [name for name in trained if not same_bits(loaded[name], shown[name])]


def begin_training(setup: Setup, model: nn.Module, directory: Path) -> str:
    """The error of train begin."""
    events = Events(model, topologies.training_arguments("ddp", directory), [setup.subject()])
    with pytest.raises(Exception) as caught:  # noqa: PT011 - its class is for the implementation to choose
        events.train_begin()
    return str(caught.value)


def begin_training_of_a_prompt(setup: Setup, directory: Path) -> str:
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    return begin_training(setup, get_peft_model(models.build("qwen2"), prompt), directory)


def begin_training_of_a_part(setup: Setup, directory: Path) -> str:
    model = models.build("odd")
    next(model.parameters()).tensor_model_parallel = True
    return begin_training(setup, model, directory)


class WithExtraState(nn.Linear):
    """A module whose state dict has an entry that is not a tensor."""

    def get_extra_state(self) -> Any:
        return {"calls": 3}

    def set_extra_state(self, state: Any) -> None: ...


@pytest.mark.clause("BEMA-7", "BEMA-10")
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize(("topology", "count"), [("single", 1), ("zero3", 2)])
def test_all_that_an_adapter_trains_is_saved(
    implementation: Implementation, ranks: Ranks, tmp_path: Path, topology: str, count: int, adapter: str
) -> None:
    require(implementation, "shadow_state_dict")
    setup = Setup(implementation.name, topology, count, steps=4)
    saved_otherwise = ranks(count).run(trained_but_saved_otherwise, setup, ADAPTERS[adapter], tmp_path)
    assert [[]] * count == saved_otherwise


@pytest.mark.clause("BEMA-10", "BEMA-18")
def test_a_learned_prompt_is_refused(implementation: Implementation, ranks: Ranks, tmp_path: Path) -> None:
    require(implementation, "shadow_state_dict")
    for message in ranks(2).run(begin_training_of_a_prompt, Setup(implementation.name, "ddp", 2), tmp_path):
        assert "prompt" in message


@pytest.mark.clause("BEMA-18")
def test_a_parameter_that_is_another_part_on_each_rank_is_refused(
    implementation: Implementation, ranks: Ranks, tmp_path: Path
) -> None:
    require(implementation, "shadow_state_dict")
    name = next(name for name, _ in models.build("odd").named_parameters())
    for message in ranks(2).run(begin_training_of_a_part, Setup(implementation.name, "ddp", 2), tmp_path):
        assert name in message


@pytest.mark.clause("BEMA-10", "BEMA-16")
def test_state_that_is_no_tensor_does_not_end_a_training(implementation: Implementation, tmp_path: Path) -> None:
    require(implementation, "shadow_state_dict")
    subject = implementation.BEMACallback(update_freq=1)
    events = Events(WithExtraState(2, 2), topologies.training_arguments("single", tmp_path), [subject])
    events.train_begin()
    events.step(1)
    assert shadow(subject)["_extra_state"] == {"calls": 3}
    events.train_end()
    assert load_file(tmp_path / "bema" / "model.safetensors").keys() == {"weight", "bias"}


@pytest.mark.clause("BEMA-11")
def test_state_of_an_earlier_training_is_removed_from_a_checkpoint_before_the_snapshot(
    implementation: Implementation, tmp_path: Path
) -> None:
    require(implementation, "shadow_weights")
    setup = Setup(implementation.name, model="odd", steps=3)
    for update_after, has_state in ((0, True), (3, False)):
        arguments = {"update_freq": 1, "update_after": update_after}
        walk = Walk(setup, tmp_path, [setup.on(hyperparameters=arguments).subject()])
        walk.begin()
        walk.go_to(2)
        checkpoint = walk.events.save()
        assert has_state == bool(list(checkpoint.glob("truestep_bema/*")))
