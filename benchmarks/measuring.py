"""How the benchmarks measure: rounds of interleaved actions, and memory as the allocator and the kernel see it."""

from __future__ import annotations

import gc
import json
import os
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

COPY = "copy_"
"""The floor of every contest: what a callback has to read or write, copied to memory of the same size and dtype."""

_BALLAST_BYTES = 128 * 2**20


class Copy:
    """Copies tensors to memory that it holds for them."""

    def __init__(self, sources: Iterable[Tensor]) -> None:
        self._pairs = [(torch.empty_like(source), source.detach()) for source in sources]

    def __call__(self) -> None:
        """Copy all of them."""
        for destination, source in self._pairs:
            destination.copy_(source)


@dataclass(frozen=True)
class Spread:
    """The median of some samples, and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """The spread of one sample or more."""
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0])
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, low, high)

    @classmethod
    def of_ratios(cls, numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
        """The spread of ratios taken round by round, in which the drift of the machine cancels out."""
        return cls.of([above / below for above, below in zip(numerators, denominators, strict=True)])


def stopwatch(action: Callable[[], object], *, start: Callable[[], object] | None = None) -> float:
    """Seconds that an action takes, from caches that hold nothing of what it uses, as after a backward.

    Args:
        action: What to measure.
        start: What to wait for first, unmeasured, once the caches are clear.
    """
    _evict_caches()
    if start is not None:
        start()
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def interleave(
    actions: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    between_rounds: Callable[[], object],
    patience: float,
    warm_up: int = 2,
    start: Callable[[], object] | None = None,
) -> dict[str, list[float]]:
    """Measure actions in turn, round after round, so that whatever disturbs the machine disturbs all of them.

    Args:
        actions: What to measure, by name. Every round begins with another one.
        rounds: How often each is measured.
        between_rounds: What happens before each round, unmeasured.
        patience: Seconds to wait at most, before each round, for other processes to be idle.
        warm_up: Rounds before those that count, in which memory is touched for the first time.
        start: What to wait for before each action; see `stopwatch`.

    Returns:
        For each action the seconds of every round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    names = list(actions)
    for number in range(-warm_up, rounds):
        between_rounds()
        wait_for_idle(patience)
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            elapsed = stopwatch(actions[name], start=start)
            if number >= 0:
                seconds[name].append(elapsed)
    return seconds


def wait_for_idle(patience: float) -> None:
    """Wait until other processes leave the processors alone, but no longer than `patience` seconds."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline and _busy_share(0.1) > 0.1:
        pass


def tensor_bytes() -> int:
    """Bytes in the storages of all tensors that Python can reach."""
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor) and not thing.is_meta]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def resident_bytes() -> int:
    """Bytes of this process that are in memory; 0 where the kernel does not say."""
    return _kernel_says("VmRSS")


def resident_peak(action: Callable[[], object]) -> int:
    """Bytes by which the resident memory of this process rises at most while an action runs; 0 if unknown."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    except OSError:
        return 0
    before = _kernel_says("VmRSS")
    action()
    return max(0, _kernel_says("VmHWM") - before)


def page_faults(action: Callable[[], object]) -> int:
    """How often an action touches a page of memory that the kernel has to provide first."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    action()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def allocated_peak(action: Callable[[], object]) -> int:
    """Bytes of tensors that are alive at once at most, of those that an action allocates, within operations too.

    The profiler sees this thread only: of what a thread of gloo frees it does not get to know. Use `living_peak` for
    actions that communicate.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    with tempfile.TemporaryDirectory() as directory:
        trace = Path(directory, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    alive = peak = 0
    for event in sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"]):
        alive += event["args"]["Bytes"]
        peak = max(peak, alive)
    return peak


def living_peak(action: Callable[[], object]) -> int:
    """Bytes of tensors that are alive at once at most, of those that an action makes, whichever thread frees them.

    What an operation allocates and frees within itself does not count, unlike in `allocated_peak`.
    """
    with _Storages() as storages:
        action()
    return storages.peak


class _Storages(TorchDispatchMode):
    """Follows the storages that operations make, without keeping them alive."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {StorageWeakRef(tensor.untyped_storage()) for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if StorageWeakRef(storage) not in given:
                self._alive[StorageWeakRef(storage)] = storage.nbytes()
        self._alive = {storage: size for storage, size in self._alive.items() if not storage.expired()}
        self.peak = max(self.peak, sum(self._alive.values()))
        return result


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and not leaf.is_meta]


def available_memory() -> int | None:
    """Bytes that this machine can still give, None where the kernel does not say."""
    return _read_kilobytes(Path("/proc/meminfo"), "MemAvailable")


def processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environment(packages: Sequence[str]) -> dict[str, str]:
    """What the figures depend on: processor, memory, allocator, versions."""
    total = _read_kilobytes(Path("/proc/meminfo"), "MemTotal")
    tuned = {name: value for name, value in os.environ.items() if name.startswith(("MALLOC_", "LD_PRELOAD", "GLIBC_"))}
    return {
        "processor": f"{_processor_name()}, {processors()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "memory": f"{total / 2**30:.0f} GiB" if total else "unknown",
        "system": f"{platform.system()} {platform.release()}",
        "allocator": f"{' '.join(platform.libc_ver()) or 'libc'}, " + (f"with {tuned}" if tuned else "untuned"),
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }


_ballast: Tensor | None = None


def _evict_caches() -> None:
    global _ballast
    if _ballast is None:
        _ballast = torch.zeros(_BALLAST_BYTES, dtype=torch.uint8).view(torch.int64)
    _ballast.max()


def _busy_share(seconds: float) -> float:
    """The share of all processors that was in use while this process slept; 0 where the kernel does not say."""
    before = _processor_ticks()
    time.sleep(seconds)
    after = _processor_ticks()
    if before is None or after is None:
        return 0.0
    busy, idle = (later - earlier for earlier, later in zip(before, after, strict=True))
    return busy / max(busy + idle, 1)


def _processor_ticks() -> tuple[int, int] | None:
    """Clock ticks that all processors together were busy and idle."""
    try:
        ticks = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    except OSError:
        return None
    idle = ticks[3] + ticks[4]
    return sum(ticks) - idle, idle


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _kernel_says(field: str) -> int:
    return _read_kilobytes(Path("/proc/self/status"), field) or 0


def _read_kilobytes(path: Path, field: str) -> int | None:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)
