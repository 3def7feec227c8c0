"""What callbacks take from a training that show its progress: truestep's, TRL's, and the Trainer's own, with tqdm."""

from __future__ import annotations

import math
import resource
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import truestep
from measuring import wait_for_idle
from rich_progress_terminal import COLUMNS, DrainedTerminal, enter_terminal
from running import in_fresh_process
from transformers import ProgressCallback, TrainerCallback
from truestep_fixtures.events import Events
from truestep_fixtures.topologies import training_arguments

NONE, TRUESTEP, TRL, TQDM = CONTESTANTS = "none", "truestep", "TRL", "tqdm"
"""Whose callback it is; the first is one that does nothing."""

METRICS = (12, 40)
"""How many metrics a log has."""

STEPS, SECONDS_PER_STEP = 750, 0.02
STEPS_PER_LOG = 10
BATCHES = 40
"""Batches of the evaluation that a training has in the middle."""

IDLE_SECONDS = 5.0

_NAMES = (
    *("loss", "grad_norm", "learning_rate", "num_tokens", "reward", "reward_std", "kl", "entropy"),
    *(f"completions/{name}" for name in ("mean_length", "min_length", "max_length", "clipped_ratio")),
    *(f"rewards/function_{number}/{name}" for number in range(1, 15) for name in ("mean", "std")),
)

_IN_EVERY_FRAME = {
    TRUESTEP: b"\x1b[?2026h",
    TRL: f"╭{'─' * (COLUMNS - 2)}╮".encode(),  # the upper edge of the panel that all is in
    TQDM: b"%|",
}


def compare_events(metrics: int, rounds: int, patience: float) -> dict[str, Any]:
    """Measure events of each callback, in turn, each time in a process and on a terminal of its own.

    Args:
        metrics: How many a log has.
        rounds: How often each is measured.
        patience: Seconds to wait, before each measurement, for an idle machine.

    Returns:
        A row of the report: `metrics`, and by contestant what `compete_in_events` returns, round by round, `samples`.
    """
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in CONTESTANTS}
    for number in range(rounds):
        print(f"events: {metrics} metrics; round {number + 1} of {rounds}", flush=True)
        shift = number % len(CONTESTANTS)
        for name in CONTESTANTS[shift:] + CONTESTANTS[:shift]:
            with DrainedTerminal() as terminal:
                wait_for_idle(patience)
                measured = in_fresh_process(compete_in_events, name, metrics, terminal.name, forked=True)
            samples[name].append(measured)
    return {"metrics": metrics, "samples": samples}


def compete_in_events(contestant: str, metrics: int, terminal: str) -> dict[str, float]:
    """What one process measures of events that come one after the other at once.

    Returns:
        Medians of seconds that a `step`, a `batch` and a `log` take.
    """
    enter_terminal(terminal)
    callback, events = _begin(contestant)
    events.train_begin()
    measured = {
        "step": _median_time(events, callback.on_step_end, [{}] * 200, calls=100),
        "batch": _median_time(events, callback.on_prediction_step, [{}] * 200, calls=100),
        "log": _median_time(events, callback.on_log, [{"logs": _logs(metrics, step)} for step in range(100)]),
    }
    events.train_end()
    return measured


def compare_trainings(rounds: int, patience: float) -> list[dict[str, Any]]:
    """Measure trainings with each callback, all at the same time, each in a process and on a terminal of its own.

    Their steps take time and no work, so that most of the time each has a processor as soon as it needs one.

    Args:
        rounds: How often they are measured.
        patience: Seconds to wait, before each round, for an idle machine.

    Returns:
        Rows of the report: `metrics`, and by contestant what was measured, round by round, `samples`: what
        `compete_in_training` returns, but in the place of `busy` and `idle` how many `seconds` these were, how many
        `frames` and `bytes` were drawn meanwhile, and how many `rows` the highest frame had.

    Raises:
        RuntimeError: A callback has drawn nothing.
    """
    rows: list[dict[str, Any]]
    rows = [{"metrics": metrics, "samples": {name: [] for name in CONTESTANTS}} for metrics in METRICS]
    cases = [(name, metrics) for metrics in METRICS for name in CONTESTANTS]
    for number in range(rounds):
        print(f"trainings; round {number + 1} of {rounds}", flush=True)
        wait_for_idle(patience)
        with ThreadPoolExecutor(len(cases)) as threads:
            measured = dict(zip(cases, threads.map(_training, *zip(*cases, strict=True)), strict=True))
        for row in rows:
            for name, samples in row["samples"].items():
                samples.append(measured[name, row["metrics"]])
    return rows


