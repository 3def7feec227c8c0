"""What a terminal shows of a real training, and how it is left, whatever ends the training."""

import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from truestep_fixtures.terminal import Child, Terminal

from truestep_spec_tests.differential import rich_progress_cases as cases
from truestep_spec_tests.differential.cases import skip_the_reference
from truestep_spec_tests.differential.screens import SCREENS, WIDTHS
from truestep_spec_tests.implementation import Implementation
from truestep_spec_tests.properties.rich_progress_cases import require_view

TQDM = re.compile(r"%\|.*it/s")
LOG = re.compile(r"^\{'.*loss'")
"""The Trainer's own bars, and the log lines that it prints."""


MEETING = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
"""Where ranks would meet; those here have done so before they ask."""


@pytest.fixture(autouse=True)
def _draws(implementation: Implementation) -> None:
    skip_the_reference(implementation, "draws nothing")


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    with Terminal(columns=100, rows=30) as terminal:
        yield terminal


def assert_in_order(expected: list[str], lines: list[str]) -> None:
    """All of the expected lines are there, whole and in order, others between them or not."""
    rest, missing = lines, []
    for line in expected:
        if line in rest:
            rest = rest[rest.index(line) + 1 :]
        else:
            missing.append(line)
    assert missing == [], "\n".join(lines)


def bars(terminal: Terminal) -> list[str]:
    """What the bars on the screen are called."""
    return [line.split()[0] for line in terminal.lines if "━" in line]


def ends(terminal: Terminal) -> list[str]:
    """How each summary begins."""
    found = [re.match("(training|evaluation|prediction) (ended|interrupted)", line) for line in terminal.history]
    return [match[0] for match in found if match]


# ── What is shown ─────────────────────────────────────────────────────────────


@pytest.mark.clause("RICH-1", "RICH-2", "RICH-3")
def test_screens_are_those_that_somebody_has_looked_at(implementation: Implementation, tmp_path: Path) -> None:
    require_view(implementation)
    with Terminal(columns=WIDTHS[0], rows=30) as terminal:
        child = terminal.start(cases.train_for_a_picture, implementation.name, tmp_path, tmp_path / "go on")
        for width in WIDTHS:
            terminal.resize(width, 30)
            expected = (SCREENS / f"during_{width}.txt").read_text(encoding="utf-8").splitlines()
            terminal.wait_for(lambda expected=expected: terminal.lines == expected)
        assert terminal.colours == {"green", "cyan"}
        (tmp_path / "go on").touch()
        assert child.wait() == 0
        assert (SCREENS / "after.txt").read_text(encoding="utf-8").splitlines() == terminal.history
        assert terminal.unrestored == []


@pytest.mark.clause("RICH-1")
def test_the_picture_shows_such_a_screen() -> None:
    picture = (SCREENS / "training.svg").read_text(encoding="utf-8").replace("&#160;", " ")
    words = re.findall(r"[\w.:%/]+", (SCREENS / "during_100.txt").read_text(encoding="utf-8"))
    assert words
    assert [word for word in words if word not in picture] == []


@pytest.mark.clause("RICH-1")
def test_it_is_no_larger_than_the_terminal(implementation: Implementation, terminal: Terminal, tmp_path: Path) -> None:
    require_view(implementation)
    child = terminal.start(cases.train_for_a_picture, implementation.name, tmp_path, tmp_path / "go on")
    terminal.wait_for("5/8")
    for columns, rows, shown in ((40, 12, "more"), (30, 4, "evaluation"), (3, 2, ""), (1, 1, ""), (100, 30, "rewards")):
        terminal.resize(columns, rows)
        terminal.wait_for(
            lambda columns=columns, shown=shown: (
                shown in "\n".join(terminal.lines) and all(len(line) < max(2, columns) for line in terminal.lines)
            )
        )
    assert terminal.history == terminal.lines  # nothing has been scrolled off the screen
    (tmp_path / "go on").touch()
    assert child.wait() == 0


@pytest.mark.parametrize(
    "encoding",
    [
        pytest.param("utf-8", marks=pytest.mark.clause("RICH-1")),
        pytest.param("ascii", marks=pytest.mark.clause("RICH-4")),
    ],
)
def test_without_colours_there_are_none_and_without_unicode_only_ascii(
    implementation: Implementation, tmp_path: Path, encoding: str
) -> None:
    with Terminal(environment={"NO_COLOR": "1"}) as terminal:
        child = terminal.start(cases.hold_still, implementation.name, tmp_path, Path(__file__), encoding=encoding)
        assert child.wait() == 0
        assert b"training" in terminal.raw.lower()
        assert encoding != "ascii" or terminal.raw.isascii()
        assert terminal.colours == set()


