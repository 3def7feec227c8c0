"""What the properties of SyncRefModel are stated over: values of every kind, exact blends, references led by hand."""

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments
from truestep_fixtures import models
from truestep_fixtures.training import Events
from truestep_reference import rounding
from truestep_reference.ref_sync import blend, blend_error

from truestep_spec_tests.implementation import Implementation
from truestep_spec_tests.options import require
from truestep_spec_tests.properties.bema_cases import Weights

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

NARROW = (torch.bfloat16, torch.float16)

ORDERS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "r + α(p − r)": lambda r, p, a: r + a * (p - r),
    "r − α(r − p)": lambda r, p, a: r - a * (r - p),
    "r.add(p − r, alpha=α)": lambda r, p, a: torch.add(r, p - r, alpha=a),
    "(1 − α)r + αp": lambda r, p, a: (1 - a) * r + a * p,
    "(1 − α)r + αp, weights as tensors": lambda r, p, a: (1 - r.new_tensor(a)) * r + r.new_tensor(a) * p,
    "r.mul(1 − α).add(p, alpha=α)": lambda r, p, a: r.mul(1 - a).add(p, alpha=a),
    "r.lerp(p, α)": lambda r, p, a: torch.lerp(r, p, a),
    "p.lerp(r, 1 − α)": lambda r, p, a: torch.lerp(p, r, 1 - a),
    "p − (1 − α)(p − r)": lambda r, p, a: p - (1 - a) * (p - r),
}
"""Orders of evaluation of the blend of a reference r and a policy p: incremental, convex and complementary ones."""

FIELDS = ("ref_model_sync_steps", "ref_model_mixup_alpha")
"""The fields of the training arguments that are read: n and α."""


class Missing:
    def __str__(self) -> str:
        return "missing"


MISSING = Missing()
"""Said of a field that the training arguments have not."""

BAD_SETTINGS: list[tuple[str, Any]] = [
    *((FIELDS[0], value) for value in (0, -1, 2.5, True, False, None, "2", math.nan)),
    *((FIELDS[1], value) for value in (-0.1, 1.1, math.nan, math.inf, -math.inf, True, False, None, "0.5")),
    *((field, MISSING) for field in FIELDS),
]
"""Fields with values that they cannot have."""

weights = st.sampled_from([0.01, 0.25, 0.5, 0.6, 0.9]) | st.floats(0, 1, exclude_min=True, exclude_max=True)
"""Values of α that blend: neither 0 nor 1."""

