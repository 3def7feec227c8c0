"""What the suite runs on every rank of a pool: trainings and followed trajectories, in lockstep with the reference."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import truestep_reference
from torch import Tensor, nn
from transformers import AutoTokenizer, GenerationConfig, TrainerCallback
from truestep_fixtures import data, models, topologies
from truestep_fixtures.events import Events
from truestep_fixtures.topologies import Placed
from truestep_fixtures.training import Attach, train
from truestep_fixtures.weave_server import RecordingServer

from truestep_spec_tests.implementation import Implementation
from truestep_spec_tests.lockstep import (
    Comparisons,
    OnCompared,
    bema,
    log_completions,
    ref_sync,
    rich_progress,
    weave_eval,
)
from truestep_spec_tests.observe import Watcher, completions, shadow_at_event, view
from truestep_spec_tests.recording import Kind, Recorded, Recorder, Trajectory, draw


@dataclass(frozen=True)
class Setup:
    """One run: what is tested, on what, where.

    Attributes:
        implementation: See `Implementation`.
        topology: One of `truestep_fixtures.topologies.TOPOLOGIES`.
        ranks: Number of ranks.
        dtype: Name of the dtype of the live parameters.
        model: One of `truestep_fixtures.models.MODELS`, or a local model directory.
        seed: Seeds weights, data and trajectories.
        steps: Number of optimizer steps.
        hyperparameters: Arguments of the callback, besides a reference model, a trainer and a generation config.
        training: More fields of `TrainingArguments`.
        callback: Which callback it is, by its documented name.
        ref_model: Of the reference model, `topology` and `dtype` where they are others than the policy's.
        prompts: Of completions, one of `truestep_fixtures.data.PROMPTS`, the evaluation dataset.
        generation: Of completions, fields of the generation config.
        scorers: Of evaluations in Weave, some of `truestep_spec_tests.lockstep.weave_eval.SCORERS`, or None.
    """

    implementation: str = "truestep"
    topology: str = "single"
    ranks: int = 1
    dtype: str = "float32"
    model: str = "qwen2"
    seed: int = 0
    steps: int = 8
    hyperparameters: dict[str, Any] = field(default_factory=lambda: {"update_freq": 2})
    training: dict[str, Any] = field(default_factory=dict)
    callback: str = "BEMACallback"
    ref_model: dict[str, str] = field(default_factory=dict)
    prompts: str = "mixed"
    generation: dict[str, Any] = field(default_factory=lambda: {"max_new_tokens": 4})
    scorers: list[str] | None = None

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype that `dtype` names."""
        return _dtype(self.dtype)

    def subject(self, *arguments: Any, **defaults: Any) -> Any:
        """A new callback of the implementation under test; the hyperparameters go before what else is given by name."""
        class_ = Implementation(self.implementation).callback(self.callback)
        return class_(*arguments, **defaults | self.hyperparameters)

    def reference(self, *arguments: Any, **defaults: Any) -> Any:
        """A new reference callback with the same hyperparameters."""
        return getattr(truestep_reference, self.callback)(*arguments, **defaults | self.hyperparameters)

    def build_model(self) -> nn.Module:
        """The model, with the weights that the seed gives or the directory holds."""
        if self.model in models.MODELS:
            model = models.build(self.model, self.torch_dtype, self.seed)
            return models.speaking(model, data.END, data.unprintable()) if self._has_prompts else model
        return models.load(self.model).to(self.torch_dtype)

    @torch.no_grad()
    def build_ref_model(self) -> nn.Module:
        """The same model as a reference: whole, in eval mode, with weights some distance from the policy's."""
        model = self.build_model().eval().requires_grad_(False)
        generator = torch.Generator().manual_seed(self.seed + 1)
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        return model.to(topologies.device(), _dtype(self.ref_model.get("dtype", self.dtype)))

    def place_ref_model(self, **zero_optimization: Any) -> Placed:
        """The reference model in its topology."""
        model = self.build_ref_model()
        topology, dtype = self.ref_model.get("topology", self.topology), next(model.parameters()).dtype
        return topologies.place_for_evaluation(model, topology, dtype, **zero_optimization)

    def evaluation(self) -> dict[str, Any]:
        """What a trainer is given to evaluate, `eval_dataset`, and where prompts are completed, `processing_class`."""
        if self._has_prompts:
            return {"eval_dataset": data.prompts(self.prompts, self.seed), "processing_class": self._tokenizer()}
        if self.callback == "RichProgressCallback" and "eval_strategy" in self.training:
            return {"eval_dataset": data.language_dataset(5, self.seed)}
        return {}

    def build_generation_config(self) -> GenerationConfig:
        """The generation config; sequences end with the tokenizer's token for that, not with that of the model's."""
        return GenerationConfig(**{"eos_token_id": self._tokenizer().eos_token_id} | self.generation)

    def weave_arguments(self) -> dict[str, Any]:
        """What a callback that logs to Weave is given besides a trainer and the hyperparameters."""
        scorers = None if self.scorers is None else {name: weave_eval.SCORERS[name] for name in self.scorers}
        config = self.build_generation_config()
        return {"project_name": weave_eval.PROJECT, "scorers": scorers, "generation_config": config}

    @property
    def _has_prompts(self) -> bool:
        return self.callback in ("LogCompletionsCallback", "WeaveCallback")

    def _tokenizer(self) -> Any:
        if (Path(self.model) / "tokenizer_config.json").is_file():
            return AutoTokenizer.from_pretrained(self.model, local_files_only=True)
        return data.tokenizer()

    def as_dict(self) -> dict[str, Any]:
        """The attributes, as JSON can hold them."""
        return asdict(self)

    def on(self, **changes: Any) -> "Setup":
        """The same run but for some attributes."""
        return replace(self, **changes)


