"""What the tests of evaluations in Weave have in common: how they are seen, and what scorers return."""

import asyncio
import copy
import dataclasses
import enum
import fractions
import importlib.util
import inspect
import math
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import nn
from transformers import GenerationConfig, TrainerCallback, TrainingArguments
from truestep_fixtures import data
from truestep_fixtures.events import Events
from truestep_fixtures.weave_records import Evaluation
from truestep_fixtures.weave_server import RecordingServer

from truestep_spec_tests.implementation import Implementation
from truestep_spec_tests.options import require, takes
from truestep_spec_tests.properties.log_completions_cases import rows_of, speaking

# `importorskip` would import it.
requires_weave = pytest.mark.skipif(importlib.util.find_spec("weave") is None, reason="weave is not installed")

PATIENCE = 60.0
"""Seconds after which what has not arrived never will."""

SILENCE = 15.0
"""Seconds without a request, once there were some, after which no other will come."""

# What has been logged


class Row(NamedTuple):
    """A prediction."""

    prompt: str
    completion: str
    scores: dict[str, Any]


class Seen(NamedTuple):
    """An evaluation that has arrived, with the names that were given.

    `score_calls` are by scorer, for each row. `lacks` is what it does not say of itself, or says otherwise.
    """

    project: str
    step: int
    model: str
    dataset: str
    config: dict[str, Any]
    prefix: str
    rows: list[Row]
    summary: dict[str, Any] | None
    score_calls: list[dict[str, Any]]
    lacks: list[str]

    @property
    def prompts(self) -> list[str]:
        """Those of the rows."""
        return [row.prompt for row in self.rows]


def seen(callback: TrainerCallback, server: RecordingServer, project: str | None = None) -> list[Seen]:
    """The evaluations that have arrived, of one project or of all, in their order.

    Of a callback that logs nowhere, it is those that it has as `evaluations`.
    """
    if hasattr(callback, "evaluations"):
        return [
            Seen(
                *(one.project, one.training_step, one.model_name, one.dataset_name, one.generation_config),
                *(one.metric_key_prefix, list(map(_as_shown, one.predictions)), one.summary, [], []),
            )
            for one in callback.evaluations
        ]
    return [_of_server(one) for one in evaluations(server) if project in (None, one.project) and _is_whole(one)]


def evaluations(server: RecordingServer) -> list[Evaluation]:
    """What a server has got; nothing while an object is under way that something else refers to."""
    try:
        return server.evaluations()
    except KeyError:
        return []


def wait_for(callback: TrainerCallback, server: RecordingServer, number: int, project: str | None = None) -> list[Seen]:
    """What has arrived, as soon as there are so many evaluations."""
    requests, found, changed = -1, list[Seen](), time.monotonic()

    def are_there() -> bool:
        nonlocal requests, found, changed
        before, requests = requests, len(server.requests())
        if before != requests:  # otherwise there is nothing new
            found, changed = seen(callback, server, project), time.monotonic()
        if requests and time.monotonic() - changed > SILENCE:
            pytest.fail(f"of {number} evaluations {len(found)} are whole, and nothing more arrives")
        return len(found) >= number

    wait_until(are_there)
    return found


