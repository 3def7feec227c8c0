"""SyncRefModelCallback's contestants on one policy: a plain copy of a reference, truestep's callback and TRL's."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import trl
import truestep
from accelerate import Accelerator
from measuring import COPY, Copy, allocated_peak, interleave, living_peak, page_faults, resident_peak
from models import build
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState
from truestep_fixtures.ranks import RankPool
from truestep_fixtures.topologies import place, place_for_evaluation, training_arguments
from truestep_spec_tests.differential.traffic import messages_of

_TIMEOUT = 3600.0


class Layout(NamedTuple):
    """The topologies of policy and reference; see `truestep_fixtures.topologies`."""

    policy: str
    reference: str


SINGLE, ALIKE, WHOLE = "one process", "both ZeRO-3", "reference whole"

LAYOUTS: Mapping[str, Layout] = {
    SINGLE: Layout("single", "single"),
    ALIKE: Layout("zero3", "zero3"),
    WHOLE: Layout("zero3", "single"),
}
"""How the two models lie. `WHOLE`: a partitioned policy, and all of the reference on every rank."""


class Contest:
    """A policy that lies in a topology, with a reference for each callback to follow its next step.

    Args:
        family: A key of `MODELS`.
        size: A key of `MODELS[family]`.
        dtype: What the parameters of policy and references are.
        layout: A key of `LAYOUTS`.

    Attributes:
        parameters: Elements of the whole model.
        largest_parameter: Bytes of its largest parameter.
        held_bytes: Bytes of what this rank holds of a reference.
        actions: By name, what each contestant does at a sync.
    """

    def __init__(self, family: str, size: float, dtype: torch.dtype, layout: str) -> None:
        topologies = LAYOUTS[layout]
        model = build(family, size)
        numels = [parameter.numel() for parameter in model.parameters()]
        self.parameters = sum(numels)
        self.largest_parameter = max(numels) * dtype.itemsize
        self._policy = place(model, topologies.policy, dtype).model
        self._references = {
            name: place_for_evaluation(build(family, size), topologies.reference, dtype).model
            for name in ("truestep", "TRL")
        }
        held = [_held(parameter) for parameter in self._references["truestep"].parameters()]
        self.held_bytes = sum(elements.numel() for elements in held) * dtype.itemsize
        self.actions: dict[str, Callable[[], object]] = {COPY: Copy(held)}
        self._begin(topologies.policy)

    @torch.no_grad()
    def take_step(self) -> None:
        """Stand in for an optimizer step: every parameter of the policy changes a little, in bfloat16 too."""
        self._state.global_step += 1
        for parameter in self._policy.parameters():
            _held(parameter).mul_(0.99)

    def largest_difference(self) -> float:
        """The largest distance between the two references on this rank, over the largest weight."""
        ours, theirs = ([_held(one).float() for one in model.parameters()] for model in self._references.values())
        largest: float = max(value.abs().max().item() for value in ours)
        return max((mine - value).abs().max().item() for mine, value in zip(ours, theirs, strict=True)) / largest

    def memory(self) -> dict[str, dict[str, int]]:
        """Measure what a sync needs beside the models, and what it sends.

        It comes after all timing: a profiler leaves free memory on the heap, which a sync can then reuse without page
        faults.

        Returns:
            By callback, of one sync on this rank: how many `collectives` and `page faults` it takes, and the bytes that
            it needs at once at most, as resident memory (`peak resident`) and as tensors (`peak allocated`; without
            what operations free themselves if there are collectives).
        """
        return {name: _memory_of(self.actions[name]) for name in self._references}

    def _begin(self, topology: str) -> None:
        with tempfile.TemporaryDirectory() as unused:
            args = training_arguments(topology, unused, ref_model_sync_steps=1, ref_model_mixup_alpha=0.6)
        # As a Trainer makes it. TRL's callback looks into the state behind it: without a DeepSpeed plugin there, which
        # `cpu=True` would keep out, it takes ZeRO-3's empty placeholders for the weights and blends those.
        accelerator = Accelerator(deepspeed_plugin=args.deepspeed_plugin)
        self._state = TrainerState()
        event = (args, self._state, TrainerControl())
        for name, callback in {
            "truestep": truestep.SyncRefModelCallback(self._references["truestep"], accelerator),
            "TRL": trl.SyncRefModelCallback(self._references["TRL"], accelerator),
        }.items():
            callback.on_train_begin(*event, model=self._policy)
            self.actions[name] = lambda callback=callback: callback.on_step_end(*event, model=self._policy)


def compare_in_one_process(
    family: str, size: float, dtype: torch.dtype, threads: int, rounds: int, patience: float
) -> dict[str, Any]:
    """Measure the contestants in this process.

    Returns:
        A row of the report: what was measured, `seconds` by contestant, `memory` by callback.
    """
    return _row(family, dtype, SINGLE, [compete(family, size, dtype, SINGLE, threads, rounds, patience)])


def compare_ranks(
    family: str, size: float, dtype: torch.dtype, layout: str, ranks: int, rounds: int, patience: float
) -> dict[str, Any]:
    """Measure the contestants on several ranks of one thread each.

    Returns:
        A row of the report. Of times and memory, the rank counts that takes most.
    """
    with RankPool(ranks) as pool:
        reports = pool.run(compete, family, size, dtype, layout, 1, rounds, patience, timeout=_TIMEOUT)
    return _row(family, dtype, layout, reports)


def compete(
    family: str, size: float, dtype: torch.dtype, layout: str, threads: int, rounds: int, patience: float
) -> dict[str, Any]:
    """What one rank measures. All rounds are one task: the pool clears Accelerate's state between tasks."""
    torch.set_num_threads(threads)
    contest = Contest(family, size, dtype, layout)
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    seconds = interleave(
        contest.actions,
        rounds,
        between_rounds=contest.take_step,
        patience=patience if is_first else 0.0,  # the others wait for it
        start=dist.barrier if dist.is_initialized() else None,
    )
    return {
        "parameters": contest.parameters,
        "largest parameter": contest.largest_parameter,
        "held": contest.held_bytes,
        "threads": threads,
        "seconds": seconds,
        "largest difference": contest.largest_difference(),
        "memory": contest.memory(),
    }


def _memory_of(action: Callable[[], object]) -> dict[str, int]:
    collectives = len(messages_of(action))
    return {
        "collectives": collectives,
        "page faults": page_faults(action),
        "peak resident": resident_peak(action),
        "peak allocated": living_peak(action) if collectives else allocated_peak(action),
    }


def _held(parameter: nn.Parameter) -> Tensor:
    """The elements of a parameter that are on this rank, without the padding of a partition."""
    partition = getattr(parameter, "ds_tensor", None)
    if partition is None:
        return parameter.detach().view(-1)
    start = dist.get_rank() * partition.numel()
    return partition.detach()[: max(0, min(partition.numel(), parameter.ds_numel - start))]


def _row(family: str, dtype: torch.dtype, layout: str, reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    first = reports[0]
    return {
        "model": family,
        **{name: first[name] for name in ("parameters", "largest parameter", "threads")},
        "dtype": str(dtype).removeprefix("torch."),
        "layout": layout,
        "ranks": len(reports),
        "held": max(report["held"] for report in reports),
        "seconds": {
            name: [max(of_ranks) for of_ranks in zip(*(report["seconds"][name] for report in reports), strict=True)]
            for name in first["seconds"]
        },
        "largest differences": [report["largest difference"] for report in reports],
        "memory": {
            name: {quantity: max(report["memory"][name][quantity] for report in reports) for quantity in quantities}
            for name, quantities in first["memory"].items()
        },
    }
