"""The callback's state, and its place in a checkpoint.

One file of tensors and one of everything else, written in this order, so that an index means a complete
state.
"""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load, save_file
from torch import Tensor

from truestep_reference.rounding import Bound

FORMAT = "truestep_reference.bema/1"
TENSORS = "state.safetensors"
INDEX = "state.json"
SUBJECT_DTYPES = {"float32": torch.float32, "float64": torch.float64}


class Average(NamedTuple):
    """What is kept of one parameter, whole, float64.

    Attributes:
        theta_0: θ₀, the snapshot.
        ema: EMA_t at the last update.
        shadow: θ′_t at the last update.
        bounds: How far rounding may take a subject that computes in each of ``SUBJECT_DTYPES`` from the two.
    """

    theta_0: Tensor
    ema: Tensor
    shadow: Tensor
    bounds: dict[torch.dtype, Bound]


def at_snapshot(theta: Tensor) -> Average:
    """θ₀ ← θ_τ, EMA ← θ_τ, θ′ ← θ_τ, all exactly.

    Args:
        theta: θ_τ, float64.

    Returns:
        The average that consists of θ_τ alone.
    """
    exact = torch.zeros_like(theta)
    bounds = {dtype: Bound(ema=exact, shadow=exact) for dtype in SUBJECT_DTYPES.values()}
    return Average(theta_0=theta, ema=theta, shadow=theta, bounds=bounds)


Origin = dict[str, Any]
"""What averages depend on: "step", "hyperparameters", and the parameters' "dtypes" and "shapes" by name."""


def write_state(directory: Path, averages: Mapping[str, Average], origin: Origin) -> None:
    """Writes the state. One process calls it.

    Args:
        directory: Where to; it is made if need be.
        averages: The state of each parameter, by name.
        origin: What it depends on, to be compared on reading.

    Raises:
        OSError: It cannot be written.
        SafetensorError: It cannot be written.
    """
    tensors = {}
    for name, average in averages.items():
        tensors[f"theta_0/{name}"] = average.theta_0
        tensors[f"ema/{name}"] = average.ema
        tensors[f"shadow/{name}"] = average.shadow
        for label, dtype in SUBJECT_DTYPES.items():
            tensors[f"ema_bound_{label}/{name}"] = average.bounds[dtype].ema
            tensors[f"shadow_bound_{label}/{name}"] = average.bounds[dtype].shadow
    directory.mkdir(parents=True, exist_ok=True)
    (directory / INDEX).unlink(missing_ok=True)
    save_file({key: tensor.cpu().clone() for key, tensor in tensors.items()}, directory / TENSORS)
    checksum = zlib.crc32((directory / TENSORS).read_bytes())
    index = json.dumps({"format": FORMAT, "crc32": checksum, "origin": origin}, indent=2)
    (directory / f"{INDEX}.partial").write_text(index)
    (directory / f"{INDEX}.partial").rename(directory / INDEX)


def read_state(directory: Path, origin: Origin, device: torch.device) -> dict[str, Average] | None:
    """Reads what ``write_state`` wrote. Every rank calls it.

    Args:
        directory: Where from.
        origin: What the averages of this training depend on.
        device: Where to put the tensors.

    Returns:
        The state of each parameter, by name, or None where there is no state.

    Raises:
        ValueError: The state is damaged, or of another step, other hyperparameters or another model.
    """
    path = directory / INDEX
    if not path.exists():
        return None
    remedy = f"deleting {directory} starts a new average"
    try:
        index = json.loads(path.read_text())
        format_, checksum, found = index["format"], index["crc32"], _flat(index["origin"])
        contents = (directory / TENSORS).read_bytes()
    except (ValueError, LookupError, TypeError, AttributeError, OSError) as error:
        raise ValueError(f"{path}: the state of BEMACallback is damaged ({error!r}): {remedy}") from error
    if format_ != FORMAT:
        raise ValueError(f"{path}: format is {format_!r}, but only {FORMAT!r} is known: {remedy}")
    if zlib.crc32(contents) != checksum:
        raise ValueError(f"{directory / TENSORS} is damaged: its CRC-32 is not {checksum}: {remedy}")
    expected = _flat(origin)
    for key in expected | found:
        if found.get(key) != expected.get(key):
            raise ValueError(
                f"{path}: {key} is {found.get(key)!r} there and {expected.get(key)!r} in this training: {remedy}"
            )
    tensors = {key: tensor.to(device) for key, tensor in load(contents).items()}
    return {
        name: Average(
            theta_0=tensors[f"theta_0/{name}"],
            ema=tensors[f"ema/{name}"],
            shadow=tensors[f"shadow/{name}"],
            bounds={
                dtype: Bound(ema=tensors[f"ema_bound_{label}/{name}"], shadow=tensors[f"shadow_bound_{label}/{name}"])
                for label, dtype in SUBJECT_DTYPES.items()
            },
        )
        for name in origin["shapes"]
    }


def _flat(origin: Origin) -> dict[str, Any]:
    """One entry for everything that can differ."""
    flat: dict[str, Any] = {"step": origin["step"]}
    for kind in ("hyperparameters", "dtypes", "shapes"):
        flat |= {f"{kind}[{name!r}]": value for name, value in origin[kind].items()}
    return flat
