"""The command `truestep completions`: the completions that a training has logged, to read in a terminal."""

import argparse
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

from truestep.completions_file import read_rows
from truestep.completions_view import View, count, printable, show

TABLE = "completions"
"""The table that is shown where no other one is asked for."""

LINES = 12
"""How many lines of a text a terminal shows by default."""

NEAREST = 20
"""How many steps are listed at most where the one asked for is not there."""


class NumberedRow(NamedTuple):
    """A row of the table.

    Attributes:
        step: Its step.
        number: Its number in the step, from 1. A prompt has the same one at each step, even if its text is there twice.
        cells: Its columns, with the step.
    """

    step: int
    number: int
    cells: dict[str, Any]


class Contents:
    """A table, with an account of what has been read of it.

    Args:
        file: The table.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.rows = 0
        self.prompts = 0
        self.steps: list[int] = []

    def read(self) -> Iterator[NumberedRow]:
        """Its rows in order, while they are read.

        Raises:
            ValueError: It is no table of completions.
        """
        number = 0
        for cells in read_rows(self.file):
            if "prompt" not in cells or "completion" not in cells:
                raise ValueError(
                    f"{self.file}: row {self.rows + 1} has {', '.join(cells)}, not a prompt and a completion; give a "
                    "table of LogCompletionsCallback"
                )
            if not self.steps or self.steps[-1] != cells["step"]:
                self.steps.append(cells["step"])
                number = 0
            number += 1
            self.rows += 1
            self.prompts = max(self.prompts, number)
            yield NumberedRow(cells["step"], number, cells)

    def __str__(self) -> str:
        """How much there is of it."""
        return f"{self.file}: {count(self.rows, 'row')}, {self.range}, {count(self.prompts, 'prompt')}"

    @property
    def range(self) -> str:
        """Which steps there are, in words."""
        if len(self.steps) == 1:
            return f"step {self.steps[0]}"
        return f"{len(self.steps):,} steps ({self.steps[0]} to {self.steps[-1]})"


def main(arguments: Sequence[str]) -> int:
    """Show completions.

    Args:
        arguments: The command's arguments; `--help` lists them.

    Returns:
        0. Where the arguments do not fit, the process exits with 2.
    """
    understood = parser()
    options = understood.parse_args(arguments)
    try:
        contents = Contents(_file(options.output_dir, options.table))
        views = _views(contents, options.step, options.prompt)
    except (OSError, ValueError) as error:
        understood.error(printable(str(error)))
    try:
        show(views, str(contents), options.lines)
        sys.stdout.flush()
    except BrokenPipeError:  # `head` and the like have seen enough; what is left in the buffer has nowhere to go either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def parser() -> argparse.ArgumentParser:
    """The arguments that the command takes."""
    arguments = argparse.ArgumentParser(
        prog="truestep completions",
        description="Show the completions that LogCompletionsCallback has logged: those of the newest step, of another "
        "step, or of one prompt at all steps. A training may be writing them.",
    )
    add = arguments.add_argument
    add("output_dir", type=Path, metavar="OUTPUT_DIR", help="the training's output directory, or the table's file")
    add("--step", type=int, metavar="N", help="show this step; -1 is the newest (the default), -2 the one before")
    add("--prompt", metavar="K|TEXT", help="show prompt number K, or those that contain TEXT (in any case), over time")
    add("--table", metavar="NAME", help=f"show another table, such as {TABLE}_2 or {TABLE}.1")
    add(
        "--lines",
        type=_lines,
        default=LINES,
        metavar="N",
        help=f"lines of each text that a terminal shows, 0 for all (default {LINES}); elsewhere all are printed",
    )
    return arguments


# Finding and choosing


def _lines(argument: str) -> int:
    if not argument.isdecimal():
        raise argparse.ArgumentTypeError(f"{argument!r}: must be an integer of at least 0")
    return int(argument)


def _file(output_dir: Path, table: str | None) -> Path:
    if output_dir.is_file():
        if table is not None:
            raise ValueError(f"--table {table}: {output_dir} is a table already; give the directory that it is in")
        return output_dir
    if not output_dir.is_dir():
        raise ValueError(f"OUTPUT_DIR {output_dir}: no such directory; give the output_dir of the training")
    file = output_dir / f"{(table or TABLE).removesuffix('.jsonl')}.jsonl"
    if file.is_file():
        return file
    others = ", ".join(sorted(other.stem for other in output_dir.glob(f"{TABLE}*.jsonl")))
    if others:
        raise ValueError(f"--table {table or TABLE}: {output_dir} has {others}")
    raise ValueError(f"OUTPUT_DIR {output_dir}: it has no {file.name}; no completions have been logged there")


def _views(contents: Contents, step: int | None, prompt: str | None) -> list[View]:
    """Choose the rows, reading the table once and keeping no more than may have to be shown."""
    rows: Iterable[NumberedRow] = contents.read()
    if step is not None or prompt is None:
        rows = _of_step(rows, contents, -1 if step is None else step)
    chosen = [row for row in rows if prompt is None or _is_chosen(row, prompt)]
    if not contents.rows:
        raise ValueError(f"{contents.file}: it has no rows of completions; nothing has been logged there yet")
    if not chosen and prompt is not None:
        if _is_number(prompt):
            raise ValueError(f"--prompt {prompt}: {contents.file} has prompts 1 to {contents.prompts}")
        raise ValueError(f"--prompt {prompt}: no prompt in {contents.file} contains this text")
    if step is None and prompt is not None:
        by_number = groupby(sorted(chosen, key=attrgetter("number")), attrgetter("number"))  # steps stay in order
        return [_over_time(number, list(its_rows)) for number, its_rows in by_number]
    rest = [(row.number, {name: cell for name, cell in row.cells.items() if name != "step"}) for row in chosen]
    return [View(f"step {chosen[0].step}", {}, "#", rest)]


def _of_step(rows: Iterable[NumberedRow], contents: Contents, step: int) -> list[NumberedRow]:
    if step >= 0:
        found = [row for row in rows if row.step == step]
    else:
        newest: deque[list[NumberedRow]] = deque(maxlen=-step)
        newest.extend(list(group) for _, group in groupby(rows, attrgetter("step")))
        found = newest[0] if len(newest) == -step else []
    if contents.rows and not found:
        nearest = sorted(contents.steps, key=lambda other: abs(other - step))[:NEAREST]
        which = "the nearest of them" if len(nearest) < len(contents.steps) else "they"
        listed = ", ".join(map(str, sorted(nearest)))
        raise ValueError(f"--step {step}: {contents.file} has {contents.range}; {which} are {listed}")
    return found


def _is_number(prompt: str) -> bool:
    return prompt.isascii() and prompt.isdecimal()


def _is_chosen(row: NumberedRow, prompt: str) -> bool:
    if _is_number(prompt):
        return row.number == int(prompt)
    return prompt.casefold() in str(row.cells["prompt"]).casefold()


def _over_time(number: int, rows: list[NumberedRow]) -> View:
    first = rows[0].cells
    common = {
        name: cell
        for name, cell in first.items()
        if name not in ("step", "completion") and all(name in row.cells and row.cells[name] == cell for row in rows)
    }
    rest = [
        (row.step, {name: cell for name, cell in row.cells.items() if name != "step" and name not in common})
        for row in rows
    ]
    return View(f"#{number}", common, "step", rest)
