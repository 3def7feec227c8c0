"""Subject and reference at the same events of the same training, compared at every step."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import TrainerCallback
from truestep_fixtures.topologies import read_parameters
from truestep_reference import BEMACallback as ReferenceBEMACallback

from truestep_spec_tests.observe import shadow, shadow_at_event, shows_dtypes


class Divergence(NamedTuple):
    """The first value that is further from the reference's than its bound allows.

    Attributes:
        step: The global step.
        rank: The rank that saw it.
        parameter: The parameter's name.
        index: Index of the element in the whole parameter.
        subject: The subject's value.
        reference: The reference's value.
        bound: What |subject − reference| may be at most.
        shown_as: The dtype that the subject showed its value in.
    """

    step: int
    rank: int
    parameter: str
    index: tuple[int, ...]
    subject: float
    reference: float
    bound: float
    shown_as: str

    def __str__(self) -> str:
        return (
            f"step {self.step}, rank {self.rank}, {self.parameter}[{', '.join(map(str, self.index))}] "
            f"shown as {self.shown_as}: subject {self.subject!r}, reference {self.reference!r}, "
            f"difference {abs(self.subject - self.reference):.3g}, bound {self.bound:.3g}"
        )


@dataclass
class Comparisons:
    """What a training in lockstep came to.

    Attributes:
        ratios: For each compared step, its largest error ÷ bound over all elements.
        divergence: The first one, or None.
    """

    ratios: dict[int, float] = field(default_factory=dict)
    divergence: Divergence | None = None

    @property
    def worst(self) -> float:
        """The largest error ÷ bound of all steps."""
        return max(self.ratios.values(), default=0.0)


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


class Comparator(TrainerCallback):
    """Compares after every step, and ends the training on all ranks at the first divergence on any.

    Args:
        subject: The callback under test; it has seen the event already.
        reference: The reference; it has seen the event already.
        on_compared: Called on every rank after a comparison, with the step, the live parameters and the subject's
            shadow as the model's dtype shows it.

    Attributes:
        comparisons: The results so far, the same on every rank.
    """

    def __init__(
        self,
        subject: TrainerCallback,
        reference: ReferenceBEMACallback,
        on_compared: Callable[[int, dict[str, Tensor], dict[str, Tensor]], None] | None = None,
    ) -> None:
        self.comparisons = Comparisons()
        self._subject = subject
        self._reference = reference
        self._on_compared = on_compared

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._compare(args, state, control, **kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._compare(args, state, control, **kwargs)

    def _compare(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        live = read_parameters(model)
        values = self._reference.shadow_values()
        shown = shadow_at_event(self._subject, args, state, control, model=model, **kwargs)
        computed_in = _common_dtype([live[name].dtype for name in values])
        looks = [(shown, self._rounded_bounds(computed_in, {name: live[name].dtype for name in values}))]
        if shows_dtypes(self._subject):
            looks.append((shadow(self._subject, computed_in), self._reference.shadow_bounds(computed_in)))
        worst, divergence = 0.0, None
        for look, bounds in looks:
            for name, value in values.items():
                ratio, found = _compare_parameter(state.global_step, name, look.get(name), value, bounds[name])
                worst, divergence = max(worst, ratio), divergence or found
        self._conclude(state.global_step, worst, divergence)
        if self.comparisons.divergence is not None:
            control.should_training_stop = True
        if self._on_compared is not None:
            self._on_compared(state.global_step, live, {name: shown[name] for name in values if name in shown})

    def _rounded_bounds(self, computed_in: torch.dtype, shown_in: dict[str, torch.dtype]) -> dict[str, Tensor]:
        """Bounds for values that were computed in one dtype and rounded, each to its own, when they were read."""
        by_dtype = {dtype: self._reference.shadow_bounds(computed_in, dtype) for dtype in set(shown_in.values())}
        return {name: by_dtype[dtype][name] for name, dtype in shown_in.items()}

    def _conclude(self, step: int, worst: float, divergence: Divergence | None) -> None:
        verdicts: list[Any] = [(worst, divergence)]
        if dist.is_initialized():
            verdicts = [None] * dist.get_world_size()
            dist.all_gather_object(verdicts, (worst, divergence))
        self.comparisons.ratios[step] = max(worst for worst, _ in verdicts)
        if self.comparisons.divergence is None:
            self.comparisons.divergence = next((found for _, found in verdicts if found is not None), None)


def lockstep(
    subject: TrainerCallback,
    reference: ReferenceBEMACallback,
    scratch: Path,
    on_compared: Callable[[int, dict[str, Tensor], dict[str, Tensor]], None] | None = None,
) -> tuple[list[TrainerCallback], Comparisons]:
    """The callbacks that compare a subject with the reference in one training.

    Args:
        subject: The callback under test.
        reference: The reference, with the same hyperparameters.
        scratch: A directory for what the reference saves.
        on_compared: See `Comparator`.

    Returns:
        The callbacks for the training, in order, and the results that it fills in.
    """
    comparator = Comparator(subject, reference, on_compared)
    return [subject, Elsewhere(reference, scratch), comparator], comparator.comparisons


def _compare_parameter(
    step: int, name: str, shown: Tensor | None, value: Tensor, bound: Tensor
) -> tuple[float, Divergence | None]:
    if shown is None or shown.shape != value.shape:
        return math.inf, Divergence(step, _rank(), name, (), math.nan, math.nan, 0.0, "nothing of that shape")
    if value.numel() == 0:
        return 0.0, None
    seen = shown.to(value.device, torch.float64)
    error = (seen - value).abs()
    # Where the reference is not finite its bound claims nothing, but NaN stays NaN.
    unclaimed = ~bound.isfinite() | (~value.isfinite() & (seen.isnan() == value.isnan()))
    ratio = torch.where((seen == value) | unclaimed, 0.0, error / bound)
    ratio = ratio.nan_to_num(nan=math.inf, posinf=math.inf).flatten()
    worst = int(ratio.argmax())
    if ratio[worst] <= 1:
        return float(ratio[worst]), None
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), value.shape))
    at = (float(tensor[index]) for tensor in (shown, value, bound))
    return float(ratio[worst]), Divergence(step, _rank(), name, index, *at, str(shown.dtype).removeprefix("torch."))


def _common_dtype(dtypes: list[torch.dtype]) -> torch.dtype:
    """What a subject computes in: float32, or float64 where there are float64 parameters."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
