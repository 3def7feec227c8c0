"""Trajectories of small models, drawn from seeds."""

import random
from collections.abc import Mapping
from typing import Any

import torch

from truestep_spec_tests.golden.files import Json, from_tensor

STEPS = 8
"""The number of steps of a trajectory."""

DESCRIPTION: dict[str, Any] = {
    "parameters": {
        "embedding.weight": {"shape": [3, 2], "trainable": True, "also_named": ["head.weight"]},
        "head.bias": {"shape": [3], "trainable": True, "also_named": []},
        "scale": {"shape": [], "trainable": True, "also_named": []},
        "frozen.weight": {"shape": [2, 1], "trainable": False, "also_named": []},
    },
    "buffers": {"norm.mean": {"shape": [2]}},
}
"""A model with parameters that are tied and frozen, one without dimensions, and a buffer."""

ODD: dict[str, Any] = {
    "parameters": {
        name: {"shape": shape, "trainable": True, "also_named": []}
        for name, shape in {"scale": [1], "shift": [3], "up.weight": [7, 3], "cube": [2, 3, 2], "bias": [5]}.items()
    },
    "buffers": {},
}
"""A model whose shapes no number of ranks divides."""


def draw(seed: str, described: Mapping[str, Any], dtype: str) -> Json:
    """A model's parameters and buffers, and how they move in a training.

    Args:
        seed: Of the numbers, which Python's generator draws: it draws the same everywhere.
        described: The model.
        dtype: Of the weights.
    """
    points, generator = [_point(seed, described)], random.Random(f"{seed}: steps")
    for _ in range(STEPS):
        points.append({name: [x + generator.uniform(-0.1, 0.1) for x in xs] for name, xs in points[-1].items()})
    return {"dtype": dtype, **described, "steps": [_rounded(point, dtype) for point in points]}


def draw_pair(seed: str, described: Mapping[str, Any], dtype: str, reference_dtype: str) -> Json:
    """A trajectory, and what a reference model holds at its begin; see `draw`."""
    reference = _rounded(_point(f"{seed}: reference", described), reference_dtype)
    return draw(seed, described, dtype) | {"reference_dtype": reference_dtype, "reference": reference}


def draw_not_finite() -> Json:
    """A trajectory with infinities and NaN in the policy and in the reference."""
    found = draw_pair("not finite", DESCRIPTION, "float32", "float32")
    found["steps"][2]["head.bias"] = ["inf", "nan", "-0x0.0p+0"]
    found["steps"][4]["scale"] = ["-inf"]
    found["reference"]["embedding.weight"][:2] = ["nan", "-inf"]
    return found


def _point(seed: str, described: Mapping[str, Any]) -> dict[str, list[float]]:
    generator = random.Random(seed)
    counts = {
        name: torch.Size(about["shape"]).numel()
        for name, about in (described["parameters"] | described["buffers"]).items()
    }
    return {name: [generator.uniform(-1, 1) for _ in range(count)] for name, count in counts.items()}


def _rounded(point: Mapping[str, list[float]], dtype: str) -> Json:
    return {name: from_tensor(torch.tensor(xs, dtype=getattr(torch, dtype))) for name, xs in point.items()}
