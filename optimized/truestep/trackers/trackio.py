"""Trackio: a table for each logging."""

from collections.abc import Sequence
from typing import Any

from truestep.completions_file import Cell, Row


class TrackioTracker:
    """The table in parts, each with the rows of one logging.

    Args:
        trainer: Not needed.
    """

    def __init__(self, trainer: Any) -> None:
        import trackio

        self.memory: Any = None
        self._trackio: Any = trackio

    def run(self) -> str:
        """The project and id of the current run."""
        run = self._current()
        return f"{run.project}/{run.id}"

    def log(self, table: str, columns: Sequence[str], rows: Sequence[Row]) -> None:
        """Log a part at the run's last step. The next one, which it would get otherwise, is for the next metrics."""
        data = [[_storable(row.get(column)) for column in columns] for row in rows]
        run = self._current()
        # Before the first metrics that is step -1, as the run counts from 0.
        run.log({table: self._trackio.Table(columns=list(columns), data=data)}, step=run._next_step - 1)

    def _current(self) -> Any:
        run = self._trackio.context_vars.current_run.get()
        if run is None:
            raise RuntimeError("there is no current run: trackio.init was not called")
        return run


def _storable(cell: Cell) -> Cell:
    """A cell that Trackio does not leave out, as it does with what its JSON cannot hold, together with its table."""
    if isinstance(cell, str):
        return cell.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(cell, int) and not -(2**63) <= cell < 2**64:
        return str(cell)
    return cell
