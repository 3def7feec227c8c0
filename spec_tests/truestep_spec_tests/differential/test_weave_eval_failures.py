"""What becomes of evaluations and trainings when Weave fails, and what is left when a training or a process ends."""

import asyncio
import contextlib
import importlib.util
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NoReturn

import psutil
import pytest
import wandb
from truestep_fixtures import topologies
from truestep_fixtures.ranks import RankFailure, RankPool
from truestep_fixtures.terminal import Terminal
from truestep_fixtures.weave_server import Fault, RecordingServer, recording_server

from truestep_spec_tests.differential.cases import logged_warnings, skip_the_reference
from truestep_spec_tests.differential.weave_eval_cases import evaluating, is_alive, leaving_nothing
from truestep_spec_tests.implementation import Implementation
from truestep_spec_tests.properties.weave_eval_cases import (
    Subject,
    evaluate_at,
    requires_weave,
    seen,
    wait_for,
    wait_until,
)
from truestep_spec_tests.runs import Setup, Walk

pytestmark = requires_weave

Ranks = Callable[[int], RankPool]

PROMPTS = ("The quick", "Zwölf")


@pytest.fixture(scope="module")
def server() -> Iterator[RecordingServer]:
    """A server in a process of its own: threads of this process are none of its."""
    with recording_server(own_process=True) as server:
        yield server


@pytest.fixture
def subject(implementation: Implementation, server: RecordingServer, tmp_path: Path) -> Iterator[Subject]:
    skip_the_reference(implementation, "goes nowhere that could fail")
    yield Subject(implementation, topologies.training_arguments("single", tmp_path, max_steps=20), server)
    server.answer_after(0)
    server.fail(None)


def losses(warnings: list[str]) -> list[str]:
    """Warnings that name a step of an evaluation."""
    return [warning for warning in warnings if "step" in warning]


def is_lost(step: int, warnings: list[str]) -> bool:
    return any(f"step {step}" in warning for warning in losses(warnings))


def assert_lost(steps: Iterable[int], warnings: list[str]) -> None:
    """There is one warning for the evaluation at each of these steps, in their order."""
    for step, warning in zip(steps, losses(warnings), strict=True):
        assert f"step {step}" in warning


def length(prompt: str, completion: str) -> int:
    return len(completion)


async def later(prompt: str, completion: str) -> int:
    await asyncio.sleep(0)
    return len(completion)


# ── Weave fails ───────────────────────────────────────────────────────────────


@pytest.mark.clause("WEAVE-6")
@pytest.mark.parametrize(
    "fault",
    [Fault("refuse"), Fault("error", after=8)],
    ids=["refuses from the beginning", "fails midway"],
)
def test_what_is_lost_is_one_warning_and_what_comes_later_is_tried_again(
    subject: Subject, server: RecordingServer, fault: Fault
) -> None:
    project = f"team/{fault.how}"
    server.fail(fault)
    with leaving_nothing(), logged_warnings() as warnings:
        trainer, callback = subject.begin(PROMPTS, project, scorers={"length": length, "later": later})
        evaluate_at(trainer, 1)
        wait_until(lambda: is_lost(1, warnings))
        server.fail(None)
        evaluate_at(trainer, 2)
        trainer.train_end()
    assert [one.step for one in seen(callback, server, project)] == [2]
    assert_lost((1,), warnings)


@pytest.mark.clause("WEAVE-6")
@pytest.mark.parametrize("is_training", [True, False], ids=["in a training", "outside of one"])
def test_a_server_that_does_not_answer_holds_nobody_up_for_longer_than_allowed(
    subject: Subject, server: RecordingServer, is_training: bool
) -> None:
    server.fail(Fault("hang"))
    with leaving_nothing(), logged_warnings() as warnings:
        trainer = subject.trainer([{"prompt": prompt} for prompt in PROMPTS])
        trainer.add_callback(subject.having("timeout").callback(trainer, "team/hang", timeout=1.0))
        if is_training:
            trainer.train_begin()
            for step in (1, 2):
                evaluate_at(trainer, step)
            trainer.train_end()
        else:
            evaluate_at(trainer, 1)
    assert_lost((1, 2) if is_training else (1,), warnings)


