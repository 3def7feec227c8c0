"""Which prompts are completed together, and on which rank."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

from truestep.prompts import Prompt

MOST_ROWS = 64
"""Rows of a batch, however short: the logits of a step have the size of the vocabulary for each."""


@dataclass(frozen=True)
class Batch:
    """Prompts that are completed together.

    Attributes:
        prompts: The longest comes first.
        new_tokens: How many tokens each of them may get.
    """

    prompts: tuple[Prompt, ...]
    new_tokens: int

    @property
    def cost(self) -> int:
        """Tokens that pass through the model, with padding."""
        return len(self.prompts) * (len(self.prompts[0].tokens) + self.new_tokens)


def batches(
    prompts: Sequence[Prompt], new_tokens: Callable[[Prompt], int], batch_tokens: int, *, copies: int, is_padded: bool
) -> list[Batch]:
    """Group prompts of about the same length.

    They do not depend on the number of ranks, so neither do completions, to the last bit.

    Args:
        prompts: All prompts.
        new_tokens: How many tokens a prompt may get. Only prompts that get the same number go together.
        batch_tokens: How many tokens a batch may have, padding and new ones included, unless one prompt has more.
        copies: How many rows the model computes for each prompt, such as beams.
        is_padded: Whether prompts of different lengths may go together.

    Returns:
        The batches, that of the longest prompts first.
    """
    found: list[Batch] = []
    in_order = sorted(prompts, key=lambda prompt: (new_tokens(prompt), -len(prompt.tokens), prompt.index))
    for room, alike in groupby(in_order, new_tokens):
        together: list[Prompt] = []
        for prompt in alike:
            if together:
                longest = len(together[0].tokens)
                rows = copies * (len(together) + 1)
                is_full = rows > MOST_ROWS or rows * (longest + room) > batch_tokens
                if is_full or not (is_padded or len(prompt.tokens) == longest):
                    found.append(Batch(tuple(together), room))
                    together = []
            together.append(prompt)
        found.append(Batch(tuple(together), room))
    return sorted(found, key=lambda batch: -batch.cost)


def share(found: Sequence[Batch], ranks: int) -> list[list[Batch]]:
    """Split batches over ranks by their cost: each goes to the rank that has least so far.

    Returns:
        The batches of each rank.
    """
    shares: list[list[Batch]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for batch in found:
        idlest = loads.index(min(loads))
        shares[idlest].append(batch)
        loads[idlest] += batch.cost
    return shares


def rounds(found: Sequence[Batch], ranks: int) -> list[list[Batch | None]]:
    """Split batches over ranks that have to go through their forwards together.

    In a round every batch has the same number of new tokens: a rank that is done early goes on with forwards for the
    others, and must not run out of positions.

    Returns:
        Each round's batch for each rank; None for a rank that has none.
    """
    in_rounds: list[list[Batch | None]] = []
    for _, alike in groupby(sorted(found, key=lambda batch: batch.new_tokens), lambda batch: batch.new_tokens):
        queue = list(alike)
        for start in range(0, len(queue), ranks):
            those = queue[start : start + ranks]
            in_rounds.append([*those, *[None] * (ranks - len(those))])
    return in_rounds
