"""What a display of progress takes from a training, side by side with TRL's callback and with the Trainer's own.

    python benchmarks/rich_progress.py [--rounds N] [--output DIRECTORY]

Measured are the events that a training waits for, what it takes to draw, what is drawn while nothing happens, and the
processor time that a training takes with each callback. Each is in a process of its own, on a pseudo-terminal of 100
columns and 40 rows that another process reads from. Needs TRL and rich. Writes tables (plain text and Markdown) and all
samples (JSON). A round takes less than a minute.
"""

from __future__ import annotations

import argparse
from typing import Any

from rich_progress_contest import METRICS, compare_events, compare_trainings
from rich_progress_report import tables
from running import PACKAGES, measured, options, write


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the tables and write the files."""
    parsed = options(__doc__.splitlines()[0], rounds=3).parse_args(arguments)
    results = measured("rich_progress.py", arguments, lambda: _measure(parsed), (*PACKAGES, "rich", "tqdm"))
    write(results, tables(results["events"], results["trainings"]), parsed.output, "rich_progress")


def _measure(parsed: argparse.Namespace) -> dict[str, Any]:
    return {
        "events": [compare_events(metrics, parsed.rounds, parsed.patience) for metrics in METRICS],
        "trainings": compare_trainings(parsed.rounds, parsed.patience),
    }


if __name__ == "__main__":
    main()
