"""What was measured about LogCompletionsCallback, as tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from log_completions_contest import NEW_TOKENS
from measuring import Spread
from reporting import Row, Table, in_words, milliseconds, verdict, what

_ENDS = 5
"""Loggings at the beginning and at the end of a training, of which medians are compared."""

_WANDB = "wandb"
_LIMITS = {1: 1.6, 2: 3.0}
"""How many times as fast as TRL's, by number of ranks."""


def tables(results: Mapping[str, Any]) -> list[Table]:
    """All tables that there are measurements for.

    Args:
        results: The rows of `completing`, `in double` and `logging`.
    """
    completing, logging = results["completing"], results["logging"]
    made = [
        _throughput(completing),
        _texts([*completing, *results["in double"]]),
        _cost(logging),
        _promises([*_promises_of_throughput(completing), *_promises_of_logging(logging)]),
    ]
    return [table for table in made if table.rows]


def _throughput(rows: Sequence[Row]) -> Table:
    return Table(
        "Completions in a second",
        f"Greedy, {NEW_TOKENS} new tokens for each prompt, none of which ends early; TRL's has batches of 8, the "
        "trainer's default. Medians of interleaved rounds, and [quartiles] of the ratios, which are taken round by "
        "round; the slowest rank counts. Ranks have one thread each. Only prompts count that are completed for the "
        "first time: TRL's completes each of them on every rank.",
        ("model", "parameters", "dtype", "ranks", "prompts", "tokens", "truestep /s", "TRL /s", "truestep ÷ TRL"),
        [
            (
                *what(row),
                str(row["ranks"]),
                str(row["prompts"]),
                "{shortest}–{longest}, median {median}".format(**row["tokens"]),
                *(f"{row['prompts'] / Spread.of(row['seconds'][name]).median:.1f}" for name in ("truestep", "TRL")),
                in_words(_times_faster(row)),
            )
            for row in rows
        ],
    )


def _texts(rows: Sequence[Row]) -> Table:
    return Table(
        "The same texts",
        "`in common`: prompts that get the same completion from both. The model has no dropout, which TRL's would "
        "apply. Other batches round otherwise: in float32 that can decide between two tokens that are about equally "
        "likely, in float64 hardly ever. `rows`: what is logged at a step; under DDP TRL's has each prompt once for "
        "each rank.",
        (
            "model",
            "parameters",
            "dtype",
            "ranks",
            "prompts",
            "in common",
            "different completions",
            "rows",
            "TRL's rows",
        ),
        [
            (
                *what(row),
                *(str(row[name]) for name in ("ranks", "prompts", "same", "different completions")),
                *(str(row["rows"][name]) for name in ("truestep", "TRL")),
            )
            for row in rows
        ],
    )


def _cost(rows: Sequence[Row]) -> Table:
    which = "" if not rows else f" {rows[0]['loggings']} times {rows[0]['rows']} rows"
    return Table(
        f"Logging{which}",
        "Time from the end of the last forward to the end of the step, in which truestep's also writes the local file "
        f"to disk (the row `none` does nothing else). `first`, `last`: medians of {_ENDS} loggings at either end of a "
        "training; `CPU`: in processor time of the process that trains, which others disturb less. Of several "
        "trainings, which take turns, the medians. `÷ text`: what the tracker's files have grown by, over the bytes of "
        "the prompts and completions alone; `local file`: the same for completions.jsonl.",
        (
            "tracker",
            "callback",
            "trainings",
            "total ms",
            "first ms",
            "last ms",
            "last ÷ first",
            "last ÷ first, CPU",
            "÷ text",
            "local file",
        ),
        [
            (
                row["tracker"],
                row["callback"],
                str(len(row["seconds"])),
                milliseconds(_totals(row)),
                milliseconds([first for first, _ in _ends(row["seconds"])]),
                milliseconds([last for _, last in _ends(row["seconds"])]),
                f"{_growth(row['seconds']):.2f}",
                f"{_growth(row['processor seconds']):.2f}",
                f"{row['bytes'] / row['text']:.2f}",
                f"{row['file'] / row['text']:.2f}" if row["file"] else "",
            )
            for row in rows
        ],
    )


def _promises(lines: Sequence[tuple[str, ...]]) -> Table:
    return Table(
        "What is promised",
        "In one run with TRL's. Medians of this run; a busy machine blurs them.",
        ("what", "promised", "measured", ""),
        lines,
    )


def _promises_of_throughput(rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    for row in rows:
        if row["ranks"] in _LIMITS:
            limit, measured = _LIMITS[row["ranks"]], _times_faster(row).median
            name = f"completions in a second ÷ TRL's, {' '.join(what(row))}, {row['ranks']} rank(s)"
            yield name, f"≥ {limit}", f"{measured:.2f}", verdict(measured >= limit)


def _promises_of_logging(rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    by_callback = {row["callback"]: row for row in rows if row["tracker"] == _WANDB}
    if not by_callback:
        return
    ours, theirs = by_callback["truestep"], by_callback["TRL"]
    size, growth = ours["bytes"] / ours["text"], _growth(ours["seconds"])
    faster = Spread.of_ratios(_totals(theirs), _totals(ours)).median
    yield "Weights & Biases: bytes on disk ÷ text", "≤ 5", f"{size:.2f}", verdict(size <= 5)
    yield "Weights & Biases: last loggings ÷ first", "≤ 1.5", f"{growth:.2f}", verdict(growth <= 1.5)
    yield "Weights & Biases: TRL's time ÷ truestep's", "≥ 10", f"{faster:.1f}", verdict(faster >= 10)


def _times_faster(row: Row) -> Spread:
    return Spread.of_ratios(row["seconds"]["TRL"], row["seconds"]["truestep"])


def _totals(row: Row) -> list[float]:
    """Seconds that all loggings of a training take, training by training."""
    return [sum(seconds) for seconds in row["seconds"]]


def _ends(trainings: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    """The medians of the first loggings and of the last ones, training by training."""
    return [(Spread.of(seconds[:_ENDS]).median, Spread.of(seconds[-_ENDS:]).median) for seconds in trainings]


def _growth(trainings: Sequence[Sequence[float]]) -> float:
    return Spread.of([last / first for first, last in _ends(trainings)]).median
