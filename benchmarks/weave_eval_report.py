"""What was measured about WeaveCallback, as tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from measuring import Spread
from reporting import Row, Table, in_words, verdict
from weave_eval_contest import NONE, PREDICTIONS, SCORERS, TRACED, TRL, TRUESTEP

_LIMITS = {TRUESTEP: 4.0, TRACED: 1.2}
"""How many times less than with TRL's."""


def tables(rows: Sequence[Row]) -> list[Table]:
    """All tables.

    Args:
        rows: What `compare` has returned for each case.
    """
    return [_times(rows), _promises(rows)]


def _times(rows: Sequence[Row]) -> Table:
    return Table(
        f"Training time lost, {PREDICTIONS} predictions with {len(SCORERS)} scores in each evaluation",
        "Seconds; medians and [quartiles] of rounds. `training`: from the beginning of `Trainer.train()` to its end. "
        "`lost`: that, less the same without a callback in the same round. `in events`: what the callback's events "
        "take; the rest of `lost` is what its process or threads take from the training beside them. `completing`: "
        "from the beginning of an evaluation's event to the end of the model's last forward in it. `afterwards`: what "
        "has to be waited for, once the training is over, until all has arrived; it is not lost to the training. Nor "
        "does the import of Weave count that TRL's has before the training; truestep's is beside the training.",
        (
            "evaluations",
            "callback",
            "training",
            "lost",
            "in events",
            "completing",
            "lost besides completing",
            "afterwards",
        ),
        [
            (
                row["evaluations"],
                name,
                in_words(_spread(row, name, "training")),
                *(
                    ("",) * 5
                    if name == NONE
                    else (
                        in_words(Spread.of(_lost(row, name))),
                        in_words(_spread(row, name, "events")),
                        in_words(_spread(row, name, "completing")),
                        in_words(Spread.of(_lost_besides(row, name))),
                        in_words(_spread(row, name, "afterwards")),
                    )
                ),
            )
            for row in rows
            for name in row["samples"]
        ],
    )


def _promises(rows: Sequence[Row]) -> Table:
    return Table(
        "What is promised",
        "In one run with TRL's: its median over truestep's, and in brackets its lower quartile over truestep's upper "
        "one, and its upper over truestep's lower. A busy machine blurs them.",
        ("evaluations", "callback", "what", "promised", "measured", ""),
        [line for row in rows for line in _promises_of(row)],
    )


def _promises_of(row: Row) -> Iterator[tuple[str, ...]]:
    for name, limit in _LIMITS.items():
        for what, lost in (("time lost", _lost), ("time lost besides completing", _lost_besides)):
            ours, theirs = Spread.of(lost(row, name)), Spread.of(lost(row, TRL))
            middle, least, most = (
                _ratio(above, below)
                for above, below in (
                    (theirs.median, ours.median),
                    (theirs.low, ours.high),
                    (theirs.high, ours.low),
                )
            )
            is_met = verdict(theirs.median >= limit * ours.median)
            yield (
                row["evaluations"],
                name,
                f"TRL's {what} ÷ truestep's",
                f"≥ {limit:g}",
                f"{middle} [{least}–{most}]",
                is_met,
            )


def _ratio(theirs: float, ours: float) -> str:
    return f"{theirs / ours:.2f}" if ours > 0 else "∞"  # where noise is more than what is lost


def _spread(row: Row, name: str, what: str) -> Spread:
    return Spread.of([sample[what] for sample in row["samples"][name]])


def _lost(row: Row, name: str) -> list[float]:
    """By how many seconds the training takes longer than without a callback, round by round."""
    pairs = zip(row["samples"][name], row["samples"][NONE], strict=True)
    return [sample["training"] - without["training"] for sample, without in pairs]


def _lost_besides(row: Row, name: str) -> list[float]:
    """The same, less what it takes to complete the prompts."""
    pairs = zip(_lost(row, name), row["samples"][name], strict=True)
    return [lost - sample["completing"] for lost, sample in pairs]
