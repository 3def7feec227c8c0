"""The reference's rounding bounds: no honest evaluation exceeds them, and dishonest ones do."""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from truestep_reference import rounding
from truestep_reference.bema import bias_weight, ema, ema_weight, is_update, shadow
from truestep_reference.state import Average, Bound, at_snapshot

from truestep_spec_tests.properties.bema_cases import distance, exact_shadow, hyperparameters, trajectories

EMAS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "E + β(θ − E)": lambda e, theta, b: e + b * (theta - e),
    "E − β(E − θ)": lambda e, theta, b: e - b * (e - theta),
    "E.add(θ − E, alpha=β)": lambda e, theta, b: torch.add(e, theta - e, alpha=b),
    "(1 − β)E + βθ": lambda e, theta, b: (1 - b) * e + b * theta,
    "E.mul(1 − β).add(θ, alpha=β)": lambda e, theta, b: e.mul(1 - b).add(theta, alpha=b),
    "(1 − β)E + βθ, weights as tensors": lambda e, theta, b: (1 - e.new_tensor(b)) * e + e.new_tensor(b) * theta,
    "E.lerp(θ, β)": lambda e, theta, b: torch.lerp(e, theta, b),
    "θ.lerp(E, 1 − β)": lambda e, theta, b: torch.lerp(theta, e, 1 - b),
    "θ − (1 − β)(θ − E)": lambda e, theta, b: theta - (1 - b) * (theta - e),
}
"""Orders of evaluation of the EMA."""

SHADOWS: dict[str, Callable[[Tensor, Tensor, Tensor, float], Tensor]] = {
    "E + α(θ − θ₀)": lambda e, theta, start, a: e + a * (theta - start),
    "E.add(θ − θ₀, alpha=α)": lambda e, theta, start, a: torch.add(e, theta - start, alpha=a),
    "(E + αθ) − αθ₀": lambda e, theta, start, a: (e + a * theta) - a * start,
    "(E − αθ₀) + αθ": lambda e, theta, start, a: torch.add(e - a * start, theta, alpha=a),
    "(αθ − αθ₀) + E": lambda e, theta, start, a: (a * theta - a * start) + e,
}
"""Orders of evaluation of the shadow."""

NARROW = (torch.bfloat16, torch.float16)

ema_orders = st.sampled_from(sorted(EMAS)).map(EMAS.__getitem__)
shadow_orders = st.sampled_from(sorted(SHADOWS)).map(SHADOWS.__getitem__)
subject_dtypes = st.sampled_from([torch.float32, torch.float64])


@pytest.fixture(autouse=True)
def precision() -> Iterator[None]:
    with mpmath.workdps(60):
        yield


class Subject:
    """An evaluation of BEMA in a dtype and an order, on one tensor.

    Args:
        dtype: What it computes in and keeps.
        ema_order: One of `EMAS`.
        shadow_order: One of `SHADOWS`.
        h: Arguments of `BEMACallback`.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        ema_order: Callable[[Tensor, Tensor, float], Tensor] = EMAS["E.lerp(θ, β)"],
        shadow_order: Callable[[Tensor, Tensor, Tensor, float], Tensor] = SHADOWS["E + α(θ − θ₀)"],
        **h: Any,
    ) -> None:
        self.dtype, self.ema_order, self.shadow_order, self.h = dtype, ema_order, shadow_order, h

    def beta(self, t: int) -> float:
        """β_t."""
        return max((self.h["lag"] + self.h["multiplier"] * t) ** -self.h["ema_power"], self.h["min_ema_multiplier"])

    def alpha(self, t: int) -> float:
        """α_t."""
        power = self.h["bias_power"]
        return (self.h["lag"] + self.h["multiplier"] * t) ** -power if power else 0.0

    def run(self, trajectory: Tensor) -> list[Tensor]:
        """The shadow after each step, from step 0 on, in the subject's dtype."""
        theta = trajectory.to(self.dtype)
        τ, φ = self.h["update_after"], self.h["update_freq"]
        shadows = list(theta[:τ])
        average = value = start = theta[min(τ, len(theta) - 1)]
        for t in range(τ, len(theta)):
            if t > τ and (t - τ) % φ == 0:
                average = self.ema_order(average, theta[t], self.beta(t))
                value = self.shadow_order(average, theta[t], start, self.alpha(t))
            shadows.append(value)
        return shadows


