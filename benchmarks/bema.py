"""BEMA's update, side by side with TRL's and with a plain copy of the parameters.

    python benchmarks/bema.py [--sizes 1e6 1e7 1e8] [--ranks 1 2 4] [--rounds N] [--output DIRECTORY]

Measured are the time of one update in one process and under DDP, the memory that it takes, and how long it blocks a
training step. Everything that is compared runs in one process and in turn, on one model. Needs TRL and matplotlib.
Writes tables (plain text and Markdown), all samples (JSON) and a picture.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler, which counts allocations, is chatty

from bema_contest import compare_in_one_process
from bema_ranks import compare_ranks
from bema_report import draw, tables
from bema_training import compare_in_training
from running import DTYPES, cases, fits, in_fresh_process, measured, parse, write

# The parameters, their copy, the buffers of both callbacks, and TRL's temporaries.
_MODELS_PER_PROCESS = 12


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the tables and write the files."""
    parsed = parse(__doc__.splitlines()[0], arguments, ranks=(1, 2, 4), engine="DDP")
    results = measured("bema.py", arguments, lambda: _measure(parsed))
    write(results, tables(results), parsed.output, "bema")
    if results["one process"] and results["ranks"]:
        draw(results, parsed.output / "bema.svg")


def _measure(parsed: argparse.Namespace) -> dict[str, Any]:
    """Rows by section; a case for which the memory does not suffice is left out."""
    results: dict[str, Any] = {"one process": [], "ranks": [], "training": []}
    family, largest = parsed.models[0], max(parsed.sizes)
    if 1 in parsed.ranks:
        for case in cases(parsed.models, parsed.sizes):
            if fits(case, 1, _MODELS_PER_PROCESS):
                row = in_fresh_process(compare_in_one_process, *case, parsed.threads, parsed.rounds, parsed.patience)
                results["one process"].append(row)
        for dtype in DTYPES:
            case = (family, largest, dtype)
            if fits(case, 1, _MODELS_PER_PROCESS):
                row = in_fresh_process(compare_in_training, *case, parsed.threads, max(2, parsed.rounds // 3))
                results["training"].append(row)
    for case in cases([family], parsed.sizes):
        for ranks in sorted({*parsed.ranks} - {1}):
            if fits(case, 1 + ranks, _MODELS_PER_PROCESS):
                results["ranks"].append(compare_ranks(*case, ranks, max(3, parsed.rounds // 2), parsed.patience))
    return results


if __name__ == "__main__":
    main()
