"""Leads callbacks along what golden files say, the reference when they are filled and any other when they are used."""

import contextlib
import io
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import ByT5Tokenizer, GenerationConfig, TrainerCallback
from truestep_fixtures import models, topologies
from truestep_fixtures.data import Rows
from truestep_fixtures.events import Events

from truestep_spec_tests import observe
from truestep_spec_tests.golden.files import Json, marked, to_tensor, unmarked
from truestep_spec_tests.lockstep.weave_eval import PROJECT, Arrivals, served

Point = dict[str, Tensor]
"""Values by the names of parameters and buffers."""

BYTES = 3 + 256
"""The tokens of a tokenizer of bytes: three special ones come first."""


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Lets callbacks neither print nor warn."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)


# Models that move along a trajectory


def point(trajectory: Json, values: Json) -> Point:
    """What a file has of a model at one step, as float64 tensors."""
    described = trajectory["parameters"] | trajectory["buffers"]
    return {name: to_tensor(elements, described[name]["shape"]) for name, elements in values.items()}


def policy_of(trajectory: Json) -> nn.Module:
    """The model that a file describes, as it is at train begin."""
    return _model(trajectory, trajectory["steps"][0], trajectory["dtype"])


def reference_of(trajectory: Json) -> nn.Module:
    """The reference model that a file describes, as it is at train begin."""
    return _model(trajectory, trajectory["reference"], trajectory["reference_dtype"]).requires_grad_(False)


def _model(trajectory: Json, values: Json, dtype_name: str) -> nn.Module:
    return _Described((trajectory, point(trajectory, values), getattr(torch, dtype_name)))


class _Described(models.Anew):
    """A model as a file describes it.

    Args:
        config: The trajectory, the values and the dtype.
    """

    def __init__(self, config: tuple[Json, Point, torch.dtype]) -> None:
        super().__init__(config)
        trajectory, values, dtype = config
        tied = [name for name, about in trajectory["parameters"].items() if about["also_named"]]
        for name in dict.fromkeys([*tied, *values]):  # of a parameter's names, PyTorch lists the one that comes first
            value = values[name]
            if name in trajectory["buffers"]:
                module, attribute = _holder(self, name)
                module.register_buffer(attribute, value.to(dtype))
                continue
            about = trajectory["parameters"][name]
            parameter = nn.Parameter(value.to(dtype), requires_grad=about["trainable"])
            for known_as in (name, *about["also_named"]):
                module, attribute = _holder(self, known_as)
                module.register_parameter(attribute, parameter)


def led(
    callback: TrainerCallback, model: nn.Module, trajectory: Json, directory: Path, engine: Any = None, **fields: Any
) -> Iterator[Events]:
    """Leads a callback along a trajectory.

    Args:
        callback: The callback.
        model: The model, at the first step of the trajectory, where it lies.
        trajectory: The trajectory.
        directory: The `output_dir`.
        engine: What runs the model, if it does not run by itself.
        fields: Fields of the training arguments.

    Yields:
        The events, after the begin of the training and after each step.
    """
    topology = "ddp" if dist.is_initialized() else "single"
    args = topologies.training_arguments(topology, directory, max_steps=len(trajectory["steps"]) - 1, **fields)
    events = Events(model, args, [callback], engine=engine)
    events.train_begin()
    yield events
    for t, values in enumerate(trajectory["steps"][1:], start=1):
        write(model, point(trajectory, values))
        events.step(t)
        yield events


@torch.no_grad()
def write(model: nn.Module, values: Point) -> None:
    """Writes parameters, wherever they lie, and buffers."""
    buffers = dict(model.named_buffers())
    topologies.write_parameters(model, {name: value for name, value in values.items() if name not in buffers})
    for name in buffers:
        buffers[name].copy_(values[name])


def shadows(callback: TrainerCallback, model: nn.Module, trajectory: Json, directory: Path) -> Iterator[Point]:
    """What a callback that averages shows at each step of a trajectory, by the keys of the model's state dict."""
    for events in led(callback, model, trajectory, directory):
        yield observe.shadow_now(callback, events)


