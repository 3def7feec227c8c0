"""The clauses of `truestep verify`: what it says of an implementation that is wrong in every way that there is."""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from rich.console import Console
from truestep_fixtures.ranks import RankFailure, RankReport

from truestep_spec_tests.meta import specification
from truestep_spec_tests.properties.weave_eval_cases import wait_until
from truestep_spec_tests.verify.clauses import plugin
from truestep_spec_tests.verify.clauses.display import show_clauses
from truestep_spec_tests.verify.clauses.findings import NOT_RUN, Finding, finding_of
from truestep_spec_tests.verify.clauses.running import Outcome
from truestep_spec_tests.verify.clauses.verdicts import judge
from truestep_spec_tests.verify.command import main
from truestep_spec_tests.verify.expectations import Expectations

WRONG = """
import os, time
from truestep_reference import RichProgressCallback as Right

class RichProgressCallback(Right):
    def __init__(self, *, plain_percent=10.0, plain_seconds=60.0):
        if plain_percent is None:
            os._exit(1)
        if plain_seconds is None:
            time.sleep(600)
        if plain_seconds is False:
            raise KeyboardInterrupt
        if plain_percent == "10":
            raise ZeroDivisionError("by my own zero \\ud800")
        if plain_percent != -1.0:
            super().__init__(plain_percent=plain_percent, plain_seconds=plain_seconds)
"""
"""An implementation whose constructor ends the process, hangs, interrupts, raises or takes too much."""

NOTHING = Expectations()

CONSTRUCTOR = (
    "properties/test_rich_progress_subject.py::"
    "test_other_values_are_an_error_that_names_the_argument_and_its_value[subject-{}]"
)


class Said(NamedTuple):
    """What a verification came to: the exit status, what was printed, the report."""

    status: int
    printed: str
    report: dict[str, Any]

    def findings(self) -> dict[str, dict[str, Any]]:
        return {test["test"]: test for test in self.report["tests"]}

    def verdicts(self) -> dict[str, str]:
        return {clause["clause"]: clause["verdict"] for clause in self.report["clauses"]}


def verify(directory: Path, arguments: str, implementation: str = WRONG) -> Said:
    """Runs the command in a directory that `callbacks_of_mine` can be imported from, on a terminal of 80 columns."""
    (directory / "callbacks_of_mine.py").write_text(implementation)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.chdir(directory)
        patch.syspath_prepend(directory)
        patch.setenv("COLUMNS", "80")
        status = main(["--clauses", *arguments.split()])
    report = json.loads((directory / "truestep-verify" / "report.json").read_text(encoding="utf-8"))
    return Said(status, printed.getvalue(), report)


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> Said:
    directory = tmp_path_factory.mktemp("empty")
    said = verify(directory, "--implementation callbacks_of_mine --only RICH-7 --only BEMA-1 --timeout 2")
    assert {file.name for file in directory.iterdir()} - {"__pycache__"} == {"callbacks_of_mine.py", "truestep-verify"}
    return said


def test_a_wrong_implementation_exits_with_1(said: Said) -> None:
    assert said.status == 1
    assert said.report["passed"] is False
    assert said.verdicts() == {"BEMA-1": "not offered", "RICH-7": "fails"}


@pytest.mark.parametrize(
    ("case", "verdict", "exception", "message"),
    [
        ("plain_percent--1.0", "fails", "Failed", "DID NOT RAISE"),
        ("plain_percent-10", "crashes", "ZeroDivisionError", "by my own zero \\ud800"),
        ("plain_percent-None", "crashes", "", "crashed while running"),
        ("plain_seconds-None", "hangs", "", "callbacks_of_mine.py"),
        ("plain_seconds-False", "crashes", "RuntimeError", "KeyboardInterrupt was raised"),
        ("plain_seconds-60", "passes", "", ""),
    ],
)
def test_every_test_says_what_it_found_whatever_became_of_the_others(
    said: Said, case: str, verdict: str, exception: str, message: str
) -> None:
    found = said.findings()[CONSTRUCTOR.format(case)]
    assert (found["verdict"], found["exception"]) == (verdict, exception)
    assert message in found["message"]


