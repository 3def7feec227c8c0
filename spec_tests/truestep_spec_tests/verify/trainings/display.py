"""What trainings show: progress while they run, a table at the end, and what does not equal the reference."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from truestep_spec_tests.runs import Setup
from truestep_spec_tests.verify.texts import encodable
from truestep_spec_tests.verify.trainings.check import Result
from truestep_spec_tests.verify.trainings.plan import SHORT, identity

COLOURS = {"equal": "green", "not run": "dim"}
"""Of verdicts; of all others it is red."""


class StepColumn(ProgressColumn):
    """The step that the current run has come to; its ranks write it to a file."""

    def render(self, task: Task) -> Text:
        counter: Path = task.fields["counter"]
        try:
            step = counter.read_text()
        except OSError:
            step = ""
        return Text(f"step {step}" if step else "starting", style="progress.remaining")


class Display:
    """The progress of a verification on a terminal; on a pipe, one line for each run.

    Args:
        console: Where to.
        runs: Number of runs.
        counter: The file that the ranks write the current step to.
    """

    def __init__(self, console: Console, runs: int, counter: Path) -> None:
        self._console = console
        self._counter = counter
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            StepColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("starting", total=runs, counter=counter)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def begin(self, setup: Setup) -> None:
        """A run begins."""
        self._counter.unlink(missing_ok=True)
        self._progress.update(self._task, description=_name(setup))

    def end(self, result: Result) -> None:
        """A run has ended."""
        self._progress.advance(self._task)
        if not self._console.is_terminal:
            self._console.print(f"{_name(result.setup)}: {result.verdict}", soft_wrap=True)


def show_trainings(console: Console, results: Sequence[Result], is_known: Callable[[Setup], bool]) -> None:
    """Print the table of all trainings, and the details of each failure that was not known."""
    # Nine columns that fit into 80 characters.
    table = Table(box=SIMPLE_HEAD, padding=0, show_edge=False)
    for heading in (
        "callback",
        "topology",
        "ranks",
        "dtype",
        "steps",
        "error ÷\nbound",
        "bitwise",
        "time\nin s",
        "verdict",
    ):
        numeric = heading in ("ranks", "steps", "error ÷\nbound", "time\nin s")
        table.add_column(heading, justify="right" if numeric else "left", no_wrap=True)
    for result in results:
        comparisons = result.comparisons
        colour = "yellow" if is_known(result.setup) and not result.passed else COLOURS.get(result.verdict, "red")
        table.add_row(
            *identity(result.setup),
            "–" if comparisons is None else str(len(comparisons.steps)),
            "–" if comparisons is None else _ratio(comparisons.worst),
            "–" if comparisons is None else ("no" if result.difference else "yes"),
            "–" if comparisons is None else f"{result.seconds:.1f}",
            f"[{colour}]{result.verdict}[/]",
        )
    console.print(table)
    console.print(
        "error ÷ bound: the largest at any step, against the running rounding-error bound\n"
        "bitwise: a single process on the same trajectory has the same shadow, reference model, table, evaluations or "
        "bars, bit by bit",
        style="dim",
    )
    for result in results:
        if not result.passed and result.verdict != "not run" and not is_known(result.setup):
            _explain(console, result)


def _explain(console: Console, result: Result) -> None:
    console.print(f"\n[red]{_name(result.setup)} {result.verdict}[/]")
    if result.verdict == "stops early" and result.comparisons is not None:
        console.print(f"compared at {len(result.comparisons.steps)} of {result.setup.steps + 1} steps, from step 0")
    if result.divergence is not None:
        console.print(_text(str(result.divergence)), soft_wrap=True)
    if result.difference is not None:
        console.print(f"a single process on the same trajectory: {_text(result.difference)}", soft_wrap=True)
    if result.crash is not None:
        console.print(_text(result.crash.shortened()), soft_wrap=True)
    if result.replay is not None:
        console.print(f"truestep verify --replay {escape(str(result.replay))}", soft_wrap=True)


def _text(text: str) -> str:
    """A text of the implementation's, as a console prints it as it is."""
    return escape(encodable(text))


def _ratio(value: float) -> str:
    """An error ÷ bound, in seven characters at most."""
    return f"{value:.3f}" if value < 1000 or math.isinf(value) else f"{value:.1e}"


def _name(setup: Setup) -> str:
    return (
        f"{SHORT[setup.callback]}, {setup.topology}, {setup.ranks} rank{'s' if setup.ranks > 1 else ''}, {setup.dtype}"
    )
