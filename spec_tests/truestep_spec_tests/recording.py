"""Trajectories of the parameters: drawn from a seed, recorded in a training, kept in a file to be followed again."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

Kind = Literal["walk", "jumps", "cancelling"]


@dataclass
class Trajectory:
    """θ_t for t = 0, 1, 2, …, whole, in the dtype of the live parameters.

    Attributes:
        steps: For each step, the parameters by name.
        about: What else a file with the trajectory says: how it came about.
    """

    steps: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    def save(self, file: Path) -> None:
        """Write it to one safetensors file, with `about` as JSON in its header."""
        tensors = {f"{step}/{name}": value for step, values in self.steps.items() for name, value in values.items()}
        save_file(tensors, file, metadata={"truestep": json.dumps(self.about)})

    @classmethod
    def load(cls, file: Path) -> "Trajectory":
        """Read what `save` wrote.

        Raises:
            ValueError: The file cannot be read, or holds no trajectory.
        """
        steps: dict[int, dict[str, Tensor]] = {}
        try:
            opened = safe_open(file, framework="pt")
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file}: cannot be read ({error})") from error
        with opened as contents:
            about = (contents.metadata() or {}).get("truestep")
            if about is None:
                raise ValueError(f"{file}: not a trajectory")
            for key in contents.keys():  # noqa: SIM118 - not a mapping
                step, _, name = key.partition("/")
                steps.setdefault(int(step), {})[name] = contents.get_tensor(key)
        return cls(dict(sorted(steps.items())), json.loads(about))


def draw(parameters: Mapping[str, Tensor], steps: int, seed: int, kind: Kind = "walk") -> Trajectory:
    """A synthetic trajectory, the same on every rank for a seed.

    Args:
        parameters: Where it starts, by name.
        steps: How many steps it has after step 0.
        seed: Seeds the generator.
        kind: "walk" moves a little at every step; "jumps" draws each step anew over many orders of magnitude;
            "cancelling" swings about a large offset, so that differences lose most of their digits.
    """
    generator = torch.Generator().manual_seed(seed)
    trajectory = Trajectory({0: {name: value.clone() for name, value in parameters.items()}})
    for step in range(1, steps + 1):
        before = trajectory.steps[step - 1]
        trajectory.steps[step] = {name: _move(value, step, kind, generator) for name, value in before.items()}
    return trajectory


def _move(value: Tensor, step: int, kind: Kind, generator: torch.Generator) -> Tensor:
    noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
    if kind == "walk":
        return (value.double() + 0.03 * noise).to(value.dtype)
    if kind == "cancelling":
        return (100 + (-1) ** step * noise).to(value.dtype)
    exponents = torch.randint(-6, 4, value.shape, generator=generator)
    return (noise * 10.0**exponents).to(value.dtype)


class Recorder:
    """Writes θ_t and what the subject shows at every step of a training to a directory, from rank 0.

    It is a `Comparator`'s `on_compared`, so what it holds in memory is one step.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def __call__(self, step: int, live: dict[str, Tensor], shown: dict[str, Tensor]) -> None:
        if not dist.is_initialized() or dist.get_rank() == 0:
            tensors = {f"theta/{name}": value for name, value in live.items()} | {
                f"shown/{name}": value for name, value in shown.items()
            }
            save_file(tensors, self.directory / f"{step:08d}.safetensors")


class Recorded(Mapping[int, dict[str, Tensor]]):
    """One part of what a `Recorder` wrote, step by step; a step is read from its file when it is asked for.

    Args:
        directory: The recorder's directory.
        part: "theta" for θ_t, "shown" for what the subject shows.
    """

    def __init__(self, directory: Path, part: Literal["theta", "shown"]) -> None:
        self._files = {int(file.stem): file for file in sorted(directory.glob("*.safetensors"))}
        self._prefix = f"{part}/"

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        tensors = load_file(self._files[step])
        return {key.removeprefix(self._prefix): value for key, value in tensors.items() if key.startswith(self._prefix)}

    def __iter__(self) -> Iterator[int]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)
