"""The command `truestep fixtures`."""

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from truestep_spec_tests.golden.consuming import FILES, Result, Run, consume
from truestep_spec_tests.golden.files import DIRECTORY
from truestep_spec_tests.golden.filling import fill
from truestep_spec_tests.implementation import Implementation
from truestep_spec_tests.verify.launch import LocalPools

TIMEOUT = 120.0
"""Seconds that ranks may take for a case."""

COLOURS = {"equal": "green", "different": "red", "left out": "yellow"}


def main(arguments: Sequence[str], run: Run | None = None) -> int:
    """Fill golden files, or hold an implementation against them.

    Args:
        arguments: The command's arguments; `--help` lists them.
        run: Runs functions on ranks; by default on processes that are started for it.

    Returns:
        0 if every case is equal, 1 if one is not, 2 if the arguments do not fit.
    """
    understood = parser()
    options = understood.parse_args(arguments)
    if options.action == "fill":
        fill(options.directory)
        return 0
    try:
        implementation = Implementation(options.implementation)
        if run is not None:
            return _report(consume(implementation, options.directory, options.file or FILES, run))
        with LocalPools(TIMEOUT) as pools:
            return _report(consume(implementation, options.directory, options.file or FILES, pools.run))
    except ValueError as error:
        understood.error(str(error))


def parser() -> argparse.ArgumentParser:
    """The arguments that the command takes."""
    arguments = argparse.ArgumentParser(
        prog="truestep fixtures",
        description="Golden files: small cases with their exact expected results, for implementations in any language.",
    )
    actions = arguments.add_subparsers(dest="action", required=True)
    fill_ = actions.add_parser("fill", help="write them anew, from the reference")
    consume_ = actions.add_parser("consume", help="hold an implementation in Python against them")
    consume_.add_argument("--implementation", default="truestep", help="a package (truestep, trl, …) or a class's path")
    consume_.add_argument("--file", action="append", choices=FILES, help="only this one (may be repeated)")
    for action in (fill_, consume_):
        action.add_argument("--directory", type=Path, default=DIRECTORY, help=f"where they are (default {DIRECTORY})")
    return arguments


def _report(results: Iterable[Result]) -> int:
    console = Console(soft_wrap=True, highlight=False)
    verdicts = Counter[str]()
    for result in results:
        verdict, why = _verdict(result)
        verdicts[verdict] += 1
        console.print(f"{result.file}, {escape(result.case)}: [{COLOURS[verdict]}]{verdict}[/]{escape(why)}")
    console.print(", ".join(f"{verdicts[verdict]} {verdict}" for verdict in COLOURS))
    return 1 if verdicts["different"] else 0


def _verdict(result: Result) -> tuple[str, str]:
    """What is said of a case, and what comes after that."""
    if result.omitted is not None:
        return "left out", f": {result.omitted}"
    return ("equal", "") if result.difference is None else ("different", f": {result.difference}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
