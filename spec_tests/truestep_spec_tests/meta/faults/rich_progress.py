"""The faults that a progress display can have away from a terminal."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback
from truestep_fixtures.data import language_dataset
from truestep_fixtures.topologies import training_arguments
from truestep_fixtures.training import train

from truestep_spec_tests.meta.faults import unless_it_raises
from truestep_spec_tests.properties.rich_progress_cases import Fired, Loader, as_json
from truestep_spec_tests.runs import Setup

# What is logged at one step after the other: numbers of all sizes, and what is none.
LOGS: list[dict[Any, Any]] = [
    {"loss": 2.5, "learning_rate": 1e-5, "rewards/chosen": 12345.678},
    {"loss": 0.00012345, "[red]": "two\nlines", "rewards/chosen": 2.9979e8},
    *({"loss": 1 / step} for step in range(1, 40)),
]


def in_its_view(setup: Setup, directory: Path) -> str | None:
    """It is another one than the reference's after some event."""
    subject, reference = setup.subject(), setup.reference()
    for event in _events_of_a_training(directory, [subject, reference]):
        expected, found = as_json(reference.view), as_json(subject.view)
        if expected != found:
            return f"after {event} it is {found}, not {expected}"
    return None


def on_other_ranks(setup: Setup, directory: Path) -> str | None:
    """There is a view."""
    subject = setup.subject()
    fired = Fired(training_arguments("single", directory), [subject])
    fired.state.is_world_process_zero = False
    fired.begin()
    return None if subject.view is None else f"there is a view: {subject.view}"


def with_no_percent(setup: Setup, directory: Path) -> str | None:
    """It is taken."""
    return unless_it_raises(lambda: setup.subject(plain_percent=0))


def in_a_file(setup: Setup, directory: Path) -> str | None:
    """There are no lines, or not only lines."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "log").open("w+", encoding="utf-8") as file:
        with _standard_output(file):
            train("single", "odd", output_dir=directory, callbacks=[setup.subject()], steps=3)
        file.seek(0)
        written = file.read()
    if "\x1b" in written:
        return f"there are control codes: {written!r}"
    return None if "training begins" in written else f"nothing is said of the training: {written!r}"


def after_a_training_that_raised(setup: Setup, directory: Path) -> str | None:
    """It is still on when something is evaluated."""
    subject, made, dataset = setup.subject(), [], language_dataset(2)

    def attach(trainer: Trainer) -> list[TrainerCallback]:
        made.append(trainer)
        return [subject, _Raising()]

    with _standard_output(None):
        assert unless_it_raises(lambda: train("single", "odd", output_dir=directory, attach=attach)) is None
        made[0].evaluate(dataset)
    return None if subject.view.training is None else f"it is at {subject.view.training}"


class _Raising(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        raise RuntimeError("no more")


def _events_of_a_training(directory: Path, callbacks: list[TrainerCallback]) -> Iterator[str]:
    """A training that is resumed, is evaluated, and takes more steps than it says; and a prediction after it."""
    fired = Fired(training_arguments("single", directory), callbacks)
    loaders = [Loader(3), Loader(2)]
    fired.at(step=20, max_steps=50, epoch=0.4)
    yield from _each("the beginning", lambda: fired.begin({"loss": 3.0, "step": 10}))
    for step, logs in enumerate(LOGS, start=21):
        fired.at(step=step, max_steps=50, epoch=step / 50)
        yield from _each(f"step {step}", lambda: fired.fire("on_step_end"))
        yield from _each(f"the log of step {step}", lambda logs=logs: fired.fire("on_log", logs=logs))
        if step == 30:
            for loader in (*loaders[:1] * 4, *loaders[1:]):
                yield from _each("a batch", lambda loader=loader: fired.batch(loader))
    yield from _each("the end", lambda: fired.fire("on_train_end"))
    yield from _each("a batch after the end", lambda: fired.batch(loaders[0]))
    yield from _each("the prediction", lambda: fired.fire("on_predict", metrics={"test_loss": 1}))


def _each(event: str, fire: Any) -> Iterator[str]:
    with _standard_output(None):
        fire()
    yield event


@contextmanager
def _standard_output(stream: Any) -> Iterator[None]:
    """Another standard output, or none, within a `with` block."""
    before, sys.stdout = sys.stdout, stream
    try:
        yield
    finally:
        sys.stdout = before
