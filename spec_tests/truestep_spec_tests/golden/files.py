"""Golden files: where they lie, and how values stand in them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import truestep_fixtures
from torch import Tensor

DIRECTORY = Path(truestep_fixtures.__file__).parent / "golden"
"""Where the files are that come with the package."""

FORMAT = 1
"""The version of the format."""

WIDTH = 120
"""What fits into a line of this many letters stays on one."""

Json = Any


def read(directory: Path, stem: str) -> Json:
    """The contents of a golden file.

    Args:
        directory: Where it lies.
        stem: Its name without the suffix.

    Raises:
        ValueError: It cannot be read, or is of another version.
    """
    file = directory / f"{stem}.json"
    try:
        contents = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    found = contents.get("format") if isinstance(contents, dict) else None
    if found != FORMAT:
        raise ValueError(
            f"{file} has format={found!r}, and what is read here is format={FORMAT}: take the files of this version of "
            "Truestep, or the version that wrote these"
        )
    return contents


def text_of(value: Json, indent: int = 0) -> str:
    """JSON that can be read: what fits into a line is on one, everything else has a line for each part.

    Args:
        value: What is written.
        indent: How far in it begins.
    """
    line = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, dict | list) or indent + len(line) < WIDTH:
        return line
    if isinstance(value, dict):
        parts = [f"{json.dumps(name, ensure_ascii=False)}: {text_of(part, indent + 1)}" for name, part in value.items()]
    else:
        parts = [text_of(part, indent + 1) for part in value]
    lines = ",\n".join(" " * (indent + 1) + part for part in parts)
    return f"{line[0]}\n{lines}\n{' ' * indent}{line[-1]}"


def from_tensor(values: Tensor) -> list[str]:
    """The elements of a tensor in row-major order, each as `float.hex` has it."""
    return [value.hex() for value in values.double().flatten().tolist()]


def to_tensor(elements: list[str], shape: list[int]) -> Tensor:
    """The float64 tensor that `from_tensor` wrote."""
    return torch.tensor([float.fromhex(element) for element in elements], dtype=torch.float64).reshape(shape)


def marked(value: Any) -> Json:
    """A value with each float in it as an object, so that it is no integer and no text, and is exact."""
    if isinstance(value, float):
        return {"float": value.hex()}
    if isinstance(value, Mapping):
        return {name: marked(part) for name, part in value.items()}
    return [marked(part) for part in value] if isinstance(value, list | tuple) else value


def unmarked(value: Json) -> Any:
    """The value that `marked` wrote."""
    if isinstance(value, dict):
        if value.keys() == {"float"}:
            return float.fromhex(value["float"])
        return {name: unmarked(part) for name, part in value.items()}
    return [unmarked(part) for part in value] if isinstance(value, list) else value
