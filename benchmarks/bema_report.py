"""What was measured about BEMA, as tables and as a picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from drawing import pyplot, save
from measuring import COPY, Spread
from reporting import Row, Table, in_words, large, millions, milliseconds, short, what

_MIB = 2**20


def tables(results: Mapping[str, Any]) -> list[Table]:
    """All tables that there are measurements for.

    Args:
        results: `environment`, and the rows of `one process`, `ranks` and `training`.
    """
    made = [
        _in_one_process(results["one process"]),
        _memory(results["one process"]),
        _ranks(results["ranks"]),
        _training(results["training"]),
        _promises(results),
    ]
    return [table for table in made if table.rows]


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Draw the update's time against the copy, and what ranks share, with the conditions below.

    Args:
        results: As for `tables`.
        path: Where to, with a suffix that matplotlib knows.
    """
    plt = pyplot()
    figure, (times, shares) = plt.subplots(1, 2, figsize=(13, 6), width_ratios=(3, 2), layout="constrained")
    rows = results["one process"]
    for offset, name, colour in ((-0.2, "truestep", "tab:blue"), (0.2, "TRL", "tab:orange")):
        spreads = [Spread.of_ratios(row["seconds"][name], row["seconds"][COPY]) for row in rows]
        medians = [spread.median for spread in spreads]
        errors = [
            [spread.median - spread.low for spread in spreads],
            [spread.high - spread.median for spread in spreads],
        ]
        places = [place + offset for place in range(len(rows))]
        bars = times.bar(places, medians, 0.4, yerr=errors, capsize=2, label=name, color=colour)
        times.bar_label(bars, fmt="%.1f", fontsize=8, padding=2)
    times.axhline(1, color="black", linewidth=0.8, label="copy_ of the parameters")
    times.set_yscale("log")
    times.set_xticks(
        range(len(rows)), [f"{row['model']}\n{millions(row)}\n{short(row['dtype'])}" for row in rows], fontsize=8
    )
    times.set_ylabel("time of an update ÷ time of copy_")
    times.set_title("One update in one process (medians, quartiles)")
    times.legend()

    for row in results["ranks"]:
        counts = [1, row["ranks"]]
        label = f"{millions(row)} {short(row['dtype'])}"
        ratio = _alone_ratio(row).median
        shares.plot(counts, [1, ratio], marker="o", linewidth=0.8, label=f"time, {label}")
    counts = sorted({1, *(row["ranks"] for row in results["ranks"])})
    shares.plot(
        counts, [1 / count for count in counts], color="black", linestyle="--", label="1 / ranks = share of buffers"
    )
    shares.set_xscale("log", base=2)
    shares.set_yscale("log", base=2)
    shares.set_xticks(counts, [str(count) for count in counts])
    shares.set_xlabel("DDP ranks of one thread")
    shares.set_ylabel("of what one rank needs")
    shares.set_title("truestep's update on a rank, one rank at a time")
    shares.legend(fontsize=8)

    save(figure, path, results["environment"])


def _in_one_process(rows: Sequence[Row]) -> Table:
    return Table(
        "One update in one process",
        "Medians of interleaved rounds, from cold caches; [quartiles] of the ratios, which are taken round by round. "
        "copy_ copies the model's parameters to other memory of the same size.",
        ("model", "parameters", "dtype", "copy_ ms", "truestep ms", "TRL ms", "truestep ÷ copy_", "TRL ÷ truestep"),
        [
            (
                *what(row),
                *(milliseconds(row["seconds"][name]) for name in (COPY, "truestep", "TRL")),
                in_words(Spread.of_ratios(row["seconds"]["truestep"], row["seconds"][COPY])),
                in_words(Spread.of_ratios(row["seconds"]["TRL"], row["seconds"]["truestep"])),
            )
            for row in rows
        ],
    )


def _memory(rows: Sequence[Row]) -> Table:
    return Table(
        "Memory of one process",
        "In units of the model's parameters, and in MiB. `buffers`: tensors that stay; `resident`: what the kernel "
        "counts for them. `peak`: what one update needs on top, as tensors and as resident memory (which reuses what "
        "earlier updates have left on the heap). TRL's buffers for bfloat16 include a float32 model. "
        "`page faults`: in one update; they are most of TRL's time, and how many there are depends on the allocator.",
        (
            "model",
            "parameters",
            "dtype",
            "callback",
            "buffers",
            "resident",
            "peak, tensors",
            "peak, resident",
            "page faults",
        ),
        [
            (
                *what(row),
                name,
                *(
                    f"{memory[quantity] / row['bytes']:.2f} ({memory[quantity] / _MIB:.1f} MiB)"
                    for quantity in ("buffers", "resident", "peak allocated", "peak resident")
                ),
                str(memory["page faults"]),
            )
            for row in rows
            for name, memory in row["memory"].items()
        ],
    )


