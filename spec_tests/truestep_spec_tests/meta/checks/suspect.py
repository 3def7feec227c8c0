"""What claims to be right, and what to look at it with.

A check runs on ranks of its choice, and returns the first fault that it finds or None. A package that crashes
instead of being wrong makes it raise, which is no verdict.
"""

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from truestep_fixtures.ranks import RankPool

from truestep_spec_tests.meta import faults
from truestep_spec_tests.runs import Setup, follow_in_lockstep


@dataclass(frozen=True)
class Suspect:
    """A package that is looked at, and what to look at it with.

    Attributes:
        package: Its import name.
        path: The directory that it is imported from.
        directory: Where a check may write.
        ranks: The pool for each world size.
    """

    package: str
    path: Path
    directory: Path
    ranks: Callable[[int], RankPool]

    def run(self, setup: Setup, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> list[Any]:
        """Runs `function(setup, directory, …)` on every rank of the setup, where the package can be imported."""
        pool = self.ranks(setup.ranks)
        return pool.run(with_path, self.path, function, setup, self.directory, *args, **kwargs)

    def fault(self, setup: Setup, function: Callable[..., str | None], /, *args: Any) -> str | None:
        """Runs a function of `faults`; the first fault on any rank."""
        return _first(self.run(setup, function, *args))

    def divergence(self, setup: Setup) -> str | None:
        """Where the package leaves the reference on a trajectory."""
        divergence = self.run(setup, follow_in_lockstep)[0].comparisons.divergence
        return None if divergence is None else str(divergence)


Check = Callable[[Suspect], str | None]


def with_path(path: Path, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Calls `function(*args, **kwargs)` where packages in a directory can be imported."""
    sys.path.insert(0, str(path))
    importlib.invalidate_caches()
    try:
        return function(*args, **kwargs)
    finally:
        sys.path.remove(str(path))


def _first(faults_by_rank: list[str | None]) -> str | None:
    return next((f"rank {rank}: {fault}" for rank, fault in enumerate(faults_by_rank) if fault is not None), None)


def difference(found: list[dict[int, dict[str, Tensor]]], expected: dict[int, dict[str, Tensor]]) -> str | None:
    """The first place where what some rank has shown at some step is not what was expected there."""
    for rank, shown in enumerate(found):
        for step, values in shown.items():
            fault = faults.first_difference(values, expected[step])
            if fault is not None:
                return f"rank {rank}, step {step}: {fault}"
    return None
