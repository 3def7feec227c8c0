"""Completions: what is compared is every row of the table, letter by letter."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from truestep_fixtures.training import Attach
from truestep_reference import LogCompletionsCallback as ReferenceLogCompletionsCallback

from truestep_spec_tests.lockstep import Comparator, Comparisons, Divergence, Look, OnCompared
from truestep_spec_tests.observe import as_text, completions

COUNT = "number of rows"
"""The name under which it is compared how many rows there are."""


class CompletionsComparator(Comparator):
    """Compares the table.

    Args:
        on_compared: See `OnCompared`.

    Attributes:
        subject: The callback under test; it is there when the training begins.
        reference: The reference.
    """

    subject: TrainerCallback
    reference: ReferenceLogCompletionsCallback

    def __init__(self, on_compared: OnCompared | None = None) -> None:
        super().__init__(on_compared)

    def looks(self, live: Mapping[str, Tensor], args: Any, state: Any, control: Any, **kwargs: Any) -> Iterator[Look]:
        expected = as_tensors([as_text(row) for row in self.reference.table])
        bounds = {name: torch.zeros(value.shape, dtype=torch.float64) for name, value in expected.items()}
        values = {name: value.double() for name, value in expected.items()}
        yield Look(as_tensors(completions(self.subject, args, state)), values, bounds)

    def followed(self, live: Mapping[str, Tensor], shown: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(live)

    def explained(self, divergence: Divergence, shown: Tensor | None, value: Tensor) -> Divergence:
        if divergence.parameter == COUNT:
            return divergence
        subject = "nothing" if shown is None else _text(shown)
        return divergence._replace(index=(), subject=subject, reference=_text(value), shown_as="text")


def lockstep(
    subject: Callable[[Any], TrainerCallback],
    reference: Callable[[Any], ReferenceLogCompletionsCallback],
    on_compared: OnCompared | None = None,
) -> tuple[Attach, Comparisons]:
    """The callbacks that compare a subject with the reference in one training.

    Args:
        subject: Makes the callback under test for a trainer.
        reference: Makes the reference for a trainer, with the same arguments.
        on_compared: See `OnCompared`.

    Returns:
        What makes the callbacks for a training, in order, and the results that they fill in.
    """
    comparator = CompletionsComparator(on_compared)

    def attach(trainer: Any) -> list[TrainerCallback]:
        comparator.subject, comparator.reference = subject(trainer), reference(trainer)
        return [comparator.subject, comparator.reference, comparator]

    return attach, comparator.comparisons


def as_tensors(rows: Sequence[str]) -> dict[str, Tensor]:
    """A table as tensors by name: the bytes of each row, and their number.

    Args:
        rows: The text of each row.
    """
    tensors = {f"row {number}": torch.tensor(list(row.encode()), dtype=torch.uint8) for number, row in enumerate(rows)}
    return tensors | {COUNT: torch.tensor(len(rows))}


def _text(tensor: Tensor) -> str:
    return bytes(tensor.to(torch.uint8).tolist()).decode()
