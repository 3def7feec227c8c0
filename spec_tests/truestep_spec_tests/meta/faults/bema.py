"""The faults that a BEMA can have."""

import contextlib
import inspect
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback
from truestep_fixtures import data, topologies
from truestep_fixtures.events import Events
from truestep_fixtures.training import train

from truestep_spec_tests.implementation import Implementation
from truestep_spec_tests.meta.faults import Values, first_difference, unless_it_raises
from truestep_spec_tests.meta.specification import constructor
from truestep_spec_tests.observe import shadow
from truestep_spec_tests.properties.bema_cases import BAD_ARGUMENTS, BAD_SCHEDULES, Weights
from truestep_spec_tests.runs import Setup, Walk, same_bits

# At the end of a trajectory


def when_it_is_read(setup: Setup, directory: Path) -> str | None:
    """The keys are not those of the state dict, or what is not trained is not live."""
    subject, placed = _at_the_end(setup, directory)
    shown, live = shadow(subject), placed.model.state_dict(keep_vars=True)
    if shown.keys() != live.keys():
        return f"entries that are on one side only: {', '.join(shown.keys() ^ live.keys())}"
    return first_difference(shown, {key: value.detach() for key, value in live.items() if not value.requires_grad})


def when_it_is_swapped_in(setup: Setup, directory: Path) -> str | None:
    """A forward does not give what it gives with the shadow written into the parameters, or the end is not live."""
    subject, placed = _at_the_end(setup, directory)
    live, shown = placed.read(), shadow(subject)
    placed.write({name: shown[name] for name in live})
    expected = _logits(placed)
    placed.write(live)
    _logits(placed)  # engines keep whole copies from a forward, which are stale once the shadow is in
    with subject.shadow_weights(placed.model):
        found = _logits(placed)
    if not same_bits(found, expected):
        return "a forward with the shadow swapped in gives something else"
    return first_difference(placed.read(), live)


def when_an_exception_leaves_the_block(setup: Setup, directory: Path) -> str | None:
    """The live weights are not put back."""
    subject, placed = _at_the_end(setup, directory)
    live = placed.read()
    with contextlib.suppress(KeyboardInterrupt), subject.shadow_weights(placed.model):
        raise KeyboardInterrupt
    return first_difference(placed.read(), live)


def when_it_is_saved(setup: Setup, directory: Path) -> str | None:
    """What is saved is not the shadow as it is read, or the tokenizer is not beside it."""
    subject, placed = _at_the_end(setup, directory)
    _end(subject, placed, directory, data.tokenizer())
    fault = first_difference(load_file(directory / "bema" / "model.safetensors"), shadow(subject))
    if fault is None and not (directory / "bema" / "tokenizer.json").is_file():
        return "there is no tokenizer"
    return fault


class FullDisk:
    """A tokenizer that cannot be saved."""

    def save_pretrained(self, directory: Path) -> None:
        raise OSError(f"{directory}: no space left")


def when_it_cannot_be_saved(setup: Setup, directory: Path) -> str | None:
    """There is no error, or the result of the training before is gone or touched."""
    subject, placed = _at_the_end(setup, directory)
    _end(subject, placed, directory)
    before = (directory / "bema" / "model.safetensors").read_bytes()
    placed.write({name: torch.zeros_like(value) for name, value in placed.read().items()})
    with contextlib.suppress(Exception):
        _end(subject, placed, directory, FullDisk())
        return "there is no error"
    saved = directory / "bema" / "model.safetensors"
    return None if saved.is_file() and saved.read_bytes() == before else "the earlier result is gone"


def _at_the_end(setup: Setup, directory: Path) -> tuple[Any, topologies.Placed]:
    """A subject, and the model that it was led along a trajectory with."""
    subject = setup.subject()
    walk = Walk(setup, directory, [subject])
    walk.begin()
    walk.go_to(setup.steps)
    return subject, walk.placed


def _logits(placed: topologies.Placed) -> Tensor:
    with torch.no_grad():
        logits: Tensor = placed.engine(input_ids=torch.arange(12).view(2, 6))["logits"]
    return logits


def _end(subject: TrainerCallback, placed: topologies.Placed, directory: Path, processing_class: Any = None) -> None:
    args = topologies.training_arguments("single", directory)
    Events(placed.model, args, [subject], processing_class=processing_class).train_end()


# In trainings


def in_a_second_training(setup: Setup, directory: Path) -> str | None:
    """An object that has seen a training is not like a new one."""
    used, _ = _at_the_end(setup, directory)
    new = setup.subject()
    walk = Walk(setup.on(seed=setup.seed + 1), directory, [used, new])
    walk.begin()
    for step in range(setup.steps + 1):
        walk.go_to(step)
        difference = first_difference(shadow(used), shadow(new))
        if difference is not None:
            return f"step {step} of the second training: {difference}"
    return None


def in_a_real_training(setup: Setup, directory: Path) -> str | None:
    """A training with the callback does not end like one without it."""
    watched, alone = (_end_of_training(setup, directory, callbacks) for callbacks in ([setup.subject()], []))
    return first_difference(watched, alone)


def _end_of_training(setup: Setup, directory: Path, callbacks: list[TrainerCallback]) -> Values:
    """Weights, optimizer state, and the state of the random number generator."""
    ended = train(
        setup.topology,
        setup.build_model(),
        output_dir=directory,
        callbacks=callbacks,
        steps=setup.steps,
        dtype=setup.torch_dtype,
        seed=setup.seed,
    )
    assert ended.trainer is not None
    assert ended.trainer.optimizer is not None
    moments = ended.trainer.optimizer.state_dict()["state"]
    return {
        **topologies.read_parameters(ended.model),
        **{f"{kind} of parameter {i}": value for i, kinds in moments.items() for kind, value in kinds.items()},
        "random number generator": torch.get_rng_state(),
    }


# At its beginning


def in_resuming(setup: Setup, directory: Path, at: int) -> str | None:
    """Resuming from a checkpoint that it should refuse raises nothing."""
    return unless_it_raises(lambda: Walk(setup, directory, [setup.subject()]).begin(at))


def with_a_complex_parameter(setup: Setup, directory: Path) -> str | None:
    """Train begin raises nothing."""
    model = Weights({"w": torch.ones(3, dtype=torch.complex64)})
    events = Events(model, topologies.training_arguments("single", directory), [setup.subject()])
    return unless_it_raises(events.train_begin)


def with_bad_arguments(setup: Setup, directory: Path) -> str | None:
    """Construction accepts what the properties say it refuses."""
    callback = Implementation(setup.implementation).BEMACallback
    for arguments in [*BAD_ARGUMENTS, *BAD_SCHEDULES]:
        with contextlib.suppress(ValueError):
            callback(**arguments)
            return f"{arguments} is accepted"
    return None


def in_the_constructor(setup: Setup, directory: Path) -> str | None:
    """Its parameters are not the documented ones."""
    found = inspect.signature(Implementation(setup.implementation).BEMACallback).parameters.values()
    for shown, documented in zip(found, constructor("BEMACallback"), strict=True):
        if (shown.name, shown.default) != (documented.name, documented.default):
            return f"{shown} stands where {documented} is documented"
    return None
