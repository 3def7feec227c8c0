"""The command `truestep run`: a training program as it is, with the callbacks of this package in the place of TRL's."""

import argparse
import builtins
import logging
import os
import runpy
import sys
from collections.abc import Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from pkgutil import get_importer
from types import ModuleType, TracebackType

from truestep import drop_in


def main(arguments: Sequence[str]) -> int:
    """Run a program as `python` would.

    It is the process's `__main__` from then on, and ends the process as it would under `python`.

    Args:
        arguments: The command's arguments; `--help` lists them.

    Returns:
        0. What the program raises is left to the interpreter, SystemExit and KeyboardInterrupt too. Where there is no
        such script, the process exits with 2.
    """
    understood = parser()
    options = understood.parse_args(arguments)
    script = Path(options.program)
    if not options.m and not script.exists():
        understood.error(f"PROGRAM {script}: no such file; for a module, give -m {script}")
    if os.environ.get("RANK", "0") == "0":  # which launchers set
        _show_what_is_in_place()
    drop_in.patch_trl()
    path = os.path.join(Path.cwd(), options.program)  # noqa: PTH118 (as by python, with what `./` there is)
    is_folder = not options.m and get_importer(path) is not None  # or a zip file
    first = path if is_folder else str(Path.cwd() if options.m else script.resolve().parent)
    if not sys.flags.safe_path:
        sys.path[0] = first
    elif is_folder:
        sys.path.insert(0, first)
    sys.argv = ["-m" if options.m else options.program, *options.arguments]
    program = sys.modules["__main__"] = ModuleType("__main__")
    vars(program)["__builtins__"] = builtins
    # What `python` itself calls. The public functions of runpy take `__main__` away at their end, when threads and exit
    # handlers of the program may still use it.
    run_module = runpy._run_module_as_main  # type: ignore[attr-defined]
    try:
        if options.m or is_folder:
            run_module("__main__" if is_folder else options.program, alter_argv=options.m)
        else:
            vars(program).update(__file__=path, __cached__=None, __loader__=SourceFileLoader("__main__", path))
            exec(compile(script.read_bytes(), path, "exec", dont_inherit=True), vars(program))
    except BaseException as error:
        if error.__traceback__ is not None:
            _show_from(error.__traceback__.tb_next)
        raise
    return 0


def parser() -> argparse.ArgumentParser:
    """The arguments that the command takes."""
    arguments = argparse.ArgumentParser(
        prog="truestep run",
        description="Run a training script as 'python PROGRAM ARGUMENTS' would, but with the callbacks of truestep in "
        "the place of TRL's: those that it imports from trl, and that of TRL's trainers with sync_ref_model=True. A "
        "process that it starts has TRL's own, unless it is forked or calls truestep.patch_trl() itself.",
    )
    arguments.add_argument("-m", action="store_true", help="PROGRAM is a module, such as trl.scripts.dpo")
    arguments.add_argument("program", metavar="PROGRAM", help="the script, or a directory or zip file with __main__.py")
    arguments.add_argument("arguments", metavar="ARGUMENTS", nargs=argparse.REMAINDER, help="what it is to be given")
    return arguments


def _show_what_is_in_place() -> None:
    """Has each callback that is constructed in the place of TRL's named on standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("truestep: %(message)s"))
    drop_in.logger.addHandler(handler)
    drop_in.logger.setLevel(logging.INFO)
    drop_in.logger.propagate = False  # or a program that logs there too would show it twice


def _show_from(trace: TracebackType | None) -> None:
    """Has the exception that ends the process shown without the frames around the program's."""
    hook = sys.excepthook
    sys.excepthook = lambda kind, error, _: hook(kind, error.with_traceback(trace), trace)