def reference_run(trajectory: Tensor, **h: Any) -> list[Average]:
    """The reference's state after each step from the snapshot on."""
    schedule = {"lag": h["lag"], "multiplier": h["multiplier"]}
    theta = trajectory.double()
    τ = h["update_after"]
    states = [at_snapshot(theta[τ])]
    for t in range(τ + 1, len(theta)):
        previous = states[-1]
        if is_update(t, update_after=τ, update_freq=h["update_freq"]):
            beta = ema_weight(t, ema_power=h["ema_power"], min_ema_multiplier=h["min_ema_multiplier"], **schedule)
            alpha = bias_weight(t, bias_power=h["bias_power"], **schedule)
            ema_t = ema(previous.ema, theta[t], beta)
            shadow_t = shadow(ema_t, theta[t], previous.theta_0, alpha)
            bounds = {
                dtype: rounding.advance(
                    bound,
                    ema_before=previous.ema,
                    ema=ema_t,
                    shadow=shadow_t,
                    theta=theta[t],
                    theta_0=previous.theta_0,
                    beta=beta,
                    alpha=alpha,
                    ema_power=h["ema_power"],
                    bias_power=h["bias_power"],
                    dtype=dtype,
                )
                for dtype, bound in previous.bounds.items()
            }
            previous = Average(previous.theta_0, ema_t, shadow_t, bounds)
        states.append(previous)
    return states


def largest_ratio(
    subject: Subject, trajectory: Tensor, *, computing: torch.dtype, read: torch.dtype | None = None
) -> float:
    """The subject's largest error ÷ bound over all steps and elements."""
    worst = 0.0
    shadows = subject.run(trajectory)[subject.h["update_after"] :]
    for values, state in zip(shadows, reference_run(trajectory, **subject.h), strict=True):
        bound = state.bounds[computing].shadow
        if read is not None:
            bound = rounding.read_error(bound, shadow=state.shadow, dtype=computing, read_dtype=read)
            values = values.to(read)
        error = (values.double() - state.shadow).abs()
        worst = max(worst, float(torch.where(error == 0, 0.0, error / bound).max()))
    return worst


def random_walk(*, steps: int = 200, elements: int = 64, dtype: torch.dtype = torch.float32) -> Tensor:
    """Weights of size 1/50 that take steps a hundred times smaller: a training's typical magnitudes."""
    generator = torch.Generator().manual_seed(0)
    size = torch.full((steps + 1, 1), 2e-4, dtype=torch.float64)
    size[0] = 0.02
    return (size * torch.randn(steps + 1, elements, generator=generator, dtype=torch.float64)).cumsum(0).to(dtype)


DEFAULTS = {
    "update_freq": 1,
    "ema_power": 0.5,
    "bias_power": 0.2,
    "lag": 10,
    "update_after": 0,
    "multiplier": 1.0,
    "min_ema_multiplier": 0.0,
}

numbers = st.floats(-(2.0**100), 2.0**100)


@pytest.mark.clause("BEMA-8")
@given(
    trajectory=trajectories(largest=2.0**100),
    h=hyperparameters(update_after=st.just(0)),
    ema_order=ema_orders,
    shadow_order=shadow_orders,
    dtype=subject_dtypes,
)
def test_no_order_of_evaluation_exceeds_the_bound(
    trajectory: Tensor,
    h: dict[str, Any],
    ema_order: Callable[..., Tensor],
    shadow_order: Callable[..., Tensor],
    dtype: torch.dtype,
) -> None:
    subject = Subject(dtype, ema_order, shadow_order, **h)
    assert largest_ratio(subject, trajectory, computing=dtype) <= 1


