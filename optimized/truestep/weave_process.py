"""Evaluations on their way to Weave, through a process of its own, while the training goes on.

Weave's client runs threads that take turns with the training's. When its service does not answer, it waits for minutes,
also at the end of the process, and no setting bounds that. A process of its own can be ended.
"""

import atexit
import json
import logging
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from truestep import weave_context

logger = logging.getLogger(__name__)

Job = dict[str, Any]

WAITING = 8
"""How many evaluations may wait. Who brings another waits too."""

POLLING = 0.1
"""How often who waits looks whether something takes too long, in seconds."""

LONGEST_REQUEST = 300.0
"""How long a request may take however long Weave may take, in seconds."""

IMPORTING = 120.0
"""How long the process may take to start and import Weave, in seconds."""

_ENVIRONMENT = {
    "WANDB_SILENT": "true",
    "WEAVE_ENABLE_DISK_FALLBACK": "false",
    "WEAVE_IMPLICITLY_PATCH_INTEGRATIONS": "false",
    "WEAVE_LOG_LEVEL": "ERROR",
    "WEAVE_PRINT_CALL_LINK": "false",
}
_ENVIRONMENT_UNLESS_SET = {
    "WEAVE_RETRY_MAX_ATTEMPTS": "2",
    "WEAVE_RETRY_MAX_INTERVAL": "2",
}


class WeaveProcess:
    """Logs evaluations in the background.

    Args:
        project: `entity/project`, or a project of the user's default entity.
        timeout: How long Weave may take without a sign of progress, in seconds.
    """

    def __init__(self, project: str, timeout: float) -> None:
        self._jobs: queue.Queue[Job | None] = queue.Queue(WAITING)
        self._outlook = _Outlook()
        # Here, as Weave's settings are those of a thread.
        greeting = {"project": project} | weave_context.of_this_process()
        self._thread = threading.Thread(
            target=_serve, args=(self._jobs, self._outlook, greeting, timeout), name="truestep-weave", daemon=True
        )
        self._thread.start()
        # After a training that raised, which no event tells, what is on its way may still arrive.
        atexit.register(self.close)

    def log(self, job: Job) -> None:
        """Log an evaluation; it has arrived, or a warning has said why it has not, when `close` returns.

        Args:
            job: See `truestep.weave_worker.log`.
        """
        self._outlook.enforce()
        if self._outlook.is_bad and self._jobs.full():
            _warn_of_loss(job, "Weave does not keep up")
        else:
            _put(self._jobs, job, self._outlook)

    def close(self) -> None:
        """Wait for what is on its way. If there is no progress, it is given up."""
        atexit.unregister(self.close)
        self._outlook.is_ending = True
        _put(self._jobs, None, self._outlook)
        while self._thread.is_alive():
            self._thread.join(POLLING)
            self._outlook.enforce()


class _Outlook:
    """What the thread and its owner tell each other."""

    is_bad = False
    """Whether Weave failed the last time that it was used."""

    is_ending = False
    """Whether the owner waits for the end."""

    is_given_up = False
    """Whether Weave has failed while the owner waited for the end, who does not wait for that again."""

    def __init__(self) -> None:
        self._limit: tuple[float, Callable[[], None]] | None = None

    def limit(self, seconds: float, end: Callable[[], None]) -> None:
        """Something is waited for in the thread, and `end` ends it."""
        self._limit = time.monotonic() + seconds, end

    def unlimit(self) -> None:
        """Nothing is waited for."""
        self._limit = None

    def enforce(self) -> None:
        """End what takes too long. The owner does that: a timer would be a thread, which cannot be had at the end."""
        limit = self._limit
        if limit is not None and time.monotonic() > limit[0]:
            limit[1]()


def _put(jobs: "queue.Queue[Job | None]", job: Job | None, outlook: _Outlook) -> None:
    while True:
        with suppress(queue.Full):
            return jobs.put(job, timeout=POLLING)
        outlook.enforce()