def test_what_has_the_reference_in_the_place_of_the_implementation_is_not_run(said: Said) -> None:
    assert said.findings()
    assert not [test for test in said.findings() if "[reference" in test]


def test_the_table_has_a_line_for_each_clause(said: Said) -> None:
    rows = [line.rstrip() for line in said.printed.splitlines() if re.match(r"[A-Z]+-\d+ ", line)]
    assert [re.split(r" {2,}", row)[:3] for row in rows] == [
        ["BEMA-1", "Snapshot", "not offered"],
        ["RICH-7", "Constructor", "fails"],
    ]
    assert rows[-1].endswith("  5 of 18 tests")
    assert max(map(len, rows)) <= 80


def test_a_failing_clause_has_the_shortest_evidence_and_the_command_that_repeats_it(said: Said) -> None:
    (evidence,) = [clause["evidence"] for clause in said.report["clauses"] if clause["clause"] == "RICH-7"]
    assert evidence == CONSTRUCTOR.format("plain_percent--1.0")
    assert "RICH-7: fails\nFailed\n  DID NOT RAISE" in said.printed
    assert said.findings()[evidence]["command"] in said.printed


@pytest.mark.parametrize(
    ("known", "status", "printed"),
    [("BEMA-1", 0, []), ("BEMA-99", 1, ["known failures: BEMA-99: there is no such clause, test or training"])],
)
def test_what_is_not_offered_is_no_failure_but_a_known_failure_of_nothing_is(
    tmp_path: Path, known: str, status: int, printed: list[str]
) -> None:
    (tmp_path / "known").write_text(known)
    said = verify(tmp_path, "--implementation callbacks_of_mine --only BEMA --expect known")
    assert set(said.verdicts().values()) == {"not offered"}
    assert said.status == status
    assert re.findall("^known failures: .*", said.printed, re.MULTILINE) == printed


ENDS_PYTEST = """
import os, signal
from truestep_reference import RichProgressCallback as Right

class RichProgressCallback(Right):
    def __init__(self, *, plain_percent=10.0, plain_seconds=60.0):
        if plain_percent is None:
            os.kill(os.getppid(), signal.SIGKILL)
        super().__init__(plain_percent=plain_percent, plain_seconds=plain_seconds)
"""


def test_what_was_found_is_kept_if_pytest_itself_ends(tmp_path: Path) -> None:
    said = verify(tmp_path, "--implementation callbacks_of_mine --only RICH-7", ENDS_PYTEST)
    assert said.status == 1
    assert said.verdicts() == {"RICH-7": "not tested"}
    assert said.report["clauses"][0]["note"] == "pytest ended with exit code -9: see pytest.log"
    assert {"passes", "not run"} <= {test["verdict"] for test in said.findings().values()}


def test_a_pytest_that_knows_no_tests_is_a_reason_for_all_clauses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text("import os, sys\nif 'pytest' in sys.orig_argv: os._exit(7)\n")
    monkeypatch.setenv("PYTEST_ADDOPTS", "--no-such-option")  # which is not taken
    said = verify(tmp_path, "--implementation callbacks_of_mine --only RICH")
    assert said.status == 1
    assert set(said.verdicts().values()) == {"not tested"}
    assert said.report["clauses"][0]["note"] == "pytest ended with exit code 7: see pytest.log"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_goes_on_when_the_process_ends(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "callbacks_of_mine.py").write_text(WRONG)
    command = [sys.executable, "-m", "truestep", "verify", "--implementation", "callbacks_of_mine", "--only", "RICH-7"]
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}

    def are_testing() -> bool:  # in a directory for temporary files
        lines = map(_read, Path("/proc").glob("[0-9]*/cmdline"))
        return any(f"={tmp_path}/truestep-clauses".encode() in line for line in lines)

    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as process:
        wait_until(are_testing)
        process.send_signal(number)
        printed, _ = process.communicate(timeout=60)
        assert process.returncode == (1 if number == signal.SIGTERM else -signal.SIGKILL)
    assert ("the verification was interrupted" in printed) == (number == signal.SIGTERM)
    wait_until(lambda: not are_testing())


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:  # of a process that has ended
        return b""


