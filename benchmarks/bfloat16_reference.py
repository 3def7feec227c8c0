"""How far a bfloat16 reference gets on its way to a policy, with master weights and without.

    python benchmarks/bfloat16_reference.py [--output DIRECTORY]

A tiny Qwen2 is trained in bfloat16. What came of it is then held fixed as the policy, and the model that it began as is
the reference: after each of 200 steps it is synced, by truestep's callback, by the same with master weights, by TRL's,
and by the formula in float64. Needs TRL and matplotlib. Prints a table and draws a picture. The same versions
give the same figures again.
"""

from __future__ import annotations

import argparse
import copy
import shlex
import sys
import tempfile
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
import trl
import truestep
from accelerate import Accelerator
from drawing import pyplot, save
from reporting import Table
from running import PACKAGES
from torch import Tensor, nn
from transformers import TrainerCallback
from truestep_fixtures import models
from truestep_fixtures.events import Events
from truestep_fixtures.topologies import training_arguments
from truestep_fixtures.training import train

_STEPS, _LEARNING_RATE = 100, 1e-4  # of the training
_WEIGHTS = (0.01, 0.1, 0.5, 0.6)  # α; the last is what TRL's trainers have by default
_LOOKS = (1, 2, 3, 5, 7, 10, 20, 30, 50, 70, 100, 200)  # numbers of syncs after which to look

_FORMULA = "formula in float64"
_CALLBACKS: Mapping[str, Callable[[nn.Module], TrainerCallback]] = {
    "truestep, master weights": lambda reference: truestep.SyncRefModelCallback(
        reference, Accelerator(), master_weights=True
    ),
    "truestep": lambda reference: truestep.SyncRefModelCallback(reference, Accelerator()),
    "TRL": lambda reference: trl.SyncRefModelCallback(reference, Accelerator()),
}
_STYLES = {
    _FORMULA: {"color": "black", "linewidth": 0.8},
    "truestep, master weights": {"color": "tab:blue", "marker": "o", "linestyle": "none"},
    "truestep": {"color": "tab:blue", "marker": ".", "linestyle": "--"},
    "TRL": {"color": "tab:orange", "marker": ".", "linestyle": "--"},
}


class Progress(NamedTuple):
    """How far a reference has come.

    Attributes:
        covered: The distance by which its weights have come nearer to the policy's, summed over all of them, divided by
            that of the whole way.
        unmoved: The share of weights that are where they began, of those that have a way to go.
    """

    covered: float
    unmoved: float


Course = Mapping[int, Progress]
"""The progress by number of syncs."""


class Gap:
    """The way from a reference, as it is now, to a policy.

    Args:
        reference: Where it begins.
        policy: Where it ends.
    """

    def __init__(self, reference: nn.Module, policy: nn.Module) -> None:
        self._begin, self._end = _weights(reference), _weights(policy)
        self._way = self._end - self._begin

    def progress(self, weights: Tensor) -> Progress:
        """How far weights have come that began as those of `reference`."""
        moved = weights - self._begin
        return Progress(
            covered=(moved @ self._way.sign() / self._way.abs().sum()).item(),
            unmoved=(moved == 0)[self._way != 0].double().mean().item(),
        )

    def in_words(self) -> str:
        """How large it is."""
        moved = self._way != 0
        relative = (self._way / self._begin).abs()[moved & (self._begin != 0)].median().item()
        return f"{moved.double().mean().item():.0%} of the weights differ, by {relative:.1%} (median)"

    def follow(self, weight: float) -> Course:
        """Follow the formula in float64."""
        weights, course = self._begin.clone(), {}
        for sync in range(1, max(_LOOKS) + 1):
            weights = weight * self._end + (1 - weight) * weights
            if sync in _LOOKS:
                course[sync] = self.progress(weights)
        return course


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="directory for the file")
    parsed = parser.parse_args(arguments)
    begin = models.build("qwen2", torch.bfloat16)
    policy = _train(copy.deepcopy(begin))
    gap = Gap(begin, policy)
    courses = {
        weight: {_FORMULA: gap.follow(weight)}
        | {name: _follow(new, begin, policy, gap, weight) for name, new in _CALLBACKS.items()}
        for weight in _WEIGHTS
    }
    print(f"\n{_table(courses, gap).as_text()}")
    command = ["python", "benchmarks/bfloat16_reference.py", *(sys.argv[1:] if arguments is None else arguments)]
    conditions = {"command": shlex.join(command)} | {package: version(package) for package in PACKAGES}
    parsed.output.mkdir(parents=True, exist_ok=True)
    path = parsed.output / "bfloat16_reference.svg"
    _draw(courses, conditions, path)
    print("\n" + "\n".join(f"{key}: {value}" for key, value in conditions.items()) + f"\n\nwritten to {path}")


def _train(model: nn.Module) -> nn.Module:
    with tempfile.TemporaryDirectory() as directory:
        train(
            "single",
            model,
            output_dir=directory,
            steps=_STEPS,
            dtype=torch.bfloat16,
            learning_rate=_LEARNING_RATE,
        )
    return model


def _follow(
    new_callback: Callable[[nn.Module], TrainerCallback],
    begin: nn.Module,
    policy: nn.Module,
    gap: Gap,
    weight: float,
) -> Course:
    """Have a callback sync a reference at the end of each step."""
    reference, syncs = copy.deepcopy(begin), max(_LOOKS)
    with tempfile.TemporaryDirectory() as unused:
        args = training_arguments(
            "single", unused, max_steps=syncs, ref_model_sync_steps=1, ref_model_mixup_alpha=weight
        )
    events = Events(policy, args, [new_callback(reference)])
    events.train_begin()
    course = {}
    for step in range(1, syncs + 1):
        events.step(step)
        if step in _LOOKS:
            course[step] = gap.progress(_weights(reference))
    events.train_end()
    return course


def _weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().double().flatten() for parameter in model.parameters()])


def _table(courses: Mapping[float, Mapping[str, Course]], gap: Gap) -> Table:
    return Table(
        f"Share of the gap that a bfloat16 reference covers in {max(_LOOKS)} syncs",
        f"Between reference and policy {gap.in_words()}. The share is the distance by which the weights have come "
        "nearer, summed over all of them, divided by that of the whole way. In brackets: how many of the weights that "
        "differ have not moved at all.",
        ("α", *next(iter(courses.values()))),
        [
            (f"{weight:g}", *(_in_words(course[max(_LOOKS)]) for course in by_method.values()))
            for weight, by_method in courses.items()
        ],
    )


def _in_words(progress: Progress) -> str:
    return f"{progress.covered:.1%} ({progress.unmoved:.0%})"


def _draw(courses: Mapping[float, Mapping[str, Course]], conditions: Mapping[str, str], path: Path) -> None:
    figure, panels = pyplot().subplots(1, len(courses), figsize=(12, 3.5), sharey=True, layout="constrained")
    for panel, (weight, by_method) in zip(panels, courses.items(), strict=True):
        for name, course in by_method.items():
            covered = [progress.covered for progress in course.values()]
            panel.plot(list(course), covered, label=name, markersize=4, **_STYLES[name])
        panel.set_xscale("log")
        panel.set_xticks([1, 10, 100], ["1", "10", "100"])
        panel.minorticks_off()
        panel.set_title(f"α = {weight:g}")
        panel.set_xlabel("syncs")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("share of the gap covered")
    panels[0].yaxis.set_major_formatter("{x:.0%}")
    panels[0].legend(fontsize=8)
    save(figure, path, conditions)


if __name__ == "__main__":
    main()
