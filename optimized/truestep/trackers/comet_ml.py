"""Comet: a CSV asset for each logging."""

import json
from collections.abc import Sequence
from typing import Any

from truestep.completions_file import Cell, Row


class CometTracker:
    """The table as assets `table/{step}.csv`, each with the rows of one logging.

    Args:
        trainer: Not needed.
    """

    def __init__(self, trainer: Any) -> None:
        import comet_ml

        self.memory: Any = None
        self._comet: Any = comet_ml

    def run(self) -> str:
        """The key of the running experiment."""
        return str(self._experiment().get_key())

    def log(self, table: str, columns: Sequence[str], rows: Sequence[Row]) -> None:
        """Log an asset. Neither a step nor an epoch goes with it, which would become those of the experiment."""
        lines = [columns, *([row.get(column) for column in columns] for row in rows)]
        text = "".join(",".join(map(_quoted, line)) + "\r\n" for line in lines)
        name = f"{table}/{rows[-1]['step']:08}.csv"
        if self._experiment().log_asset_data(text, name=name, overwrite=True) is None:
            raise RuntimeError(f"the asset {name} was not accepted")

    def _experiment(self) -> Any:
        experiment = self._comet.get_running_experiment()
        if experiment is None or not experiment.alive:
            raise RuntimeError("there is no running experiment")
        return experiment


def _quoted(cell: Cell) -> str:
    """A cell of a CSV file (RFC 4180). Only text has quotes, which tells "" from None and "5" from 5."""
    if isinstance(cell, str):
        # Comet would drop all of the asset, and say nothing, for half of a surrogate pair.
        text = cell.encode("utf-8", "backslashreplace").decode("utf-8")
        return '"' + text.replace('"', '""') + '"'
    return "" if cell is None else json.dumps(cell)
