"""Completions that are logged during a training, side by side with TRL's callback.

    python benchmarks/log_completions.py [--sizes 1e7] [--ranks 1 2] [--rounds N] [--output DIRECTORY]

Measured are how many prompts are completed in a second, in one process and under DDP, and what it costs to log the
rows: time, and bytes on disk, for each tracker. Both callbacks follow the same training where they complete prompts,
and take turns with trainings of their own where they log. Needs TRL, and the trackers, which stay offline. Writes
tables (plain text and Markdown) and all samples (JSON).
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

os.environ.setdefault("COMET_API_KEY", "0123456789abcdefghijklmno")  # or Transformers, which TRL asks, ignores Comet

import torch
from log_completions_contest import compare
from log_completions_logging import compare_trackers
from log_completions_report import tables
from running import fits, measured, parse, write
from truestep_fixtures.ranks import RankPool

_DEFAULTS = ["--sizes", "1e7", "--models", "qwen2", "--rounds", "3"]
"""What a run has by default. Options that are given come later, and count."""

_PROMPTS = 256
_PROMPTS_IN_DOUBLE = 64
_LOGGINGS, _ROWS = 50, 64
_MODELS_PER_PROCESS = 8


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the tables and write the files."""
    given = sys.argv[1:] if arguments is None else arguments
    parsed = parse(__doc__.splitlines()[0], [*_DEFAULTS, *given], ranks=(1, 2), engine="DDP")
    results = measured("log_completions.py", arguments, lambda: _measure(parsed))
    write(results, tables(results), parsed.output, "log_completions")


def _measure(parsed: argparse.Namespace) -> dict[str, Any]:
    """Rows by section; a case for which the memory does not suffice is left out."""
    results: dict[str, Any] = {"completing": [], "in double": []}
    for ranks in sorted({*parsed.ranks}):
        with RankPool(ranks) as pool:
            for model in [(family, size) for family in parsed.models for size in parsed.sizes]:
                for section, dtype, prompts, rounds in (
                    ("completing", torch.float32, _PROMPTS, parsed.rounds),
                    ("in double", torch.float64, _PROMPTS_IN_DOUBLE, 1),
                ):
                    if fits((*model, dtype), ranks, _MODELS_PER_PROCESS):
                        results[section].append(compare(pool, *model, dtype, prompts, rounds, parsed.patience))
    return results | {"logging": compare_trackers(_LOGGINGS, _ROWS, parsed.rounds, parsed.patience)}


if __name__ == "__main__":
    main()