SLOW = """
import time
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

@pytest.fixture
def implementation():
    return None

@pytest.mark.clause("A-1")
@settings(deadline=None, print_blob=True, suppress_health_check=list(HealthCheck))
@given(st.lists(st.integers(), min_size=20))
def test_it(implementation, numbers):
    time.sleep(0.5)
    assert sum(numbers) < 10**6
"""


def test_an_example_that_takes_long_to_shorten_is_no_hang(tmp_path: Path) -> None:
    (tmp_path / "test_slow.py").write_text(SLOW)
    (tmp_path / "found").mkdir()
    arguments = [
        "-p",
        plugin.__name__,
        "-n",
        "1",
        "--hypothesis-seed",
        "0",
        "--clauses-directory",
        str(tmp_path / "found"),
    ]
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            *arguments,
            "--clauses-chosen",
            "A-1",
            "--clauses-timeout",
            "20",
            str(tmp_path),
        ],
        cwd=tmp_path,
    )
    ((_, (verdict, *_, example)),) = map(json.loads, (tmp_path / "found" / plugin.FINDINGS).read_text().splitlines())
    assert verdict == "fails"
    assert "numbers=[" in example


# Of exceptions


class Unsayable(Exception):  # noqa: N818 - of an implementation
    def __str__(self) -> str:
        raise ValueError


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (AssertionError("1 is not 2"), "fails"),
        (pytest.fail.Exception("DID NOT RAISE"), "fails"),
        (KeyError("x"), "crashes"),
        (SystemExit(3), "crashes"),
        (Unsayable(), "crashes"),
        (ExceptionGroup("several", [KeyError("x"), AssertionError()]), "fails"),
        (ExceptionGroup("several", [KeyError("x"), ExceptionGroup("more", [ValueError()])]), "crashes"),
        (RankFailure("task", [RankReport(0, "raised", "…\nAssertionError: x"), RankReport(1, "hung")]), "fails"),
        (RankFailure("task", [RankReport(0, "raised", "…\nKeyError: 'x'"), RankReport(1, "finished")]), "crashes"),
        (RankFailure("task", [RankReport(0, "raised", "…\nAssertionError: x\n…\n  File …\nKeyError: 'x'")]), "crashes"),
        (RankFailure("task", [RankReport(0, "raised", "…\nFailed: DID NOT RAISE")]), "fails"),
        (RankFailure("task", [RankReport(0, "finished"), RankReport(1, "died")]), "crashes"),
        (RankFailure("task", [RankReport(0, "finished"), RankReport(1, "hung", "stack")]), "hangs"),
    ],
)
def test_an_assertion_fails_a_rank_may_hang_and_all_else_crashes(error: BaseException, verdict: str) -> None:
    assert finding_of(error).verdict == verdict


def test_an_exception_without_a_message_is_shown_by_the_line_that_raised_it() -> None:
    with pytest.raises(KeyboardInterrupt) as raised:
        raise KeyboardInterrupt
    assert finding_of(raised.value).message == "raise KeyboardInterrupt"


def test_the_end_of_the_traceback_of_the_worst_rank_is_the_message() -> None:
    detail = "\n".join(
        ["Traceback (most recent call last):", *(f"  line {number}" for number in range(20)), "AssertionError: x"]
    )
    failure = RankFailure("task", [RankReport(0, "hung", "stack"), RankReport(1, "raised", detail)])
    lines = finding_of(failure).message.splitlines()
    assert lines == ["rank 1 raised", "  line 17", "  line 18", "  line 19", "AssertionError: x"]


class Sum(RuleBasedStateMachine):
    total = 0

    @rule(number=st.integers())
    def add(self, number: int) -> None:
        self.total += number

    @invariant()
    def is_small(self) -> None:
        assert self.total < 10, "too large"


@given(number=st.floats())
def is_small(size: dict[str, list[str]], number: float, of: str) -> None:
    assert not number > 5, "too large"


