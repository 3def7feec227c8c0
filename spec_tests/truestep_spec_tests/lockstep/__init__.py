"""Subject and reference at the same events of the same training, compared at every step.

Here is what all callbacks have in common; the modules of this package, named after the callbacks, say what is looked
at.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import TrainerCallback
from truestep_fixtures.topologies import read_parameters

OnCompared = Callable[[int, dict[str, Tensor], dict[str, Tensor]], None]
"""Called on every rank after a comparison, with the step, the live parameters that what is compared depends on, and
what the subject shows of its state, as users see it."""


class Divergence(NamedTuple):
    """The first value that is further from the reference's than its bound allows.

    Attributes:
        step: The global step.
        rank: The rank that saw it.
        parameter: The parameter's name, or that of something else that is compared.
        index: Index of the element in the whole parameter.
        subject: The subject's value; where texts are compared, its text.
        reference: The reference's value, or text.
        bound: What |subject − reference| may be at most.
        shown_as: The dtype that the subject showed its value in.
    """

    step: int
    rank: int
    parameter: str
    index: tuple[int, ...]
    subject: float | str
    reference: float | str
    bound: float
    shown_as: str

    def __str__(self) -> str:
        where = f"step {self.step}, rank {self.rank}, {self.parameter}"
        if isinstance(self.subject, str) or isinstance(self.reference, str):
            return f"{where}: subject {self.subject}, reference {self.reference}"
        return (
            f"{where}[{', '.join(map(str, self.index))}] "
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


class Look(NamedTuple):
    """One way of looking at a subject, and what the reference says to it.

    Attributes:
        shown: What the subject shows, by name.
        values: The reference's values, float64.
        bounds: What |subject − reference| may be at most, float64.
    """

    shown: Mapping[str, Tensor]
    values: Mapping[str, Tensor]
    bounds: Mapping[str, Tensor]


class Comparator(TrainerCallback):
    """Compares after every step, and ends the training on all ranks at the first divergence on any.

    Subject and reference have seen the event already.

    Args:
        on_compared: See `OnCompared`.

    Attributes:
        comparisons: The results so far, the same on every rank.
    """

    def __init__(self, on_compared: OnCompared | None = None) -> None:
        self.comparisons = Comparisons()
        self._on_compared = on_compared

    def looks(self, live: Mapping[str, Tensor], args: Any, state: Any, control: Any, **kwargs: Any) -> Iterable[Look]:
        """The looks at the subject after an event; the first one is what users see. Collective."""
        raise NotImplementedError

    def followed(self, live: Mapping[str, Tensor], shown: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The live parameters that what is shown depends on, by name: those with something shown."""
        return {name: live[name] for name in shown}

    def explained(self, divergence: Divergence, shown: Tensor | None, value: Tensor) -> Divergence:
        """A divergence as it is reported.

        Args:
            divergence: Where it is, and the elements that differ.
            shown: All that the subject shows under that name.
            value: All that the reference has there.
        """
        return divergence

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._compare(args, state, control, **kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._compare(args, state, control, **kwargs)

    def _compare(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        live = read_parameters(model)
        looks = list(self.looks(live, args, state, control, model=model, **kwargs))
        worst, divergence = 0.0, None
        for look in looks:
            for name, value in look.values.items():
                shown, bound = look.shown.get(name), look.bounds[name]
                ratio, found = _compare_one(state.global_step, name, shown, value, bound)
                worst = max(worst, ratio)
                if divergence is None and found is not None:
                    divergence = self.explained(found, shown, value)
        self._conclude(state.global_step, worst, divergence)
        if self.comparisons.divergence is not None:
            control.should_training_stop = True
        if self._on_compared is not None:
            seen = {name: looks[0].shown[name] for name in looks[0].values if name in looks[0].shown}
            self._on_compared(state.global_step, self.followed(live, seen), seen)

    def _conclude(self, step: int, worst: float, divergence: Divergence | None) -> None:
        verdicts: list[Any] = [(worst, divergence)]
        if dist.is_initialized():
            verdicts = [None] * dist.get_world_size()
            dist.all_gather_object(verdicts, (worst, divergence))
        self.comparisons.ratios[step] = max(worst for worst, _ in verdicts)
        if self.comparisons.divergence is None:
            self.comparisons.divergence = next((found for _, found in verdicts if found is not None), None)


def _compare_one(
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


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
