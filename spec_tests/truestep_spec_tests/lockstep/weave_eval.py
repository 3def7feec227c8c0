"""Evaluations in Weave: what is compared is what its service has got, letter by letter and to the last bit."""

import hashlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor
from transformers import TrainerCallback
from truestep_fixtures.isolation import environment
from truestep_fixtures.training import Attach
from truestep_fixtures.weave_records import Evaluation
from truestep_fixtures.weave_server import RecordingServer, forget_client, recording_server
from truestep_reference import WeaveCallback as ReferenceWeaveCallback
from truestep_reference.weave_eval import Evaluation as ReferenceEvaluation

from truestep_spec_tests.lockstep import Comparisons, OnCompared, texts
from truestep_spec_tests.observe import as_text

PROJECT = "truestep/verify"
"""The project, unless a run has another one."""

COUNT = "number of evaluations"
"""The name under which it is compared how many evaluations there are."""

PATIENCE = 60.0
"""Seconds that evaluations may take to arrive. Their order and contents say whether they are right, not the time."""

PATIENCE_WITH_ROWS = 5.0
"""Seconds that rows may still take when their evaluation is said to be finished."""


# Scorers, of which the results have many digits and do not depend on anything else


def share(prompt: str, completion: str) -> float:
    """A number of [0, 1) with 53 bits."""
    digest = hashlib.blake2b(f"{prompt}/{completion}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, byteorder="big") >> 11) / 2**53


def length(prompt: str, completion: str) -> int:
    """An integer."""
    return len(completion)


def is_short(prompt: str, completion: str) -> bool:
    """A truth value."""
    return len(completion) < 4


def sometimes(prompt: str, completion: str) -> float:
    """An exception, not a number, a text or a number."""
    drawn = share(prompt, completion)
    if drawn < 0.2:
        raise ValueError("no luck")
    results: list[Any] = [float("nan"), "a text", drawn, 3 * drawn]
    return results[int(drawn * 64) % 4]


async def later(prompt: str, completion: str) -> float:
    """A number that has to be awaited."""
    return share(completion, prompt) * 1e-3


SCORERS: dict[str, Callable[[str, str], Any]] = {
    "share": share,
    "number of letters": length,
    "is-short": is_short,
    "with luck / größer 0": sometimes,
    "later": later,
}
"""Scorers by name."""


# What there is


@contextmanager
def served() -> Iterator[RecordingServer | None]:
    """A server for one run of all ranks: the main process has it, and every rank has it in its environment. Collective.

    Yields:
        The server, or None on other ranks.
    """
    with ExitStack() as stack:
        server = stack.enter_context(recording_server()) if _is_main() else None
        variables: list[Any] = [None if server is None else server.environment]
        if dist.is_initialized():
            dist.broadcast_object_list(variables, src=0)
        stack.enter_context(environment(variables[0]))
        stack.callback(forget_client)
        yield server


def as_tensors(evaluations: list[dict[str, str]]) -> dict[str, Tensor]:
    """Evaluations as tensors by name: each part of each, and their number.

    Args:
        evaluations: The texts of each, by what they are the texts of.
    """
    parts = {
        f"evaluation {number}, {part}": text
        for number, evaluation in enumerate(evaluations)
        for part, text in evaluation.items()
    }
    return texts.as_tensors(parts, COUNT, len(evaluations))


def of_transcript(evaluation: ReferenceEvaluation) -> dict[str, str]:
    """The parts of an evaluation as the reference has it."""
    attributes = {
        name: getattr(evaluation, name)
        for name in ("dataset_name", "generation_config", "metric_key_prefix", "model_name", "training_step")
    }
    shown: dict[str, Any] = {
        "project": evaluation.project,
        "model": evaluation.model_name,
        "dataset": evaluation.dataset_name,
        "rows": [{"prompt": row.prompt} for row in evaluation.predictions],
        "attributes": _sorted(attributes),
        "how it ended": "well",
    }
    for number, row in enumerate(evaluation.predictions):
        shown[f"prediction {number}"] = [{"prompt": row.prompt}, row.completion, _numbers(row.scores), []]
    summary = evaluation.summary
    shown["summary"] = None if summary is None else _numbers(dict(sorted(summary.items())))
    return {part: as_text(value) for part, value in shown.items()}


class Arrivals:
    """What has arrived of a subject's evaluations, as users see it, which may take a while.

    A subject that logs nowhere, like the reference, shows a transcript as `evaluations` instead.

    Args:
        server: What `served` yields; on other ranks than the main process there is nothing to see.

    Attributes:
        subject: The callback; it is there when the training begins.
    """

    subject: TrainerCallback

    def __init__(self, server: RecordingServer | None) -> None:
        self._server = server
        self._patience = PATIENCE

    def after(self, number: int) -> dict[str, Tensor]:
        """What there is as soon as so many evaluations have ended, or after a wait that was long enough.

        Args:
            number: How many there should be. Once they were not, what comes later is not waited for.
        """
        if self._server is None:
            return as_tensors([])
        if hasattr(self.subject, "evaluations"):
            return as_tensors([of_transcript(one) for one in self.subject.evaluations])
        server = self._server
        weave = sys.modules.get("weave")
        client = None if weave is None else weave.get_client()
        if client is not None:
            client.flush()
        if not _wait(self._patience, lambda: sum(one.is_finished for one in _got(server)) >= number):
            self._patience = 0.0
        # Their ends need not be the last of them to arrive.
        _wait(PATIENCE_WITH_ROWS, lambda: all(len(one.predictions) >= len(one.dataset["rows"]) for one in _got(server)))
        return as_tensors([_of_server(one) for one in _got(server)])


class ArrivalsAfterEvents(Arrivals):
    """The same after each event: a look for a `Watcher`.

    Args:
        server: See `Arrivals`.
        parts: How many datasets are evaluated each time.
    """

    def __init__(self, server: RecordingServer | None, parts: int) -> None:
        super().__init__(server)
        self._parts = parts
        self._number = 0

    def __call__(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> dict[str, Tensor]:
        if metrics is not None:
            self._number += self._parts
        return self.after(self._number)


class WeaveComparator(texts.TextComparator):
    """Compares what has arrived with the reference's transcript, on the main process, which has both.

    Args:
        server: See `Arrivals`.
        on_compared: See `OnCompared`.

    Attributes:
        arrivals: What the subject shows.
        reference: The reference; it is there when the training begins.
    """

    reference: ReferenceWeaveCallback
    count = COUNT

    def __init__(self, server: RecordingServer | None, on_compared: OnCompared | None = None) -> None:
        super().__init__(on_compared)
        self.arrivals = Arrivals(server)

    def texts(self, args: Any, state: Any) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        transcript = self.reference.evaluations
        return self.arrivals.after(len(transcript)), as_tensors([of_transcript(one) for one in transcript])

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._compare(args, state, control, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._compare(args, state, control, **kwargs)


def lockstep(
    subject: Callable[[Any], TrainerCallback],
    reference: Callable[[Any], ReferenceWeaveCallback],
    server: RecordingServer | None,
    on_compared: OnCompared | None = None,
) -> tuple[Attach, Comparisons]:
    """The callbacks that compare a subject with the reference in one training.

    Args:
        subject: Makes the callback under test for a trainer.
        reference: Makes the reference for a trainer, with the same arguments.
        server: What `served` yields.
        on_compared: See `OnCompared`.

    Returns:
        What makes the callbacks for a training, in order, and the results that they fill in.
    """
    comparator = WeaveComparator(server, on_compared)

    def attach(trainer: Any) -> list[TrainerCallback]:
        comparator.arrivals.subject, comparator.reference = subject(trainer), reference(trainer)
        return [comparator.arrivals.subject, comparator.reference, comparator]

    return attach, comparator.comparisons


def _is_main() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _wait(seconds: float, condition: Callable[[], bool]) -> bool:
    """Whether something comes true in so many seconds."""
    end = time.monotonic() + seconds
    while not (is_true := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return is_true


def _got(server: RecordingServer) -> list[Evaluation]:
    try:
        return server.evaluations()
    except KeyError:  # an object that an evaluation refers to is still under way
        return []


def _of_server(evaluation: Evaluation) -> dict[str, str]:
    """The parts of an evaluation as Weave has it."""
    is_ended = evaluation.is_finished and all(row.is_finished for row in evaluation.predictions)
    shown: dict[str, Any] = {
        "project": evaluation.project,
        "model": evaluation.model["name"],
        "dataset": evaluation.dataset["name"],
        "rows": evaluation.dataset["rows"],
        "attributes": _sorted(evaluation.attributes),
        "how it ended": evaluation.exception or ("well" if is_ended else "not yet"),
    }
    for number, row in enumerate(evaluation.predictions):
        shown[f"prediction {number}"] = [row.inputs, row.output, _numbers(row.scores), sorted(row.score_calls)]
    summary = evaluation.summary
    shown["summary"] = None if summary is None else _numbers(dict(sorted(summary.get("output", summary).items())))
    return {part: as_text(value) for part, value in shown.items()}


def _sorted(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes, and the fields of the config among them, in the order of their names."""
    return {
        name: dict(sorted(value.items())) if isinstance(value, Mapping) else value
        for name, value in sorted(attributes.items())
    }


def _numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values with each number as the float64 that it is; truth values stay, as they are no numbers in Weave."""
    return {
        name: float(value) if isinstance(value, int) and not isinstance(value, bool) else value
        for name, value in values.items()
    }