@pytest.mark.clause("BEMA-8")
@given(
    trajectory=trajectories(steps=6, elements=2, largest=2.0**100),
    h=hyperparameters(update_after=st.just(0)),
    ema_order=ema_orders,
    shadow_order=shadow_orders,
    dtype=subject_dtypes,
)
def test_the_bound_also_holds_against_exact_arithmetic(
    trajectory: Tensor,
    h: dict[str, Any],
    ema_order: Callable[..., Tensor],
    shadow_order: Callable[..., Tensor],
    dtype: torch.dtype,
) -> None:
    values = Subject(dtype, ema_order, shadow_order, **h).run(trajectory)[-1]
    state = reference_run(trajectory, **h)[-1]
    exact = exact_shadow(trajectory, len(trajectory) - 1, **h)
    assert (distance(values, exact) <= state.bounds[dtype].shadow).all()
    assert (distance(state.shadow, exact) <= state.bounds[torch.float64].shadow).all()


@pytest.mark.clause("BEMA-8")
@given(
    trajectory=trajectories(largest=1e5),
    h=hyperparameters(update_after=st.just(0)),
    ema_order=ema_orders,
    shadow_order=shadow_orders,
    dtype=subject_dtypes,
    read=st.sampled_from([torch.float32, *NARROW]),
)
def test_no_single_rounding_on_reading_exceeds_the_bound(
    trajectory: Tensor,
    h: dict[str, Any],
    ema_order: Callable[..., Tensor],
    shadow_order: Callable[..., Tensor],
    dtype: torch.dtype,
    read: torch.dtype,
) -> None:
    subject = Subject(dtype, ema_order, shadow_order, **h)
    assert largest_ratio(subject, trajectory, computing=dtype, read=read) <= 1


@pytest.mark.clause("BEMA-8")
@given(value=st.floats(-1e5, 1e5), read=st.sampled_from([torch.float32, *NARROW]))
def test_reading_a_float64_shadow_stays_within_its_bound_also_by_way_of_float32(
    value: float, read: torch.dtype
) -> None:
    exact = torch.tensor([value], dtype=torch.float64)
    bound = rounding.read_error(torch.zeros_like(exact), shadow=exact, dtype=torch.float64, read_dtype=read)
    for rounded in (exact.to(read), exact.float().to(read)):
        assert rounded.double().sub(exact).abs() <= bound


@pytest.mark.clause("BEMA-1", "BEMA-8")
@given(trajectory=trajectories(dtype=torch.bfloat16), h=hyperparameters(update_after=st.just(0)))
def test_at_the_snapshot_the_bound_is_zero_also_when_read_in_the_dtype_of_the_weights(
    trajectory: Tensor, h: dict[str, Any]
) -> None:
    start = reference_run(trajectory, **h)[0]
    for dtype, bound in start.bounds.items():
        read = rounding.read_error(bound.shadow, shadow=start.shadow, dtype=dtype, read_dtype=torch.bfloat16)
        assert bound.ema.equal(torch.zeros_like(start.ema))
        assert read.equal(torch.zeros_like(start.ema))


@pytest.mark.clause("BEMA-8")
@given(
    trajectory=trajectories(dtype=torch.float32, largest=2.0**-120),
    h=hyperparameters(update_after=st.just(0)),
    ema_order=ema_orders,
    shadow_order=shadow_orders,
)
def test_the_bound_holds_while_subnormal_numbers_are_flushed_to_zero(
    trajectory: Tensor,
    h: dict[str, Any],
    ema_order: Callable[..., Tensor],
    shadow_order: Callable[..., Tensor],
) -> None:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush subnormal numbers")
    try:
        subject = Subject(torch.float32, ema_order, shadow_order, **h)
        shadows = subject.run(trajectory)
    finally:
        torch.set_flush_denormal(False)
    for values, state in zip(shadows, reference_run(trajectory, **h), strict=True):
        assert ((values.double() - state.shadow).abs() <= state.bounds[torch.float32].shadow).all()


