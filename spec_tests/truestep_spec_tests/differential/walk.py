"""A callback led along a drawn trajectory: to any step, from any step, in any topology."""

from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist
from torch import Tensor
from transformers import TrainerCallback
from truestep_fixtures import topologies
from truestep_fixtures.events import Events
from truestep_fixtures.topologies import Placed

from truestep_spec_tests.observe import Watcher
from truestep_spec_tests.recording import Kind, draw
from truestep_spec_tests.runs import Setup


class Walk:
    """The events of a training whose weights follow the trajectory that a setup's seed gives; on every rank.

    Args:
        setup: The run; it has the number of steps that there are, of which a walk may take a part.
        directory: The `output_dir` of the training arguments.
        callbacks: What sees the events, in this order.
        kind: What kind of trajectory is drawn.
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
        placed: Placed | None = None,
    ) -> None:
        self.placed = placed or topologies.place(setup.build_model(), setup.topology, setup.torch_dtype)
        self.points = draw(self.placed.read(), setup.steps, setup.seed, kind).steps
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