@dataclass(frozen=True)
class Outcome:
    """What a run came to on one rank.

    Attributes:
        comparisons: Subject against reference.
        seconds: How long the run took.
    """

    comparisons: Comparisons
    seconds: float


def train_in_lockstep(
    setup: Setup, directory: Path, *, recording: Path | None = None, counter: Path | None = None
) -> Outcome:
    """A real training with subject and reference; on every rank.

    Args:
        setup: The run.
        directory: Where the training writes.
        recording: Where θ_t and the shadow of every step are written, if anywhere.
        counter: A file that holds the number of the step compared last, for who watches.
    """
    began = time.perf_counter()
    with _lockstep(setup, directory, _observer(recording, counter)) as (callbacks, attach, comparisons):
        train(
            setup.topology,
            setup.build_model(),
            output_dir=directory,
            callbacks=callbacks,
            attach=attach,
            steps=setup.steps,
            dtype=setup.torch_dtype,
            seed=setup.seed,
            **setup.evaluation(),
            **setup.training,
        )
    return Outcome(comparisons, time.perf_counter() - began)


def follow_in_lockstep(
    setup: Setup,
    directory: Path,
    trajectory: Path | None = None,
    *,
    kind: Kind = "walk",
    recording: Path | None = None,
    counter: Path | None = None,
) -> Outcome:
    """Subject and reference led along a trajectory, without a training; on every rank.

    Args:
        setup: The run.
        directory: Where the callbacks write.
        trajectory: The file to take the trajectory from; by default it is drawn from the seed.
        kind: What kind of trajectory is drawn.
        recording: As in `train_in_lockstep`.
        counter: As in `train_in_lockstep`.
    """
    began = time.perf_counter()
    points = None if trajectory is None else Trajectory.load(trajectory).steps
    with _lockstep(setup, directory, _observer(recording, counter)) as (callbacks, attach, comparisons):
        walk = Walk(setup, directory, callbacks, attach=attach, kind=kind, points=points)
        walk.begin()
        for step in list(walk.points)[1:]:
            if comparisons.divergence is not None:
                break
            walk.go_to(step)
        walk.end()
    return Outcome(comparisons, time.perf_counter() - began)