# The bound is tight enough to tell right from wrong


@functools.cache
def exact_random_walk() -> list[mpmath.mpf]:
    """The exact shadow at the end of the random walk."""
    walk = random_walk()
    with mpmath.workdps(60):
        return exact_shadow(walk, len(walk) - 1, **DEFAULTS)


@functools.cache
def bounds_of_random_walk() -> Mapping[torch.dtype, Bound]:
    """The reference's bounds at its end."""
    return reference_run(random_walk(), **DEFAULTS)[-1].bounds


@pytest.mark.clause("BEMA-8")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shadow_order", SHADOWS)
@pytest.mark.parametrize("ema_order", EMAS)
def test_the_bound_is_within_a_factor_of_fifty_of_what_an_honest_subject_needs(
    ema_order: str, shadow_order: str, dtype: torch.dtype
) -> None:
    subject = Subject(dtype, EMAS[ema_order], SHADOWS[shadow_order], **DEFAULTS)
    error = distance(subject.run(random_walk())[-1], exact_random_walk())
    assert 1 / 50 <= (error / bounds_of_random_walk()[dtype].shadow).max() <= 1


@pytest.mark.clause("BEMA-8")
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_an_average_that_is_kept_in_a_narrow_dtype_exceeds_the_bound(dtype: torch.dtype) -> None:
    trajectory = random_walk(dtype=dtype)
    for ema_order in EMAS.values():
        subject = Subject(dtype, ema_order, **DEFAULTS)
        assert largest_ratio(subject, trajectory, computing=torch.float32, read=dtype) > 1


@pytest.mark.clause("BEMA-8")
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_rounding_the_ema_and_then_the_shadow_exceeds_the_bound(dtype: torch.dtype) -> None:
    subject = Subject(
        torch.float32, shadow_order=lambda e, theta, start, a: e.to(dtype) + a * (theta - start), **DEFAULTS
    )
    assert largest_ratio(subject, random_walk(dtype=dtype), computing=torch.float32, read=dtype) > 1


class _StepTooLate(Subject):
    def beta(self, t: int) -> float:
        return super().beta(t + 1)


class _CorrectionOfTheStepBefore(Subject):
    def alpha(self, t: int) -> float:
        return super().alpha(t - 1)


class _BetaInBfloat16(Subject):
    def beta(self, t: int) -> float:
        return float(torch.tensor(super().beta(t), dtype=torch.bfloat16))


@pytest.mark.clause("BEMA-3", "BEMA-5", "BEMA-8")
@pytest.mark.parametrize("wrong", [_StepTooLate, _CorrectionOfTheStepBefore, _BetaInBfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_wrong_weight_exceeds_the_bound(wrong: type[Subject], dtype: torch.dtype) -> None:
    subject = wrong(dtype, **DEFAULTS)
    assert largest_ratio(subject, random_walk(dtype=dtype), computing=dtype) > 100


@pytest.mark.clause("BEMA-8")
def test_a_float32_average_exceeds_the_bound_for_float64() -> None:
    subject = Subject(torch.float32, **DEFAULTS)
    assert largest_ratio(subject, random_walk(), computing=torch.float64) > 100


@pytest.mark.clause("BEMA-8")
@given(error=st.floats(0, 1), beta=st.floats(2.0**-10, 1), theta=numbers)
def test_every_update_contracts_the_errors_before_it(error: float, beta: float, theta: float) -> None:
    value = torch.tensor([theta], dtype=torch.float64)
    w = rounding.weight_error(beta, power=0.5, dtype=torch.float32)

    def update(e: Tensor) -> Tensor:
        return rounding.ema_error(e, before=value, after=value, theta=value, beta=beta, w=w, dtype=torch.float32)

    own, e = update(torch.zeros_like(value)), value.abs() * error
    assert update(e) <= (1 - beta) * e + own + 8 * 2.0**-24 * (e + own)
