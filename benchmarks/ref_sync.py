"""A sync of the reference model, side by side with TRL's and with a plain copy of what a rank holds of the reference.

    python benchmarks/ref_sync.py [--sizes 1e6 1e7 1e8] [--ranks 1 2] [--rounds N] [--output DIRECTORY]

Measured are the time of one sync, the memory that it takes, and how many collectives: in one process; under ZeRO-3
with policy and reference both partitioned; and with a reference that is whole on every rank. Everything that is
compared runs in the same processes and in turn, on one policy. Needs TRL and DeepSpeed. Writes tables (plain text and
Markdown) and all samples (JSON).
"""

from __future__ import annotations

import argparse
import os
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler, which counts allocations, is chatty

from ref_sync_contest import ALIKE, WHOLE, compare_in_one_process, compare_ranks
from ref_sync_report import tables
from running import cases, fits, in_fresh_process, measured, parse, write

# The policy, its optimizer's copies, a reference for each callback, the copy, and what TRL's gathers.
_MODELS_PER_PROCESS = 10


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the tables and write the files."""
    parsed = parse(__doc__.splitlines()[0], arguments, ranks=(1, 2), engine="ZeRO-3")
    results = measured("ref_sync.py", arguments, lambda: {"syncs": _measure(parsed)})
    write(results, tables(results["syncs"]), parsed.output, "ref_sync")


def _measure(parsed: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each case; one for which the memory does not suffice is left out."""
    rows = []
    for case in cases(parsed.models, parsed.sizes):
        if 1 in parsed.ranks and fits(case, 1, _MODELS_PER_PROCESS):
            rows.append(in_fresh_process(compare_in_one_process, *case, parsed.threads, parsed.rounds, parsed.patience))
        for ranks in sorted({*parsed.ranks} - {1}):
            if fits(case, ranks, _MODELS_PER_PROCESS):
                for layout in (ALIKE, WHOLE):
                    rows.append(compare_ranks(*case, layout, ranks, parsed.rounds, parsed.patience))
    return rows


if __name__ == "__main__":
    main()
