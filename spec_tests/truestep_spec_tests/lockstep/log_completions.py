"""Completions: what is compared is every row of the table, letter by letter."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import TrainerCallback
from truestep_fixtures.training import Attach
from truestep_reference import LogCompletionsCallback as ReferenceLogCompletionsCallback

from truestep_spec_tests.lockstep import Comparisons, OnCompared, texts
from truestep_spec_tests.observe import as_text, completions

COUNT = "number of rows"
"""The name under which it is compared how many rows there are."""


class CompletionsComparator(texts.TextComparator):
    """Compares the table.

    Args:
        on_compared: See `OnCompared`.

    Attributes:
        subject: The callback under test; it is there when the training begins.
        reference: The reference.
    """

    subject: TrainerCallback
    reference: ReferenceLogCompletionsCallback
    count = COUNT

    def texts(self, args: Any, state: Any) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        expected = [as_text(row) for row in self.reference.table]
        return as_tensors(completions(self.subject, args, state)), as_tensors(expected)


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
    """A table as tensors by name: each row, and their number.

    Args:
        rows: The text of each row.
    """
    return texts.as_tensors({f"row {number}": row for number, row in enumerate(rows)}, COUNT, len(rows))
