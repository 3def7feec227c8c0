"""Random numbers for generation that no training and no other prompt has a part in."""

import hashlib
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


def prompt_seed(seed: int, step: int, index: int) -> int:
    """The seed of one prompt's generator at one step.

    Args:
        seed: The training's.
        step: The global step.
        index: The number of the prompt, from 0.

    Example:
        >>> prompt_seed(42, 100, 0)
        3569877506777598362
    """
    digest = hashlib.blake2b(f"{seed}/{step}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % 2**63


class OwnGenerators(TorchFunctionMode):
    """Within a `with` block, `torch.multinomial` draws each row of a matrix with a generator of that row.

    What a row gets then does not depend on the rows that it is in a batch with.

    Args:
        seeds: The seed of each row's generator.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        super().__init__()
        self._seeds = seeds
        self._generators: list[torch.Generator] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func not in (torch.multinomial, Tensor.multinomial):
            return func(*args, **(kwargs or {}))
        return self._draw(*args, **(kwargs or {}))

    def _draw(self, weights: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if weights.dim() != 2 or len(weights) != len(self._seeds):
            return torch.multinomial(weights, *args, **kwargs)
        if not self._generators:
            self._generators = [torch.Generator(weights.device).manual_seed(seed) for seed in self._seeds]
        rows = zip(weights.split(1), self._generators, strict=True)
        return torch.cat([torch.multinomial(row, *args, **kwargs, generator=own) for row, own in rows])


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Within a `with` block random numbers can be drawn and seeds set; at its end all generators are as before.

    All: Python's, NumPy's and PyTorch's global ones, of the CPU and of every device.
    """
    python = random.getstate()
    numpy = sys.modules["numpy"].random.get_state() if "numpy" in sys.modules else None
    has_devices = torch.accelerator.is_available()
    kind = torch.accelerator.current_accelerator() if has_devices else None
    try:
        with torch.random.fork_rng(
            devices=range(torch.accelerator.device_count() if has_devices else 0),
            device_type="cuda" if kind is None else kind.type,
        ):
            yield
    finally:
        random.setstate(python)
        if numpy is not None:
            sys.modules["numpy"].random.set_state(numpy)


def seed_global_generators(seed: int) -> None:
    """Seed what `random_states_kept` keeps, for models that draw in eval mode and for other ways of sampling."""
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)
    torch.manual_seed(seed)
