"""BEMA: what is compared is the shadow, as the model's dtype shows it and as the dtype that it is computed in does."""

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from truestep_reference import BEMACallback as ReferenceBEMACallback

from truestep_spec_tests.lockstep import Comparator, Comparisons, Look, OnCompared
from truestep_spec_tests.observe import shadow, shadow_at_event, shows_dtypes


class Elsewhere(TrainerCallback):
    """Passes a training's events on to a callback that leaves its result in a directory of its own."""

    def __init__(self, callback: TrainerCallback, output_dir: Path) -> None:
        self._callback = callback
        self._output_dir = output_dir

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._callback.on_train_begin(args, state, control, **kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._callback.on_step_end(args, state, control, **kwargs)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._callback.on_save(args, state, control, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        elsewhere = copy.copy(args)
        elsewhere.output_dir = str(self._output_dir)
        self._callback.on_train_end(elsewhere, state, control, **kwargs)


class BEMAComparator(Comparator):
    """Compares the shadow.

    Args:
        subject: The callback under test.
        reference: The reference.
        on_compared: See `OnCompared`.
    """

    def __init__(
        self, subject: TrainerCallback, reference: ReferenceBEMACallback, on_compared: OnCompared | None = None
    ) -> None:
        super().__init__(on_compared)
        self._subject = subject
        self._reference = reference

    def looks(self, live: Mapping[str, Tensor], args: Any, state: Any, control: Any, **kwargs: Any) -> Iterator[Look]:
        values = self._reference.shadow_values()
        shown = shadow_at_event(self._subject, args, state, control, **kwargs)
        computed_in = _common_dtype([live[name].dtype for name in values])
        yield Look(shown, values, self._rounded_bounds(computed_in, {name: live[name].dtype for name in values}))
        if shows_dtypes(self._subject):
            yield Look(shadow(self._subject, computed_in), values, self._reference.shadow_bounds(computed_in))

    def _rounded_bounds(self, computed_in: torch.dtype, shown_in: dict[str, torch.dtype]) -> dict[str, Tensor]:
        """Bounds for values that were computed in one dtype and rounded, each to its own, when they were read."""
        by_dtype = {dtype: self._reference.shadow_bounds(computed_in, dtype) for dtype in set(shown_in.values())}
        return {name: by_dtype[dtype][name] for name, dtype in shown_in.items()}


def lockstep(
    subject: TrainerCallback,
    reference: ReferenceBEMACallback,
    scratch: Path,
    on_compared: OnCompared | None = None,
) -> tuple[list[TrainerCallback], Comparisons]:
    """The callbacks that compare a subject with the reference in one training.

    Args:
        subject: The callback under test.
        reference: The reference, with the same hyperparameters.
        scratch: A directory for what the reference saves.
        on_compared: See `OnCompared`.

    Returns:
        The callbacks for the training, in order, and the results that it fills in.
    """
    comparator = BEMAComparator(subject, reference, on_compared)
    return [subject, Elsewhere(reference, scratch), comparator], comparator.comparisons


def _common_dtype(dtypes: list[torch.dtype]) -> torch.dtype:
    """What a subject computes in: float32, or float64 where there are float64 parameters."""
    return torch.float64 if torch.float64 in dtypes else torch.float32
