"""Weights & Biases: a table that grows by increments."""

from collections.abc import Sequence
from typing import Any

from truestep.completions_file import Row

_ROWS_OF_AN_INCREMENT = 10_000  # of more than these the table's file in the run would have the first ones only
_INCREMENTS_SHOWN = 50  # of the 100 that a workspace would show, as each logging has their names again


class WandbTracker:
    """The table as increments, each of which has the rows of one logging.

    One `wandb.Table` that is logged again and again keeps all rows in memory, and sends the names of all increments
    each time. So each logging has a table object of its own, with the names of the latest increments, which the
    workspace shows together with it. Earlier ones stay in the run.

    Args:
        trainer: Not needed.
    """

    def __init__(self, trainer: Any) -> None:
        import wandb

        self.memory: Any = None
        self._wandb: Any = wandb
        self._defined: set[tuple[str, str]] = set()

    def run(self) -> str:
        """The id of the active run."""
        if self._wandb.run is None:
            raise RuntimeError("there is no active run: wandb.run is None")
        return str(self._wandb.run.id)

    def log(self, table: str, columns: Sequence[str], rows: Sequence[Row]) -> None:
        """Add rows as an increment, without a step: it joins what is logged next, in one row of the history."""
        run = self._wandb.run
        axis = f"{table}/step"
        if (run.id, table) not in self._defined:
            # Transformers has `train/global_step` as the axis of everything. The next value of that is a later step.
            run.define_metric(axis, hidden=True)
            run.define_metric(table, step_metric=axis)
            self._defined.add((run.id, table))
        for start in range(0, len(rows), _ROWS_OF_AN_INCREMENT):
            part = rows[start : start + _ROWS_OF_AN_INCREMENT]
            increment = self._wandb.Table(
                columns=list(columns),
                data=[[row.get(column) for column in columns] for row in part],
                allow_mixed_types=True,
                log_mode="INCREMENTAL",
            )
            if self.memory is not None:
                increment._increment_num = self.memory["increments"]
                increment._previous_increments_paths = list(self.memory["shown"])
            run.log({table: increment, axis: part[-1]["step"]}, commit=False)
            self._remember(increment)

    def _remember(self, increment: Any) -> None:
        # A run that is disabled numbers nothing. Should another version of the package keep its numbers elsewhere, each
        # increment is a table that stands alone.
        if getattr(increment, "_increment_num", None) is None:
            self.memory = None
            return
        shown = [*increment._previous_increments_paths, increment._get_artifact_entry_ref_url()]
        self.memory = {
            "increments": increment._increment_num + 1,
            "shown": [path for path in shown if path is not None][1 - _INCREMENTS_SHOWN :],
        }
