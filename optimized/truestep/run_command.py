"""The command `truestep run`: a training program as it is, with the callbacks of this package in the place of TRL's."""

import argparse
import logging
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from truestep import drop_in


def main(arguments: Sequence[str]) -> int:
    """Run a program as `python` would.

    Args:
        arguments: The command's arguments; `--help` lists them.

    Returns:
        0; 1 where the program ends with an exception. Where it exits by itself, so does this. Where there is no such
        script, the process exits with 2.
    """
    understood = parser()
    options = understood.parse_args(arguments)
    script = Path(options.program)
    if not options.m and not script.exists():
        understood.error(f"PROGRAM {script}: no such file; for a module, give -m {script}")
    if not sys.flags.safe_path:
        sys.path[0] = str(Path.cwd() if options.m else script.resolve().parent)
    sys.argv = [options.program, *options.arguments]
    if os.environ.get("RANK", "0") == "0":  # which launchers set
        _show_what_is_in_place()
    drop_in.patch_trl()
    try:
        if options.m:
            runpy.run_module(options.program, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(str(script.absolute()), run_name="__main__")
    except Exception as error:
        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_globals["__name__"] in (__name__, runpy.__name__):
            trace = trace.tb_next
        sys.excepthook(type(error), error.with_traceback(trace), trace)
        return 1
    return 0


def parser() -> argparse.ArgumentParser:
    """The arguments that the command takes."""
    arguments = argparse.ArgumentParser(
        prog="truestep run",
        description="Run a training script as 'python PROGRAM ARGUMENTS' would, but with the callbacks of truestep in "
        "the place of TRL's: those that it imports from trl, and that of TRL's trainers with sync_ref_model=True.",
    )
    arguments.add_argument("-m", action="store_true", help="PROGRAM is a module, such as trl.scripts.dpo")
    arguments.add_argument("program", metavar="PROGRAM", help="the script")
    arguments.add_argument("arguments", metavar="ARGUMENTS", nargs=argparse.REMAINDER, help="what it is to be given")
    return arguments


def _show_what_is_in_place() -> None:
    """Has each callback that is constructed in the place of TRL's named on standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("truestep: %(message)s"))
    drop_in.logger.addHandler(handler)
    drop_in.logger.setLevel(logging.INFO)
