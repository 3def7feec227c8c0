"""Which runs a verification consists of."""

import random
from collections.abc import Sequence

from truestep_fixtures.topologies import TOPOLOGIES

from truestep_spec_tests.runs import Setup

RANKS = (2, 3, 4)
"""World sizes of topologies with several ranks. On 3 ranks nothing divides evenly."""

DTYPES = ("float32", "bfloat16", "float64")


def plan(
    *,
    implementation: str,
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
        topologies: Only these; all by default.
        ranks: Only these world sizes. By default every topology runs on 2 ranks in float32 and bfloat16, those with
            sharded parameters also on 3 and 4, and float64 where the engine trains it.
        dtypes: Only these, on every world size.
        model: Name of a built-in model, or a local model directory.
        seed: Seeds everything.
        steps: Optimizer steps of each training.
    """
    setups = []
    for topology in topologies or TOPOLOGIES:
        sizes = [1] if topology == "single" else list(ranks or RANKS)
        for size in sizes:
            if (topology == "single") != (size == 1) or (ranks and size not in ranks):
                continue
            for dtype in dtypes or _dtypes(topology, size, everything=bool(ranks)):
                run = len(setups)
                setups.append(
                    Setup(
                        implementation=implementation,
                        topology=topology,
                        ranks=size,
                        dtype=dtype,
                        model=model,
                        seed=seed,
                        steps=steps,
                        hyperparameters=_hyperparameters(random.Random(f"{seed}/{run}"), steps),
                    )
                )
    return sorted(setups, key=lambda setup: setup.ranks)


def _dtypes(topology: str, ranks: int, everything: bool) -> tuple[str, ...]:
    # DeepSpeed has no float64 training.
    trained = tuple(dtype for dtype in DTYPES if dtype != "float64" or not topology.startswith("zero"))
    if everything or ranks == 1:
        return trained
    if ranks == 2:
        return trained[:2]
    return trained[:1] if topology in ("ddp", "zero3", "zero3_persistent", "fsdp2") else ()


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
