"""The experiment trackers that a table is sent to, row by row: what a run has is not sent to it again.

What a run has is remembered in a file as soon as its tracker has taken the rows. What that means for a process that is
killed, resumed and goes on with the run depends on the tracker:

- MLflow and TensorBoard have sent or written the rows by then. The run gets each row at least once: twice if the
  process was killed in the moment before the file was written.
- Weights & Biases, Comet and Trackio take rows into a queue, which dies with the process. The run gets each row at most
  once, but for the same moment. Trackio writes its queue every half a second. Weights & Biases gets to know rows with
  the metrics that the Trainer logs next, as they take no step of their own, and writes an offline run's file every
  15 seconds; its process does not outlive the training to do the rest. Comet completes the archive of an offline
  experiment at its end only.

A run that is new gets all rows, and the local file has them in any case.
"""

import importlib
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from truestep.completions_file import Row, columns_of

logger = logging.getLogger(__name__)

_TRACKERS = {
    "wandb": "WandbTracker",
    "comet_ml": "CometTracker",
    "trackio": "TrackioTracker",
    "mlflow": "MlflowTracker",
    "tensorboard": "TensorBoardTracker",
}
"""Names as in `args.report_to`, which the modules of this package have too, and the classes in them."""


class Tracker(Protocol):
    """A tracker, through the run that the Trainer, or the user, has started in it. None is started here.

    Attributes:
        memory: What has to be known of earlier loggings to the run, as JSON; None before the first.
    """

    memory: Any

    def __init__(self, trainer: Any) -> None: ...

    def run(self) -> str:
        """What identifies the active run.

        Raises:
            RuntimeError: There is none.
        """

    def log(self, table: str, columns: Sequence[str], rows: Sequence[Row]) -> None:
        """Add rows to a table of the active run, at no step of it; they may be of several steps."""


class Trackers:
    """The trackers of a training, to which the main process sends a table.

    Args:
        names: As in `args.report_to`. Those of which this package has no module are left out.
        table: What the table is called there.
        trainer: The trainer, of which some trackers need the callback that reports to them.
        sent: A small file that remembers which steps the trackers' runs have.
    """

    def __init__(self, names: Sequence[str], table: str, trainer: Any, sent: Path) -> None:
        self._names = [name for name in _TRACKERS if name in names]
        self._table = table
        self._trainer = trainer
        self._path = sent
        self._sent: dict[str, dict[str, Any]] = {}
        self._sent_earlier: dict[str, dict[str, Any]] = {}
        self._trackers: dict[str, Tracker] = {}
        self._complete: dict[str, str] = {}
        self._failed: set[str] = set()
        self._has_warned = False

    def begin(self, step: int, earlier: Path | None = None) -> None:
        """Begin, once.

        Args:
            step: 0 forgets what runs have; otherwise the step of the checkpoint, and it is read.
            earlier: The file of the training that the checkpoint is from. It counts for runs that this training's own
                file does not name: that may be of a training that had the directory before.
        """
        if step == 0:
            with suppress(OSError):
                self._path.unlink(missing_ok=True)
        else:
            self._sent = _read(self._path)
            self._sent_earlier = {} if earlier is None else _read(earlier)

    def send(self, rows: Sequence[Row], earlier: Callable[[int], Iterable[Row]]) -> None:
        """Give each tracker the rows that its run does not have.

        One that fails affects nothing else: there is a warning, and it gets nothing more in this training.

        Args:
            rows: Those that were just made, in the order of their steps.
            earlier: Gives all rows of later steps than its argument; whether `rows` are among them does not matter.
        """
        for name in self._names:
            if name in self._failed or not rows:
                continue
            try:
                self._send(name, rows, earlier)
            except Exception as error:
                self._failed.add(name)
                self._trackers.pop(name, None)
                logger.warning(
                    "LogCompletions: %s gets no more rows of the table %r in this training, as it raised %r; the local "
                    "file has them",
                    name,
                    self._table,
                    error,
                )

    def _send(self, name: str, rows: Sequence[Row], earlier: Callable[[int], Iterable[Row]]) -> None:
        if name not in self._trackers:
            module = importlib.import_module(f"{__name__}.{name}")
            self._trackers[name] = getattr(module, _TRACKERS[name])(self._trainer)
        tracker = self._trackers[name]
        run = tracker.run()
        known = self._known(name, run)
        after = known["step"]
        lacking = [row for row in rows if _step(row) > after]
        if self._complete.get(name) != run:  # its first rows in this training
            tracker.memory = known.get("memory")
            first = _step(rows[0])
            lacking = [row for row in earlier(after) if _step(row) < first] + lacking
        if lacking:
            tracker.log(self._table, columns_of(lacking), lacking)
            known = {"run": run, "step": _step(lacking[-1]), "memory": tracker.memory}
        if self._sent.get(name) != known:
            self._sent[name] = known
            self._remember()
        self._complete[name] = run

    def _known(self, name: str, run: str) -> dict[str, Any]:
        """What a run has: up to which step, and what its tracker has to know."""
        for found in (self._sent, self._sent_earlier):
            if found.get(name, {}).get("run") == run:
                return found[name]
        return {"run": run, "step": 0, "memory": None}

    def _remember(self) -> None:
        # Without it a later training sends rows that the run has already, which is no reason to stop sending now.
        try:
            # Put in place at once, so that a killed process leaves the old contents or the new ones. It does not wait
            # for the disk, which takes longer than most trackers do: a machine that loses power may forget.
            temporary = self._path.with_name(f"{self._path.name}.tmp")
            temporary.write_text(json.dumps(self._sent), encoding="utf-8")
            temporary.replace(self._path)
        except OSError as error:
            if not self._has_warned:
                logger.warning(
                    "LogCompletions: %s cannot be written (%s); trackers may get rows twice if the training is resumed",
                    self._path,
                    error,
                )
            self._has_warned = True


def _step(row: Row) -> int:
    step = row["step"]
    assert isinstance(step, int)
    return step


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """What runs have; nothing where there is no file, or one that is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {
            name: one for name, one in found.items() if isinstance(one["run"], str) and isinstance(one["step"], int)
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