@pytest.mark.clause("WEAVE-6")
def test_weave_that_is_not_installed_is_one_warning_when_the_training_begins(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # All that is installed, but for it.
    (tmp_path / "others").mkdir()
    found = importlib.util.find_spec("weave")
    assert found is not None
    assert found.origin is not None
    site = Path(found.origin).parents[1]
    for entry in site.iterdir():
        if entry.name.partition("-")[0] != "weave":
            (tmp_path / "others" / entry.name).symlink_to(entry)
    monkeypatch.setattr(
        sys,
        "path",
        [str(tmp_path / "others") if Path(entry).resolve() == site.resolve() else entry for entry in sys.path],
    )
    if "weave" in sys.modules:
        pytest.skip("it has been imported")
    assert importlib.util.find_spec("weave") is None
    with leaving_nothing(), logged_warnings() as warnings:
        trainer, _ = subject.begin(PROMPTS)
        (warning,) = warnings
        for step in (1, 2):
            evaluate_at(trainer, step)
        trainer.train_end()
    assert [warning] == warnings
    assert "not installed" in warning


@pytest.mark.clause("WEAVE-6")
@pytest.mark.parametrize("project", ["team/turned off", None], ids=["by a variable", "with the run"])
def test_what_is_turned_off_logs_nothing_and_says_so_once(
    subject: Subject, server: RecordingServer, monkeypatch: pytest.MonkeyPatch, project: str | None
) -> None:
    with contextlib.ExitStack() as stack:
        if project is not None:
            monkeypatch.setenv("WEAVE_DISABLED", "true")
        else:
            stack.callback(wandb.finish)  # a disabled run stays the process's run at the end of its block
            stack.enter_context(wandb.init(mode="disabled", project="turned off"))
        before = len(server.requests())
        with leaving_nothing(), logged_warnings() as warnings:
            trainer, _ = subject.begin(PROMPTS, project)
            evaluate_at(trainer, 1)
            trainer.train_end()
    (warning,) = warnings
    assert "no evaluation is logged" in warning
    assert len(server.requests()) == before


@pytest.mark.clause("WEAVE-6")
def test_an_interruption_ends_the_scorers_that_run(subject: Subject) -> None:
    waits = threading.Event()

    def interrupted(prompt: str, completion: str) -> int:
        waits.wait(timeout=1.0)
        raise KeyboardInterrupt

    async def endless(prompt: str, completion: str) -> int:
        waits.set()
        await asyncio.Event().wait()
        return 1

    with leaving_nothing():
        trainer, _ = subject.begin(PROMPTS, scorers={"interrupted": interrupted, "endless": endless})
        with pytest.raises(KeyboardInterrupt):
            evaluate_at(trainer, 1)
        trainer.train_end()


# ── A process that works for the training ends before it ──────────────────────


@pytest.mark.clause("WEAVE-6")
def test_a_process_that_is_killed_loses_no_more_than_what_it_was_at(subject: Subject, server: RecordingServer) -> None:
    with leaving_nothing() as working, logged_warnings() as warnings:
        trainer, callback = subject.begin(PROMPTS, "team/killed")
        evaluate_at(trainer, 1)
        wait_for(callback, server, 1, "team/killed")
        if not working():
            trainer.train_end()
            pytest.skip("no process works for the training")
        time.sleep(1)  # in which it says that it is done
        kill(working())  # it has nothing to do
        del warnings[:]  # of one that had not said it
        evaluate_at(trainer, 2)
        wait_for(callback, server, 2, "team/killed")
        before = len(server.requests())
        server.answer_after(0.3)
        evaluate_at(trainer, 3)
        wait_until(lambda: len(server.requests()) > before)
        kill(working())  # it is in the middle
        wait_until(lambda: is_lost(3, warnings))
        server.answer_after(0)
        evaluate_at(trainer, 4)
        trainer.train_end()
    assert [one.step for one in seen(callback, server, "team/killed")] == [1, 2, 4]
    assert_lost((3,), warnings)


def kill(processes: set[int]) -> None:
    for process in processes:
        psutil.Process(process).kill()
    # Its main thread ends before the others, and its parent can see that it has ended when all have.
    wait_until(lambda: not any(is_alive(process) or len(threads_of(process)) > 1 for process in processes))


def threads_of(process: int) -> list[Path]:
    with contextlib.suppress(FileNotFoundError):
        return list(Path(f"/proc/{process}/task").iterdir())
    return []


# ── The training ends before its time ─────────────────────────────────────────


def train_and_raise(implementation: str, directory: Path) -> NoReturn:
    args = topologies.training_arguments("single", directory, max_steps=20)
    subject = Subject(Implementation(implementation), args, None)
    trainer, _ = subject.begin(PROMPTS, "team/raising", scorers={"length": length})
    for step in (1, 2, 3):
        evaluate_at(trainer, step)
    raise RuntimeError("the training has had enough")


@pytest.mark.clause("WEAVE-6")
def test_what_a_training_that_raises_has_logged_arrives_by_the_end_of_its_process(
    subject: Subject, server: RecordingServer, tmp_path: Path
) -> None:
    errors = tmp_path / "stderr"
    with Terminal() as terminal, leaving_nothing():
        program = terminal.start(train_and_raise, subject.implementation.name, tmp_path, stderr=errors)
        assert program.wait(120) == 1
    assert "has had enough" in errors.read_text(encoding="utf-8")
    found = [one for one in server.evaluations() if one.project == "team/raising"]
    assert [one.attributes["training_step"] for one in found] == [1, 2, 3]
    assert [(one.is_finished, len(one.predictions)) for one in found] == [(True, 2)] * 3


def evaluate_and_be_killed(setup: Setup, directory: Path, server: dict[str, str], processes: Path) -> None:
    """Writes down what works for a training that has evaluations under way, and ends without a word."""
    os.environ |= server  # the pool puts the environment back
    walk = Walk(setup, directory, attach=lambda trainer: [setup.subject(trainer, **setup.weave_arguments())])
    walk.begin()
    walk.go_to(setup.steps)
    children = psutil.Process().children(recursive=True)
    processes.write_text("\n".join(str(child.pid) for child in children))
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.clause("WEAVE-6")
def test_no_process_outlives_a_training_that_is_killed(
    subject: Subject, server: RecordingServer, ranks: Ranks, tmp_path: Path
) -> None:
    setup = evaluating(subject.implementation.name)
    with pytest.raises(RankFailure):
        ranks(1).run(evaluate_and_be_killed, setup, tmp_path, dict(server.environment), tmp_path / "processes")
    worked = [int(line) for line in (tmp_path / "processes").read_text().split()]
    wait_until(lambda: not any(map(is_alive, worked)))