def wait_until(condition: Callable[[], bool], seconds: float = PATIENCE) -> None:
    """Fails the test if something does not come to be."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            pytest.fail("it did not come to be")
        time.sleep(0.1)


def named(kind: str, name: str) -> str:
    """What an object is called in Weave, which wants a letter or a digit in a name."""
    return name if any(letter.isalnum() for letter in name) else f"{kind} {name}"


def _as_shown(prediction: Any) -> Row:
    prompt, completion, scores = prediction
    return Row(prompt, completion, {named("scorer", name): score for name, score in scores.items()})


def _is_whole(evaluation: Evaluation) -> bool:
    is_ended = evaluation.is_finished and all(row.is_finished for row in evaluation.predictions)
    rows = evaluation.dataset["rows"]
    return is_ended and (len(evaluation.predictions) == len(rows) or not all("prompt" in row for row in rows))


def _of_server(evaluation: Evaluation) -> Seen:
    assert evaluation.exception is None
    attributes = evaluation.attributes
    model, dataset = (part["name"] for part in (evaluation.model, evaluation.dataset))
    names = {"model_name": model, "dataset_name": dataset}
    unsaid = {"training_step": None, "generation_config": {}, "metric_key_prefix": ""}
    said = names | unsaid | attributes
    as_said = {
        "attributes": attributes.keys() == names.keys() | unsaid.keys(),
        "model": named("model", said["model_name"]) == model,
        "dataset": named("dataset", said["dataset_name"]) == dataset,
        "rows": [row.inputs for row in evaluation.predictions] == evaluation.dataset["rows"],
        "inputs": all(set(row.inputs) == {"prompt"} for row in evaluation.predictions),
    }
    return Seen(
        evaluation.project,
        said["training_step"],
        said["model_name"],
        said["dataset_name"],
        said["generation_config"],
        said["metric_key_prefix"],
        [Row(row.inputs["prompt"], row.output, row.scores) for row in evaluation.predictions],
        None if evaluation.summary is None else evaluation.summary["output"],
        [row.score_calls for row in evaluation.predictions],
        [part for part, is_right in as_said.items() if not is_right],
    )


# The callback under test, and how it is led


@dataclasses.dataclass(frozen=True)
class Subject:
    """A callback under test, and where it logs.

    Args:
        implementation: Where it is from.
        args: Training arguments; each training has an `output_dir` of its own beneath theirs.
        server: Where evaluations arrive.
        model: What completes.
        tokenizer: The trainer's `processing_class`.
        generation: Fields of the generation config.
    """

    implementation: Implementation
    args: TrainingArguments
    server: RecordingServer
    model: nn.Module = dataclasses.field(default_factory=lambda: speaking("qwen2"))
    tokenizer: Any = dataclasses.field(default_factory=data.tokenizer)
    generation: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"max_new_tokens": 4})

    def on(self, **changes: Any) -> "Subject":
        """The same but for some attributes."""
        return dataclasses.replace(self, **changes)

    def having(self, *options: str) -> "Subject":
        """The same; skips the test if the constructor lacks an option."""
        require(self.implementation.WeaveCallback, options)
        return self

    def offers(self, option: str) -> bool:
        """Whether the constructor has an option."""
        return takes(self.implementation.WeaveCallback, option)

    @property
    def config(self) -> GenerationConfig:
        """The generation config that callbacks are given."""
        return GenerationConfig(**{"eos_token_id": data.END} | self.generation)

    def trainer(self, dataset: Any) -> Events:
        """What stands in for a trainer with an evaluation dataset."""
        args = copy.copy(self.args)
        args.output_dir = tempfile.mkdtemp(dir=self.args.output_dir)
        rows = data.Rows(dataset) if isinstance(dataset, list) else dataset
        return Events(self.model, args, [], processing_class=self.tokenizer, eval_dataset=rows)

    def callback(self, trainer: Any, project: str | None = "team/project", **options: Any) -> TrainerCallback:
        """A new callback; skips the test if it lacks an option."""
        self.having(*options)
        arguments = {"generation_config": self.config} | options
        callback: TrainerCallback = self.implementation.WeaveCallback(trainer, project, **arguments)
        return callback

    def begin(
        self, prompts: Any, project: str | None = "team/project", **options: Any
    ) -> tuple[Events, TrainerCallback]:
        """A training with a new callback, after its begin."""
        trainer = self.trainer(rows_of(prompts))
        callback = self.callback(trainer, project, **options)
        trainer.add_callback(callback)
        trainer.train_begin()
        return trainer, callback

    def refusal(self, dataset: Any, **options: Any) -> str:
        """The message of the error at construction."""
        trainer = self.trainer(dataset)
        with pytest.raises(ValueError) as error:  # noqa: PT011 - the test looks at the message
            self.callback(trainer, **options)
        return str(error.value)


def evaluate_at(trainer: Events, step: int) -> None:
    """Tells callbacks of an evaluation at a step."""
    trainer.state.global_step = step
    trainer.evaluate()


# What scorers return


class Outcome(NamedTuple):
    """What a call of a scorer comes to.

    Attributes:
        value: What is returned, or raised.
        score: What that is as a score, if it is any.
        is_raised: Whether it is raised.
    """

    value: Any
    score: int | float | None
    is_raised: bool = False

    def __call__(self) -> Any:
        """What the scorer does."""
        if self.is_raised:
            raise self.value
        return self.value


class Grade(enum.IntEnum):
    """A number that has a name."""

    GOOD = 3


class Temperature(float):
    """A number that is a float, and more."""


NUMBERS: list[tuple[Any, int | float]] = [
    *((value, value) for value in (0, 3, -5, 2**53 + 1, 10**30, -(10**308))),
    *((value, value) for value in (0.5, 0.1, -0.0, 3.0, 1e22, 1.7e308, -1.7e308, 5e-324)),
    *((True, 1), (False, 0), (Grade.GOOD, 3), (Temperature(0.3), 0.3)),
    *((np.float64(0.1), 0.1), (np.float32(0.5), 0.5), (np.float32(0.1), 0.10000000149011612), (np.int8(-7), -7)),
    *((np.uint64(2**64 - 1), 2**64 - 1), (np.bool_(True), 1), (np.array(0.25), 0.25), (np.float16(0.5), 0.5)),
    *((torch.tensor(0.1, dtype=torch.float64), 0.1), (torch.tensor(3), 3), (torch.tensor(False), 0)),
    *((torch.tensor(0.1, dtype=torch.bfloat16), 0.10009765625), (torch.tensor(0.5, requires_grad=True), 0.5)),
]
"""Values that are scores, and the numbers that they are."""

NO_NUMBERS: list[Any] = [
    *(None, "0.5", "", b"1", [], [0.5], (1,), {}, {"score": 0.5}, {1}, 1 + 0j, object, Ellipsis),
    *(math.nan, math.inf, -math.inf, 10**400, -(2**1024), np.float32("nan"), torch.tensor(math.inf)),
    *(Decimal("0.5"), fractions.Fraction(1, 2), np.array([0.5]), np.array([]), np.str_("1"), np.complex64(1)),
    *(torch.tensor([0.5]), torch.tensor([]), torch.tensor(1j), ValueError("returned, not raised")),
]
"""Values that are no scores."""

ERRORS: list[Exception] = [
    *(ValueError("no"), KeyError("prompt"), RuntimeError(), StopIteration(), AssertionError(""), OSError(5, "é")),
    *(TimeoutError(), asyncio.InvalidStateError(), RecursionError(), MemoryError(), UnicodeError("\ud800")),
]
"""What scorers raise."""

outcomes = st.one_of(
    st.sampled_from(NUMBERS).map(lambda pair: Outcome(*pair)),
    st.floats(allow_nan=False, allow_infinity=False).map(lambda number: Outcome(number, number)),
    st.integers(-(2**70), 2**70).map(lambda number: Outcome(number, number)),
    st.sampled_from(NO_NUMBERS).map(lambda value: Outcome(value, None)),
    st.sampled_from(ERRORS).map(lambda error: Outcome(error, None, True)),
)
"""What calls of scorers come to."""


class Unprintable:
    """Something that cannot even be shown."""

    def __repr__(self) -> str:
        raise RuntimeError("cannot be shown")

    __str__ = __repr__


class UnprintableError(Exception):
    """An exception that cannot be shown."""

    def __repr__(self) -> str:
        raise RuntimeError("cannot be shown")

    __str__ = __repr__


class Unreadable:
    """Something that looks like a scalar and has no value."""

    shape = ()

    def item(self) -> float:
        raise RuntimeError("has no value")


PROMPTS = ("The quick", "Zwölf", "Every step is")
"""Prompts that scorers are called with, none of which is in another."""

SCORERS = ("meta-llama/judge 3.1", "größe 漢字: is", "🙂")
"""Names of scorers. The last one is async."""


class Scored:
    """A training with scorers that do what each evaluation tells them to do.

    Args:
        subject: What logs.
        project: Where.
        options: More arguments of the callback.

    Attributes:
        calls: Of the last evaluation: prompt, scorer and thread of each, in the order in which they began.
        most: The most that went on at a time.
    """

    def __init__(self, subject: Subject, project: str, **options: Any) -> None:
        scorers = {name: self._scorer(name) for name in SCORERS[:-1]} | {SCORERS[-1]: self._async_scorer(SCORERS[-1])}
        self._subject, self._project = subject, project
        self._trainer, self._callback = subject.begin(PROMPTS, project, scorers=scorers, **options)
        self._acts: Mapping[tuple[str, str], Callable[[], Any]] = {}
        self._lock, self._active = threading.Lock(), 0
        self._arrived: list[Seen] = []
        self.calls: list[tuple[str, str, int]] = []
        self.most = 0

    def evaluate(self, acts: Mapping[tuple[str, str], Callable[[], Any]]) -> Seen:
        """What arrives of an evaluation in which scorers act like this, by prompt and scorer."""
        self._acts, self.calls, self.most = acts, [], 0
        step = self._trainer.state.global_step + 1
        evaluate_at(self._trainer, step)
        self._arrived = wait_for(self._callback, self._subject.server, len(self._arrived) + 1, self._project)
        return self._arrived[-1]

    def end(self) -> None:
        """Ends the training."""
        self._trainer.train_end()

    def _begins(self, prompt: str, name: str) -> Callable[[], Any]:
        with self._lock:
            self.calls.append((prompt, name, threading.get_ident()))
            self._active += 1
            self.most = max(self.most, self._active)
        return self._acts[prompt, name]

    def _ends(self) -> None:
        with self._lock:
            self._active -= 1

    def _scorer(self, name: str) -> Callable[[str, str], Any]:
        def scorer(prompt: str, completion: str) -> Any:
            act = self._begins(prompt, name)
            try:
                return act()
            finally:
                self._ends()

        return scorer

    def _async_scorer(self, name: str) -> Callable[[str, str], Any]:
        async def scorer(prompt: str, completion: str) -> Any:
            act = self._begins(prompt, name)
            try:
                await asyncio.sleep(0)
                result = act()
                return await result if inspect.isawaitable(result) else result
            finally:
                self._ends()

        return scorer
