"""BEMA's update, side by side with TRL's and with a plain copy of the parameters.

    python benchmarks/bema.py [--sizes 1e6 1e7 1e8] [--ranks 1 2 4] [--rounds N] [--output DIRECTORY]

Measured are the time of one update in one process and under DDP, the memory that it takes, and how long it blocks a
training step. Everything that is compared runs in one process and in turn, on one model. Needs TRL and matplotlib.
Writes tables (plain text and Markdown), all samples (JSON) and a picture.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shlex
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler, which counts allocations, is chatty

import torch
from bema_contest import MODELS, compare_in_one_process
from bema_ranks import compare_ranks
from bema_report import draw, tables
from bema_training import compare_in_training
from measuring import available_memory, environment, processors

_PACKAGES = ("torch", "transformers", "accelerate", "trl", "truestep")
_DTYPES = (torch.float32, torch.bfloat16)

# The parameters, their copy, the buffers of both callbacks, and TRL's temporaries.
_MODELS_PER_PROCESS = 12


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the tables and write the files."""
    parsed = _parse(arguments)
    begin, load = time.monotonic(), os.getloadavg()[0]
    results = _measure(parsed)
    results["environment"] = {
        "command": shlex.join(["python", "benchmarks/bema.py", *(sys.argv[1:] if arguments is None else arguments)]),
        **environment(_PACKAGES),
        "load": f"{load:.2f} before, {os.getloadavg()[0]:.2f} after",
        "seconds": f"{time.monotonic() - begin:.0f}",
    }
    _write(results, parsed.output)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    sizes = sorted({size for family in MODELS.values() for size in family})
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--sizes", type=float, nargs="+", choices=sizes, default=sizes, help="numbers of parameters, about"
    )
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="families of models")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="numbers of DDP ranks; 1: one process")
    parser.add_argument("--rounds", type=int, default=15, help="measurements of each kind (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=processors(), help="of one process; ranks have one each")
    parser.add_argument(
        "--patience", type=float, default=1.0, help="seconds to wait, before each round, for an idle machine"
    )
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results", help="directory for the files"
    )
    parsed = parser.parse_args(arguments)
    if min(parsed.ranks) < 1 or parsed.rounds < 1:
        parser.error("--ranks and --rounds must be positive")
    return parsed


def _measure(parsed: argparse.Namespace) -> dict[str, Any]:
    """Rows by section; a case for which the memory does not suffice is left out."""
    results: dict[str, Any] = {"one process": [], "ranks": [], "training": []}
    cases = [(family, size, dtype) for family in parsed.models for size in parsed.sizes for dtype in _DTYPES]
    family, largest = parsed.models[0], max(parsed.sizes)
    if 1 in parsed.ranks:
        for case in cases:
            if _fits(case, processes=1):
                row = _in_fresh_process(compare_in_one_process, *case, parsed.threads, parsed.rounds, parsed.patience)
                results["one process"].append(row)
        for dtype in _DTYPES:
            case = (family, largest, dtype)
            if _fits(case, processes=1):
                row = _in_fresh_process(compare_in_training, *case, parsed.threads, max(2, parsed.rounds // 3))
                results["training"].append(row)
    for case in (case for case in cases if case[0] == family):
        for ranks in sorted({*parsed.ranks} - {1}):
            if _fits(case, processes=1 + ranks):
                results["ranks"].append(compare_ranks(*case, ranks, max(3, parsed.rounds // 2), parsed.patience))
    return results


def _in_fresh_process(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Call a function where no earlier case has left its mark on the heap: TRL's time depends on that."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as executor:
        return executor.submit(function, *arguments).result()


def _fits(case: tuple[str, float, torch.dtype], processes: int) -> bool:
    family, size, dtype = case
    available = available_memory()
    needed = int(size * dtype.itemsize * _MODELS_PER_PROCESS * processes)
    print(f"{family}, {size:.0e} parameters, {dtype}, {processes} process(es)", flush=True)
    if available is None or needed <= available:
        return True
    print(f"  left out: it needs {needed / 2**30:.0f} GiB, of which {available / 2**30:.0f} GiB are free", flush=True)
    return False


def _write(results: dict[str, Any], directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    made = tables(results)
    conditions = [f"{key}: {value}" for key, value in results["environment"].items()]
    text = "\n\n".join([*(table.as_text() for table in made), "\n".join(conditions)])
    markdown = "\n\n".join([*(table.as_markdown() for table in made), "\n".join(f"- {line}" for line in conditions)])
    (directory / "bema.txt").write_text(f"{text}\n", encoding="utf-8")
    (directory / "bema.md").write_text(f"{markdown}\n", encoding="utf-8")
    (directory / "bema.json").write_text(f"{json.dumps(results, indent=1)}\n", encoding="utf-8")
    if results["one process"] and results["ranks"]:
        draw(results, directory / "bema.svg")
    print(f"\n{text}\n\nwritten to {directory}")


if __name__ == "__main__":
    main()
