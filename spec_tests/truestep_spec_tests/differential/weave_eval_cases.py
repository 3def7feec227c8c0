"""The runs that the differential tests of evaluations in Weave have in common, and what ranks do in them."""

import asyncio
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from transformers import Trainer, TrainerCallback

from truestep_spec_tests.differential.log_completions_cases import SAMPLING
from truestep_spec_tests.differential.observing import state_after_training
from truestep_spec_tests.lockstep.weave_eval import PROJECT, served
from truestep_spec_tests.properties.weave_eval_cases import Seen, seen, wait_until
from truestep_spec_tests.runs import Setup

CALLBACK = "WeaveCallback"


def evaluating(implementation: str, topology: str = "single", ranks: int = 1, **changes: Any) -> Setup:
    """A run that evaluates at every second of four steps, with completions that are drawn.

    Args:
        implementation: See `Implementation`.
        topology: Of the model.
        ranks: Number of ranks.
        changes: Other attributes of `Setup`; `training` comes on top of the interval.
    """
    training = {"eval_strategy": "steps", "eval_steps": 2} | changes.pop("training", {})
    return Setup(
        implementation,
        topology,
        ranks,
        callback=CALLBACK,
        **{"steps": 4, "generation": SAMPLING, "hyperparameters": {}, "training": training} | changes,
    )


class Evaluating(TrainerCallback):
    """Has a trainer do something at the end of each step, such as evaluate.

    Args:
        trainer: The trainer.
        actions: What it does at step 1, 2, and so on.
    """

    def __init__(self, trainer: Trainer, actions: list[Callable[[Trainer], object]]) -> None:
        self._trainer, self._actions = trainer, actions

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._actions[state.global_step - 1](self._trainer)


# Scorers that leave traces


def draw_by_python(prompt: str, completion: str) -> float:
    return random.random()


def draw_by_numpy(prompt: str, completion: str) -> float:
    return float(np.random.random())


async def draw_by_torch(prompt: str, completion: str) -> float:
    await asyncio.sleep(0)
    torch.manual_seed(len(completion))
    return float(torch.rand(()))


DRAWING: dict[str, Callable[[str, str], Any]] = {
    "python": draw_by_python,
    "numpy": draw_by_numpy,
    "torch": draw_by_torch,
}
"""Scorers that draw random numbers."""


class Watched(NamedTuple):
    """What a training with the callback leaves on a rank.

    Attributes:
        state: What is left of the training.
        calls: How many calls of scorers there were.
        seen: On the main process, the evaluations that have arrived.
        projects: On the main process, how many clients each project was opened by.
    """

    state: dict[str, Any]
    calls: int
    seen: list[Seen]
    projects: dict[str, int]


def train_watched(setup: Setup, directory: Path) -> Watched:
    """Trains with a callback whose scorers draw random numbers."""
    calls: list[str] = []
    made: list[TrainerCallback] = []

    def count(prompt: str, completion: str) -> int:
        calls.append(prompt)
        return 1

    def attach(trainer: Any) -> list[TrainerCallback]:
        made.append(setup.subject(trainer, **setup.weave_arguments() | {"scorers": DRAWING | {"count": count}}))
        return made

    with served() as server:
        state = state_after_training(setup, directory, attach=attach)
        is_main = server is not None
        return Watched(
            state,
            len(calls),
            seen(made[0], server, PROJECT) if is_main else [],
            server.projects() if is_main else {},
        )


# What is left of a callback


def running() -> tuple[set[int], set[int]]:
    """The threads and the children of this process."""
    threads = {thread.native_id for thread in threading.enumerate() if thread.native_id is not None}
    return threads, {child.pid for child in psutil.Process().children(recursive=True)}


@contextmanager
def leaving_nothing() -> Iterator[Callable[[], set[int]]]:
    """Asserts that a block leaves no thread and no process, but for such as are about to end.

    Yields:
        What returns the processes that are running now and were not before.
    """
    threads, children = running()
    yield lambda: running()[1] - children
    wait_until(lambda: running()[0] <= threads and running()[1] <= children)


def is_alive(process: int) -> bool:
    """Whether a process runs, whoever has started it."""
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