@pytest.mark.clause("RICH-3")
def test_a_small_number_is_not_shown_as_zero_and_markup_is_shown_as_text(
    implementation: Implementation, terminal: Terminal, tmp_path: Path
) -> None:
    go_on = tmp_path / "go on"
    child = terminal.start(cases.log_what_is_hard_to_read, implementation.name, tmp_path, go_on)
    terminal.wait_for("small")
    shown = "\n".join(terminal.lines)
    assert [text for text in ("1.25e-05", "[red]", "[bold]") if text not in shown] == [], shown
    go_on.touch()
    assert child.wait() == 0


@pytest.mark.clause("RICH-1")
def test_while_nothing_changes_nothing_is_written(
    implementation: Implementation, terminal: Terminal, tmp_path: Path
) -> None:
    child = terminal.start(cases.hold_still, implementation.name, tmp_path, tmp_path / "go on")
    terminal.wait_for("still")
    cases.drawn()
    written = terminal.raw
    cases.drawn()
    assert written == terminal.raw
    (tmp_path / "go on").touch()
    assert child.wait() == 0


@pytest.mark.clause("RICH-1")
def test_neither_bars_of_the_trainer_nor_its_log_lines_appear(
    implementation: Implementation, terminal: Terminal, tmp_path: Path
) -> None:
    assert terminal.start(cases.train_in_every_way, implementation.name, tmp_path).wait() == 0
    lines = re.split(r"[\r\n]+", terminal.raw.decode())
    assert [line for line in lines if TQDM.search(line) or LOG.match(line)] == []


@pytest.mark.clause("RICH-1", "RICH-4")
def test_each_training_evaluation_or_prediction_leaves_a_summary(
    implementation: Implementation, terminal: Terminal, tmp_path: Path
) -> None:
    require_view(implementation)
    assert terminal.start(cases.evaluate_before_and_after_training, implementation.name, tmp_path).wait() == 0
    once = ["evaluation ended", "training ended", "evaluation ended", "prediction ended"]
    assert once * 4 == ends(terminal)


@pytest.mark.clause("RICH-1")
def test_the_trainer_has_its_own_bar_again_when_the_callback_is_removed(
    implementation: Implementation, terminal: Terminal, tmp_path: Path
) -> None:
    assert terminal.start(cases.train_without_it_again, implementation.name, tmp_path).wait() == 0
    before, _, after = terminal.raw.decode().partition("now without")
    assert TQDM.search(before) is None
    assert TQDM.search(after)


# ── What else is on the terminal ──────────────────────────────────────────────


@pytest.mark.clause("RICH-5")
def test_other_output_is_above_the_display_whole_and_in_order(
    implementation: Implementation, terminal: Terminal, tmp_path: Path
) -> None:
    assert terminal.start(cases.print_in_every_way, implementation.name, tmp_path).wait() == 0
    whole = [
        "begun before",
        "one [red]",
        "two halves",
        "three",
        "lines",
        "at once",
        "a record",
        "past the streams",
        "and past Python",
    ]
    assert_in_order([*whole, "between two", "late", "records", "after it"], terminal.history)
    everything = "".join(terminal.history).replace(" ", "")  # the warning begins with a path, and may be wrapped
    assert everything.count("UserWarning:awarning") == 1
    assert sum(line.startswith("mapping: 100%") and "40/40" in line for line in terminal.history) == 1
    assert [line for line in terminal.history if line.startswith("training ") and " ended" not in line] == []
    assert ends(terminal) == ["training ended", "training ended"]


@pytest.mark.clause("RICH-5")
def test_there_is_no_display_while_the_program_asks_for_input(
    implementation: Implementation, terminal: Terminal, tmp_path: Path
) -> None:
    child = terminal.start(cases.ask, implementation.name, tmp_path)
    terminal.wait_for("your name?")
    time.sleep(1.2)  # in which the times would be drawn anew
    assert terminal.lines == ["your name?"]
    terminal.type("Ada\n")
    assert child.wait() == 0
    assert_in_order(["your name? Ada", "Hello Ada"], terminal.history)
    assert ends(terminal) == ["training ended"]


@pytest.mark.clause("RICH-5")
def test_what_forked_processes_print_is_not_lost(
    implementation: Implementation, terminal: Terminal, tmp_path: Path
) -> None:
    assert terminal.start(cases.print_in_forked_processes, implementation.name, tmp_path).wait() == 0
    assert_in_order(["child 0", "child 1", "child 2"], terminal.history)


@pytest.mark.clause("RICH-4")
def test_several_trainers_are_shown_at_a_time(
    implementation: Implementation, terminal: Terminal, tmp_path: Path
) -> None:
    child = terminal.start(cases.train_two_at_a_time, implementation.name, tmp_path, tmp_path / "go on")
    terminal.wait_for(lambda: bars(terminal) == ["training", "evaluation"])
    (tmp_path / "go on").touch()
    assert child.wait() == 0
    assert ends(terminal) == ["training ended", "evaluation ended", "training ended"]


# ── How it ends ───────────────────────────────────────────────────────────────


def ended(terminal: Terminal, child: Child, how: str) -> int:
    """The exit code of a program that is ended when its training has come to its third step."""
    terminal.wait_for("now")
    cases.drawn()
    if how == "Ctrl-C":
        terminal.type("\x03")
    elif how in signal.Signals.__members__:
        child.send(signal.Signals[how])
    return child.wait()


@pytest.mark.clause("RICH-4")
@pytest.mark.parametrize(("how", "error"), [("error", "RuntimeError"), ("Ctrl-C", "KeyboardInterrupt")])
def test_an_interrupted_training_leaves_a_summary_and_nothing_else(
    implementation: Implementation, terminal: Terminal, tmp_path: Path, how: str, error: str
) -> None:
    child = terminal.start(cases.end_in_the_middle, implementation.name, tmp_path, how)
    assert ended(terminal, child, how) == 0
    assert terminal.unrestored == []
    assert ends(terminal) == ["training interrupted"]
    assert bars(terminal) == []
    expected = [f"caught {error}", "threads: []", "streams: TextIOWrapper TextIOWrapper"]
    assert expected == terminal.history[-3:]


@pytest.mark.clause("RICH-4")
def test_a_traceback_is_below_the_summary(implementation: Implementation, terminal: Terminal, tmp_path: Path) -> None:
    assert terminal.start(cases.end_in_the_middle, implementation.name, tmp_path, "uncaught").wait() == 1
    assert_in_order(["Traceback (most recent call last):", "RuntimeError: no more"], terminal.history)
    assert terminal.history[-1] == "RuntimeError: no more"
    summary = next(index for index, line in enumerate(terminal.history) if line.startswith("training interrupted"))
    assert summary < terminal.history.index("Traceback (most recent call last):")


@pytest.mark.clause("RICH-4")
@pytest.mark.parametrize("how", ["SIGTERM", "SIGKILL", "abort"])
def test_a_killed_process_leaves_the_terminal_with_the_cursor_below_the_display(
    implementation: Implementation, terminal: Terminal, tmp_path: Path, how: str
) -> None:
    child = terminal.start(cases.end_in_the_middle, implementation.name, tmp_path, how)
    number = signal.Signals.SIGABRT if how == "abort" else signal.Signals[how]
    assert ended(terminal, child, how) == -number
    cases.drawn()
    terminal.start(print, "$ a prompt").wait()
    assert terminal.unrestored == []
    assert terminal.lines[-1] == "$ a prompt"
    assert sum("━" in line for line in terminal.lines) == 1


@pytest.mark.clause("RICH-4")
def test_the_death_of_another_rank_leaves_the_terminal_as_it_was(
    implementation: Implementation, terminal: Terminal, tmp_path: Path
) -> None:
    ranks = [
        terminal.start(
            cases.lose_another_rank,
            implementation.name,
            tmp_path,
            tmp_path / "meeting",
            environment={"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"} | MEETING,
        )
        for rank in range(2)
    ]
    assert [rank.wait() for rank in ranks] == [1, -signal.SIGKILL]
    assert terminal.unrestored == []
    said = [line for line in terminal.history if line.startswith("rank")]
    assert sorted(said) == ["rank 0 is at step 3", "rank 1 is at step 3"]
    assert ends(terminal) == ["training interrupted"]
    assert any("Error" in line for line in terminal.history)


@pytest.mark.clause("RICH-4")
def test_a_training_goes_on_when_its_terminal_is_closed(
    implementation: Implementation, terminal: Terminal, tmp_path: Path
) -> None:
    child = terminal.start(cases.train_without_a_terminal, implementation.name, tmp_path, tmp_path / "go on")
    terminal.wait_for("at step 2")
    terminal.hang_up()
    (tmp_path / "go on").touch()
    child.wait()
    assert (tmp_path / "steps").exists()
    assert (tmp_path / "steps").read_text() == "6"


@pytest.mark.clause("RICH-8")
def test_drawing_for_the_first_time_draws_no_random_numbers(
    implementation: Implementation, terminal: Terminal, tmp_path: Path
) -> None:
    assert terminal.start(cases.draw_random_numbers, implementation.name, tmp_path).wait() == 0
    assert "has drawn: True, the same: True" in terminal.history
