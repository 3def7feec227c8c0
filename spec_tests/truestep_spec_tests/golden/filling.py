"""Fills golden files: what the reference answers to each case."""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import truestep_reference
from truestep_reference import generation, ref_sync, rounding, scores

from truestep_spec_tests.golden import cases, driving
from truestep_spec_tests.golden.driving import Point
from truestep_spec_tests.golden.files import FORMAT, Json, from_tensor, marked, text_of
from truestep_spec_tests.golden.trajectories import DESCRIPTION, ODD, draw, draw_not_finite, draw_pair


def fill(directory: Path) -> None:
    """Writes all golden files anew.

    Args:
        directory: Where to.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for stem, contents in FILES.items():
        with tempfile.TemporaryDirectory() as scratch, driving.quietly():
            text = text_of({"format": FORMAT, **contents(Path(scratch))})
        (directory / f"{stem}.json").write_text(f"{text}\n", encoding="utf-8")


def bema(scratch: Path) -> Json:
    """Averages at each step."""
    trajectories = {
        dtype: draw(f"average of {dtype}", DESCRIPTION, dtype)
        for dtype in dict.fromkeys(dtype for dtype, _ in cases.BEMA.values())
    }
    return {
        "callback": "BEMACallback",
        "clauses": [f"BEMA-{number}" for number in range(1, 9)],
        "trajectories": trajectories,
        "cases": [
            {
                "name": name,
                "trajectory": dtype,
                "arguments": arguments,
                "steps": list(_averages(trajectories[dtype], arguments, scratch)),
            }
            for name, (dtype, arguments) in cases.BEMA.items()
        ],
    }


def sync(scratch: Path) -> Json:
    """Reference models at each step."""
    trajectories = {
        name: draw_pair(f"policy in {name}", DESCRIPTION, *dtypes) for name, dtypes in cases.PAIRS.items()
    } | {"not finite": draw_not_finite()}
    return {
        "callback": "SyncRefModelCallback",
        "clauses": [f"SYNC-{number}" for number in range(1, 5)],
        "trajectories": trajectories,
        "cases": [
            {
                "name": name,
                "trajectory": trajectory,
                "arguments": settings,
                "steps": list(_blends(trajectories[trajectory], settings)),
            }
            for name, (trajectory, settings) in cases.SYNC.items()
        ],
    }


def zero3(scratch: Path) -> Json:
    """What ranks hold of both under ZeRO-3."""
    trajectory = draw_pair("on ranks", ODD, "float32", "float32")
    steps = {
        "BEMACallback": list(_averages(trajectory, cases.ON_RANKS["BEMACallback"], scratch)),
        "SyncRefModelCallback": list(_blends(trajectory, cases.ON_RANKS["SyncRefModelCallback"])),
    }
    return {
        "clauses": ["BEMA-18", "BEMA-19", "SYNC-6"],
        "trajectory": trajectory,
        "cases": [
            {
                "name": f"{callback} on {size} ranks",
                "callback": callback,
                "arguments": arguments,
                "ranks": [_held(trajectory, steps[callback], rank, size) for rank in range(size)],
            }
            for callback, arguments in cases.ON_RANKS.items()
            for size in cases.RANKS
        ],
    }


def weave_eval(scratch: Path) -> Json:
    """Summaries."""
    asked = {name: [_scores(of_prediction) for of_prediction in given] for name, given in cases.SCORES.items()}
    return {
        "callback": "WeaveCallback",
        "clauses": ["WEAVE-5"],
        "cases": [
            {
                "name": "evaluations with three scorers",
                "scorers": list(cases.SCORERS),
                "evaluations": [
                    {"name": name, "predictions": marked(predictions), "summary": marked(_summary(predictions))}
                    for name, predictions in asked.items()
                ],
            }
        ],
    }


def rich_progress(scratch: Path) -> Json:
    """Views after each event."""
    callback = truestep_reference.RichProgressCallback
    return {
        "callback": "RichProgressCallback",
        "clauses": ["RICH-2", "RICH-3"],
        "cases": [
            {
                "name": name,
                "events": [
                    event | {"view": view}
                    for event, view in zip(events, driving.views(callback(), events, scratch), strict=True)
                ],
            }
            for name, events in cases.EVENTS.items()
        ],
    }


def log_completions(scratch: Path) -> Json:
    """Rows of tables, and the seeds of prompts."""
    asked = {name: cases.TABLE | case for name, case in cases.TABLES.items()}
    callback = truestep_reference.LogCompletionsCallback
    return {
        "callback": "LogCompletionsCallback",
        "clauses": ["LOGC-1", "LOGC-2", "LOGC-10", "LOGC-11"],
        "window": 128,
        "cases": [
            {"name": name, **case, **_with_columns(driving.rows(callback, case, scratch / str(number)))}
            for number, (name, case) in enumerate(asked.items())
        ],
        "seeds": [
            {
                **dict(zip(("seed", "step", "prompt"), one, strict=True)),
                "seed_of_prompt": hex(generation.prompt_seed(*one)),
            }
            for one in cases.SEEDS
        ],
    }


FILES: dict[str, Callable[[Path], Json]] = {
    "bema": bema,
    "ref_sync": sync,
    "zero3": zero3,
    "weave_eval": weave_eval,
    "rich_progress": rich_progress,
    "log_completions": log_completions,
}
"""What makes the contents of each file, by the file's name without suffix; it is given a directory to use."""


