"""What a training leaves in `{output_dir}/bema`: a model that loads, and whose weights are the shadow."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from truestep_fixtures import models
from truestep_fixtures.data import tokenizer
from truestep_fixtures.events import Events
from truestep_fixtures.ranks import RankPool
from truestep_fixtures.topologies import read_parameters
from truestep_fixtures.training import train

from truestep_spec_tests.differential.cases import SHARDED, error_of, full_disk, logged_warnings, odd, placements
from truestep_spec_tests.implementation import Implementation
from truestep_spec_tests.lockstep.bema import Elsewhere
from truestep_spec_tests.runs import Setup, Walk, same_bits

Ranks = Callable[[int], RankPool]


# ── What the ranks do ─────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Finished:
    """A finished training as one rank knows it.

    Attributes:
        live: The parameters and buffers in the model's state dict, whole, a tied one once.
        shadow: The reference's shadow of the trainable parameters.
        bounds: How far a subject may be from it that was rounded to the parameters' dtype.
        shown: What the subject's `shadow_state_dict()` returns, if it has one.
        configs: The model's config and generation config, if it has them.
        warnings: What was logged as a warning.
    """

    live: dict[str, Tensor]
    shadow: dict[str, Tensor]
    bounds: dict[str, Tensor]
    shown: dict[str, Tensor] | None
    configs: list[dict[str, Any]]
    warnings: list[str]


def train_with_reference(setup: Setup, directory: Path, scratch: Path) -> Finished:
    subject, reference = setup.subject(), setup.reference()
    model = setup.build_model()
    if hasattr(model, "generation_config"):
        model.generation_config.max_new_tokens = 7
    with logged_warnings() as warnings:
        result = train(
            setup.topology,
            model,
            output_dir=directory,
            callbacks=[subject, Elsewhere(reference, scratch)],
            steps=setup.steps,
            dtype=setup.torch_dtype,
            seed=setup.seed,
            # With a tokenizer the Trainer also passes attention masks, which plain modules do not take.
            processing_class=tokenizer() if hasattr(model, "save_pretrained") else None,
            **setup.training,
        )
    live = read_parameters(result.model) | dict(result.model.named_buffers())
    computed_in = torch.promote_types(torch.float32, setup.torch_dtype)
    return Finished(
        live={name: value for name, value in live.items() if name in result.model.state_dict()},
        shadow=reference.shadow_values(),
        bounds=reference.shadow_bounds(computed_in, setup.torch_dtype),
        shown=subject.shadow_state_dict() if hasattr(subject, "shadow_state_dict") else None,
        configs=configs_of(result.model),
        warnings=[message for message in warnings if "bema" in message.lower()],
    )


def configs_of(model: nn.Module) -> list[dict[str, Any]]:
    return [getattr(model, name).to_dict() for name in ("config", "generation_config") if hasattr(model, name)]


def end_training(setup: Setup, directory: Path, *, on_full_disk: bool = False) -> str | None:
    """The error with which a training of no more than its events ends, if it does."""
    walk = Walk(setup, directory, [setup.subject()])
    walk.begin()
    walk.go_to(setup.steps)
    if not on_full_disk:
        return error_of(walk.events.train_end)
    with full_disk():
        return error_of(walk.events.train_end)


class Obstruction(TrainerCallback):
    """When training ends, there is a file where the directory of the results was."""

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            shutil.rmtree(args.output_dir)
            Path(args.output_dir).touch()


def train_with_obstruction(setup: Setup, directory: Path) -> str | None:
    return error_of(
        lambda: train(
            setup.topology,
            setup.build_model(),
            output_dir=directory,
            callbacks=[Obstruction(), setup.subject()],
            steps=setup.steps,
        )
    )


class UnwritableTokenizer:
    """Its error is of a class that no other process can import."""

    def save_pretrained(self, directory: Path) -> None:
        class OutOfInkError(Exception):
            pass

        raise OutOfInkError(f"no ink left for {directory}")


def end_training_with(setup: Setup, directory: Path, processing_class: Any) -> str | None:
    walk = Walk(setup, directory, [])
    walk.events = Events(walk.placed.model, walk.events.args, [setup.subject()], processing_class=processing_class)
    walk.begin()
    walk.go_to(setup.steps)
    return error_of(walk.events.train_end)


# ── What was saved ────────────────────────────────────────────────────────────


def load(setup: Setup, directory: Path) -> nn.Module:
    """The model in a directory, loaded as its users would."""
    if setup.model == "lora":
        base = models.build("qwen2", setup.torch_dtype, setup.seed)
        return PeftModel.from_pretrained(base, directory, autocast_adapter_dtype=False)
    if setup.model in ("batchnorm", "odd"):
        model = setup.on(seed=setup.seed + 1).build_model()
        missing, unexpected = load_model(model, directory / "model.safetensors")
        assert not missing
        assert not unexpected
        return model
    loaded: nn.Module = AutoModelForCausalLM.from_pretrained(directory)
    return loaded


def assert_saved(setup: Setup, directory: Path, finished: Finished) -> None:
    """What is in the directory is the shadow, and whatever else the model consists of."""
    loaded = load(setup, directory)
    parameters, state = dict(loaded.named_parameters()), loaded.state_dict()
    assert parameters.keys() <= finished.live.keys()
    for name, live in finished.live.items():
        saved = state[name]
        assert live.dtype == saved.dtype, name
        if name in finished.shadow:
            error = (saved.double() - finished.shadow[name]).abs()
            assert (error <= finished.bounds[name]).all(), name
        else:
            assert same_bits(live, saved), name
        if finished.shown is not None and name in finished.shown:
            assert same_bits(finished.shown[name], saved), name


TRAININGS = [
    *(("single", model, "float32") for model in models.MODELS),
    *(("single", model, "bfloat16") for model in ("qwen2", "tied", "lora", "batchnorm")),
    ("single", "gpt2", "float64"),
    ("ddp", "tied", "bfloat16"),
    ("ddp", "lora", "float32"),
    ("ddp", "batchnorm", "float32"),
    ("zero1", "qwen2", "bfloat16"),
    ("zero2", "gpt2", "float32"),
    ("zero2", "frozen", "bfloat16"),
    ("zero3", "tied", "float32"),
    ("zero3", "lora", "bfloat16"),
    ("zero3", "batchnorm", "float32"),
    ("zero3_persistent", "frozen", "float32"),
    ("zero3_persistent", "gpt2", "bfloat16"),
    ("fsdp2", "qwen2", "bfloat16"),
    ("fsdp2", "tied", "float32"),
    ("fsdp2", "lora", "float32"),
    ("fsdp2", "batchnorm", "float64"),
]


def trainings() -> list[Any]:
    """The trainings, with the clauses that each is about."""
    cases = []
    for topology, model, dtype in TRAININGS:
        mark = pytest.mark.clause("BEMA-10")
        if topology in SHARDED:
            mark = pytest.mark.clause("BEMA-18")
        elif model in ("frozen", "lora"):
            mark = pytest.mark.clause("BEMA-7", "BEMA-10")
        cases.append(pytest.param(topology, model, dtype, marks=mark))
    return cases


@pytest.mark.parametrize(("topology", "model", "dtype"), trainings())
def test_a_training_leaves_a_model_that_loads_with_the_shadow_as_its_weights(
    implementation: Implementation, ranks: Ranks, tmp_path: Path, topology: str, model: str, dtype: str
) -> None:
    count = 1 if topology == "single" else 2
    setup = Setup(implementation.name, topology, count, dtype, model, steps=5)
    finished, *others = ranks(count).run(train_with_reference, setup, tmp_path / "out", tmp_path / "reference")
    saved = tmp_path / "out" / "bema"
    assert_saved(setup, saved, finished)
    assert [message for rank in (finished, *others) for message in rank.warnings] == []

    plain = model in ("batchnorm", "odd")
    assert plain or (saved / ("adapter_config.json" if model == "lora" else "config.json")).is_file()
    assert (saved / "adapter_model.safetensors").is_file() == (model == "lora")
    text = "Every step is compared with every other step."
    assert plain or tokenizer()(text)["input_ids"] == AutoTokenizer.from_pretrained(saved)(text)["input_ids"]


@pytest.mark.clause("BEMA-10")
@pytest.mark.parametrize(("topology", "count"), [("single", 1), ("zero3", 2)])
def test_config_and_generation_config_are_those_of_the_live_model(
    implementation: Implementation, ranks: Ranks, tmp_path: Path, topology: str, count: int
) -> None:
    setup = Setup(implementation.name, topology, count, model="gpt2", steps=2)
    finished, *_ = ranks(count).run(train_with_reference, setup, tmp_path / "out", tmp_path / "reference")
    expected, actual = finished.configs, configs_of(load(setup, tmp_path / "out" / "bema"))
    for config in (*expected, *actual):
        for written_on_saving in ("_name_or_path", "architectures"):
            config.pop(written_on_saving, None)
    assert expected == actual
    assert actual[1]["max_new_tokens"] == 7


@pytest.mark.clause("BEMA-1")
@pytest.mark.parametrize(("topology", "count"), [("single", 1), ("ddp", 2), ("zero3", 2), ("fsdp2", 2)])
def test_a_training_that_ends_before_the_snapshot_leaves_the_live_weights_and_a_warning(
    implementation: Implementation, ranks: Ranks, tmp_path: Path, topology: str, count: int
) -> None:
    arguments = {"update_freq": 1, "update_after": 100}
    setup = Setup(implementation.name, topology, count, model="frozen", steps=2, hyperparameters=arguments)
    finished, *others = ranks(count).run(train_with_reference, setup, tmp_path / "out", tmp_path / "reference")
    loaded = dict(load(setup, tmp_path / "out" / "bema").named_parameters())
    for name, parameter in loaded.items():
        assert same_bits(finished.live[name], parameter.detach()), name
    # The reference warns as well.
    assert len(finished.warnings) == 2
    assert [message for rank in others for message in rank.warnings] == []


@pytest.mark.clause("BEMA-10")
def test_what_an_earlier_training_left_is_replaced(
    implementation: Implementation, ranks: Ranks, tmp_path: Path
) -> None:
    for seed in range(2):
        setup = Setup(implementation.name, model=odd(implementation), steps=3, seed=seed)
        (finished,) = ranks(1).run(train_with_reference, setup, tmp_path / "out", tmp_path / f"reference {seed}")
        assert_saved(setup, tmp_path / "out" / "bema", finished)
        assert not (tmp_path / "out" / "bema" / "left").exists()
        (tmp_path / "out" / "bema" / "left").touch()
        assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["bema"]


# ── What cannot be written ────────────────────────────────────────────────────


@pytest.mark.clause("BEMA-10")
@pytest.mark.parametrize(("topology", "count"), placements(2))
def test_every_rank_raises_if_the_shadow_cannot_be_written(
    implementation: Implementation, ranks: Ranks, tmp_path: Path, topology: str, count: int
) -> None:
    (tmp_path / "file").touch()
    setup = Setup(implementation.name, topology, count, model=odd(implementation), steps=2)
    for message in ranks(count).run(end_training, setup, tmp_path / "file" / "out"):
        assert str(tmp_path / "file") in str(message)


@pytest.mark.clause("BEMA-10")
@pytest.mark.parametrize(("topology", "count"), [("single", 1), ("zero2", 2)])
def test_every_rank_of_a_real_training_raises_if_the_shadow_cannot_be_written(
    implementation: Implementation, ranks: Ranks, tmp_path: Path, topology: str, count: int
) -> None:
    setup = Setup(implementation.name, topology, count, model=odd(implementation), steps=2)
    for message in ranks(count).run(train_with_obstruction, setup, tmp_path / "out"):
        assert str(tmp_path / "out") in str(message)


@pytest.mark.clause("BEMA-10")
@pytest.mark.parametrize(("topology", "count"), [("single", 1), ("ddp", 2), ("fsdp2", 2)])
def test_a_full_disk_is_an_error_that_leaves_the_earlier_result_and_no_half_one(
    implementation: Implementation, ranks: Ranks, tmp_path: Path, topology: str, count: int
) -> None:
    setup = Setup(implementation.name, topology, count, model=odd(implementation), steps=2)
    assert [None] * count == ranks(count).run(end_training, setup, tmp_path)
    before = {file.name: file.read_bytes() for file in (tmp_path / "bema").iterdir()}
    changed = setup.on(seed=1)
    for message in ranks(count).run(end_training, changed, tmp_path, on_full_disk=True):
        assert str(tmp_path / "bema") in str(message)
    assert before == {file.name: file.read_bytes() for file in (tmp_path / "bema").iterdir()}


@pytest.mark.clause("BEMA-10")
def test_an_error_of_any_class_reaches_every_rank(implementation: Implementation, ranks: Ranks, tmp_path: Path) -> None:
    setup = Setup(implementation.name, "ddp", 2, model=odd(implementation), steps=2)
    for message in ranks(2).run(end_training_with, setup, tmp_path, UnwritableTokenizer(), timeout=20):
        assert "no ink left" in str(message)
