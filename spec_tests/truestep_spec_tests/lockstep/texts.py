"""Texts that are compared letter by letter, as the tensors that a comparison is made of."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from truestep_spec_tests.lockstep import Comparator, Divergence, Look


class TextComparator(Comparator):
    """Compares texts by name, and how many there are of what they are the texts of.

    Attributes:
        count: The name under which that number is compared.
    """

    has_distances = False
    count: str

    def texts(self, args: Any, state: Any) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """What the subject shows after an event, and what the reference has: both of `as_tensors`. Collective."""
        raise NotImplementedError

    def looks(self, live: Mapping[str, Tensor], args: Any, state: Any, control: Any, **kwargs: Any) -> Iterator[Look]:
        yield look(*self.texts(args, state))

    def followed(self, live: Mapping[str, Tensor], shown: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(live)

    def explained(self, divergence: Divergence, shown: Tensor | None, value: Tensor) -> Divergence:
        if divergence.parameter == self.count:
            return divergence
        subject = "nothing" if shown is None else _text(shown)
        return divergence._replace(index=(), subject=subject, reference=_text(value), shown_as="text")


def look(shown: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Look:
    """A look at a subject that has to show exactly what the reference has.

    Args:
        shown: What the subject shows, of `as_tensors`.
        expected: What the reference has, of `as_tensors`.
    """
    bounds = {name: torch.zeros(value.shape, dtype=torch.float64) for name, value in expected.items()}
    return Look(shown, {name: value.double() for name, value in expected.items()}, bounds)


def as_tensors(texts: Mapping[str, str], count: str, number: int) -> dict[str, Tensor]:
    """Texts as tensors: their bytes.

    Args:
        texts: Texts by name.
        count: A name for a number.
        number: How many there are of what they are the texts of.
    """
    tensors = {name: torch.tensor(list(text.encode()), dtype=torch.uint8) for name, text in texts.items()}
    return tensors | {count: torch.tensor(number)}


def _text(tensor: Tensor) -> str:
    return bytes(tensor.to(torch.uint8).tolist()).decode()
