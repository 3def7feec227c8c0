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


class Comparison(NamedTuple):
    """What the comparison at one step came to.

    Attributes:
        error: |subject − reference| at the element where it is largest against its bound; NaN where the subject is not
            a number or shows nothing. Texts have no distance: infinite where they differ.
        bound: What it may be at most there.
        values: How many values were compared: parameters, or texts.
        outside: How many of these are outside their bound somewhere.
    """

    error: float = 0.0
    bound: float = 0.0
    values: int = 0
    outside: int = 0

    @property
    def ratio(self) -> float:
        """Error ÷ bound: 0 where there is no error, infinite where there may be none."""
        if self.error == 0:
            return 0.0
        return math.inf if self.bound == 0 or math.isnan(self.error) else self.error / self.bound

    @classmethod
    def worst_of(
        cls, comparisons: Iterable["Comparison"], counted: Callable[[Iterable[int]], int] = max
    ) -> "Comparison":
        """What several come to together.

        Args:
            comparisons: The comparisons.
            counted: `max` if they are of the same values, on other ranks or at other events; `sum` if of others.
        """
        each = list(comparisons)
        worst = max(each, key=lambda one: one.ratio, default=cls())
        return worst._replace(values=counted(one.values for one in each), outside=counted(one.outside for one in each))


@dataclass
class Comparisons:
    """What a training in lockstep came to.

    Attributes:
        steps: What each compared step came to.
        divergence: The first one, or None.
    """

    steps: dict[int, Comparison] = field(default_factory=dict)
    divergence: Divergence | None = None

    @property
    def worst(self) -> float:
        """The largest error ÷ bound of all steps."""
        return max((comparison.ratio for comparison in self.steps.values()), default=0.0)


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
        has_distances: Whether what is compared has a distance, or can but differ, as texts can.
    """

    has_distances = True

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
        compared: dict[str, Comparison] = {}
        divergence = None
        for look in looks:
            for name, value in look.values.items():
                shown, bound = look.shown.get(name), look.bounds[name]
                one, found = _compare_one(state.global_step, name, shown, value, bound)
                if one.error and not self.has_distances:
                    one = one._replace(error=math.inf)
                compared[name] = Comparison.worst_of([compared.get(name, one), one])
                if divergence is None and found is not None:
                    divergence = self.explained(found, shown, value)
        self._conclude(state.global_step, Comparison.worst_of(compared.values(), counted=sum), divergence)
        if self.comparisons.divergence is not None:
            control.should_training_stop = True
        if self._on_compared is not None:
            seen = {name: looks[0].shown[name] for name in looks[0].values if name in looks[0].shown}
            self._on_compared(state.global_step, self.followed(live, seen), seen)

    def _conclude(self, step: int, comparison: Comparison, divergence: Divergence | None) -> None:
        verdicts: list[Any] = [(comparison, divergence)]
        if dist.is_initialized():
            verdicts = [None] * dist.get_world_size()
            dist.all_gather_object(verdicts, (comparison, divergence))
        before = self.comparisons.steps.get(step, Comparison())
        self.comparisons.steps[step] = Comparison.worst_of([*(one for one, _ in verdicts), before])
        if self.comparisons.divergence is None:
            self.comparisons.divergence = next((found for _, found in verdicts if found is not None), None)


def _compare_one(
    step: int, name: str, shown: Tensor | None, value: Tensor, bound: Tensor
) -> tuple[Comparison, Divergence | None]:
    if shown is None or shown.shape != value.shape:
        divergence = Divergence(step, _rank(), name, (), math.nan, math.nan, 0.0, "nothing of that shape")
        return Comparison(math.nan, 0.0, 1, 1), divergence
    if value.numel() == 0:
        return Comparison(values=1), None
    seen = shown.to(value.device, torch.float64)
    # Where the reference is not finite its bound claims nothing, but NaN stays NaN.
    unclaimed = ~bound.isfinite() | (~value.isfinite() & (seen.isnan() == value.isnan()))
    error = torch.where((seen == value) | unclaimed, 0.0, (seen - value).abs())
    ratio = torch.where(error == 0, 0.0, error / bound)
    worst = int(ratio.nan_to_num(nan=math.inf, posinf=math.inf).argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), value.shape))
    comparison = Comparison(float(error[index]), float(bound[index]), 1)
    if comparison.ratio <= 1:
        return comparison, None
    at = (float(tensor[index]) for tensor in (shown, value, bound))
    divergence = Divergence(step, _rank(), name, index, *at, str(shown.dtype).removeprefix("torch."))
    return comparison._replace(outside=1), divergence


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
