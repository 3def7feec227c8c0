"""The suite's ways of looking at progress displays."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from truestep_fixtures.terminal import Child, Terminal

from truestep_spec_tests.differential import rich_progress_cases as cases
from truestep_spec_tests.meta.checks.suspect import Suspect, with_path
from truestep_spec_tests.meta.faults import rich_progress as faults
from truestep_spec_tests.runs import Setup


def _setup(suspect: Suspect) -> Setup:
    return Setup(suspect.package, callback="RichProgressCallback", hyperparameters={})


# Away from a terminal


def has_the_references_view(suspect: Suspect) -> str | None:
    """After every event of a training and a prediction."""
    return suspect.fault(_setup(suspect), faults.in_its_view)


def shows_nothing_on_other_ranks(suspect: Suspect) -> str | None:
    """At the beginning of a training."""
    return suspect.fault(_setup(suspect), faults.on_other_ranks)


def refuses_no_percent(suspect: Suspect) -> str | None:
    """At construction."""
    return suspect.fault(_setup(suspect), faults.with_no_percent)


def writes_lines_to_a_file(suspect: Suspect) -> str | None:
    """Of a real training."""
    return suspect.fault(_setup(suspect), faults.in_a_file)


def knows_when_a_training_has_raised(suspect: Suspect) -> str | None:
    """There is an evaluation after it."""
    return suspect.fault(_setup(suspect), faults.after_a_training_that_raised)


# On a terminal


def draws_only_what_has_changed(suspect: Suspect) -> str | None:
    """Time stands still in the middle of a training."""
    go_on = suspect.directory / "go on"
    with _running(suspect, cases.hold_still, go_on) as (terminal, child):
        terminal.wait_for("still")
        cases.drawn()
        before = len(terminal.raw)
        cases.drawn()
        written = len(terminal.raw) - before
        go_on.touch()
        child.wait()
    return f"{written} bytes are written" if written else None


def is_the_only_bar(suspect: Suspect) -> str | None:
    """The Trainer would have one of its own."""
    with _running(suspect, cases.train_without_it_again) as (terminal, child):
        terminal.wait_for("now without")
        before = terminal.raw.partition(b"now without")[0]
        child.wait()
    return "the Trainer's own bar is drawn too" if b"%|" in before else None


def leaves_a_summary_after_an_error(suspect: Suspect) -> str | None:
    """The program goes on after the training has raised."""
    with _running(suspect, cases.end_in_the_middle, "error") as (terminal, child):
        child.wait()
        is_left = any("━" in line for line in terminal.lines) or "threads: []" not in terminal.lines
    return "bars or threads are left" if is_left else None


def keeps_other_output_above(suspect: Suspect) -> str | None:
    """Whatever is printed while the display is on."""
    with _running(suspect, cases.print_in_every_way) as (terminal, child):
        child.wait()
        lines = terminal.history
    missing = [line for line in ("two halves", "at once", "past the streams", "between two") if line not in lines]
    return f"{missing} are missing" if missing else None


def draws_no_random_numbers(suspect: Suspect) -> str | None:
    """The first time in the process."""
    with _running(suspect, cases.draw_random_numbers) as (terminal, child):
        child.wait()
        is_same = any("the same: True" in line for line in terminal.lines)
    return None if is_same else "Python's random numbers are others"


@contextmanager
def _running(suspect: Suspect, function: Callable[..., None], *args: Any) -> Iterator[tuple[Terminal, Child]]:
    """A program that trains with the suspect's display, on a terminal."""
    suspect.directory.mkdir(parents=True, exist_ok=True)
    with Terminal() as terminal:
        yield terminal, terminal.start(with_path, suspect.path, function, suspect.package, suspect.directory, *args)
