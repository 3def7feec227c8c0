"""What a verification clause by clause shows: how far it is, a table at the end, evidence of what does not hold."""

import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from truestep_spec_tests.meta.specification import PACKAGE, titles
from truestep_spec_tests.verify.clauses.running import OnProgress, Outcome
from truestep_spec_tests.verify.clauses.verdicts import Verdict

SECONDS_BETWEEN_LINES = 60.0

COLOURS = {"passes": "green", "fails": "red", "crashes": "red", "hangs": "red"}


@contextmanager
def progress(console: Console) -> Iterator[OnProgress]:
    """A bar for the tests on a terminal; on a pipe, a line each minute."""
    columns = TextColumn("tests"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield partial(bar.update, bar.add_task("", total=None)) if console.is_terminal else _Lines(console)


class _Lines:
    """Says now and then how many of the tests have ended.

    Args:
        console: Where to.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._said = time.monotonic()

    def __call__(self, *, completed: int, total: int) -> None:
        if total and time.monotonic() - self._said >= SECONDS_BETWEEN_LINES:
            self._said = time.monotonic()
            self._console.print(f"{completed} of {total} tests")


def show_clauses(console: Console, verdicts: Sequence[Verdict], implementation: str, seed: int) -> None:
    """Print the table, and below it the evidence against each clause that does not hold."""
    table = Table("clause", "title", "verdict", "tests", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    title = titles()
    for verdict in verdicts:
        colour = "yellow" if verdict.is_known else COLOURS.get(verdict.verdict, "dim")
        coloured = f"[{colour}]{verdict.verdict}[/]"
        table.add_row(verdict.clause, title[verdict.clause], coloured, escape(verdict.note))
    console.print(table)
    console.print("A test that fails does so for every clause that it names.", style="dim")
    surprising = [verdict for verdict in verdicts if not verdict.is_known]
    for test in dict.fromkeys(verdict.evidence for verdict in surprising if verdict.evidence is not None):
        clauses = ", ".join(verdict.clause for verdict in surprising if verdict.evidence == test)
        console.print(f"\n[red]{clauses}: {test.finding.verdict}[/]")
        for line in (*_evidence(test), command(test, implementation, seed)):
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def command(test: Outcome, implementation: str, seed: int) -> str:
    """The shell's command that repeats a test, with the same examples."""
    arguments = [str(PACKAGE / test.id), "--implementation", implementation, f"--hypothesis-seed={seed}"]
    return shlex.join(["python", "-m", "pytest", *arguments])


def _evidence(test: Outcome, lines: int = 10, columns: int = 300) -> Iterator[str]:
    """The evidence that a test gives, in few lines; all of it is in the report."""
    _, exception, message, example = test.finding
    said = message.strip().splitlines()
    yield from filter(None, [exception])
    for line in said[:lines]:
        yield f"  {line}" if len(line) <= columns else f"  {line[:columns]}…"
    if len(said) > lines:
        yield "  …"
    if example:
        yield "shortest example:"
        yield from (f"  {line}" for line in example.splitlines())
