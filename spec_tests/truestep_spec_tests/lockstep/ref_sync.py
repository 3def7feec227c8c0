"""The reference model that follows: compared are its weights, and the logits of its next forward."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from truestep_fixtures import topologies
from truestep_fixtures.models import VOCABULARY
from truestep_fixtures.topologies import Placed
from truestep_reference import SyncRefModelCallback as ReferenceSyncRefModelCallback
from truestep_reference.ref_sync import is_sync

from truestep_spec_tests.lockstep import Comparator, Comparisons, Look, OnCompared

LOGITS = "(logits)"
"""The name under which logits are reported; no parameter can have it."""


class SyncComparator(Comparator):
    """Compares the subject's reference model with the reference's.

    After a sync a weight may be as far from the reference's blend as the bound of that one sync says; after any other
    step it is what it was before, bitwise. What the next forward computes is bitwise what a fresh model with these
    weights computes. Then the reference's model takes the weights over, so that the next sync is judged by itself.

    Args:
        placed: The subject's reference model, where it lies.
        reference: The reference, which moves `fresh`.
        fresh: The same model, whole and with nothing around it.
        on_compared: See `OnCompared`.
    """

    def __init__(
        self,
        placed: Placed,
        reference: ReferenceSyncRefModelCallback,
        fresh: nn.Module,
        on_compared: OnCompared | None = None,
    ) -> None:
        super().__init__(on_compared)
        self._placed = placed
        self._reference = reference
        self._fresh = fresh
        self._before: dict[str, Tensor] = {}

    def looks(self, live: Mapping[str, Tensor], args: Any, state: Any, control: Any, **kwargs: Any) -> Iterator[Look]:
        # Two forwards before the weights are read, as reading lets go of whole copies that a forward would have used.
        computed = {f"{LOGITS} {forward}": logits(self._placed.engine) for forward in ("first", "second")}
        shown = self._placed.read()
        if not self._before or is_sync(state.global_step, sync_steps=args.ref_model_sync_steps):
            yield Look(shown, self._reference.blended_values(), self._reference.blended_bounds())
        else:
            yield Look(shown, *_exactly(self._before))
        topologies.write_parameters(self._fresh, shown)
        self._before = shown
        # And one after it, which leaves such copies behind for the next sync to deal with.
        computed[f"{LOGITS} third"] = logits(self._placed.engine)
        yield Look(computed, *_exactly(dict.fromkeys(computed, logits(self._fresh))))


def lockstep(
    subject: TrainerCallback,
    placed: Placed,
    reference: ReferenceSyncRefModelCallback,
    fresh: nn.Module,
    on_compared: OnCompared | None = None,
) -> tuple[list[TrainerCallback], Comparisons]:
    """The callbacks that compare a subject with the reference in one training.

    Args:
        subject: The callback under test, of `placed`.
        placed: Its reference model, where it lies.
        reference: The reference, of `fresh`, with the same options.
        fresh: A reference model with the same weights, whole and with nothing around it.
        on_compared: See `OnCompared`.

    Returns:
        The callbacks for the training, in order, and the results that it fills in.
    """
    comparator = SyncComparator(placed, reference, fresh, on_compared)
    return [subject, reference, comparator], comparator.comparisons


@torch.no_grad()
def logits(engine: Any) -> Tensor:
    """What a model in eval mode makes of one batch; the batch is the same on every rank and for every model."""
    batch = torch.arange(24).view(2, 12) * 11 % VOCABULARY
    computed: Tensor = engine(input_ids=batch.to(topologies.device()))["logits"]
    return computed.cpu()


def _exactly(values: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return (
        {name: value.double() for name, value in values.items()},
        {name: torch.zeros(value.shape, dtype=torch.float64) for name, value in values.items()},
    )