# Averages and reference models


def _averages(trajectory: Json, arguments: Mapping[str, Any], scratch: Path) -> Iterator[Json]:
    callback = truestep_reference.BEMACallback(**arguments)
    dtype = getattr(torch, trajectory["dtype"])
    computed_in = torch.promote_types(dtype, torch.float32)
    for _ in driving.led(callback, driving.policy_of(trajectory), trajectory, scratch):
        yield _with_bounds(callback.shadow_values(), callback.shadow_bounds(computed_in, dtype))


def _blends(trajectory: Json, settings: Mapping[str, Any]) -> Iterator[Json]:
    """What the reference model holds, with a bound that runs from sync to sync.

    The bound of the reference implementation is that of a single sync. Here a subject goes on from what it holds
    itself, so that the bound after one sync is what the next one begins with.
    """
    dtype, of_policy = (getattr(torch, trajectory[name]) for name in ("reference_dtype", "dtype"))
    computed_in = torch.promote_types(torch.promote_types(dtype, of_policy), torch.float32)
    alpha = settings["ref_model_mixup_alpha"]
    values = {
        name: value
        for name, value in driving.point(trajectory, trajectory["reference"]).items()
        if name in trajectory["parameters"]
    }
    bounds = {name: torch.zeros_like(value) for name, value in values.items()}
    for t, policy in enumerate(driving.point(trajectory, step) for step in trajectory["steps"]):
        if ref_sync.is_sync(t, sync_steps=settings["ref_model_sync_steps"]):
            for name, before in values.items():
                values[name] = ref_sync.blend(policy[name], before, alpha)
                error = ref_sync.blend_error(
                    bounds[name],
                    policy=policy[name],
                    reference=before,
                    blended=values[name],
                    alpha=alpha,
                    dtype=computed_in,
                )
                bounds[name] = rounding.read_error(error, shadow=values[name], dtype=computed_in, read_dtype=dtype)
        yield _with_bounds(values, bounds)


def _with_bounds(values: Point, bounds: Point) -> Json:
    return {
        "values": {name: from_tensor(value) for name, value in values.items()},
        "bounds": {name: from_tensor(bound) for name, bound in bounds.items()},
    }


def _held(trajectory: Json, steps: Json, rank: int, size: int) -> Json:
    """What a rank holds at some steps."""
    ranges = {
        name: _range(torch.Size(about["shape"]).numel(), rank, size) for name, about in trajectory["parameters"].items()
    }
    return {
        "ranges": ranges,
        "steps": {
            str(t): {
                part: {name: elements[slice(*ranges[name])] for name, elements in steps[t][part].items()}
                for part in ("values", "bounds")
            }
            for t in cases.RANKS_LOOK_AT
        },
    }


def _range(count: int, rank: int, size: int) -> list[int]:
    """The elements [start, stop) of a parameter: partitions are equally long, and what is behind them is padding."""
    length = -(-count // size)
    return [min(rank * length, count), min((rank + 1) * length, count)]


# Scores


def _scores(of_prediction: list[int | float | None]) -> dict[str, int | float]:
    named = zip(cases.SCORERS, of_prediction, strict=True)
    return {name: score for name, score in named if score is not None}


def _summary(predictions: list[dict[str, int | float]]) -> dict[str, int | float]:
    of_scorers = [{name: {name: one[name]} if name in one else {} for name in cases.SCORERS} for one in predictions]
    return scores.summary(cases.SCORERS, of_scorers)


# Rows


def _with_columns(rows: list[Json]) -> Json:
    return {"columns": list(rows[0]), "rows": rows}