fewer = settings(max_examples=max(10, settings.default.max_examples // 4))
"""For properties that have little to draw, or are cheap to break."""

# The callback under test, and how it is led


def set_field(args: TrainingArguments, field: str, value: Any) -> None:
    """Sets a field of the arguments, or removes it if the value is `MISSING`."""
    if value is MISSING:
        delattr(args, field)
    else:
        setattr(args, field, value)


@dataclasses.dataclass(frozen=True)
class Subject:
    """A callback under test, and how it is led in a training of a policy that the test writes.

    Args:
        implementation: Where it is from.
        args: Training arguments, of which n and α do not count.
        options: Arguments of the constructor beside the two that are documented.
    """

    implementation: Implementation
    args: TrainingArguments
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def having(self, **options: Any) -> "Subject":
        """The same with options, of which False is the default; skips the test if the constructor lacks one."""
        wanted = {option: value for option, value in options.items() if value is not False}
        require(self.implementation.SyncRefModelCallback, wanted)
        return dataclasses.replace(self, options=wanted)

    def callback(self, reference: nn.Module | None, accelerator: Accelerator | None = None) -> TrainerCallback:
        """A new callback."""
        callback: TrainerCallback = self.implementation.SyncRefModelCallback(reference, accelerator, **self.options)
        return callback

    def events(
        self, callback: TrainerCallback, policy: nn.Module, alpha: float, sync_steps: int = 1, **parts: Any
    ) -> Events:
        """A training with a callback, before its begin; `parts` are more that a Trainer hands to callbacks."""
        args = copy.copy(self.args)
        args.ref_model_sync_steps, args.ref_model_mixup_alpha = sync_steps, alpha
        return Events(policy, args, [callback], **parts)

    def begin(self, policy: nn.Module, reference: nn.Module, alpha: float, sync_steps: int = 1) -> Events:
        """A training with a new callback, after its begin."""
        events = self.events(self.callback(reference), policy, alpha, sync_steps)
        events.train_begin()
        return events

    def refusal(self, policy: nn.Module, reference: nn.Module) -> str:
        """The message of the error at train begin, before which nothing was changed."""
        events = self.events(self.callback(reference), policy, alpha=0.5)
        before = all_bits(policy), all_bits(reference)
        with pytest.raises((ValueError, RuntimeError)) as error:
            events.train_begin()
        assert before == (all_bits(policy), all_bits(reference))
        return str(error.value)

    def follow(
        self, callback: TrainerCallback, reference: nn.Module, points: Tensor, alpha: float, sync_steps: int = 1
    ) -> list[Tensor]:
        """What a reference of one parameter `w` holds at train begin and after each step.

        Args:
            callback: What moves it.
            reference: The model that is moved.
            points: What the policy holds after each step, in rows.
            alpha: α.
            sync_steps: n.
        """
        policy = Weights({"w": points[0]})
        events = self.events(callback, policy, alpha, sync_steps)
        events.train_begin()
        seen = [reference.get_parameter("w").detach().clone()]
        for t, point in enumerate(points, start=1):
            events.step(t, lambda point=point: policy.w.data.copy_(point))
            seen.append(reference.get_parameter("w").detach().clone())
        return seen

    def followed(self, start: Tensor, points: Tensor, alpha: float, sync_steps: int = 1) -> list[Tensor]:
        """What a new reference with these weights holds at train begin and after each step, see `follow`."""
        reference = Weights({"w": start})
        return self.follow(self.callback(reference), reference, points, alpha, sync_steps)


# Models


def of(value: float, *shape: int) -> Weights:
    """A model with a parameter `w`, whose elements are all the same."""
    return Weights({"w": torch.full(shape or (3,), value)})


class Tied(nn.Module):
    """A single parameter under several names."""

    def __init__(self, value: float, *names: str) -> None:
        super().__init__()
        parameter = nn.Parameter(torch.full((3,), value))
        for name in names:
            self.register_parameter(name, parameter)


def with_trained_head() -> nn.Module:
    """A qwen2 with LoRA, and with a head that PEFT trains in a copy of its own."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(models.build("qwen2"), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))


def base_weight(policy: nn.Module, name: str) -> Tensor:
    """The weight of a policy with adapters that had a name before PEFT wrapped the model."""
    module, _, weight = name.rpartition(".")
    layer = policy.get_base_model().get_submodule(module)
    layer = getattr(layer, "original_module", getattr(layer, "base_layer", layer))
    return layer.get_parameter(weight)


# Values


def computing(reference: torch.dtype, policy: torch.dtype) -> torch.dtype:
    """The dtype that a blend is computed in: the wider one, and at least float32."""
    return torch.promote_types(torch.promote_types(reference, policy), torch.float32)


@st.composite
def courses(
    draw: st.DrawFn, reference: torch.dtype | None = None, policy: torch.dtype | None = None, steps: int = 5
) -> tuple[Tensor, Tensor]:
    """Draws what a reference holds at first, and what the policy holds after each step.

    Either they are any finite numbers, in any order of magnitude, or many with all their bits in use, as in a training:
    a policy that goes away from the reference by steps that may be small.

    Args:
        draw: Hypothesis's.
        reference: Dtype of the reference; drawn by default.
        policy: Dtype of the policy; drawn by default.
        steps: The largest number of steps.

    Returns:
        Tensors of shapes (elements,) and (steps, elements).
    """
    reference = reference or draw(st.sampled_from(DTYPES))
    policy = policy or draw(st.sampled_from(DTYPES))
    count = draw(st.integers(1, steps))
    if draw(st.booleans()):
        largest = 2.0**15 if torch.float16 in (reference, policy) else 2.0**100
        values = st.floats(-largest, largest)
        array = draw(hnp.arrays("float64", (count + 1, draw(st.integers(1, 6))), elements=values))
        rows = torch.from_numpy(np.ascontiguousarray(array))
    else:
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
        rows = torch.randn(count + 1, 24, generator=generator, dtype=torch.float64)
        rows[1:] *= 2.0 ** -draw(st.integers(0, 12))
        rows = rows.cumsum(0)
    return rows[0].to(reference), rows[1:].to(policy)


def anything(dtype: torch.dtype, shape: tuple[int, ...] = (8,)) -> st.SearchStrategy[Tensor]:
    """Draws tensors of any bits: infinities, NaN of any payload, zeros of both signs and subnormal numbers too."""
    integers = _integers(dtype)
    infinity = int(torch.tensor(torch.inf, dtype=dtype).view(integers))
    sign = torch.iinfo(integers).min
    special = [0, sign, 1, sign + 1, infinity, sign + infinity, infinity + 1, sign + infinity + 3]
    patterns = st.integers(sign, torch.iinfo(integers).max) | st.sampled_from(special)
    arrays = hnp.arrays(f"int{dtype.itemsize * 8}", shape, elements=patterns)
    return arrays.map(lambda array: torch.from_numpy(np.ascontiguousarray(array)).view(dtype))


def bits(values: Tensor) -> Tensor:
    """The bits of each element, as an integer."""
    return values.detach().clone().view(_integers(values.dtype))


def all_bits(model: nn.Module) -> dict[str, list[Any]]:
    """The bits of all parameters and buffers, by name, which `==` compares."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: bits(value).tolist() for name, value in named}


def same_bits(expected: Tensor, actual: Tensor) -> bool:
    """Whether two tensors are bitwise equal. Of a NaN the payload is not asked for."""
    if (expected.dtype, expected.shape) != (actual.dtype, actual.shape):
        return False
    return bool(((bits(expected) == bits(actual)) | (expected.isnan() & actual.isnan())).all())


def _integers(dtype: torch.dtype) -> torch.dtype:
    return {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]


# Exact arithmetic, and how far from it rounding may lead


def exactly(values: Tensor) -> list[Fraction]:
    """The elements as fractions."""
    return [Fraction(value) for value in values.double().tolist()]


def exact_reference(start: Tensor, points: Tensor, alpha: float) -> list[Fraction]:
    """The reference after a sync at every point, as one weighted sum instead of a recurrence.

    Of k policies the i-th weighs α(1 − α)^(k−i), and what the reference held at first (1 − α)^k.
    """
    α, k = Fraction(alpha), len(points)
    sums = [(1 - α) ** k * value for value in exactly(start)]
    for i, point in enumerate(points, start=1):
        weight = α * (1 - α) ** (k - i)
        sums = [sum_ + weight * value for sum_, value in zip(sums, exactly(point), strict=True)]
    return sums


def running_bound(
    start: Tensor, points: Tensor, alpha: float, *, computed_in: torch.dtype, kept_in: torch.dtype
) -> Tensor:
    """Bounds |subject − exact| after a sync at every point, for any honest order of evaluation.

    Args:
        start: What the reference held at first.
        points: The policy at each sync.
        alpha: α.
        computed_in: The subject's computing dtype.
        kept_in: What a blend is rounded to before the next one.
    """
    value = start.double()
    error = torch.zeros_like(value)
    for point in points.double():
        blended = blend(point, value, alpha)
        error = blend_error(error, policy=point, reference=value, blended=blended, alpha=alpha, dtype=computed_in)
        error = rounding.read_error(error, shadow=blended, dtype=computed_in, read_dtype=kept_in)
        value = blended
    return error


def rounded(exact: Fraction, dtype: torch.dtype) -> float:
    """The number of a dtype that is nearest to an exact one, and of two the even one: a single rounding."""
    if exact == 0:
        return 0.0
    kind = torch.finfo(dtype)
    exponent = abs(exact.numerator).bit_length() - exact.denominator.bit_length()
    if abs(exact) < Fraction(2) ** exponent:
        exponent -= 1
    spacing = Fraction(kind.eps) * max(Fraction(2) ** exponent, Fraction(kind.smallest_normal))
    nearest = round(exact / spacing) * spacing  # Python rounds a half to the even integer
    return float(nearest) if abs(nearest) <= kind.max else math.copysign(math.inf, exact)


def strayed(
    values: Tensor, exact: Sequence[Fraction], errors: Tensor, *, computed_in: torch.dtype
) -> list[tuple[float, float, float]]:
    """Lists the elements that are not an exact value, off by its error at most, rounded once.

    Rounding keeps the order of numbers, so such an element lies between what the two ends of the interval are rounded
    to. Where the interval is small against the dtype's spacing, that is the nearest number and at most one neighbour.

    Args:
        values: What was computed, in the dtype that it was rounded to.
        exact: What should have been.
        errors: How far from that it may be before it is rounded.
        computed_in: The dtype before that. A conversion of float64 to a 16-bit dtype may pass through float32.

    Returns:
        For each such element the least value that it may have, its value, and the largest.
    """
    found = []
    for value, truth, error in zip(values.double().tolist(), exact, errors.tolist(), strict=True):
        ends = [truth - Fraction(error), truth + Fraction(error)]
        allowed = [rounded(end, values.dtype) for end in ends]
        if computed_in == torch.float64 and values.dtype in NARROW:
            by_way = [rounded(end, torch.float32) for end in ends]
            allowed += [rounded(Fraction(x), values.dtype) if math.isfinite(x) else x for x in by_way]
        if not min(allowed) <= value <= max(allowed):
            found.append((min(allowed), value, max(allowed)))
    return found