def _holder(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that has what is called so, made if need be, and the last part of the name."""
    *path, attribute = name.split(".")
    for part in path:
        if not hasattr(model, part):
            model.add_module(part, nn.Module())
        model = model.get_submodule(part)
    return model, attribute


# Scores, views and rows


def summaries(callback: type[Any], case: Json, directory: Path) -> list[Any]:
    """The summaries of evaluations with the scores of a file, with each number as a float; None where there is none."""
    scores = {
        evaluation["name"]: {
            f"{evaluation['name']} {number}": unmarked(prediction)
            for number, prediction in enumerate(evaluation["predictions"])
        }
        for evaluation in case["evaluations"]
    }
    of_prompts = {prompt: given for prompts in scores.values() for prompt, given in prompts.items()}
    scorers = {name: _Scorer(name, of_prompts) for name in case["scorers"]}
    return [_summary(callback, scorers, prompts, directory) for prompts in scores.values()]


def _summary(
    callback: type[Any], scorers: dict[str, "_Scorer"], prompts: Iterable[str], directory: Path
) -> dict[str, Any] | None:
    """The summary of an evaluation with some prompts."""
    trainer = _trainer([{"prompt": prompt} for prompt in prompts], directory, max_steps=1)
    with served() as server:
        arrivals = Arrivals(server)
        arrivals.subject = callback(trainer, PROJECT, scorers, GenerationConfig(max_new_tokens=1))
        trainer.add_callback(arrivals.subject)
        trainer.train_begin()
        trainer.evaluate()
        shown = arrivals.after(1).get("evaluation 0, summary")
        trainer.train_end()
    return None if shown is None else json.loads(bytes(shown.tolist()))


class _Scorer:
    """Gives the scores that a file has."""

    def __init__(self, name: str, scores: Mapping[str, Mapping[str, Any]]) -> None:
        self._name = name
        self._scores = scores

    def __call__(self, prompt: str, completion: str) -> Any:
        return self._scores[prompt].get(self._name)


def views(callback: TrainerCallback, events: Json, directory: Path) -> Iterator[Json]:
    """The view of a callback after each of a file's events."""
    trainer = Events(nn.Module(), topologies.training_arguments("single", directory, max_steps=1), [callback])
    try:
        loaders: dict[str, _Loader] = {}
        for event in map(unmarked, events):
            _fire(trainer, event, loaders)
            yield _as_json(observe.view(callback, trainer.state))
    finally:
        trainer.close()


def _fire(trainer: Events, event: Mapping[str, Any], loaders: dict[str, "_Loader"]) -> None:
    """Fires a file's event."""
    for name in ("global_step", "max_steps", "epoch", "num_train_epochs"):
        setattr(trainer.state, name, event[name])
    trainer.state.log_history = [dict(entry) for entry in event.get("log_history", [])]
    if "dataloader" in event:
        name, length = event["dataloader"]["name"], event["dataloader"]["length"]
        trainer.callback_handler.eval_dataloader = loaders.setdefault(name, _Loader(length))
    called = "logs" if event["event"] == "on_log" else "metrics"
    metrics = {called: dict(event["metrics"])} if "metrics" in event else {}
    trainer.fire(event["event"], **metrics)


class _Loader:
    """A dataloader as far as it is seen: it need not have a length."""

    def __init__(self, length: int | None) -> None:
        self._length = length

    def __len__(self) -> int:
        if self._length is None:
            raise TypeError("it has no length")
        return self._length


def _as_json(view: Any) -> Json:
    if view is None:
        return None
    if isinstance(view, observe.Bars):
        return {part: _bar(bar) for part, bar in view._asdict().items()}
    training, epoch, evaluation, groups = view
    return {
        "training": _bar(training),
        "epoch": epoch,
        "evaluation": _bar(evaluation),
        "groups": [
            {
                "name": group,
                "metrics": [{"name": name, "value": value, "trend": marked(trend)} for name, value, trend in metrics],
            }
            for group, metrics in groups
        ],
    }


def _bar(bar: Any) -> Json:
    return None if bar is None else dict(zip(("completed", "total"), bar, strict=True))


def rows(callback: type[Any], case: Json, directory: Path) -> list[Json]:
    """The rows of a table at the end of a training, with None in the place of each completion."""
    dataset = unmarked(case["dataset"])
    is_several = isinstance(dataset[0], list)
    trainer = _trainer(dict(dataset) if is_several else dataset, directory, **case["training"])
    config = GenerationConfig(**case["generation"])
    table = callback(trainer, config, **case["arguments"])
    trainer.add_callback(table)
    trainer.train_begin()
    for t in range(1, case["training"]["max_steps"] + 1):
        trainer.step(t)
    found = [json.loads(row) for row in observe.completions(table, trainer.args, trainer.state)]
    trainer.train_end()
    return [marked(row | {"completion": None}) for row in found]


def _trainer(dataset: Mapping[str, list[Json]] | list[Json], directory: Path, **fields: Any) -> Events:
    """What stands in for a trainer of a language model that reads bytes."""
    args = topologies.training_arguments("single", directory, **fields)
    tokenizer = ByT5Tokenizer(extra_ids=models.VOCABULARY - BYTES)  # a token for each that the model may say
    is_dict = isinstance(dataset, Mapping)
    rows = {name: Rows(part) for name, part in dataset.items()} if is_dict else Rows(dataset)
    return Events(models.build("gpt2"), args, [], processing_class=tokenizer, eval_dataset=rows)