def _serve(jobs: "queue.Queue[Job | None]", outlook: _Outlook, greeting: Job, timeout: float) -> None:
    """What the thread does: it keeps a worker, and starts another one after a failure."""
    worker: _Worker | None = None
    job: Job | None = None
    while True:
        try:
            if worker is None or not worker.is_running:
                worker = None
                worker = _Worker(greeting, timeout, outlook)
            if job is not None:
                worker.log(job)
            outlook.is_bad = False
        except Exception as error:  # this thread has to go on, or who brings an evaluation would wait for ever
            outlook.is_bad, outlook.is_given_up = True, outlook.is_ending
            if worker is not None:
                worker.kill()
            worker = None
            if job is None:
                logger.warning("Weave, project %r: %s; evaluations are tried all the same", greeting["project"], error)
            else:
                _warn_of_loss(job, error)
        job = jobs.get()
        while job is not None and outlook.is_given_up:
            _warn_of_loss(job, "Weave has just failed, and the training ends")
            job = jobs.get()
        if job is None:
            break
    if worker is not None:
        worker.end()


def _warn_of_loss(job: Job, reason: object) -> None:
    logger.warning("Weave: the evaluation %s is lost: %s", _named(job), reason)


def _named(job: Job) -> str:
    return "of {dataset_name!r} at step {training_step}".format_map(job["attributes"])


class _WorkerError(RuntimeError):
    """The worker cannot do what it was asked to do."""


_starting = threading.Lock()
"""Held while a process is started: another one (a data loader's) that was forked meanwhile would keep a pipe open, of
which the start awaits the end."""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_starting.acquire, after_in_parent=_starting.release, after_in_child=_starting.release)


class _Worker:
    """The process.

    Args:
        greeting: The first line that it reads; see `truestep.weave_worker`.
        timeout: How long it may take without a sign of progress, in seconds.
        outlook: Where is said what is waited for.

    Raises:
        OSError: It cannot be started.
        _WorkerError: It cannot use Weave.
    """

    def __init__(self, greeting: Job, timeout: float, outlook: _Outlook) -> None:
        self._timeout = timeout
        self._outlook = outlook
        self._is_late = False
        http_timeout = {"WEAVE_HTTP_TIMEOUT": f"{min(max(1.0, timeout / 2), LONGEST_REQUEST):g}"}
        with _starting:
            self._process = subprocess.Popen(
                # By its path, and without that path's directory among those of modules.
                [sys.executable, "-P", str(Path(__file__).with_name("weave_worker.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                encoding="utf-8",
                env=http_timeout | _ENVIRONMENT_UNLESS_SET | os.environ | _ENVIRONMENT,
                start_new_session=True,  # Ctrl-C in a terminal is for the training; what is on its way may arrive
            )
        try:
            self._ask(greeting, "import", IMPORTING)
            self._await("init", timeout)
        except BaseException:
            self.kill()
            raise

    @property
    def is_running(self) -> bool:
        """Whether the process has not ended."""
        return self._process.poll() is None

    def log(self, job: Job) -> None:
        """Log an evaluation.

        Raises:
            _WorkerError: That did not work out.
        """
        answer = self._ask(job, "log", self._timeout)
        logger.info("Weave: the evaluation %s is at %s", _named(job), answer["url"])

    def end(self) -> None:
        """Have the process end, which has nothing left to do."""
        with suppress(OSError), self._limited(self._timeout):
            self._send(None)  # its input may not end here: processes that were forked have it open too
            self._process.wait()
        self.kill()

    def kill(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(OSError):  # of a line that was not taken
                assert pipe is not None
                pipe.close()

    def _ask(self, question: Job, expected: str, timeout: float) -> dict[str, Any]:
        with self._limited(timeout):
            self._send(question)
        return self._await(expected, timeout)

    def _send(self, line: Job | None) -> None:
        assert self._process.stdin is not None
        # What a client's functions have made of prompts and completions may be anything.
        print(json.dumps(line, default=str), file=self._process.stdin, flush=True)

    def _await(self, expected: str, timeout: float) -> dict[str, Any]:
        """Read answers up to the one that is expected, and wait for each at most the timeout."""
        assert self._process.stdout is not None
        while True:
            with self._limited(timeout):
                line = self._process.stdout.readline()
            if not line:
                ended = f"its process has ended with {self._process.wait()}"
                raise _WorkerError(f"no answer within {timeout:g} s" if self._is_late else ended)
            answer: dict[str, Any] = json.loads(line)
            if "failed" in answer:
                raise _WorkerError(answer["failed"])
            if answer["did"] == expected:
                return answer

    @contextmanager
    def _limited(self, seconds: float) -> Iterator[None]:
        """The process may be killed when the block takes longer, which ends the block."""
        self._outlook.limit(seconds, self._end_late)
        try:
            yield
        finally:
            self._outlook.unlimit()

    def _end_late(self) -> None:
        self._is_late = True
        self._process.kill()