class Walk:
    """The events of a training whose weights follow a trajectory; on every rank.

    Args:
        setup: The run.
        directory: The `output_dir` of the training arguments.
        callbacks: What sees the events, in this order.
        attach: Makes more callbacks, for which `events` stands in for a trainer.
        kind: What kind of trajectory is drawn from the seed.
        points: The trajectory, instead of a drawn one.
        placed: The setup's model where it lies already; it is placed in the setup's topology by default.

    Attributes:
        placed: The model where it lies.
        points: The parameters at each step, whole, by name.
        events: What fires the events.
    """

    def __init__(
        self,
        setup: Setup,
        directory: Path,
        callbacks: Sequence[TrainerCallback] = (),
        *,
        attach: Attach | None = None,
        kind: Kind = "walk",
        points: Mapping[int, Mapping[str, Tensor]] | None = None,
        placed: Placed | None = None,
    ) -> None:
        self.placed = placed or topologies.place(setup.build_model(), setup.topology, setup.torch_dtype)
        self.points = draw(self.placed.read(), setup.steps, setup.seed, kind).steps if points is None else points
        # The callbacks are to see the ranks; how the model lies on them is not for the arguments to say.
        settings = {"max_steps": setup.steps, "seed": setup.seed} | setup.training
        args = topologies.training_arguments("ddp" if dist.is_initialized() else "single", directory, **settings)
        self.events = Events(self.placed.model, args, callbacks, engine=self.placed.engine, **setup.evaluation())
        self._works_in_background = setup.callback == "WeaveCallback"
        for callback in () if attach is None else attach(self.events):
            self.events.add_callback(callback)

    def begin(self, step: int = 0) -> None:
        """Begins a training at a step: at 0, or where it resumes."""
        self.placed.write(self.points[step])
        self.events.train_begin(step)

    def go_to(self, step: int) -> None:
        """Takes the steps up to `step`."""
        for t in range(self.events.state.global_step + 1, step + 1):
            self.placed.write(self.points[t])
            self.events.step(t)

    def end(self) -> None:
        """Ends the training, for callbacks that work in the background; of others it would ask for files."""
        if self._works_in_background:
            self.events.train_end()


def walked(
    setup: Setup, directory: Path, first: int = 0, last: int | None = None, *, kind: Kind = "walk", save: bool = False
) -> dict[int, dict[str, Tensor]]:
    """A new callback of the implementation under test, led over a part of a trajectory; on every rank.

    Args:
        setup: The run.
        directory: The `output_dir`, where checkpoints are written and looked for.
        first: The step that the training begins at; after 0, it resumes from the checkpoint of that step.
        last: The step that it ends at; the last one by default.
        kind: What kind of trajectory is drawn.
        save: Whether a checkpoint is saved at its end.

    Returns:
        What the callback shows of its state at each step from `first` on, by the names of the parameters; or its table,
        or what has arrived in Weave.
    """
    with _watched(setup) as (callbacks, attach, watcher):
        walk = Walk(setup, directory, callbacks, attach=attach, kind=kind)
        walk.begin(first)
        shown = {first: watcher.shown}
        for step in range(first + 1, (setup.steps if last is None else last) + 1):
            walk.go_to(step)
            shown[step] = watcher.shown
        if save:
            walk.events.save()
        walk.end()
    if setup.callback in ("LogCompletionsCallback", "WeaveCallback"):
        return shown
    return {step: {name: values[name] for name in walk.points[0]} for step, values in shown.items()}


def first_difference_in_one_process(setup: Setup, recording: Path, directory: Path) -> str | None:
    """Lead a subject along a recorded trajectory in a single process, and compare bitwise.

    Args:
        setup: The run that was recorded.
        recording: What its `Recorder` wrote.
        directory: Where the callback writes.

    Returns:
        Where what it shows differs from what was recorded for the first time, or None.
    """
    alone = setup.on(topology="single", ref_model=setup.ref_model | {"topology": "single"})
    points, shown = Recorded(recording, "theta"), Recorded(recording, "shown")
    with _watched(alone) as (callbacks, attach, watcher):
        walk = Walk(alone, directory, callbacks, attach=attach, points=points)
        difference = _first_difference(walk, watcher, shown)
        walk.end()
    return difference


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal to the last bit, NaNs and signs of zeros included."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(*(tensor.contiguous().flatten().view(torch.uint8) for tensor in (one, other)))


def _first_difference(walk: Walk, watcher: Watcher, shown: Mapping[int, Mapping[str, Tensor]]) -> str | None:
    for step in walk.points:
        if step == 0:
            walk.begin()
        else:
            walk.go_to(step)
        for name, value in shown[step].items():
            if name not in watcher.shown or not same_bits(watcher.shown[name], value):
                return f"step {step}, {name}"
    return None


def sync_in_lockstep(
    setup: Setup, on_compared: OnCompared | None = None, **zero_optimization: Any
) -> tuple[Placed, list[TrainerCallback], Comparisons]:
    """A subject with its reference model where it lies, the callbacks that compare, and the results they fill in."""
    placed, fresh = setup.place_ref_model(**zero_optimization), setup.build_ref_model()
    subject, reference = setup.subject(placed.engine, None), setup.reference(fresh, None)
    return placed, *ref_sync.lockstep(subject, placed, reference, fresh, on_compared)


