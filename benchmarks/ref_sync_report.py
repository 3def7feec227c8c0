"""What was measured about SyncRefModelCallback, as tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from measuring import COPY, Spread
from ref_sync_contest import ALIKE, SINGLE
from reporting import Row, Table, in_words, large, milliseconds, short, what

_MB = 1e6
_WHICH = ("model", "parameters", "dtype", "models lie", "ranks")


def tables(rows: Sequence[Row]) -> list[Table]:
    """All tables that there are measurements for, of the rows that `ref_sync_contest` returns."""
    return [table for table in (_time(rows), _memory(rows), _outcome(rows), _promises(rows)) if table.rows]


def _time(rows: Sequence[Row]) -> Table:
    return Table(
        "One sync",
        "Medians of interleaved rounds, from cold caches; [quartiles] of the ratios, which are taken round by round. "
        "Ranks have one thread each and begin together; the slowest counts. copy_ copies what the rank holds of the "
        "reference to other memory of the same size. `reference whole`: all of the reference on every rank, the policy "
        "under ZeRO-3.",
        (*_WHICH, "copy_ ms", "truestep ms", "TRL ms", "truestep ÷ copy_", "TRL ÷ truestep"),
        [
            (
                *_which(row),
                *(milliseconds(row["seconds"][name]) for name in (COPY, "truestep", "TRL")),
                in_words(_ratio(row, "truestep", COPY)),
                in_words(_ratio(row, "TRL", "truestep"), 1),
            )
            for row in rows
        ],
    )


def _memory(rows: Sequence[Row]) -> Table:
    return Table(
        "Memory and traffic of one sync",
        "Of the rank that takes most. `held`: what it holds of the reference. `peak`: what one sync needs beside the "
        "models, as tensors and as resident memory (which reuses what earlier syncs have left on the heap), in MB (1e6 "
        "bytes) and, in brackets, in units of the largest parameter. `collectives`: operations of torch.distributed.",
        (
            *_WHICH,
            "largest parameter",
            "held",
            "callback",
            "peak, tensors",
            "peak, resident",
            "page faults",
            "collectives",
        ),
        [
            (
                *_which(row),
                f"{row['largest parameter'] / _MB:.1f} MB",
                f"{row['held'] / _MB:.1f} MB",
                name,
                *(
                    f"{memory[quantity] / _MB:.1f} MB ({memory[quantity] / row['largest parameter']:.2f})"
                    for quantity in ("peak allocated", "peak resident")
                ),
                str(memory["page faults"]),
                str(memory["collectives"]),
            )
            for row in rows
            for name, memory in row["memory"].items()
        ],
    )


def _outcome(rows: Sequence[Row]) -> Table:
    return Table(
        "How far TRL's reference is from truestep's",
        "After all rounds: the largest difference of two weights on each rank, in units of the largest weight. TRL's "
        "rounds twice in a sync. Of models under ZeRO-3 it moves the weights on rank 0 and has DeepSpeed distribute "
        "them, which leaves a reference that is whole on every rank as it was on all ranks but that.",
        (*_WHICH, "largest difference, by rank"),
        [(*_which(row), ", ".join(f"{difference:.1e}" for difference in row["largest differences"])) for row in rows],
    )


def _promises(rows: Sequence[Row]) -> Table:
    return Table(
        "What is promised for 100 million parameters",
        "Under ZeRO-3 at 2 ranks, in one run with TRL's, default allocator. Medians of this run; a busy machine blurs "
        "them.",
        ("model", "dtype", "models lie", "what", "promised", "measured"),
        [line for row in large(rows) if row["layout"] != SINGLE and row["ranks"] == 2 for line in _promises_of(row)],
    )


def _promises_of(row: Row) -> Iterator[tuple[str, ...]]:
    memory, largest = row["memory"]["truestep"], row["largest parameter"]
    name = (row["model"], short(row["dtype"]), row["layout"])
    if row["layout"] == ALIKE:
        yield (*name, "times faster than TRL's", "≥ 30", f"{_ratio(row, 'TRL', 'truestep').median:.1f}")
        yield (*name, "times the copy_ of the shard", "≤ 1.5", f"{_ratio(row, 'truestep', COPY).median:.2f}")
        yield (*name, "collectives", "0", str(memory["collectives"]))
    for quantity, words in (("peak allocated", "peak, tensors"), ("peak resident", "peak, resident")):
        promised = "< 10 MB" if row["layout"] == ALIKE else f"≤ {largest / _MB:.1f} MB, the largest parameter"
        yield (*name, words, promised, f"{memory[quantity] / _MB:.1f} MB")


def _which(row: Row) -> tuple[str, ...]:
    return *what(row), row["layout"], str(row["ranks"])


def _ratio(row: Row, above: str, below: str) -> Spread:
    return Spread.of_ratios(row["seconds"][above], row["seconds"][below])
