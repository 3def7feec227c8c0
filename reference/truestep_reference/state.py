"""A callback's state, and its place in a checkpoint.

One file of tensors and one of everything else, written in this order, so that an index means a complete
state.
"""

import json
import traceback
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load, save_file
from torch import Tensor
from transformers import Trainer, TrainingArguments

from truestep_reference.rounding import Bound

FORMAT = "truestep_reference/2"
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
"""What a state depends on: "step", "hyperparameters", and the parameters' "dtypes" and "shapes" by name."""


def write_averages(directory: Path, averages: Mapping[str, Average], origin: Origin) -> None:
    """Writes the state of BEMA, as ``write_tensors`` does.

    Args:
        directory: Where to.
        averages: The state of each parameter, by name.
        origin: What it depends on.
    """
    tensors = {}
    for name, average in averages.items():
        tensors[f"theta_0/{name}"] = average.theta_0
        tensors[f"ema/{name}"] = average.ema
        tensors[f"shadow/{name}"] = average.shadow
        for label, dtype in SUBJECT_DTYPES.items():
            tensors[f"ema_bound_{label}/{name}"] = average.bounds[dtype].ema
            tensors[f"shadow_bound_{label}/{name}"] = average.bounds[dtype].shadow
    write_tensors(directory, tensors, origin)


def read_averages(directory: Path, origin: Origin, device: torch.device) -> dict[str, Average] | None:
    """Reads the state of BEMA, as ``read_tensors`` does.

    Args:
        directory: Where from.
        origin: What the averages of this training depend on.
        device: Where to put the tensors.

    Returns:
        The state of each parameter, by name, or None where there is no state.
    """
    read = read_tensors(directory, origin)
    if read is None:
        return None
    tensors = {key: tensor.to(device) for key, tensor in read.items()}
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


def write_tensors(directory: Path, tensors: Mapping[str, Tensor], origin: Origin) -> None:
    """Writes a state. One process calls it.

    Args:
        directory: Where to; it is made if need be.
        tensors: All of the state, by names of one's choice.
        origin: What it depends on, to be compared on reading.

    Raises:
        OSError: It cannot be written.
        SafetensorError: It cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / INDEX).unlink(missing_ok=True)
    save_file({key: tensor.cpu().clone() for key, tensor in tensors.items()}, directory / TENSORS)
    checksum = zlib.crc32((directory / TENSORS).read_bytes())
    index = json.dumps({"format": FORMAT, "crc32": checksum, "origin": origin}, indent=2)
    (directory / f"{INDEX}.partial").write_text(index)
    (directory / f"{INDEX}.partial").rename(directory / INDEX)


def read_tensors(directory: Path, origin: Origin) -> dict[str, Tensor] | None:
    """Reads what ``write_tensors`` wrote. Every rank calls it.

    Args:
        directory: Where from.
        origin: What the state of this training depends on.

    Returns:
        The tensors, on the CPU, or None where there is no state.

    Raises:
        ValueError: The state is damaged, or of another step, other hyperparameters or another model.
    """
    path = directory / INDEX
    if not path.exists():
        return None
    remedy = f"deleting {directory} starts afresh"
    try:
        index = json.loads(path.read_text())
        format_, checksum, found = index["format"], index["crc32"], _flat(index["origin"])
        contents = (directory / TENSORS).read_bytes()
    except (ValueError, LookupError, TypeError, AttributeError, OSError) as error:
        raise ValueError(f"{path}: the state is damaged ({error!r}): {remedy}") from error
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
    return load(contents)


def checkpoint_written(args: TrainingArguments, t: int) -> Path:
    """Where the trainer puts the checkpoint of step t."""
    return Path(str(args.output_dir)) / f"checkpoint-{t}"


def checkpoint_resumed(args: TrainingArguments, t: int) -> Path:
    """The checkpoint that training resumes from.

    It can lie anywhere, and the trainer tells no callback where: the path is an argument of the functions that have
    led here. A loop without a trainer resumes from where it saves.
    """
    for frame, _ in traceback.walk_stack(None):
        path = frame.f_locals.get("resume_from_checkpoint")
        if isinstance(frame.f_locals.get("self"), Trainer) and isinstance(path, str):
            return Path(path)
    return checkpoint_written(args, t)


def _flat(origin: Origin) -> dict[str, Any]:
    """One entry for everything that can differ."""
    flat: dict[str, Any] = {"step": origin["step"]}
    for kind in ("hyperparameters", "dtypes", "shapes"):
        flat |= {f"{kind}[{name!r}]": value for name, value in origin[kind].items()}
    return flat