def completions_in_lockstep(setup: Setup, on_compared: OnCompared | None = None) -> tuple[Attach, Comparisons]:
    """What makes the subject and the callbacks that compare it for a trainer, and the results that they fill in."""
    config = setup.build_generation_config()
    return log_completions.lockstep(
        lambda trainer: setup.subject(trainer, config), lambda trainer: setup.reference(trainer, config), on_compared
    )


def weave_in_lockstep(
    setup: Setup, server: RecordingServer | None, on_compared: OnCompared | None = None
) -> tuple[Attach, Comparisons]:
    """As `completions_in_lockstep`, for evaluations that arrive at a server."""
    arguments = setup.weave_arguments()
    return weave_eval.lockstep(
        lambda trainer: setup.subject(trainer, **arguments),
        lambda trainer: setup.reference(trainer, **arguments),
        server,
        on_compared,
    )


@contextmanager
def _lockstep(
    setup: Setup, directory: Path, on_compared: OnCompared
) -> Iterator[tuple[list[TrainerCallback], Attach | None, Comparisons]]:
    """A subject and the reference of the setup's callback, with what compares them: callbacks, or what makes them."""
    if setup.callback == "WeaveCallback":
        with weave_eval.served() as server:
            yield [], *weave_in_lockstep(setup, server, on_compared)
    elif setup.callback == "LogCompletionsCallback":
        yield [], *completions_in_lockstep(setup, on_compared)
    elif setup.callback == "BEMACallback":
        subject, reference = setup.subject(), setup.reference()
        callbacks, comparisons = bema.lockstep(subject, reference, directory / "reference", on_compared)
        yield callbacks, None, comparisons
    elif setup.callback == "RichProgressCallback":
        callbacks, comparisons = rich_progress.lockstep(setup.subject(), setup.reference(), on_compared)
        yield callbacks, None, comparisons
    else:
        _, callbacks, comparisons = sync_in_lockstep(setup, on_compared)
        yield callbacks, None, comparisons


@contextmanager
def _watched(setup: Setup) -> Iterator[tuple[list[TrainerCallback], Attach | None, Watcher]]:
    """A subject of the setup's callback with what looks at its state, as callbacks or as what makes them."""
    if setup.callback == "WeaveCallback":
        arguments, dataset = setup.weave_arguments(), setup.evaluation()["eval_dataset"]
        with weave_eval.served() as server:
            arrivals = weave_eval.ArrivalsAfterEvents(server, len(dataset) if isinstance(dataset, Mapping) else 1)
            watcher = Watcher(arrivals)

            def attach_with_server(trainer: Any) -> list[TrainerCallback]:
                arrivals.subject = setup.subject(trainer, **arguments)
                return [arrivals.subject, watcher]

            yield [], attach_with_server, watcher
    elif setup.callback == "LogCompletionsCallback":
        config, made = setup.build_generation_config(), []

        def attach(trainer: Any) -> list[TrainerCallback]:
            made.append(setup.subject(trainer, config))
            return [*made, watcher]

        watcher = Watcher(lambda args, state, *_, **__: log_completions.as_tensors(completions(made[0], args, state)))
        yield [], attach, watcher
    elif setup.callback == "BEMACallback":
        subject = setup.subject()
        watcher = Watcher(partial(shadow_at_event, subject))
        yield [subject, watcher], None, watcher
    elif setup.callback == "RichProgressCallback":
        subject = setup.subject()
        watcher = Watcher(
            lambda args, state, *_, **__: rich_progress.as_tensors(rich_progress.bars(view(subject, state)))
        )
        yield [subject, watcher], None, watcher
    else:
        placed = setup.place_ref_model()
        subject, watcher = setup.subject(placed.engine, None), Watcher(lambda *_, **__: placed.read())
        yield [subject, watcher], None, watcher


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _observer(recording: Path | None, counter: Path | None) -> OnCompared:
    record = None if recording is None else Recorder(recording)

    def on_compared(step: int, live: dict[str, Tensor], shown: dict[str, Tensor]) -> None:
        if record is not None:
            record(step, live, shown)
        if counter is not None:
            counter.write_text(str(step))

    return on_compared
