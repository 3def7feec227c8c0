"""Tiny trainings by TRL's trainers, on every rank: with TRL's own callback, or with another in its place."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from torch import Tensor
from transformers import Trainer, TrainerCallback
from truestep_fixtures import topologies
from truestep_fixtures.data import tokenizer
from truestep_fixtures.isolation import forget_engines
from truestep_reference.ref_sync import blend, blend_error, is_sync

from truestep_spec_tests.implementation import Implementation
from truestep_spec_tests.runs import same_bits

SYNC_STEPS = 2
STEPS = 5
"""The losses of the last step have seen the second sync."""
ALPHA = 0.6
"""TRL's default."""

_SAMPLED = {"num_generations": 2, "max_completion_length": 6, "beta": 0.1}

_FIELDS: dict[str, dict[str, Any]] = {"DPO": {}, "KTO": {}, "GRPO": _SAMPLED, "RLOO": _SAMPLED}

TRAINERS = tuple(_FIELDS)
"""The trainers that have `sync_ref_model`."""

_WORDS = ("one", "two", "three", "four", "five", "six", "seven")

_TIMES = ("runtime", "per_second", "step_time")
"""What the names of figures have in them that are others every time."""

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Course:
    """What a training went through on one rank.

    Attributes:
        figures: What was logged at each step: losses, rewards and all else but times.
        policy: The whole policy at train begin, which is step 0 unless the training resumes, and after each step.
        reference: The whole reference, likewise; at a sync, after it.
    """

    figures: dict[int, dict[str, float]] = field(default_factory=dict)
    policy: dict[int, Weights] = field(default_factory=dict)
    reference: dict[int, Weights] = field(default_factory=dict)


class _Recorder(TrainerCallback):
    """Takes the course of a training down; it has to come after the callback that syncs."""

    def __init__(self, trainer: Trainer) -> None:
        self.course = Course()
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._look(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._look(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "train_runtime" not in logs:  # the summary at the end
            figures = {name: value for name, value in logs.items() if not any(part in name for part in _TIMES)}
            self.course.figures[state.global_step] = figures

    def _look(self, step: int) -> None:
        unwrap = self._trainer.accelerator.unwrap_model
        self.course.policy[step] = topologies.read_parameters(unwrap(self._trainer.model))
        self.course.reference[step] = topologies.read_parameters(unwrap(self._trainer.ref_model))


def train(
    trainer: str,
    subject: Implementation | None,
    topology: str,
    model: Path,
    directory: Path,
    *,
    dtype: torch.dtype = torch.float32,
    resume_from: Path | None = None,
    **fields: Any,
) -> Course:
    """Trains with a reference model that is synced every `SYNC_STEPS` steps, unless `fields` say otherwise.

    Args:
        trainer: One of `TRAINERS`.
        subject: The implementation whose callback takes the place of TRL's own; None leaves that where it is.
        topology: One of `topologies.TOPOLOGIES`; not "fsdp2", which Accelerate has on GPUs only.
        model: The directory of the model that both policy and reference are loaded from.
        directory: Where the training writes.
        dtype: Dtype of both models.
        resume_from: A checkpoint directory of an earlier training.
        fields: More fields of the trainer's arguments.
    """
    plain = topologies.training_arguments(topology, directory, dtype)
    forget_engines()  # the arguments that follow begin anew what these have begun
    if plain.deepspeed:
        import deepspeed

        deepspeed.init_distributed("gloo")  # Accelerate does it where it finds no process group
    kept = (
        *("use_cpu", "optim", "per_device_train_batch_size", "learning_rate", "bf16", "deepspeed", "seed"),
        *("dataloader_pin_memory", "save_strategy", "report_to", "disable_tqdm"),
    )
    settings = {name: getattr(plain, name) for name in kept} | {
        "output_dir": str(directory),
        "max_steps": STEPS,
        "logging_steps": 1,
        "sync_ref_model": True,
        "ref_model_sync_steps": SYNC_STEPS,
        "ref_model_mixup_alpha": ALPHA,
        "model_init_kwargs": {"dtype": dtype},
    }
    args = getattr(trl, f"{trainer}Config")(**(settings | _FIELDS[trainer] | fields))
    rewards = {"reward_funcs": _share_of_letters} if _FIELDS[trainer] is _SAMPLED else {}
    training = getattr(trl, f"{trainer}Trainer")(
        str(model), args=args, train_dataset=_preferences(), processing_class=tokenizer(), **rewards
    )
    if subject is not None:
        training.remove_callback(trl.SyncRefModelCallback)
        training.add_callback(subject.SyncRefModelCallback(training.ref_model, training.accelerator))
    recorder = _Recorder(training)
    training.add_callback(recorder)
    training.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
    return recorder.course


def blends(course: Course) -> dict[int, tuple[Weights, Weights]]:
    """What the reference is at each step by the formula, in float64, of the policies that a training went through.

    Returns:
        Step → the values, and a bound on how far those of a callback may be from them after all syncs so far. It is
        that of SPEC.md, for one interpolation and for two operations, which is what TRL does.
    """
    values = {name: value.double() for name, value in course.reference[0].items()}
    bounds = {name: torch.zeros_like(value) for name, value in values.items()}
    of_step = {0: (values, bounds)}
    for step in range(1, STEPS + 1):
        if is_sync(step, sync_steps=SYNC_STEPS):
            policy = {name: value.double() for name, value in course.policy[step].items()}
            blended = {name: blend(policy[name], value, ALPHA) for name, value in values.items()}
            bounds = {
                name: blend_error(
                    bounds[name],
                    policy=policy[name],
                    reference=value,
                    blended=blended[name],
                    alpha=ALPHA,
                    dtype=course.reference[step][name].dtype,
                )
                for name, value in values.items()
            }
            values = blended
        of_step[step] = (values, bounds)
    return of_step


def difference(one: dict[int, Weights], other: dict[int, Weights]) -> str | None:
    """The first weight of which two trainings have other bits, at the steps that both have; None if there is none."""
    for step in one.keys() & other.keys():
        for name, value in one[step].items():
            if not same_bits(value, other[step][name]):
                return f"step {step}, {name}"
    return None


def _preferences(rows: int = 24) -> Dataset:
    """Prompts, each with a completion that is chosen and one that is rejected."""
    of_row = [[_WORDS[row * factor % len(_WORDS)] for factor in (1, 3, 5)] for row in range(rows)]
    return Dataset.from_dict(
        {
            "prompt": [f"{row} and {first} is" for row, (first, _, _) in enumerate(of_row)],
            "chosen": [f" {second}." for _, second, _ in of_row],
            "rejected": [f" {third}, or {first}." for first, _, third in of_row],
        }
    )


def _share_of_letters(completions: list[str], **columns: Any) -> list[float]:
    """A reward: how much of a completion are letters."""
    return [sum(map(str.isalpha, completion)) / max(len(completion), 1) for completion in completions]
