"""The pool of ranks: whatever happens on one rank is seen, shown for every rank, and over before the next task."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np
import pytest
import torch
import torch.distributed as dist
from truestep_fixtures.ranks import RankFailure, RankPool, RankReport

# ── What the ranks do ─────────────────────────────────────────────────────────


def sum_of_ranks(offset: int) -> tuple[int, int]:
    total = torch.tensor(dist.get_rank() + offset)
    dist.all_reduce(total)
    return dist.get_rank(), int(total)


def process_id() -> int:
    return os.getpid()


def world() -> tuple[bool, str | None]:
    return dist.is_initialized(), os.environ.get("WORLD_SIZE")


def be_killed(victim: int) -> None:
    print(f"rank {dist.get_rank()} was here")
    if dist.get_rank() == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def end_process(victim: int) -> None:
    if dist.get_rank() == victim:
        os._exit(3)


def raise_on(victim: int | None) -> None:
    if victim is None or dist.get_rank() == victim:
        raise LookupError(f"nothing found on rank {dist.get_rank()}")
    dist.barrier()


def fail_bare_assertion() -> None:
    found = dist.get_rank() + 40
    assert found == 42


def hang_on(victim: int) -> None:
    if dist.get_rank() == victim:
        wait_for_ever()
    dist.barrier()


def wait_for_ever() -> NoReturn:
    threading.Event().wait()
    raise AssertionError("unreachable")


def skip_on(victim: int | None) -> None:
    if victim is None or dist.get_rank() == victim:
        pytest.skip("no such engine here")


def start_child_and_be_killed(lock: Path) -> None:
    if dist.get_rank() == 0:
        held = take(lock)
        subprocess.Popen([sys.executable, "-c", "import threading; threading.Event().wait()"], pass_fds=[held.fileno()])
    dist.barrier()
    be_killed(victim=0)


def hold_locks_for_ever(directory: Path) -> None:
    with take(directory / f"{dist.get_rank()}.lock"):
        dist.barrier()
        (directory / "ready").touch()
        wait_for_ever()


def leave_a_mess() -> None:
    os.environ["TRUESTEP_MESS"] = "1"
    os.environ.pop("RANK")
    os.chdir("/")
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    torch.rand(1), random.random(), np.random.rand()


def surroundings() -> dict[str, Any]:
    return {
        "variables": sorted(set(os.environ) - {"_"}),
        "directory": os.getcwd(),  # noqa: PTH109
        "dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "random numbers": [torch.rand(1).item(), random.random(), np.random.rand()],
    }


def return_a_lambda() -> Callable[[], None]:
    return lambda: None


# ── Whether a process is alive ────────────────────────────────────────────────
# The kernel releases a file lock when the last process that holds it has ended, also if nobody reaps that process.


def take(lock: Path) -> IO[str]:
    held = lock.open("w")
    fcntl.flock(held, fcntl.LOCK_EX)
    return held


def wait_until_released(lock: Path) -> None:
    with lock.open() as file:
        for _ in range(600):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.05)
            else:
                return
    pytest.fail(f"a process that holds {lock} is still alive")


# ── Tests ─────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(3, timeout=60, grace=1) as pool:
        yield pool


def failure(pool: RankPool, function: Callable[..., Any], *args: Any, **settings: Any) -> list[RankReport]:
    """Runs a task that has to fail and checks what holds for every failure."""
    with pytest.raises(RankFailure) as caught:
        pool.run(function, *args, **settings)
    reports = list(caught.value.reports)
    assert [report.rank for report in reports] == list(range(pool.world_size))
    for report in reports:
        assert f"rank {report.rank} {report.outcome}" in str(caught.value)
        assert report.detail in str(caught.value)
    assert_works(pool)
    return reports


def assert_works(pool: RankPool) -> None:
    size = pool.world_size
    expected = [(rank, sum(range(size)) + 10 * size) for rank in range(size)]
    assert pool.run(sum_of_ranks, 10) == expected


def test_results_come_in_the_order_of_the_ranks(pool: RankPool) -> None:
    assert_works(pool)


def test_the_same_processes_run_every_task(pool: RankPool) -> None:
    assert pool.run(process_id) == pool.run(process_id)


def test_a_pool_of_one_has_no_process_group() -> None:
    with RankPool(1) as pool:
        assert pool.run(world) == [(False, None)]


def test_a_killed_rank_is_reported_by_its_signal(pool: RankPool) -> None:
    last = pool.world_size - 1
    reports = failure(pool, be_killed, last)
    assert reports[last].outcome == "died"
    assert "SIGKILL" in reports[last].detail
    for report in reports:
        assert f"rank {report.rank} was here" in report.output
    # The others waited for it in a collective operation: gloo told them, or they were stopped.
    assert all(report.outcome in {"raised", "hung"} for report in reports[:last])


def test_a_rank_that_ends_its_process_is_reported_by_its_exit_code(pool: RankPool) -> None:
    reports = failure(pool, end_process, 0)
    assert reports[0].outcome == "died"
    assert "exit code 3" in reports[0].detail
    assert {report.outcome for report in reports[1:]} == {"finished"}


def test_a_rank_that_raises_shows_its_traceback_and_where_the_others_waited(pool: RankPool) -> None:
    reports = failure(pool, raise_on, 0)
    assert reports[0].outcome == "raised"
    assert "LookupError: nothing found on rank 0" in reports[0].detail
    assert "in raise_on" in reports[0].detail
    for report in reports[1:]:
        assert report.outcome == "hung"
        assert "in raise_on" in report.detail


def test_every_traceback_is_shown_when_all_ranks_raise(pool: RankPool) -> None:
    before = pool.run(process_id)
    reports = failure(pool, raise_on, None)
    for report in reports:
        assert report.outcome == "raised"
        assert f"nothing found on rank {report.rank}" in report.detail
    assert pool.run(process_id) == before


def test_a_bare_assertion_shows_the_variables(pool: RankPool) -> None:
    reports = failure(pool, fail_bare_assertion)
    for report in reports:
        outcome, shown = ("finished", "") if report.rank == 2 else ("raised", f"found = {report.rank + 40}")
        assert report.outcome == outcome
        assert shown in report.detail


def test_a_rank_that_hangs_shows_where(pool: RankPool) -> None:
    reports = failure(pool, hang_on, 1, timeout=1)
    assert [report.outcome for report in reports] == ["hung"] * pool.world_size
    for shown in (reports[1].detail, reports[1].shortened()):
        assert "in wait_for_ever" in shown
    assert "barrier" in reports[0].detail


def test_what_several_ranks_say_is_said_once_in_few_lines() -> None:
    frames = [f"  frame {number}" for number in range(9)]
    sizes = [f"\tsize mismatch for {name}" for name in "abcdef"]
    raised = "\n".join(["Traceback (most recent call last):", *frames, "torch.Error: in loading:", *sizes])
    failure = RankFailure(
        "train", [*(RankReport(rank, "raised", raised) for rank in (0, 2)), RankReport(1, "finished")]
    )
    assert failure.shortened().splitlines() == [
        *("ranks 0, 2 raised", *frames[-3:], "torch.Error: in loading:", *sizes[:2], "…"),
        "rank 1 finished",
    ]


def test_a_skip_on_one_rank_only_is_a_failure(pool: RankPool) -> None:
    reports = failure(pool, skip_on, 1)
    outcomes = ["finished"] * pool.world_size
    outcomes[1] = "skipped"
    assert [report.outcome for report in reports] == outcomes
    assert "no such engine here" in reports[1].detail


def test_a_skip_on_every_rank_skips_the_test(pool: RankPool) -> None:
    before = pool.run(process_id)
    with pytest.raises(pytest.skip.Exception, match="no such engine here"):
        pool.run(skip_on, None)
    assert pool.run(process_id) == before


def test_what_a_killed_rank_had_started_ends_too(pool: RankPool, tmp_path: Path) -> None:
    failure(pool, start_child_and_be_killed, tmp_path / "child.lock")
    wait_until_released(tmp_path / "child.lock")


def test_closing_a_pool_ends_its_ranks(tmp_path: Path) -> None:
    with RankPool(2, grace=1) as pool:
        with pytest.raises(RankFailure):
            pool.run(hold_locks_for_ever, tmp_path, timeout=1)
        assert_works(pool)
    for rank in range(2):
        wait_until_released(tmp_path / f"{rank}.lock")


def test_ranks_end_when_the_process_that_started_them_is_killed(tmp_path: Path) -> None:
    script = (
        "import pathlib, sys\n"
        "from truestep_fixtures import forking\n"
        "from truestep_fixtures.ranks import RankPool\n"
        f"from {__name__} import hold_locks_for_ever\n"
        f"forking._PRELOADED = ['accelerate.state', 'transformers.integrations.deepspeed', {__name__!r}]\n"
        "RankPool(2).run(hold_locks_for_ever, pathlib.Path(sys.argv[1]))\n"
    )
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], env=variables) as owner:
        while not (tmp_path / "ready").exists():
            assert owner.poll() is None, "the process ended before its ranks were ready"
            time.sleep(0.05)
        owner.kill()
    for rank in range(2):
        wait_until_released(tmp_path / f"{rank}.lock")


def test_a_rank_that_died_between_two_tasks_is_replaced(pool: RankPool) -> None:
    victim = pool.run(process_id)[0]
    os.kill(victim, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        while True:
            os.kill(victim, 0)  # until it has ended
    with pytest.warns(RuntimeWarning, match="rank 0: killed by SIGKILL"):
        assert victim not in pool.run(process_id)
    assert_works(pool)


def test_a_task_leaves_nothing_behind(pool: RankPool) -> None:
    before = pool.run(surroundings)
    pool.run(leave_a_mess)
    assert pool.run(surroundings) == before


def test_a_function_that_ranks_cannot_import_is_refused(pool: RankPool) -> None:
    with pytest.raises(TypeError, match="importable"):
        pool.run(lambda: None)
    assert_works(pool)


def test_a_result_that_cannot_be_sent_is_reported(pool: RankPool) -> None:
    reports = failure(pool, return_a_lambda)
    for report in reports:
        assert report.outcome == "raised"
        assert "its result, a function, cannot be pickled" in report.detail


def test_a_world_without_ranks_is_refused() -> None:
    with pytest.raises(ValueError, match="world_size=0"):
        RankPool(0)


def test_the_fixture_keeps_one_pool_for_each_size(ranks: Callable[[int], RankPool]) -> None:
    assert ranks(2) is ranks(2)
    assert ranks(2) is not ranks(3)
    assert_works(ranks(2))
