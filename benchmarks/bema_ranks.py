"""BEMA's contestants under DDP over gloo, beside the same contest on one rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from bema_contest import Contest
from measuring import COPY, stopwatch, wait_for_idle
from models import parameter_bytes
from truestep_fixtures.ranks import RankPool

_START_TIMEOUT = 300.0

_contest: Contest | None = None  # of this rank; it outlives the tasks that the pool sends


def compare_ranks(
    family: str, size: float, dtype: torch.dtype, ranks: int, rounds: int, patience: float
) -> dict[str, Any]:
    """Measure an update on several ranks of one thread each, in turn with one rank of one thread.

    Two times are taken, and of both the slowest rank counts. `together`: all ranks update at once and share the
    machine's memory bus. `alone`: the ranks take turns, as if each had a machine of its own.

    Returns:
        A row of the report: what was measured; `seconds` by number of ranks, way and contestant; `buffers` and `peak
        allocated` in bytes by number of ranks and callback, for the rank that has most.
    """
    seconds: dict[int, dict[str, dict[str, list[float]]]] = {}
    memory: dict[str, dict[int, dict[str, int]]] = {"buffers": {}, "peak allocated": {}}
    with RankPool(1) as one, RankPool(ranks) as several:
        pools = {1: one, ranks: several}
        for pool in pools.values():
            facts = pool.run(enter, family, size, dtype, timeout=_START_TIMEOUT)[0]
        for _ in range(rounds):
            wait_for_idle(patience)
            for number, pool in pools.items():
                for way, by_contestant in _slowest(pool.run(measure, timeout=_START_TIMEOUT)).items():
                    for name, elapsed in by_contestant.items():
                        seconds.setdefault(number, {}).setdefault(way, {}).setdefault(name, []).append(elapsed)
        for number, pool in pools.items():
            reports = pool.run(leave, timeout=_START_TIMEOUT)
            for quantity, by_number in memory.items():
                by_number[number] = {name: max(report[name][quantity] for report in reports) for name in reports[0]}
    return facts | {"ranks": ranks, "seconds": seconds} | memory


def enter(family: str, size: float, dtype: torch.dtype) -> dict[str, Any]:
    """Task of a rank: make ready for `measure`."""
    global _contest
    _contest = Contest(family, size, dtype, "ddp" if dist.is_initialized() else "single")
    return {
        "model": family,
        "parameters": sum(parameter.numel() for parameter in _contest.model.parameters()),
        "bytes": parameter_bytes(_contest.model),
        "dtype": str(dtype).removeprefix("torch."),
    }


def measure() -> dict[str, dict[str, float]]:
    """Task of a rank: one round.

    Returns:
        Seconds of this rank, by way (`together`, `alone`) and contestant.
    """
    assert _contest is not None
    _contest.take_step()
    together = {name: stopwatch(action, start=_meet) for name, action in _contest.actions.items()}
    alone = {name: _elapsed_in_turn(_contest.actions[name]) for name in (COPY, "truestep")}
    return {"together": together, "alone": alone}


def leave() -> dict[str, dict[str, int]]:
    """Task of a rank: the memory of its callbacks, as from `Contest.take_apart`; nothing can be measured afterwards."""
    assert _contest is not None
    return _contest.take_apart()


def _elapsed_in_turn(action: Callable[[], object]) -> float:
    elapsed = 0.0
    for turn in range(dist.get_world_size() if dist.is_initialized() else 1):
        _meet()
        if not dist.is_initialized() or dist.get_rank() == turn:
            elapsed = stopwatch(action)
    _meet()
    return elapsed


def _meet() -> None:
    if dist.is_initialized():
        dist.barrier()


def _slowest(reports: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    return {
        way: {name: max(report[way][name] for report in reports) for name in by_contestant}
        for way, by_contestant in reports[0].items()
    }
