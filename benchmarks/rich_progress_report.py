"""What was measured about RichProgressCallback, as tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from measuring import Spread
from reporting import Row, Table, in_words, verdict
from rich_progress_contest import BATCHES, IDLE_SECONDS, NONE, SECONDS_PER_STEP, STEPS, STEPS_PER_LOG, TRL, TRUESTEP
from rich_progress_terminal import ROWS

_STEP_MICROSECONDS = 1.0
_LOG_MICROSECONDS = {12: 10.0}
"""By number of metrics."""
_FRAME_MILLISECONDS = {12: 1.5}
_IDLE_FRAMES_PER_SECOND = 1.0


def tables(events: Sequence[Row], trainings: Sequence[Row]) -> list[Table]:
    """All tables.

    Args:
        events: What `compare_events` has returned for each number of metrics.
        trainings: What `compare_trainings` has returned.
    """
    return [
        _times(events),
        _trainings(trainings),
        _idle(trainings),
        _promises([*_promises_of_events(events), *_promises_of_trainings(trainings)]),
    ]


def _times(rows: Sequence[Row]) -> Table:
    return Table(
        "What a training waits for",
        "Microseconds that an event takes, with the keyword arguments of a Trainer, one event after the other; medians "
        "and [quartiles] of rounds, each of which gives the median of its own. `none` is a callback that does nothing: "
        "what it takes is in the other figures too. What a callback draws within an event once in many is not.",
        ("metrics", "callback", "on_step_end", "on_prediction_step", "on_log"),
        [
            (
                str(row["metrics"]),
                name,
                *(in_words(_microseconds(row, name, event)) for event in ("step", "batch", "log")),
            )
            for row in rows
            for name in row["samples"]
        ],
    )


def _trainings(rows: Sequence[Row]) -> Table:
    return Table(
        f"A training of {STEPS} steps of {1e3 * SECONDS_PER_STEP:g} ms, a log every {STEPS_PER_LOG} steps",
        f"And an evaluation of {BATCHES} batches in the middle. The steps take time and no work; all trainings of a "
        "round run at once. Medians and [quartiles] of rounds, in milliseconds. `processor time`: of the whole process "
        "from the beginning of the training to its end, and of processes that it has had; rich had been imported. "
        "`more than none`: that, less the same of a callback that does nothing in the same round. `in threads`: how "
        "much of it is that of threads which the callback has started, and `a frame`: that by frames; tqdm draws in "
        "the thread of the training. A frame begins with the caches of a process that was asleep.",
        (
            "metrics",
            "callback",
            "processor time",
            "more than none",
            "in threads",
            "a frame",
            "frames a second",
            "kB a second",
        ),
        [
            (
                str(row["metrics"]),
                name,
                in_words(_spread(row, name, "total", 1e3), 0),
                *(
                    ("",) * 5
                    if name == NONE
                    else (
                        in_words(_more(row, name), 0),
                        in_words(_spread(row, name, "threads", 1e3), 0),
                        in_words(_of_frame(row, name)) if name in (TRUESTEP, TRL) else "",
                        in_words(_rate(row, name, "busy", "frames"), 1),
                        in_words(_rate(row, name, "busy", "bytes", 1e-3), 1),
                    )
                ),
            )
            for row in rows
            for name in row["samples"]
        ],
    )


def _idle(rows: Sequence[Row]) -> Table:
    return Table(
        "While nothing happens",
        f"In {IDLE_SECONDS:g} s without an event, after a log. `rows`: of the highest frame, also of the training.",
        ("metrics", "callback", "frames a second", "kB a second", "rows"),
        [
            (
                str(row["metrics"]),
                name,
                in_words(_rate(row, name, "idle", "frames"), 1),
                in_words(_rate(row, name, "idle", "bytes", 1e-3), 1),
                str(_highest(row, name)) if name in (TRUESTEP, TRL) else "",
            )
            for row in rows
            for name in row["samples"]
            if name != NONE
        ],
    )


def _promises(lines: Sequence[tuple[str, ...]]) -> Table:
    return Table(
        "What is promised",
        "Of truestep's. Medians and [quartiles] of this run; a busy machine blurs them.",
        ("metrics", "what", "promised", "measured", ""),
        lines,
    )


def _promises_of_events(rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    for row in rows:
        step = _microseconds(row, TRUESTEP, "step")
        yield _promise(row, "on_step_end, µs", _STEP_MICROSECONDS, step)
        if row["metrics"] in _LOG_MICROSECONDS:
            log = _microseconds(row, TRUESTEP, "log")
            yield _promise(row, "on_log, µs", _LOG_MICROSECONDS[row["metrics"]], log)


def _promises_of_trainings(rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    for row in rows:
        if row["metrics"] in _FRAME_MILLISECONDS:
            frame = _of_frame(row, TRUESTEP)
            yield _promise(row, "processor time of a frame, ms", _FRAME_MILLISECONDS[row["metrics"]], frame)
        idle = _rate(row, TRUESTEP, "idle", "frames")
        yield _promise(row, "frames a second while nothing happens", _IDLE_FRAMES_PER_SECOND, idle)
        highest = _highest(row, TRUESTEP)
        yield str(row["metrics"]), "rows of the highest frame", f"≤ {ROWS}", str(highest), verdict(highest <= ROWS)
        ours, theirs = _more(row, TRUESTEP), _more(row, TRL)
        yield (
            str(row["metrics"]),
            "processor time of a training, ms more than none",
            f"< TRL's {in_words(theirs, 0)}",
            in_words(ours, 0),
            verdict(ours.median < theirs.median),
        )


def _promise(row: Row, what: str, limit: float, measured: Spread) -> tuple[str, ...]:
    return str(row["metrics"]), what, f"≤ {limit:g}", in_words(measured), verdict(measured.median <= limit)


def _spread(row: Row, name: str, what: str, factor: float) -> Spread:
    return Spread.of([factor * sample[what] for sample in row["samples"][name]])


def _microseconds(row: Row, name: str, event: str) -> Spread:
    return _spread(row, name, event, 1e6)


def _more(row: Row, name: str) -> Spread:
    """Milliseconds of processor time, less those with a callback that does nothing, round by round."""
    pairs = zip(row["samples"][name], row["samples"][NONE], strict=True)
    return Spread.of([1e3 * (sample["total"] - without["total"]) for sample, without in pairs])


def _of_frame(row: Row, name: str) -> Spread:
    """Milliseconds of processor time that the thread which draws takes for a frame."""
    return Spread.of([1e3 * sample["threads"] / sample["busy frames"] for sample in row["samples"][name]])


def _rate(row: Row, name: str, when: str, what: str, factor: float = 1.0) -> Spread:
    """How much is drawn in a second."""
    return Spread.of([factor * sample[f"{when} {what}"] / sample[f"{when} seconds"] for sample in row["samples"][name]])


def _highest(row: Row, name: str) -> int:
    return max(sample[f"{when} rows"] for sample in row["samples"][name] for when in ("busy", "idle"))