@pytest.mark.parametrize(
    ("finds", "example"),
    [
        (partial(is_small, size={"a": ["b" * 99] * 2}, of="c"), ["is_small(", "    number=6.0,", ")"]),
        (
            partial(run_state_machine_as_test, Sum),
            ["state = Sum()", "state.is_small()", "state.add(number=10)", "state.is_small()", "state.teardown()"],
        ),
    ],
)
def test_hypothesiss_shortest_example_is_shown_as_code(
    finds: Callable[[], None], example: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(AssertionError) as raised:
        finds()
    evidence = Outcome("a.py::test_a", ("RICH-3",), finding_of(raised.value, given=["size", "of"]))
    show_clauses(Console(), [judge("RICH-3", [evidence], NOTHING.has_test)], "mine", 3)
    _, said = capsys.readouterr().out.split("RICH-3: fails\n")
    expected = ["AssertionError", "  too large", "shortest example:", *(f"  {line}" for line in example)]
    *lines, reproduction, command = said.splitlines()
    assert [line for line in expected if line not in lines] == []
    assert lines[-len(example) :] == expected[-len(example) :]
    assert re.fullmatch(r"  # or: @reproduce_failure\('[\d.]+', b'.*'\)", reproduction)
    assert command.endswith("a.py::test_a --implementation mine --hypothesis-seed=3")


# Of clauses


def outcome(verdict: str, test: str = "a.py::test_a", clause: str = "A-1", message: str = "") -> Outcome:
    return Outcome(test, (clause,), Finding(verdict, message=message))


@pytest.mark.parametrize(
    ("found", "verdict", "note"),
    [
        (["passes"], "passes", "1 test"),
        (["passes", "skipped", "passes"], "passes", "2 tests"),
        (["passes", "fails", "hangs", "crashes"], "fails", "3 of 4 tests"),
        (["crashes", "hangs"], "hangs", "2 of 2 tests"),
        (["passes", "crashes"], "crashes", "1 of 2 tests"),
        (["skipped", "skipped"], "not tested", "because"),
        ([], "not tested", ""),
    ],
)
def test_a_clause_has_the_worst_verdict_of_its_tests(found: list[str], verdict: str, note: str) -> None:
    judged = judge(
        "A-1", [outcome("fails", clause="A-2"), *(outcome(one, message="because") for one in found)], NOTHING.has_test
    )
    assert (verdict, note) == (judged.verdict, judged.note)
    assert judged.is_fine is (verdict in ("passes", "not tested"))


def test_a_clause_that_there_was_no_time_for_is_not_tested_and_not_fine() -> None:
    found = [outcome("passes"), outcome("skipped"), outcome("skipped"), outcome(NOT_RUN, message="no time")]
    judged = judge("A-1", found, NOTHING.has_test)
    assert (judged.verdict, judged.note, judged.is_fine) == ("not tested", "no time", False)


def test_the_evidence_is_the_shortest_of_the_worst() -> None:
    short, long = (outcome("fails", message="x" * length) for length in (2, 20))
    of_two = Outcome("a.py::test_a", ("A-1", "A-2"), Finding("fails"))
    assert judge("A-1", [outcome("crashes", message="x"), long, short, of_two], NOTHING.has_test).evidence == short


@pytest.mark.parametrize(
    ("known", "verdict", "is_known"),
    [
        ((), "fails", False),
        (("A-1",), "fails", True),
        (("a.py::test_a", "a.py::test_b"), "fails", True),
        (("a.py::test_a[0]", "a.py::test_b"), "fails", True),
        (("a.py::test_a",), "crashes", False),
        (("a.py::test_b", "A-2"), "fails", False),
        (("a.py::test", "A-11"), "fails", False),
    ],
)
def test_a_clause_is_known_to_fail_if_all_that_fails_of_it_is_known(
    known: tuple[str, ...], verdict: str, is_known: bool
) -> None:
    tests = [outcome("fails", "a.py::test_a[0]"), outcome("crashes", "a.py::test_b"), outcome("passes", "a.py::test_c")]
    judged = judge("A-1", tests, Expectations(known).has_test)
    assert (verdict, is_known) == (judged.verdict, judged.is_known)
    assert judged.is_fine is is_known


def test_every_clause_has_a_title() -> None:
    assert list(specification.titles()) == specification.clauses()
