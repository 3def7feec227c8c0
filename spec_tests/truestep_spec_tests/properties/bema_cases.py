"""What the properties of BEMA are stated over: arguments, trajectories, and callbacks led along them."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import mpmath
import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments
from truestep_fixtures.models import Anew
from truestep_fixtures.topologies import write_parameters
from truestep_fixtures.training import Events

T = TypeVar("T")
Point = Mapping[str, Tensor]

BAD_ARGUMENTS: list[dict[str, Any]] = [
    *({"update_freq": value} for value in (0, -1, 1.5, 2.0, True, "3", None, math.nan)),
    *({"update_after": value} for value in (-1, 0.5, 0.0, False, "0", None, math.nan)),
    *(
        {name: value}
        for name in ("ema_power", "bias_power", "lag", "multiplier")
        for value in (-0.5, -1e-300, math.nan, math.inf, -math.inf, True, "1", None)
    ),
    *({"min_ema_multiplier": value} for value in (-0.1, 1.0000001, math.nan, math.inf, True, "0", None)),
    *({"device": value} for value in ("nowhere", "cuda:4096", "cpu:x", "", "meta", None, 0.0)),
]
"""Arguments that construction refuses, one at a time, all others at their defaults."""

BAD_SCHEDULES: list[dict[str, Any]] = [
    {"lag": 0, "multiplier": 0.0},
    {"lag": 0, "multiplier": 0.25, "update_freq": 3},
    {"lag": 0.5, "multiplier": 0.1, "update_freq": 2, "update_after": 2},
]
"""Arguments that are allowed each but give a base ρ + γ·(τ + φ) below one."""


def hyperparameters(**fixed: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Draws arguments of `BEMACallback`, all but the device, for trainings of a few steps.

    Args:
        fixed: Strategies to use in place of the ones here.
    """
    powers = st.sampled_from([0.0, 0.2, 0.5, 1.0]) | st.floats(0, 4, allow_subnormal=False)
    return st.fixed_dictionaries(
        {
            "update_freq": st.integers(1, 4),
            "ema_power": powers,
            "bias_power": powers,
            "lag": st.integers(1, 20) | st.floats(1, 20),
            "update_after": st.integers(0, 4),
            "multiplier": st.sampled_from([0.0, 0.5, 1.0]) | st.floats(0, 10),
            "min_ema_multiplier": st.sampled_from([0.0, 0.0, 0.1]) | st.floats(0, 1),
        }
        | fixed
    )


def trajectories(
    *, steps: int = 12, elements: int = 6, dtype: torch.dtype = torch.float32, largest: float = 1e4
) -> st.SearchStrategy[Tensor]:
    """Draws θ_0, θ_1, …: any finite numbers, in any order of magnitude.

    Args:
        steps: The largest number of steps after θ_0.
        elements: The largest number of elements.
        dtype: The dtype of θ.
        largest: The largest magnitude.

    Returns:
        Tensors of shape (steps + 1, elements).
    """
    width = 64 if dtype == torch.float64 else 32
    values = st.floats(-largest, largest, width=width)
    shapes = st.tuples(st.integers(2, steps + 1), st.integers(1, elements))
    arrays = shapes.flatmap(lambda shape: hnp.arrays(f"float{width}", shape, elements=values))
    return arrays.map(lambda array: torch.from_numpy(np.ascontiguousarray(array)).to(dtype))


class Weights(Anew):
    """A module that is nothing but named parameters.

    Args:
        values: The parameters.
    """

    def __init__(self, values: Point) -> None:
        super().__init__(values)
        for name, value in values.items():
            self.register_parameter(name, nn.Parameter(value.clone()))


def one_parameter(trajectory: Tensor) -> list[Point]:
    """Makes the points of a trajectory the values of a single parameter `w`."""
    return [{"w": theta} for theta in trajectory]


def lead(
    callbacks: Sequence[TrainerCallback],
    points: Sequence[Point],
    args: TrainingArguments,
    look: Callable[[Events], T],
    model: nn.Module | None = None,
) -> list[T]:
    """Leads callbacks along a trajectory, in a single process, without a training.

    Args:
        callbacks: They see every event, in this order.
        points: The parameters at train begin and after each step, by name.
        args: The training arguments that they see.
        look: Called at train begin and after each step.
        model: A module with these parameters; one that has nothing else by default.

    Returns:
        What `look` returned, by step.
    """
    model = Weights(points[0]) if model is None else model
    write_parameters(model, points[0])
    events = Events(model, args, callbacks)
    events.train_begin()
    seen = [look(events)]
    for t, point in enumerate(points[1:], start=1):
        write_parameters(model, point)
        events.step(t)
        seen.append(look(events))
    return seen


def instants(t: int, *, update_after: int, update_freq: int) -> list[int]:
    """Lists the updates up to step t, which are τ + φ, τ + 2φ and so on."""
    return list(range(update_after + update_freq, t + 1, update_freq))


def exact_power(t: int, power: float, *, lag: float, multiplier: float) -> mpmath.mpf:
    """(ρ + γ·t)^(−power), to the working precision."""
    base = mpmath.mpf(lag) + mpmath.mpf(multiplier) * t
    return base ** -mpmath.mpf(power)


def exact_shadow(trajectory: Tensor, t: int, **h: Any) -> list[mpmath.mpf]:
    """θ′ after step t, as one weighted sum over the trajectory instead of a recurrence.

    With the updates at t_1, …, t_n, EMA = w_0·θ_τ + Σ w_i·θ_{t_i}, where w_i = β_i·Π_{j>i} (1 − β_j) and
    w_0 = Π (1 − β_j).

    Args:
        trajectory: θ_0, θ_1, … in rows.
        t: The step; only what came until then counts.
        h: Arguments of `BEMACallback`.

    Returns:
        One number for each element, to the working precision.
    """
    theta = [[mpmath.mpf(float(x)) for x in row] for row in trajectory]
    τ, updates = h["update_after"], instants(t, update_after=h["update_after"], update_freq=h["update_freq"])
    if t < τ or not updates:
        return theta[min(t, τ)]
    schedule = {"lag": h["lag"], "multiplier": h["multiplier"]}
    betas = [max(exact_power(i, h["ema_power"], **schedule), h["min_ema_multiplier"]) for i in updates]
    last = updates[-1]
    alpha = exact_power(last, h["bias_power"], **schedule) if h["bias_power"] > 0 else mpmath.mpf(0)
    rest = [mpmath.fprod(1 - beta for beta in betas[i:]) for i in range(len(betas) + 1)]
    weights = [rest[0]] + [beta * rest[i + 1] for i, beta in enumerate(betas)]
    points = [theta[τ]] + [theta[i] for i in updates]
    return [
        mpmath.fdot(weights, column) + alpha * (theta[last][k] - theta[τ][k])
        for k, column in enumerate(zip(*points, strict=True))
    ]


def distance(values: Tensor, exact: Sequence[mpmath.mpf]) -> Tensor:
    """|values − exact|, each rounded up to float64, so that no error is understated."""
    differences = [abs(mpmath.mpf(float(value)) - truth) for value, truth in zip(values, exact, strict=True)]
    return torch.tensor([math.nextafter(float(x), math.inf) if x else 0.0 for x in differences])
