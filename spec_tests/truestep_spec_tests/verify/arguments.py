"""What `truestep verify` is asked for."""

import argparse
import threading
from collections.abc import Sequence
from pathlib import Path

from truestep_fixtures.models import MODELS
from truestep_fixtures.topologies import TOPOLOGIES

from truestep_spec_tests.implementation import CALLBACKS
from truestep_spec_tests.verify.launch import is_rank
from truestep_spec_tests.verify.trainings.plan import DTYPES

TRAININGS = ("trainings", "topology", "ranks", "dtype", "model", "steps", "replay")
"""Arguments that ask for trainings."""

CLAUSES = ("clauses", "only", "time")
"""Arguments that ask for clauses."""

_DEFAULTS = {"implementation": "truestep", "model": "qwen2", "steps": 12, "time": 7200.0}


def understand(arguments: Sequence[str]) -> argparse.Namespace:
    """The arguments of a command, with the parts of a verification that they ask for.

    Args:
        arguments: They end the process if they are none of the command's.

    Returns:
        An attribute for each; `trainings` and `clauses` say whether there is that part.
    """
    understood = parser()
    options = understood.parse_args(arguments)
    given = {name for name, value in vars(options).items() if value is not None and value is not False}
    options.clauses = not given.isdisjoint(CLAUSES)
    options.trainings = not given.isdisjoint(TRAININGS)
    if options.clauses and is_rank():
        understood.error("--clauses, --only and --time: tests start ranks of their own, not by a launcher")
    if not options.clauses and not options.trainings:
        options.trainings, options.clauses = True, options.implementation is not None and not is_rank()
    for name, value in _DEFAULTS.items():
        if getattr(options, name) is None and (name != "implementation" or options.replay is None):
            setattr(options, name, value)
    return options


def parser() -> argparse.ArgumentParser:
    """The arguments that the command takes."""
    arguments = argparse.ArgumentParser(
        prog="truestep verify",
        description="Say whether an implementation does what SPEC.md says. There are two parts: trainings, in lockstep "
        "with the reference, and tests of every clause. Arguments of one part leave the other out. Without any there "
        "are trainings, and with --implementation both.",
    )
    add = arguments.add_argument
    add(
        "--implementation",
        help="a package (truestep, the default; trl; …), or the path of a class; of one with another name, "
        "BEMACallback=PATH",
    )
    add("--callback", action="append", choices=CALLBACKS, help="only this one (may be repeated)")
    add("--seed", type=_seed, default=0, help="seeds weights, data, hyperparameters and examples (default 0)")
    add("--timeout", type=_seconds, default=300.0, help="seconds that one training or test may take (default 300)")
    add(
        "--expect",
        type=Path,
        metavar="FILE",
        help="what is known to fail, one a line: clauses, tests, or trainings by the first four columns of the table",
    )
    add(
        "--report",
        type=Path,
        metavar="DIR",
        default=Path("truestep-verify"),
        help="where the report goes, a page and JSON (default truestep-verify)",
    )
    add("--markdown", type=Path, metavar="FILE", help="where the results go as a document to keep")
    _add_trainings(
        arguments.add_argument_group(
            "trainings",
            "Train small models in every topology, with the implementation and the reference side by side, and compare "
            "them at every step. Under torchrun this is the only part, with the ranks and devices it was started with.",
        )
    )
    _add_clauses(
        arguments.add_argument_group(
            "clauses",
            "Run the suite's tests of an implementation and say of each clause of SPEC.md whether it holds.",
        )
    )
    return arguments


def _seed(text: str) -> int:
    """A number that NumPy takes as a seed."""
    if not 0 <= int(text) < 2**32:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 0 and less than 2^32")
    return int(text)


def _seconds(text: str) -> float:
    """A time that something may take."""
    if not 0 < float(text) < threading.TIMEOUT_MAX:
        raise argparse.ArgumentTypeError(f"{text}: must be more than 0 and finite")
    return float(text)


def _add_trainings(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--trainings", action="store_true", help="this part, whole")
    add("--topology", action="append", choices=TOPOLOGIES, help="only this one (may be repeated)")
    add("--ranks", action="append", type=int, metavar="N", help="only this world size (may be repeated)")
    add("--dtype", action="append", choices=DTYPES, help="only this one (may be repeated)")
    add("--model", metavar="NAME|DIR", help=f"{', '.join(MODELS)}, or a local model directory (default qwen2)")
    add("--steps", type=int, help="optimizer steps of each training (default 12)")
    add("--replay", type=Path, metavar="FILE", help="follow the trajectory of a failed training again")


def _add_clauses(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--clauses", action="store_true", help="this part, whole")
    add("--only", action="append", metavar="CLAUSE", help="only RICH, or RICH-3 (may be repeated)")
    add("--time", type=_seconds, metavar="SECONDS", help="seconds that all tests may take (default 7200)")
