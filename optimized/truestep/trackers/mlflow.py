"""MLflow: an artifact in its format of tables for each logging."""

import json
from collections.abc import Sequence
from typing import Any

from truestep.completions_file import Row


class MlflowTracker:
    """The table as artifacts `table/{step}.json`, each with the rows of one logging.

    `mlflow.log_table` is not what writes them: it reads a table that is there and writes all of it again, and keeps a
    list of tables in a tag of the run, which is limited to 8000 characters.

    Args:
        trainer: Not needed.
    """

    def __init__(self, trainer: Any) -> None:
        import mlflow

        self.memory: Any = None
        self._mlflow: Any = mlflow

    def run(self) -> str:
        """The id of the active run."""
        run = self._mlflow.active_run()
        if run is None:
            raise RuntimeError("there is no active run")
        return str(run.info.run_id)

    def log(self, table: str, columns: Sequence[str], rows: Sequence[Row]) -> None:
        """Log an artifact; it has no step."""
        data = [[row.get(column) for column in columns] for row in rows]
        text = json.dumps({"columns": list(columns), "data": data})
        self._mlflow.log_text(text, f"{table}/{rows[-1]['step']:08}.json", run_id=self.run())
