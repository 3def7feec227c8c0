"""A benchmark from its command line to its files."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from measuring import available_memory, environment, processors
from models import MODELS
from reporting import Table

Case = tuple[str, float, torch.dtype]
"""A model: its family and size, which are keys of `MODELS`, and what its parameters are."""

DTYPES = (torch.float32, torch.bfloat16)
PACKAGES = ("torch", "transformers", "accelerate", "trl", "truestep")


def options(description: str, rounds: int) -> argparse.ArgumentParser:
    """The options that all benchmarks of a callback share.

    Args:
        description: What is measured.
        rounds: How many by default.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--rounds", type=_positive, default=rounds, help="measurements of each kind (default: %(default)s)"
    )
    parser.add_argument(
        "--patience", type=float, default=1.0, help="seconds to wait, before each round, for an idle machine"
    )
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results", help="directory for the files"
    )
    return parser


def parse(description: str, arguments: Sequence[str] | None, ranks: Sequence[int], engine: str) -> argparse.Namespace:
    """Read the options of a benchmark that measures several models on several ranks.

    Args:
        description: What is measured.
        arguments: The command line; None for this process's own.
        ranks: Numbers of ranks by default.
        engine: What several ranks run under.
    """
    sizes = sorted({size for family in MODELS.values() for size in family})
    parser = options(description, rounds=15)
    parser.add_argument(
        "--sizes", type=float, nargs="+", choices=sizes, default=sizes, help="numbers of parameters, about"
    )
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="families of models")
    parser.add_argument(
        "--ranks", type=_positive, nargs="+", default=list(ranks), help=f"numbers of {engine} ranks; 1: one process"
    )
    parser.add_argument("--threads", type=int, default=processors(), help="of one process; ranks have one each")
    return parser.parse_args(arguments)


def cases(families: Iterable[str], sizes: Iterable[float]) -> list[Case]:
    """Every family in every size and dtype."""
    return [(family, size, dtype) for family in families for size in sizes for dtype in DTYPES]


def fits(case: Case, processes: int, models_per_process: int) -> bool:
    """Whether the memory suffices for a case, which is announced; if not, that it is left out."""
    family, size, dtype = case
    available = available_memory()
    needed = int(size * dtype.itemsize * models_per_process * processes)
    print(f"{family}, {size:.0e} parameters, {dtype}, {processes} process(es)", flush=True)
    if available is None or needed <= available:
        return True
    print(f"  left out: it needs {needed / 2**30:.0f} GiB, of which {available / 2**30:.0f} GiB are free", flush=True)
    return False


def in_fresh_process(function: Callable[..., dict[str, Any]], *arguments: Any, forked: bool = False) -> dict[str, Any]:
    """Call a function where no earlier case has left its mark on the heap: TRL's time depends on that.

    Args:
        function: The function.
        arguments: Its arguments.
        forked: Whether the process begins with what is slow to import, which one process imports for all.
    """
    context = multiprocessing.get_context("forkserver" if forked else "spawn")
    context.set_forkserver_preload(["datasets", "truestep_fixtures.training"])
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as executor:
        return executor.submit(function, *arguments).result()


def measured(
    program: str,
    arguments: Sequence[str] | None,
    measure: Callable[[], Mapping[str, Any]],
    packages: Sequence[str] = PACKAGES,
) -> dict[str, Any]:
    """Measure, and add what the figures depend on under `environment`.

    Args:
        program: The benchmark's file name.
        arguments: Its command line; None for this process's own.
        measure: Measures everything: rows by section.
        packages: What to give the versions of.
    """
    begin, load = time.monotonic(), os.getloadavg()[0]
    results = measure()
    conditions = {
        "command": shlex.join(["python", f"benchmarks/{program}", *(sys.argv[1:] if arguments is None else arguments)]),
        **environment(packages),
        "load": f"{load:.2f} before, {os.getloadavg()[0]:.2f} after",
        "seconds": f"{time.monotonic() - begin:.0f}",
    }
    return {**results, "environment": conditions}


def write(results: Mapping[str, Any], tables: Sequence[Table], directory: Path, name: str) -> None:
    """Print the tables, and write them (plain text and Markdown) and all samples (JSON).

    Args:
        results: From `measured`.
        tables: What was made of it.
        directory: Where to.
        name: The files' name, to which suffixes are added.
    """
    directory.mkdir(parents=True, exist_ok=True)
    conditions = [f"{key}: {value}" for key, value in results["environment"].items()]
    text = "\n\n".join([*(table.as_text() for table in tables), "\n".join(conditions)])
    markdown = "\n\n".join([*(table.as_markdown() for table in tables), "\n".join(f"- {line}" for line in conditions)])
    (directory / f"{name}.txt").write_text(f"{text}\n", encoding="utf-8")
    (directory / f"{name}.md").write_text(f"{markdown}\n", encoding="utf-8")
    (directory / f"{name}.json").write_text(f"{json.dumps(results, indent=1)}\n", encoding="utf-8")
    print(f"\n{text}\n\nwritten to {directory}")


def _positive(text: str) -> int:
    """An argument that counts something."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not positive")
    return number
