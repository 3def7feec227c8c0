"""What the suite runs on every rank of a pool: trainings and followed trajectories, in lockstep with the reference."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import TrainerCallback
from truestep_fixtures import models, topologies
from truestep_fixtures.events import Events
from truestep_fixtures.topologies import Placed
from truestep_fixtures.training import train
from truestep_reference import BEMACallback as ReferenceBEMACallback

from truestep_spec_tests.implementation import Implementation
from truestep_spec_tests.lockstep import Comparisons, lockstep
from truestep_spec_tests.observe import Watcher
from truestep_spec_tests.recording import Kind, Recorded, Recorder, Trajectory, draw

OnCompared = Callable[[int, dict[str, Tensor], dict[str, Tensor]], None]


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
        hyperparameters: Arguments of the callback.
        training: More fields of `TrainingArguments`.
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

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype that `dtype` names."""
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    def subject(self) -> Any:
        """A new callback of the implementation under test."""
        return Implementation(self.implementation).BEMACallback(**self.hyperparameters)

    def reference(self) -> ReferenceBEMACallback:
        """A new reference callback with the same hyperparameters."""
        return ReferenceBEMACallback(**self.hyperparameters)

    def build_model(self) -> nn.Module:
        """The model, with the weights that the seed gives or the directory holds."""
        if self.model in models.MODELS:
            return models.build(self.model, self.torch_dtype, self.seed)
        return models.load(self.model).to(self.torch_dtype)

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
    callbacks, comparisons = lockstep(
        setup.subject(), setup.reference(), directory / "reference", _observer(recording, counter)
    )
    train(
        setup.topology,
        setup.build_model(),
        output_dir=directory,
        callbacks=callbacks,
        steps=setup.steps,
        dtype=setup.torch_dtype,
        seed=setup.seed,
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
    callbacks, comparisons = lockstep(
        setup.subject(), setup.reference(), directory / "reference", _observer(recording, counter)
    )
    points = None if trajectory is None else Trajectory.load(trajectory).steps
    walk = Walk(setup, directory, callbacks, kind=kind, points=points)
    walk.begin()
    for step in list(walk.points)[1:]:
        if comparisons.divergence is not None:
            break
        walk.go_to(step)
    return Outcome(comparisons, time.perf_counter() - began)


class Walk:
    """The events of a training whose weights follow a trajectory; on every rank.

    Args:
        setup: The run.
        directory: The `output_dir` of the training arguments.
        callbacks: What sees the events, in this order.
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
        callbacks: Sequence[TrainerCallback],
        *,
        kind: Kind = "walk",
        points: Mapping[int, Mapping[str, Tensor]] | None = None,
        placed: Placed | None = None,
    ) -> None:
        self.placed = placed or topologies.place(setup.build_model(), setup.topology, setup.torch_dtype)
        self.points = draw(self.placed.read(), setup.steps, setup.seed, kind).steps if points is None else points
        # The callbacks are to see the ranks; how the model lies on them is not for the arguments to say.
        args = topologies.training_arguments(
            "ddp" if dist.is_initialized() else "single", directory, max_steps=setup.steps
        )
        self.events = Events(self.placed.model, args, callbacks)

    def begin(self, step: int = 0) -> None:
        """Begins a training at a step: at 0, or where it resumes."""
        self.placed.write(self.points[step])
        self.events.train_begin(step)

    def go_to(self, step: int) -> None:
        """Takes the steps up to `step`."""
        for t in range(self.events.state.global_step + 1, step + 1):
            self.placed.write(self.points[t])
            self.events.step(t)


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
        The shadow at each step from `first` on, by the names of the parameters.
    """
    subject = setup.subject()
    watcher = Watcher(subject)
    walk = Walk(setup, directory, [subject, watcher], kind=kind)
    walk.begin(first)
    shadows = {first: watcher.shown}
    for step in range(first + 1, (setup.steps if last is None else last) + 1):
        walk.go_to(step)
        shadows[step] = watcher.shown
    if save:
        walk.events.save()
    return {step: {name: shown[name] for name in walk.points[0]} for step, shown in shadows.items()}


def first_difference_in_one_process(setup: Setup, recording: Path, directory: Path) -> str | None:
    """Lead a subject along a recorded trajectory in a single process, and compare bitwise.

    Args:
        setup: The run that was recorded.
        recording: What its `Recorder` wrote.
        directory: Where the callback writes.

    Returns:
        Where the shadow differs from the recorded one for the first time, or None.
    """
    subject = setup.subject()
    watcher = Watcher(subject)
    points = Recorded(recording, "theta")
    shadows = Recorded(recording, "shadow")
    walk = Walk(setup.on(topology="single"), directory, [subject, watcher], points=points)
    for step in points:
        if step == 0:
            walk.begin()
        else:
            walk.go_to(step)
        for name, value in shadows[step].items():
            if not same_bits(watcher.shown[name], value):
                return f"step {step}, {name}"
    return None


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal to the last bit, NaNs and signs of zeros included."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(*(tensor.contiguous().flatten().view(torch.uint8) for tensor in (one, other)))


def _observer(recording: Path | None, counter: Path | None) -> OnCompared:
    record = None if recording is None else Recorder(recording)

    def on_compared(step: int, live: dict[str, Tensor], shown: dict[str, Tensor]) -> None:
        if record is not None:
            record(step, live, shown)
        if counter is not None:
            counter.write_text(str(step))

    return on_compared
