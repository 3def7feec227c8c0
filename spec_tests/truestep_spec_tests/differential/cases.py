"""Where the differential tests run, what they ask of an implementation, and what happens to it there."""

import logging
import os
import resource
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from transformers import TrainerCallback
from truestep_fixtures.topologies import TOPOLOGIES

from truestep_spec_tests.implementation import Implementation
from truestep_spec_tests.runs import Outcome

DTYPES = ("float32", "bfloat16", "float64", "float16")
"""Names of the dtypes that parameters may have."""

SHARDED = ("zero3", "zero3_persistent", "fsdp2")
"""The topologies in which a rank has only a part of the weights."""


def placements(*counts: int, topologies: tuple[str, ...] = TOPOLOGIES) -> list[tuple[str, int]]:
    """Lists topologies with numbers of ranks: a single process, and every other topology at all of `counts`."""
    distributed = [(topology, count) for topology in topologies if topology != "single" for count in counts]
    return [("single", 1)] * ("single" in topologies) + distributed


_WHOLE = tuple(topology for topology in TOPOLOGIES if topology not in SHARDED)

PLACEMENTS = [*placements(2, topologies=_WHOLE), *placements(3, topologies=SHARDED)]
"""Every topology once: at 2 ranks, and those that shard at 3, where nothing divides evenly."""


def require(implementation: Implementation, *methods: str) -> None:
    """Skips the test if the callback lacks a method that TRL's documentation does not ask for.

    An implementation that offers them is held to everything that is beyond that documentation, also to the files of
    its state.
    """
    missing = [method for method in methods if not hasattr(implementation.BEMACallback, method)]
    if missing:
        pytest.skip(f"BEMACallback of {implementation} has no {', '.join(missing)}")


def odd(implementation: Implementation) -> str:
    """The model whose shapes no number of ranks divides.

    That is a plain module. An implementation that is not held to what is beyond TRL's documentation gets a model of
    Transformers.
    """
    return "odd" if hasattr(implementation.BEMACallback, "shadow_state_dict") else "qwen2"


def skip_the_reference(implementation: Implementation, reason: str) -> None:
    """Skips the test if the reference is its own subject."""
    if implementation.callback(implementation.offered[0]).__module__.startswith("truestep_reference"):
        pytest.skip(f"the reference {reason}")


@contextmanager
def logged_warnings() -> Iterator[list[str]]:
    """Collects the messages of level WARNING that reach the root logger within a `with` block."""
    messages: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno == logging.WARNING:
                messages.append(record.getMessage())

    collector = Collector()
    logging.getLogger().addHandler(collector)
    try:
        yield messages
    finally:
        logging.getLogger().removeHandler(collector)


def error_of(action: Callable[[], object]) -> str | None:
    """The message of the error that an action raises, or None if it raises none."""
    try:
        action()
    except Exception as error:
        return str(error)
    return None


@contextmanager
def full_disk(room: int = 4096) -> Iterator[None]:
    """Within a `with` block no file of this process can grow beyond `room` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Death(TrainerCallback):
    """Ends the process without a word, as `kill -9` does, at an event of a step."""

    def __init__(self, event: str, step: int, rank: int | None = None) -> None:
        self.event, self.step, self.rank = event, step, rank

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._die_at("on_step_end", args, state)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._die_at("on_save", args, state)

    def _die_at(self, event: str, args: Any, state: Any) -> None:
        if event == self.event and state.global_step == self.step and self.rank in (None, args.process_index):
            os.kill(os.getpid(), signal.SIGKILL)


# An example takes up to a second on several ranks, and its failure says at which element of which step: it is not
# worth minutes of shrinking.
several_ranks = settings(
    max_examples=max(2, settings.default.max_examples // 40),
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
    suppress_health_check=list(HealthCheck),
)


def assert_in_lockstep(outcomes: Sequence[Outcome], steps: int) -> None:
    """All steps were compared, on every rank to the same result, and nothing was found."""
    for outcome in outcomes:
        assert outcome.comparisons.divergence is None, str(outcome.comparisons.divergence)
        assert list(range(steps + 1)) == list(outcome.comparisons.steps)
        assert outcomes[0].comparisons.steps == outcome.comparisons.steps
