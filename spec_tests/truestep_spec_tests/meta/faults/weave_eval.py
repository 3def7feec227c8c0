"""The faults that evaluations in Weave can have."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import PrinterCallback, Trainer
from truestep_fixtures import data
from truestep_fixtures.training import train
from truestep_fixtures.weave_records import Evaluation
from truestep_fixtures.weave_server import Fault, RecordingServer

from truestep_spec_tests.differential.cases import logged_warnings
from truestep_spec_tests.lockstep import weave_eval
from truestep_spec_tests.meta.faults import unless_it_raises
from truestep_spec_tests.runs import Setup, Walk


def at_the_end_of_a_training(setup: Setup, directory: Path) -> str | None:
    """Something is missing, there twice, or left over."""
    with _walked(setup, directory) as (walk, server, scored):
        walk.begin()
        walk.go_to(setup.steps)
        walk.end()
        left = [child.pid for child in psutil.Process().children() if "weave" in " ".join(child.cmdline())]
        if left:
            return f"processes are left: {left}"
        if server is None:
            return f"{len(scored)} completions are scored here" if scored else None
        return _first_of(
            _unless_equal("the steps of the evaluations", _steps(server), [2, 4]),
            _unless_equal("the clients", server.projects(), {weave_eval.PROJECT: 1}),
            *(_of_an_end(evaluation) for evaluation in server.evaluations()),
        )


def at_a_step_with_two_evaluations(setup: Setup, directory: Path) -> str | None:
    """They are both logged."""
    with _walked(setup, directory) as (walk, server, _):
        walk.begin()
        walk.go_to(2)
        walk.events.fire("on_evaluate", metrics={})
        walk.end()
        assert server is not None
        return _unless_equal("the steps of the evaluations", _steps(server), [2])


def with_another_dataset(setup: Setup, directory: Path) -> str | None:
    """Its evaluation has the prompts or the name of the trainer's."""
    other = data.prompts("mixed").select([1])
    with weave_eval.served() as server:
        result = train(setup.topology, setup.build_model(), output_dir=directory, steps=1, **setup.evaluation())
        assert isinstance(result.trainer, Trainer)
        result.trainer.remove_callback(PrinterCallback)
        result.trainer.add_callback(setup.subject(result.trainer, **setup.weave_arguments()))
        result.trainer.evaluate(other, metric_key_prefix="other")
        assert server is not None
        arrived = server.evaluations()
    found = [(one.dataset["name"], [row.inputs["prompt"] for row in one.predictions]) for one in arrived]
    return _unless_equal("the evaluations", found, [("other", list(other["prompt"]))])


def without_a_project(setup: Setup, directory: Path) -> str | None:
    """It is accepted."""
    walk = Walk(setup, directory)
    with weave_eval.served():
        walk.events.add_callback(setup.subject(walk.events, **setup.weave_arguments() | {"project_name": None}))
        fault = unless_it_raises(walk.begin)
        walk.end()
    return fault


def with_a_name_that_is_none(setup: Setup, directory: Path) -> str | None:
    """It is accepted."""
    return unless_it_raises(
        lambda: setup.on(hyperparameters={"dataset_name": ""}).subject(Walk(setup, directory).events)
    )


def with_scorers_that_draw(setup: Setup, directory: Path) -> str | None:
    """The training goes on with other random numbers."""

    def drawing(prompt: str, completion: str) -> float:
        return random.random() + float(torch.rand(()))

    with _walked(setup, directory, {"drawing": drawing}) as (walk, _, _):
        walk.begin()
        walk.go_to(1)
        before = random.getstate(), torch.get_rng_state().tolist()
        walk.go_to(2)
        after = random.getstate(), torch.get_rng_state().tolist()
        walk.end()
    return None if after == before else "the state of the random number generators is another one"


def with_a_server_that_is_gone(setup: Setup, directory: Path) -> str | None:
    """A loss is not said."""
    with _walked(setup, directory) as (walk, server, _), logged_warnings() as warned:
        assert server is not None
        server.fail(Fault("refuse"))
        walk.begin()
        walk.go_to(setup.steps)
        walk.end()
    lost = [step for step in (2, 4) if any(f"step {step}" in message for message in warned)]
    return _unless_equal("the losses that are said", lost, [2, 4])


@contextmanager
def _walked(
    setup: Setup, directory: Path, scorers: dict[str, Any] | None = None
) -> Iterator[tuple[Walk, RecordingServer | None, list[str]]]:
    """A walk with a subject, the server on the main process, and the completions that are scored on this rank."""
    scored: list[str] = []

    def noting(prompt: str, completion: str) -> int:
        scored.append(completion)
        return len(completion)

    arguments = setup.weave_arguments()
    if setup.scorers is not None:
        arguments["scorers"] = scorers or {"noting": noting}
    with weave_eval.served() as server:
        yield Walk(setup, directory, attach=lambda trainer: [setup.subject(trainer, **arguments)]), server, scored


def _steps(server: RecordingServer) -> list[int]:
    return [evaluation.attributes["training_step"] for evaluation in server.evaluations()]


def _of_an_end(evaluation: Evaluation) -> str | None:
    if not evaluation.is_finished or not all(row.is_finished for row in evaluation.predictions):
        return f"the evaluation {evaluation.name!r} is left open"
    return None if evaluation.predictions else f"the evaluation {evaluation.name!r} has no predictions"


def _unless_equal(what: str, found: object, expected: object) -> str | None:
    return None if found == expected else f"{what} are {found}"


def _first_of(*found: str | None) -> str | None:
    return next((fault for fault in found if fault is not None), None)
