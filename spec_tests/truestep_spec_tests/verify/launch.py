"""Where ranks come from: pools of processes on this machine, or the launcher that has started this process."""

import os
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol, Self

import torch
import torch.distributed as dist
from transformers.utils.logging import disable_progress_bar
from truestep_fixtures.ranks import RankFailure, RankPool, RankReport


class Launcher(Protocol):
    """Runs functions on ranks."""

    is_main: bool
    """Whether this process reports: one process does."""

    world_sizes: tuple[int, ...]
    """The world sizes that can be had; empty for any."""

    def run(self, world_size: int, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> list[Any]:
        """Run a function on every rank; returns every rank's result, raises `RankFailure` if one has none."""
        ...

    def run_alone(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Run a function in one process that is not part of any world."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class LocalPools:
    """Ranks are CPU processes on this machine, one pool for each world size, started when it is first needed."""

    is_main = True
    world_sizes: tuple[int, ...] = ()

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._pools: dict[int, RankPool] = {}

    def run(self, world_size: int, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> list[Any]:
        if world_size not in self._pools:
            self._pools[world_size] = RankPool(world_size, timeout=self._timeout)
        return self._pools[world_size].run(function, *args, **kwargs)

    def run_alone(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        return self.run(1, function, *args, **kwargs)[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pool in self._pools.values():
            pool.close()


class ExistingWorld:
    """Ranks are the processes that `torchrun` or another launcher has started, with the devices they have.

    All of them run the same verification; the main one reports. A rank that fails while the others wait for it in a
    collective ends in the launcher's own timeout.
    """

    def __init__(self, timeout: float) -> None:
        disable_progress_bar()  # every rank would draw its own
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
        self.is_main = dist.get_rank() == 0
        self.world_sizes = (dist.get_world_size(),)
        self._alone = LocalPools(timeout)

    def run(self, world_size: int, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> list[Any]:
        try:
            mine: tuple[bool, Any] = (True, function(*args, **kwargs))
        except Exception:
            mine = (False, traceback.format_exc())
        everyone: list[Any] = [None] * world_size
        dist.all_gather_object(everyone, mine)
        if not all(finished for finished, _ in everyone):
            reports = [
                RankReport(rank, "finished") if finished else RankReport(rank, "raised", result)
                for rank, (finished, result) in enumerate(everyone)
            ]
            raise RankFailure(function.__name__, reports)
        return [result for _, result in everyone]

    def run_alone(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        result: list[Any] = [None, None]
        if self.is_main:
            try:
                result[0] = self._alone.run_alone(function, *args, **kwargs)
            except RankFailure as failure:
                result[1] = failure.reports
        dist.broadcast_object_list(result, src=0)
        if result[1] is not None:
            raise RankFailure(function.__name__, result[1])
        return result[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._alone.__exit__(kind, error, trace)
        dist.destroy_process_group()


def launcher(timeout: float) -> Launcher:
    """The world that this process was started in, or pools of its own.

    Args:
        timeout: Seconds that one run may take in a pool.
    """
    return ExistingWorld(timeout) if is_rank() else LocalPools(timeout)


def is_rank() -> bool:
    """Whether a launcher has started this process as one rank of a world."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ
