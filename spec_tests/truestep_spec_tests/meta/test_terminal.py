"""The terminal that tests use: programs on it find a real one, and how they leave it is seen."""

from __future__ import annotations

import atexit
import fcntl
import logging
import os
import signal
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import torch.distributed as dist
from truestep_fixtures.terminal import Terminal

# ── What the programs do ──────────────────────────────────────────────────────


def describe_surroundings(*variables: str) -> None:
    print([stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr)])
    print(sys.stdout.encoding, sys.stdout.line_buffering, *os.get_terminal_size())
    print([os.environ.get(variable) for variable in variables])
    print(logging.getLogger("transformers").handlers[0].stream is sys.stderr)


def write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def wait_for_ever() -> NoReturn:
    print("waiting", flush=True)
    while True:
        time.sleep(60)


def hold_lock_for_ever(lock: Path) -> NoReturn:
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        wait_for_ever()


def end_by(error: BaseException) -> NoReturn:
    atexit.register(print, "at exit")
    raise error


def show_new_sizes() -> NoReturn:
    def show_size(*_: object) -> None:
        os.write(1, b"%d %d\n" % os.get_terminal_size())  # a print may be under way

    signal.signal(signal.SIGWINCH, show_size)
    wait_for_ever()


def leave_a_file_when_hung_up(file: Path) -> NoReturn:
    signal.signal(signal.SIGHUP, lambda *_: (file.touch(), os._exit(3)))
    wait_for_ever()


def stop_echoing() -> None:
    settings = termios.tcgetattr(0)
    settings[3] &= ~termios.ECHO
    termios.tcsetattr(0, termios.TCSANOW, settings)


def add_up_ranks(meeting: Path) -> None:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size)
    total = torch.tensor(dist.get_rank() + 1)
    dist.all_reduce(total)
    print(f"rank {dist.get_rank()}: {int(total)}")
    dist.destroy_process_group()


# ── Tests ─────────────────────────────────────────────────────────────────────


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    with Terminal(columns=40, rows=6) as terminal:
        yield terminal


def test_a_program_finds_a_terminal_and_nothing_that_contradicts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "7")
    monkeypatch.setenv("SOMETHING", "else")
    with Terminal(columns=90, rows=12, environment={"TERM": "dumb", "COLORTERM": "truecolor"}) as terminal:
        variables = ("NO_COLOR", "COLUMNS", "SOMETHING", "TERM", "COLORTERM", "RANK")
        program = terminal.start(describe_surroundings, *variables, environment={"RANK": "1"})
        assert program.wait() == 0
        assert terminal.lines == [
            "[True, True, True]",
            "utf-8 True 90 12",
            "[None, None, 'else', 'dumb', 'truecolor', '1']",
            "True",
        ]


@pytest.mark.parametrize(
    ("error", "exit_code", "shown"),
    [
        (LookupError("nothing there"), 1, "LookupError: nothing there"),
        (SystemExit("no more"), 1, "no more"),
        (SystemExit(3), 3, None),
        (KeyboardInterrupt(), -signal.SIGINT, "KeyboardInterrupt"),
    ],
    ids=repr,
)
def test_a_program_ends_as_python_does(
    terminal: Terminal, error: BaseException, exit_code: int, shown: str | None
) -> None:
    assert terminal.start(end_by, error).wait() == exit_code
    assert terminal.lines[-2:] == ["at exit"] if shown is None else [shown, "at exit"]


def test_a_key_interrupts_all_programs_and_a_signal_one(terminal: Terminal) -> None:
    programs = [terminal.start(wait_for_ever) for _ in range(3)]
    terminal.wait_for(lambda: terminal.lines.count("waiting") == 3)
    programs[0].send(signal.SIGTERM)
    assert programs[0].wait() == -signal.SIGTERM
    assert terminal.lines == ["waiting"] * 3
    terminal.type("\x03")
    assert [program.wait() for program in programs[1:]] == [-signal.SIGINT] * 2


def test_the_size_changes_for_programs_and_on_the_screen(terminal: Terminal) -> None:
    assert terminal.start(write, "a\nb\nc\n").wait() == 0
    terminal.start(show_new_sizes)
    terminal.wait_for("waiting")
    terminal.resize(30, 3)
    terminal.wait_for("30 3")
    assert terminal.lines == ["waiting", "30 3"]
    assert terminal.history == ["a", "b", "c", "waiting", "30 3"]


def test_nothing_is_missing_when_a_program_has_ended(terminal: Terminal) -> None:
    lines = [f"line {number}" for number in range(2_000)]
    assert terminal.start(write, "\n".join(lines)).wait() == 0
    assert terminal.lines == lines[-6:]
    assert terminal.history == lines
    assert terminal.raw == "\r\n".join(lines).encode()


def test_the_screen_shows_what_xterm_would(terminal: Terminal) -> None:
    text = "gone\r\x1b[2K\x1b[?2026h東京 ⚠\ufe0f é\x1b[?2026l\n\x1b[31mred\x1b[0m \x1b[?4m\x1b[38;2;1;2;3mtext\x1b[0m"
    assert terminal.start(write, text).wait() == 0
    assert terminal.lines == ["東京 ⚠ é", "red text"]
    assert terminal.colours == {"red", "010203"}
    assert terminal.unrestored == []


@pytest.mark.parametrize(
    ("setting", "function", "arguments"),
    [
        ("mode ?25", write, ["\x1b[?25l"]),
        ("mode ?2026", write, ["\x1b[?2026h"]),
        ("attributes", write, ["\x1b[1;31mred"]),
        ("attributes", write, ["\x1b[2mfaint"]),
        ("scrolling region", write, ["\x1b[2;3r"]),
        ("line discipline", stop_echoing, []),
    ],
)
def test_a_setting_that_a_program_leaves_is_seen(
    terminal: Terminal, setting: str, function: Callable[..., None], arguments: list[Any]
) -> None:
    assert terminal.start(function, *arguments).wait() == 0
    assert terminal.unrestored == [setting]


def test_a_program_that_hangs_is_shown_with_its_stack_and_ended(tmp_path: Path) -> None:
    with Terminal(columns=1000) as terminal:  # the stack's lines are as long as the path of the tree
        program = terminal.start(hold_lock_for_ever, tmp_path / "lock")
        terminal.wait_for("waiting")
        with pytest.raises(AssertionError, match=r"(?s)hold_lock_for_ever still runs .*\nwaiting\n.* in wait_for_ever"):
            program.wait(timeout=0)
    with (tmp_path / "lock").open() as lock:  # the kernel releases the lock of a process that has ended
        fcntl.flock(lock, fcntl.LOCK_EX)


def test_what_does_not_appear_is_reported_with_what_did(terminal: Terminal) -> None:
    assert terminal.start(print, "something").wait() == 0
    with pytest.raises(AssertionError, match=r"(?s)'else'.*\nsomething\n"):
        terminal.wait_for("else", timeout=0)


def test_programs_are_told_when_the_terminal_is_closed(terminal: Terminal, tmp_path: Path) -> None:
    program = terminal.start(leave_a_file_when_hung_up, tmp_path / "file")
    terminal.wait_for("waiting")
    terminal.hang_up()
    assert program.wait() == 3
    assert (tmp_path / "file").exists()
    assert terminal.lines == ["waiting"]


def test_output_goes_to_a_file_or_a_pipe_where_it_is_asked_to(terminal: Terminal, tmp_path: Path) -> None:
    output, pipe = tmp_path / "output", tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    program = terminal.start(end_by, LookupError("nothing there"), stdout=pipe, stderr=output)
    assert program.wait() == 1
    assert os.read(reader, 100) == b"at exit\n"
    os.close(reader)
    assert output.read_text().endswith("\nLookupError: nothing there\n")
    assert terminal.raw == b""


def test_a_program_whose_output_cannot_be_written_fails(terminal: Terminal) -> None:
    assert terminal.start(print, "lost", stdout=Path("/dev/full")).wait() == 120


def test_programs_can_be_the_ranks_of_one_world(terminal: Terminal, tmp_path: Path) -> None:
    worlds = [{"RANK": str(rank), "WORLD_SIZE": "2"} for rank in range(2)]
    ranks = [terminal.start(add_up_ranks, tmp_path / "meeting", environment=world) for world in worlds]
    assert [rank.wait() for rank in ranks] == [0, 0]
    assert sorted(terminal.lines) == ["rank 0: 3", "rank 1: 3"]
