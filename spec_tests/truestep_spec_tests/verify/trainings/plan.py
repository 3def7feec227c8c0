"""Which trainings a verification consists of."""

import itertools
import random
from collections.abc import Sequence
from typing import Any

from truestep_fixtures.data import PROMPTS
from truestep_fixtures.topologies import TOPOLOGIES

from truestep_spec_tests.lockstep.weave_eval import SCORERS
from truestep_spec_tests.runs import Setup

RANKS = (2, 3)
"""World sizes of topologies with several ranks. On 3 ranks nothing divides evenly."""

SHORT = {
    "BEMACallback": "BEMA",
    "SyncRefModelCallback": "SYNC",
    "LogCompletionsCallback": "LOGC",
    "WeaveCallback": "WEAVE",
    "RichProgressCallback": "RICH",
}
"""What callbacks are called where there is little room: as their clauses are in SPEC.md."""

DTYPES = ("float32", "bfloat16", "float64")

WEAVE = (("single", 1), ("ddp", 2), ("zero3", 2), ("fsdp2", 2))
"""Topologies and world sizes of the runs of evaluations in Weave."""

RICH = (("single", 1), ("ddp", 2), ("zero3", 2))
"""Topologies and world sizes of the runs of a progress display."""


def identity(setup: Setup) -> tuple[str, str, str, str]:
    """What tells a training from all others of a verification: callback, topology, ranks and dtype."""
    return SHORT[setup.callback], setup.topology, str(setup.ranks), setup.dtype


def plan(
    *,
    implementation: str,
    callbacks: Sequence[str],
    topologies: Sequence[str] = (),
    ranks: Sequence[int] = (),
    dtypes: Sequence[str] = (),
    model: str = "qwen2",
    seed: int = 0,
    steps: int = 12,
) -> list[Setup]:
    """The runs of a verification, sorted by their number of ranks.

    Each run draws the callback's hyperparameters from the seed, so that another seed checks other ones.

    Args:
        implementation: What is tested.
        callbacks: Which of its callbacks.
        topologies: Only these; all by default.
        ranks: Only these world sizes, where the engine trains it also in float64. By default every topology runs on 2
            ranks in float32 and bfloat16, and on 3 in float32, but for persistent parameters; of BEMA, for which
            ZeRO-1 and 2 are as DDP, not these two either. Completions, which rounding may change in any other type, are
            compared in float64 alone, and on 3 ranks not in all topologies; evaluations in Weave, which are made
            of the same completions, in those of `WEAVE`. Of a progress display, to which weights are nothing, it is
            float32 alone, in those of `RICH`.
        dtypes: Only these, on every world size.
        model: Name of a built-in model, or a local model directory.
        seed: Seeds everything.
        steps: Optimizer steps of each training.
    """
    setups = []
    for callback, topology in itertools.product(callbacks, topologies or TOPOLOGIES):
        sizes = [1] if topology == "single" else list(ranks or RANKS)
        for size in sizes:
            if (topology == "single") != (size == 1) or (ranks and size not in ranks):
                continue
            for dtype in _dtypes(callback, topology, size, dtypes, everything=bool(ranks)):
                setup = Setup(implementation, topology, size, dtype, model, seed, steps, callback=callback)
                draw = random.Random(f"{seed} {' '.join(identity(setup))}")  # the same, whatever else is asked for
                setups.append(setup.on(**_drawn(callback, draw, steps)))
    return sorted(setups, key=lambda setup: setup.ranks)


def _dtypes(callback: str, topology: str, ranks: int, asked: Sequence[str], everything: bool) -> Sequence[str]:
    if callback in ("WeaveCallback", "RichProgressCallback"):
        runs, only = (WEAVE, "float64") if callback == "WeaveCallback" else (RICH, "float32")
        is_left_out = not everything and (topology, ranks) not in runs
        return [dtype for dtype in asked or DTYPES if dtype == only and not is_left_out]
    if callback == "LogCompletionsCallback":
        # The reference completes prompts token by token on every rank, and under ZeRO-3 each takes a while.
        is_left_out = not everything and ranks == 3 and topology in ("zero1", "zero2", "zero3_persistent")
        return [dtype for dtype in asked or DTYPES if dtype == "float64" and not is_left_out]
    if asked:
        return asked
    # DeepSpeed has no float64 training.
    trained = tuple(dtype for dtype in DTYPES if dtype != "float64" or not topology.startswith("zero"))
    if everything or ranks == 1:
        return trained
    if ranks == 2:
        return trained[:2]
    left_out_of_bema = ("zero1", "zero2") if callback == "BEMACallback" else ()
    return () if topology in ("zero3_persistent", *left_out_of_bema) else trained[:1]


def _drawn(callback: str, draw: random.Random, steps: int) -> dict[str, Any]:
    """The attributes of a setup that its seed decides."""
    if callback == "BEMACallback":
        return {"hyperparameters": _hyperparameters(draw, steps)}
    if callback in ("LogCompletionsCallback", "WeaveCallback"):
        prompts = draw.choice(list(PROMPTS))
        # Two loggings, or one if there is but one step, of few prompts: the reference takes its time.
        num_prompts, freq = draw.choice([1, 2] if prompts == "two" else [2, 3]), max(1, steps // 2)
        chosen = {
            "hyperparameters": {"num_prompts": num_prompts, "freq": freq},
            "generation": {"max_new_tokens": draw.choice([2, 3, 4]), "do_sample": draw.choice([False, True])},
            "prompts": prompts,
        }
        if callback == "WeaveCallback":
            chosen["hyperparameters"] = {"num_prompts": num_prompts}
            chosen["training"] = {"eval_strategy": "steps", "eval_steps": freq}
            chosen["scorers"] = draw.choice([list(SCORERS), None])
        return chosen
    if callback == "RichProgressCallback":
        freq = draw.choice([1, 2, max(1, steps // 2)])
        settings = {"eval_strategy": "steps", "eval_steps": freq, "logging_strategy": "steps", "logging_steps": 1}
        return {"hyperparameters": {}, "training": settings}
    settings = {
        # At least one sync, however few steps there are.
        "ref_model_sync_steps": min(draw.choice([1, 2, 3]), steps),
        "ref_model_mixup_alpha": draw.choice([0.05, 0.3, 0.5, 0.6, 0.9]),
    }
    return {"hyperparameters": {}, "training": settings}


def _hyperparameters(draw: random.Random, steps: int) -> dict[str, float]:
    return {
        # At least one update, however few steps there are.
        "update_freq": min(draw.choice([1, 2, 3]), max(1, steps // 2)),
        "update_after": min(draw.choice([0, 1, steps // 3]), steps // 2),
        "ema_power": draw.choice([0.2, 0.5, 0.9]),
        "bias_power": draw.choice([0.0, 0.2, 0.6]),
        "lag": draw.choice([1, 10]),
        "multiplier": draw.choice([0.5, 1.0]),
        "min_ema_multiplier": draw.choice([0.0, 0.05]),
    }
