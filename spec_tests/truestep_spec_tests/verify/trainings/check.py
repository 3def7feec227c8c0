"""One run of a verification and what came of it."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from truestep_fixtures.ranks import RankFailure

from truestep_spec_tests.lockstep import Comparison, Comparisons, Divergence
from truestep_spec_tests.recording import Recorded, Trajectory
from truestep_spec_tests.runs import (
    Outcome,
    Setup,
    first_difference_in_one_process,
    follow_in_lockstep,
    train_in_lockstep,
)
from truestep_spec_tests.verify.launch import Launcher


@dataclass(frozen=True)
class Result:
    """What one run came to.

    Attributes:
        setup: The run.
        comparisons: Subject against reference, the same on every rank; None if they did not come to an end.
        seconds: Of the slowest rank.
        difference: Where what it shows differs from what a single process has on the same trajectory, if it does; or
            what the single process raised.
        crash: Every rank's report, if the run crashed.
        replay: The file to replay a failure from, if there is one.
    """

    setup: Setup
    comparisons: Comparisons | None = None
    seconds: float = math.nan
    difference: str | None = None
    crash: RankFailure | None = None
    replay: Path | None = None

    @property
    def divergence(self) -> Divergence | None:
        """The first value outside its bound, if there is one."""
        return None if self.comparisons is None else self.comparisons.divergence

    @property
    def verdict(self) -> str:
        """`equal`, `diverges`, `differs` (bitwise, by topology), `stops early`, `hangs`, `crashes` or `not run`."""
        if self.crash is not None:
            return "hangs" if {report.outcome for report in self.crash.reports} <= {"hung", "finished"} else "crashes"
        if self.comparisons is None:
            return "not run"
        if self.divergence is not None:
            return "diverges"
        if len(self.comparisons.steps) != self.setup.steps + 1:
            return "stops early"
        return "equal" if self.difference is None else "differs"

    @property
    def passed(self) -> bool:
        """Whether nothing was found."""
        return self.verdict == "equal"

    @property
    def can_be_replayed(self) -> bool:
        """Whether the trajectory shows what was found: of a progress display, the weights show nothing."""
        return self.verdict in ("diverges", "differs") and self.setup.callback != "RichProgressCallback"

    def as_dict(self) -> dict[str, Any]:
        """All of it, as JSON can hold it."""
        comparisons = self.comparisons or Comparisons()
        divergence = {} if self.divergence is None else self.divergence._asdict()
        return {
            "callback": self.setup.callback,
            "setup": self.setup.as_dict(),
            "verdict": self.verdict,
            "steps_compared": len(comparisons.steps),
            "largest_error_over_bound": None if self.comparisons is None else _in_json(comparisons.worst),
            "steps": {step: _of_step(comparison) for step, comparison in comparisons.steps.items()},
            "divergence": {what: _in_json(value) for what, value in divergence.items()} or None,
            "bitwise_difference": self.difference,
            "crash": None if self.crash is None else str(self.crash),
            "endings": [] if self.crash is None else self.crash.endings(),
            "replay": None if self.replay is None else str(self.replay),
            "seconds": None if math.isnan(self.seconds) else round(self.seconds, 3),
        }


def _of_step(comparison: Comparison) -> dict[str, Any]:
    shown = comparison._asdict() | {"ratio": comparison.ratio}
    return {what: _in_json(value) for what, value in shown.items()}


def _in_json(value: Any) -> Any:
    """JSON has no infinities and no NaN; they become strings."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def check(setup: Setup, launcher: Launcher, directory: Path, counter: Path, trajectory: Path | None = None) -> Result:
    """Make one run in lockstep, and follow its trajectory once more in a single process.

    Args:
        setup: The run.
        launcher: Where ranks come from.
        directory: For everything that the run writes; of this run alone.
        counter: A file for the number of the step compared last.
        trajectory: A recorded trajectory to follow instead of training.
    """
    recording = directory / "recording"
    try:
        if trajectory is None:
            outcomes: list[Outcome] = launcher.run(
                setup.ranks, train_in_lockstep, setup, directory, recording=recording, counter=counter
            )
        else:
            outcomes = launcher.run(
                setup.ranks, follow_in_lockstep, setup, directory, trajectory, recording=recording, counter=counter
            )
    except RankFailure as failure:
        return Result(setup, crash=failure)
    compared = Result(setup, outcomes[0].comparisons, max(outcome.seconds for outcome in outcomes))
    try:
        difference = launcher.run_alone(first_difference_in_one_process, setup, recording, directory / "alone")
    except RankFailure as failure:
        return replace(compared, difference=failure.shortened())
    return replace(compared, difference=difference)


def keep_for_replay(result: Result, directory: Path, file: Path) -> None:
    """Write the trajectory of a failed run to one file that `--replay` takes."""
    steps = dict(Recorded(directory / "recording", "theta"))
    about = {"setup": result.setup.as_dict(), "divergence": result.divergence, "difference": result.difference}
    file.parent.mkdir(parents=True, exist_ok=True)
    Trajectory(steps, about).save(file)
