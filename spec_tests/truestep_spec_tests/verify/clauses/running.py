"""The suite's run, in processes of their own, that finds out what holds of an implementation."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from truestep_spec_tests.implementation import CALLBACKS
from truestep_spec_tests.meta.specification import PACKAGE, statuses
from truestep_spec_tests.verify.clauses import plugin
from truestep_spec_tests.verify.clauses.findings import NOT_RUN, Finding

# More would not be faster: each runs worlds of several ranks.
PROCESSES = min(os.cpu_count() or 1, 8)

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


class OnProgress(Protocol):
    """Is told now and then how many of the tests have ended."""

    def __call__(self, *, completed: int, total: int) -> None: ...


@dataclass(frozen=True)
class Outcome:
    """A test that names clauses, and what became of it.

    Attributes:
        id: Its id, relative to the suite's folder.
        clauses: What it names.
        finding: What it found.
    """

    id: str
    clauses: tuple[str, ...]
    finding: Finding

    def is_called(self, name: str) -> bool:
        """Whether this is its id, with or without parameters."""
        return self.id == name or self.id.startswith(f"{name}[")


def run(
    implementation: str,
    clauses: Iterable[str],
    *,
    seed: int,
    timeout: float,
    seconds: float,
    log: Path,
    on_progress: OnProgress,
) -> list[Outcome]:
    """Run all tests that name one of some clauses.

    Args:
        implementation: What is tested.
        clauses: The clauses.
        seed: Seeds Hypothesis's examples.
        timeout: Seconds that one test may take.
        seconds: Seconds that all may take together.
        log: A file for what pytest says.
        on_progress: Is told how far it is.

    Returns:
        The tests in the files of the clauses' callbacks that name a clause, whichever; those that name none of these
        clauses, those that the time did not suffice for, and what was left at an interrupt or when pytest itself
        ended, are not run. If it ended before it knew the tests, there is one for all of them.
    """
    chosen = set(clauses)
    with tempfile.TemporaryDirectory(prefix="truestep-clauses-", ignore_cleanup_errors=True) as name:
        directory = Path(name)
        with _started(_command(implementation, chosen, seed, timeout, directory), directory, log) as child:
            left = Finding(NOT_RUN, message="there was no time for it")
            end = time.monotonic() + seconds
            try:
                while child.poll() is None and time.monotonic() < end:
                    time.sleep(0.5)
                    tests = _read(directory, left)
                    ended = sum(test.finding.verdict != NOT_RUN for test in tests)
                    on_progress(completed=ended, total=sum(not chosen.isdisjoint(test.clauses) for test in tests))
            except KeyboardInterrupt:
                left = Finding(NOT_RUN, message="the verification was interrupted")
            if child.poll() is not None:
                left = Finding(NOT_RUN, message=f"pytest ended with exit code {child.returncode}: see {log.name}")
        return _read(directory, left) or [Outcome("", tuple(chosen), left)]


def _command(implementation: str, clauses: Iterable[str], seed: int, timeout: float, directory: Path) -> list[str]:
    callbacks = {statuses()[clause.partition("-")[0]][0] for clause in clauses}
    files = [
        file
        for folder in ("properties", "differential")
        for callback in callbacks
        for file in sorted((PACKAGE / folder).glob(f"test_{CALLBACKS[callback]}*.py"))
    ]
    return [
        *(sys.executable, "-m", "pytest", *map(str, files), str(PACKAGE / "meta" / "test_signatures.py")),
        *(f"--rootdir={PACKAGE}", f"--config-file={os.devnull}", "--import-mode=importlib"),
        *("--strict-markers", "--override-ini=verbosity_assertions=2"),
        *("-p", "no:cacheprovider", "-p", plugin.__name__, f"--basetemp={directory / 'tmp'}"),
        *(f"--numprocesses={PROCESSES}", f"--max-worker-restart={sys.maxsize}", f"--implementation={implementation}"),
        f"--hypothesis-seed={seed}",
        *(f"--clauses-directory={directory}", f"--clauses-chosen={','.join(clauses)}", f"--clauses-timeout={timeout}"),
    ]


@contextmanager
def _started(command: Sequence[str], directory: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that ends, with all that it started, when the context does."""
    # Variables of pytest's may leave tests out.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = ENVIRONMENT | inherited | {"PYTHONPATH": os.pathsep.join(sys.path)}
    theirs, lifeline = os.pipe()  # nothing is written; it ends with this process
    with log.open("wb") as output:
        child = subprocess.Popen(
            [*command, f"--clauses-lifeline={theirs}"],
            cwd=directory,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=[theirs],
        )
    os.close(theirs)
    try:
        yield child
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        os.close(lifeline)


def _read(directory: Path, left: Finding) -> list[Outcome]:
    """The tests that name clauses, as far as they are known, with what they have found so far.

    Args:
        directory: The plugin's.
        left: What became of those that have found nothing.
    """
    collected = directory / plugin.TESTS
    if not collected.is_file():
        return []
    clauses = json.loads(collected.read_text(encoding="utf-8"))
    *lines, _ = (directory / plugin.FINDINGS).read_text(encoding="utf-8").split("\n")  # the last one is incomplete
    findings = dict(map(json.loads, lines))
    return [Outcome(test, tuple(named), Finding(*findings.get(test, left))) for test, named in clauses.items() if named]
