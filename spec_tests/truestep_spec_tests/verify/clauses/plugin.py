"""A pytest plugin that chooses the tests of clauses, ends those that hang, and writes down what each found.

Workers of pytest-xdist collect and run. What they found goes to their controller, which outlives them.
"""

import faulthandler
import json
import math
import os
import signal
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import pytest
from hypothesis.internal.conjecture import engine

from truestep_spec_tests.verify.clauses.findings import Finding, finding_of, severity
from truestep_spec_tests.verify.texts import encodable

TESTS, FINDINGS = "tests.json", "findings.jsonl"
"""Files that the plugin writes: the clauses of every test, and what each test found when it has ended."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--clauses-directory", help="where the plugin writes to")
    parser.addoption("--clauses-chosen", help="clauses, separated by commas; tests that name none of them are left out")
    parser.addoption("--clauses-timeout", type=float, help="seconds after which the process of a test is ended")
    parser.addoption("--clauses-lifeline", type=int, help="a file descriptor; all processes end when it is closed")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Worker(config) if hasattr(config, "workerinput") else Controller(config))


class Worker:
    """Chooses tests and runs them.

    Args:
        config: The worker's.
    """

    def __init__(self, config: Any) -> None:
        self._directory = Path(config.getoption("--clauses-directory"))
        self._chosen = set(config.getoption("--clauses-chosen").split(","))
        self._timeout: float = config.getoption("--clauses-timeout")
        self._name: str = config.workerinput["workerid"]
        self._stacks: TextIO = _stacks(self._directory, self._name).open("w")
        # Hypothesis has no setting for it. What is found after a long search counts as found, not as a hang.
        engine.MAX_SHRINKING_SECONDS = min(engine.MAX_SHRINKING_SECONDS, math.ceil(self._timeout / 3))

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        clauses = {item.nodeid: _clauses(item) for item in items if _is_about_the_implementation(item)}
        written = self._directory / f"{self._name}.json"
        written.write_text(json.dumps(clauses), encoding="utf-8")
        written.replace(self._directory / TESTS)  # all workers write the same
        items[:] = [item for item in items if self._chosen.intersection(clauses.get(item.nodeid, ()))]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self) -> Iterator[None]:
        # Not by an exception: Hypothesis would catch it and try the example again.
        faulthandler.dump_traceback_later(self._timeout, file=self._stacks, exit=True)
        try:
            return (yield)
        finally:
            faulthandler.cancel_dump_traceback_later()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self) -> Iterator[None]:
        try:
            return (yield)
        except (
            KeyboardInterrupt,
            pytest.exit.Exception,
        ) as error:  # of the implementation
            raise RuntimeError(f"{type(error).__name__} was raised") from error

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: Any, call: pytest.CallInfo[None]) -> Iterator[None]:
        report: Any = yield
        if report.failed and call.excinfo is not None:
            finding = finding_of(call.excinfo.value, given=item.funcargs)
            report.user_properties.append(("finding", tuple(finding)))
            report.longrepr = encodable(report.longreprtext)
        report.sections = [(title, encodable(text)) for title, text in report.sections]
        return report


class Controller:
    """Writes down what is found.

    Args:
        config: The controller's.
    """

    def __init__(self, config: pytest.Config) -> None:
        self._directory = Path(config.getoption("--clauses-directory"))
        (self._directory / FINDINGS).touch()
        self._phases: defaultdict[str, list[Finding]] = defaultdict(list)
        lifeline = config.getoption("--clauses-lifeline")
        if lifeline is not None:
            threading.Thread(target=_end_with, args=[lifeline], daemon=True).start()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        phases = self._phases[report.nodeid]
        phases.append(self._finding(report))
        if report.when not in ("setup", "call"):
            with (self._directory / FINDINGS).open("a", encoding="utf-8") as file:
                file.write(json.dumps([report.nodeid, max(phases, key=severity)]) + "\n")

    def _finding(self, report: Any) -> Finding:
        if report.passed:
            return Finding("passes")
        if report.skipped:
            return Finding("skipped", message=report.longrepr[2].removeprefix("Skipped: "))
        properties = dict(report.user_properties)
        if "finding" in properties:
            return Finding(*properties["finding"])
        stacks = _stacks(self._directory, report.node.gateway.id).read_text(encoding="utf-8", errors="replace")
        if stacks:
            return Finding("hangs", message=stacks.split("\n\n")[-1])  # of the threads, the main one
        return Finding("crashes", message=report.longrepr)


def _end_with(lifeline: int) -> None:
    """Ends the processes of this group when the other end of a pipe is closed, however its process has ended."""
    os.read(lifeline, 1)
    os.killpg(0, signal.SIGKILL)


def _stacks(directory: Path, worker: str) -> Path:
    """The file for the stacks of a worker that was ended."""
    return directory / f"{worker}.stacks"


def _clauses(item: pytest.Item) -> list[str]:
    return list(dict.fromkeys(clause for marker in item.iter_markers("clause") for clause in marker.args))


def _is_about_the_implementation(item: Any) -> bool:
    """Whether a test takes the implementation, and no fixture gives it the reference in its place."""
    given = item.callspec.params if hasattr(item, "callspec") else {}
    own = {name for marker in item.iter_markers("parametrize") for name in _names(marker.args[0])}
    by_fixtures = [str(given[name]) for name in given.keys() - own]
    return "implementation" in item.fixturenames and "reference" not in by_fixtures


def _names(argument: str | Sequence[str]) -> list[str]:
    """The names of parameters, as `pytest.mark.parametrize` takes them."""
    return [name.strip() for name in argument.split(",")] if isinstance(argument, str) else list(argument)