def _ranks(rows: Sequence[Row]) -> Table:
    def line(row: Row, ranks: int) -> tuple[str, ...]:
        seconds, base = row["seconds"][ranks], row["seconds"][1]
        buffers = {name: sizes / row["bytes"] for name, sizes in row["buffers"][ranks].items()}
        return (
            *what(row),
            str(ranks),
            *(milliseconds(seconds["together"][name]) for name in (COPY, "truestep", "TRL")),
            in_words(Spread.of_ratios(seconds["together"]["TRL"], seconds["together"]["truestep"])),
            milliseconds(seconds["alone"]["truestep"]),
            "1"
            if ranks == 1
            else in_words(Spread.of_ratios(seconds["alone"]["truestep"], base["alone"]["truestep"]), 3),
            f"{buffers['truestep']:.3f}",
            f"{buffers['TRL']:.3f}",
            f"{row['peak allocated'][ranks]['truestep'] / _MIB:.1f} MiB",
        )

    return Table(
        "One update under DDP",
        "Ranks of one thread each; the slowest rank counts. `together`: all ranks at once, on one memory bus and, "
        "where there are more ranks than cores, in turns on them; every rank copies the whole model for copy_. "
        "`alone`: one rank at a time, as on machines of their own; `of one rank` is the ratio to the row of one rank, "
        "which takes turns with the others in the same rounds. Buffers are those of the rank that has most, in units "
        "of the model's parameters; the peak is that of an update's temporary tensors.",
        (
            "model",
            "parameters",
            "dtype",
            "ranks",
            "copy_ ms",
            "truestep ms, together",
            "TRL ms, together",
            "TRL ÷ truestep",
            "truestep ms, alone",
            "of one rank",
            "buffers",
            "TRL's buffers",
            "peak",
        ),
        [line(row, ranks) for row in rows for ranks in (1, row["ranks"])],
    )


def _training(rows: Sequence[Row]) -> Table:
    return Table(
        "A training step, blocked",
        "Steps of a Trainer with AdamW on one short sequence, so that a step is about as quick as it can be. `update`: "
        "what a callback adds to a step with an update; `between`: to a step without one (by default, 399 of 400).",
        ("model", "parameters", "dtype", "step ms", "callback", "update ms", "of a step", "between ms"),
        [
            (
                *what(row),
                milliseconds(row["step"]),
                name,
                milliseconds(row["update"][name]),
                f"{Spread.of(row['update'][name]).median / Spread.of(row['step']).median:.1%}",
                milliseconds(row["between"][name]) if name in row["between"] else "",
            )
            for row in rows
            for name in row["update"]
        ],
    )


def _promises(results: Mapping[str, Any]) -> Table:
    return Table(
        "What is promised for 100 million parameters",
        "In one process with TRL, default allocator. Medians of this run; a busy machine blurs them.",
        ("model", "dtype", "what", "promised", "measured"),
        [*_promises_in_one_process(results["one process"]), *_promises_of_ranks(results["ranks"])],
    )


def _promises_in_one_process(rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    for row in large(rows):
        seconds, peak = row["seconds"], row["memory"]["truestep"]["peak allocated"]
        faster = Spread.of_ratios(seconds["TRL"], seconds["truestep"]).median
        over_copy = Spread.of_ratios(seconds["truestep"], seconds[COPY]).median
        name = (row["model"], short(row["dtype"]))
        if row["dtype"] == "float32":
            yield (*name, "times faster than TRL's", "≥ 8", f"{faster:.1f}")
            yield (*name, "times the copy_", "≤ 2.2", f"{over_copy:.2f}")
        else:
            yield (*name, "times faster than TRL's", "≥ 4", f"{faster:.1f}")
        yield (*name, "temporary tensors", "not the model's size", f"{peak / row['bytes']:.1%} of it")


def _promises_of_ranks(rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    for row in (row for row in large(rows) if row["ranks"] == 2):
        name = (row["model"], short(row["dtype"]))
        share = row["buffers"][2]["truestep"] / row["buffers"][1]["truestep"]
        yield (*name, "an update on one of two ranks, of one rank's", "0.5 ± 5 %", f"{_alone_ratio(row).median:.3f}")
        yield (*name, "buffers on one of two ranks, of one rank's", "0.5 ± 5 %", f"{share:.3f}")


def _alone_ratio(row: Row) -> Spread:
    return Spread.of_ratios(*(row["seconds"][ranks]["alone"]["truestep"] for ranks in (row["ranks"], 1)))