def compete_in_training(contestant: str, metrics: int, terminal: str) -> dict[str, Any]:
    """What one process measures of a training, and of one without steps in which nothing happens.

    Returns:
        Processor seconds of the training: in `total`, and up to its last step those of the `threads` that the callback
        has started. Moments of `time.monotonic` between which it had steps, `busy`, and between which nothing happened,
        `idle`.
    """
    enter_terminal(terminal)
    _, events = _begin(contestant)
    others = {*threading.enumerate()}
    processor = _processor_time()
    events.train_begin()
    threads = {*threading.enumerate()} - others
    before, begin = _processor_time_of(threads), time.monotonic()
    for step in range(1, STEPS + 1):
        _take_step(events, step, metrics)
        if step == STEPS // 2:
            _evaluate(events)
    of_threads, end = _processor_time_of(threads) - before, time.monotonic()
    events.train_end()
    total = _processor_time() - processor
    return {"total": total, "threads": of_threads, "busy": (begin, end), "idle": _idle(events, metrics)}


def _training(contestant: str, metrics: int) -> dict[str, float]:
    with DrainedTerminal() as terminal:
        measured = in_fresh_process(compete_in_training, contestant, metrics, terminal.name, forked=True)
    for what in ("busy", "idle"):
        begin, end = measured.pop(what)
        drawn = terminal.written(begin, end)
        frames = drawn.split(_IN_EVERY_FRAME[contestant])[1:] if contestant in _IN_EVERY_FRAME else []
        if contestant != NONE and what == "busy" and not frames:
            raise RuntimeError(f"{contestant}: nothing was drawn")
        measured[f"{what} seconds"] = end - begin
        measured[f"{what} frames"] = len(frames)
        measured[f"{what} bytes"] = len(drawn)
        measured[f"{what} rows"] = max((frame.count(b"\n") + 1 for frame in frames), default=0)
    return measured


def _begin(contestant: str) -> tuple[Any, Events]:
    torch.set_num_threads(1)
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters())
    callback = _callback(contestant)
    events = Events(
        model,
        training_arguments("single", "out", max_steps=STEPS),
        [callback],
        processing_class=object(),
        optimizer=optimizer,
        lr_scheduler=torch.optim.lr_scheduler.ConstantLR(optimizer),
        train_dataloader=[None] * STEPS,
    )
    events.callback_handler.eval_dataloader = [None] * BATCHES
    return callback, events


def _callback(contestant: str) -> TrainerCallback:
    if contestant == TRL:
        from trl.trainer.callbacks import RichProgressCallback  # here, as others are to do without all that it imports

        return RichProgressCallback()
    return {NONE: TrainerCallback, TRUESTEP: truestep.RichProgressCallback, TQDM: ProgressCallback}[contestant]()


def _logs(metrics: int, step: int) -> dict[str, float]:
    values = {name: math.sin(step + number) * 10 ** (number % 7 - 5) for number, name in enumerate(_NAMES[:metrics])}
    return values | {"epoch": step / STEPS}


def _median_time(events: Events, event: Callable[..., object], each: Sequence[dict[str, Any]], calls: int = 1) -> float:
    """Seconds that an event takes, of some calls with each of the keyword arguments beside those of all events."""
    handler, state, times = events.callback_handler, events.state, []
    names = ("model", "processing_class", "optimizer", "lr_scheduler", "train_dataloader", "eval_dataloader")
    for own in each:
        keywords = {name: getattr(handler, name) for name in names} | own
        begin = time.perf_counter()
        for _ in range(calls):
            state.global_step += 1
            event(events.args, state, events.control, **keywords)
        times.append((time.perf_counter() - begin) / calls)
    return statistics.median(times)


def _processor_time() -> float:
    """What this process has taken so far, and processes that it has waited for."""
    others = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + others.ru_utime + others.ru_stime


def _processor_time_of(threads: set[threading.Thread]) -> float:
    """What some threads have taken so far, together."""
    return sum(time.clock_gettime(time.pthread_getcpuclockid(thread.ident)) for thread in threads)


def _take_step(events: Events, step: int, metrics: int) -> None:
    time.sleep(SECONDS_PER_STEP)
    events.state.epoch = step / STEPS
    events.step(step)
    if step % STEPS_PER_LOG == 0:
        events.fire("on_log", logs=_logs(metrics, step))


def _evaluate(events: Events) -> None:
    for _ in range(BATCHES):
        time.sleep(SECONDS_PER_STEP)
        events.fire("on_prediction_step")
    events.fire("on_log", logs={"eval_loss": 1.0})
    events.evaluate()


def _idle(events: Events, metrics: int) -> tuple[float, float]:
    """The moments between which nothing happens.

    The log is half a second off the seconds of the training, so that those of both do not pass at the same time.
    """
    events.train_begin()
    time.sleep(0.5)
    events.fire("on_log", logs=_logs(metrics, 1))
    time.sleep(0.9)
    begin = time.monotonic()
    time.sleep(IDLE_SECONDS)
    end = time.monotonic()
    events.train_end()
    return begin, end
