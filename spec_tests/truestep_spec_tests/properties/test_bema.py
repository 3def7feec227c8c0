"""The reference's formulas and its recurrence, against independent derivations."""

import re
from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise
from typing import Any

import mpmath
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from transformers import TrainingArguments
from truestep_fixtures.topologies import training_arguments
from truestep_reference import BEMACallback
from truestep_reference.bema import bias_weight, ema, ema_weight, is_snapshot, is_update, shadow

from truestep_spec_tests.properties.bema_cases import (
    BAD_ARGUMENTS,
    BAD_SCHEDULES,
    distance,
    exact_power,
    exact_shadow,
    hyperparameters,
    instants,
    lead,
    one_parameter,
    trajectories,
)

U64 = 2.0**-53

steps = st.integers(0, 10**6)
powers = st.sampled_from([0.0, 0.2, 0.5, 1.0]) | st.floats(0, 20)
lags = st.floats(1, 1e4)
multipliers = st.floats(0, 1e3)
fractions = st.fractions(-1000, 1000, max_denominator=1000)
weights = st.fractions(0, 1, max_denominator=1000)


@pytest.fixture(autouse=True)
def precision() -> Iterator[None]:
    with mpmath.workdps(60):
        yield


@pytest.fixture(scope="module")
def args(tmp_path_factory: pytest.TempPathFactory) -> TrainingArguments:
    return training_arguments("single", tmp_path_factory.mktemp("out"))


def reference_run(trajectory: Tensor, args: TrainingArguments, **h: Any) -> list[Tensor]:
    """The reference's shadow at train begin and after each step."""
    callback = BEMACallback(**h)
    return lead([callback], one_parameter(trajectory), args, lambda _: callback.shadow_values()["w"])


def averages(points: list[Fraction], betas: list[Fraction]) -> list[Fraction]:
    """The reference's recurrence in exact arithmetic: the EMA at the snapshot and after each update."""
    averages = [points[0]]
    for theta, beta in zip(points[1:], betas, strict=True):
        averages.append(ema(averages[-1], theta, beta))
    return averages


def impulse_response(betas: list[Fraction]) -> list[Fraction]:
    """The weight of each point of the trajectory in the last EMA."""
    count = len(betas) + 1
    return [averages([Fraction(i == k) for i in range(count)], betas)[-1] for k in range(count)]


# The two weights


@pytest.mark.clause("BEMA-3")
@given(t=steps, power=powers, lag=lags, multiplier=multipliers, floor=st.floats(0, 1))
def test_the_ema_weight_is_the_formula_to_within_its_bound(
    t: int, power: float, lag: float, multiplier: float, floor: float
) -> None:
    exact = max(exact_power(t, power, lag=lag, multiplier=multiplier), floor)
    beta = ema_weight(t, ema_power=power, lag=lag, multiplier=multiplier, min_ema_multiplier=floor)
    assert abs(mpmath.mpf(beta) - exact) <= (2 * power + 4) * U64 * exact


@pytest.mark.clause("BEMA-5")
@given(t=steps, power=st.floats(1e-12, 20), lag=lags, multiplier=multipliers)
def test_the_bias_weight_is_the_formula_to_within_its_bound(
    t: int, power: float, lag: float, multiplier: float
) -> None:
    exact = exact_power(t, power, lag=lag, multiplier=multiplier)
    alpha = bias_weight(t, bias_power=power, lag=lag, multiplier=multiplier)
    assert abs(mpmath.mpf(alpha) - exact) <= (2 * power + 4) * U64 * exact


@pytest.mark.clause("BEMA-5")
@given(t=steps, lag=lags, multiplier=multipliers)
def test_a_bias_power_of_zero_gives_no_correction(t: int, lag: float, multiplier: float) -> None:
    assert bias_weight(t, bias_power=0.0, lag=lag, multiplier=multiplier) == 0.0


@pytest.mark.clause("BEMA-5")
@given(t=steps, lag=lags, multiplier=multipliers)
def test_a_tiny_bias_power_gives_the_strongest_correction(t: int, lag: float, multiplier: float) -> None:
    assert bias_weight(t, bias_power=5e-324, lag=lag, multiplier=multiplier) == 1.0


@pytest.mark.clause("BEMA-3")
@given(t=steps, lag=lags, multiplier=multipliers, floor=st.floats(0, 1))
def test_an_ema_power_of_zero_gives_one(t: int, lag: float, multiplier: float, floor: float) -> None:
    assert ema_weight(t, ema_power=0.0, lag=lag, multiplier=multiplier, min_ema_multiplier=floor) == 1.0


@pytest.mark.clause("BEMA-3", "BEMA-5")
@given(t=steps, later=steps, power=powers, lag=lags, multiplier=multipliers, floor=st.floats(0, 1))
def test_weights_lie_between_their_floor_and_one_and_never_grow(
    t: int, later: int, power: float, lag: float, multiplier: float, floor: float
) -> None:
    t, later = sorted([t, later])
    betas = [
        ema_weight(s, ema_power=power, lag=lag, multiplier=multiplier, min_ema_multiplier=floor) for s in (t, later)
    ]
    alphas = [bias_weight(s, bias_power=power, lag=lag, multiplier=multiplier) for s in (t, later)]
    assert floor <= betas[1] <= betas[0] <= 1
    assert 0 <= alphas[1] <= alphas[0] <= 1


# Instants


@pytest.mark.clause("BEMA-1", "BEMA-2")
@given(update_after=st.integers(0, 50), update_freq=st.integers(1, 50))
def test_the_snapshot_comes_once_and_updates_every_so_often_after_it(update_after: int, update_freq: int) -> None:
    h = {"update_after": update_after, "update_freq": update_freq}
    assert [t for t in range(200) if is_snapshot(t, update_after=update_after)] == [update_after]
    assert [t for t in range(200) if is_update(t, **h)] == instants(199, **h)


# The recurrence in exact arithmetic: the same functions, fed with fractions


@pytest.mark.clause("BEMA-4")
@given(betas=st.lists(weights, max_size=8), points=st.lists(fractions, min_size=9, max_size=9))
def test_the_ema_is_the_weighted_sum_of_all_points(betas: list[Fraction], points: list[Fraction]) -> None:
    points = points[: len(betas) + 1]
    weighted = zip(impulse_response(betas), points, strict=True)
    assert sum(weight * point for weight, point in weighted) == averages(points, betas)[-1]


@pytest.mark.clause("BEMA-4")
@given(betas=st.lists(weights, max_size=8))
def test_the_weights_of_all_points_are_not_negative_and_sum_to_one(betas: list[Fraction]) -> None:
    response = impulse_response(betas)
    assert all(weight >= 0 for weight in response)
    assert sum(response) == 1


@pytest.mark.clause("BEMA-3", "BEMA-4")
@given(
    power=st.sampled_from([0.0, 0.5, 1.0]) | st.floats(0, 1),
    lag=st.integers(1, 20),
    multiplier=st.sampled_from([0, Fraction(1, 2), 1]),
    updates=st.integers(1, 10),
)
def test_later_points_weigh_no_less_while_the_base_grows_by_at_most_one(
    power: float, lag: int, multiplier: Fraction, updates: int
) -> None:
    # w_{i+1} ≥ w_i ⇔ 1/β_{i+1} − 1/β_i ≤ 1, which holds for 1/β = (ρ + γt)^κ where κ ≤ 1, γφ ≤ 1 and ρ ≥ 1.
    # With κ = γφ = 1 they are equal, and β is known to a few units of float64's last place only.
    schedule = {"lag": lag, "multiplier": float(multiplier), "min_ema_multiplier": 0.0}
    betas = [Fraction(ema_weight(t, ema_power=power, **schedule)) for t in range(1, updates + 1)]
    response = impulse_response(betas)[1:]
    assert all(later >= earlier * (1 - Fraction(64 * U64)) for earlier, later in pairwise(response))


@pytest.mark.clause("BEMA-4", "BEMA-6")
@given(c=fractions, betas=st.lists(weights, max_size=8), alpha=weights)
def test_a_constant_trajectory_is_a_fixed_point(c: Fraction, betas: list[Fraction], alpha: Fraction) -> None:
    average = averages([c] * (len(betas) + 1), betas)[-1]
    assert average == c
    assert shadow(average, c, c, alpha) == c


@pytest.mark.clause("BEMA-4", "BEMA-6")
@given(start=fractions, slope=fractions, beta=weights, updates=st.integers(0, 10), alpha=weights)
def test_on_a_line_the_ema_lags_by_a_geometric_sum(
    start: Fraction, slope: Fraction, beta: Fraction, updates: int, alpha: Fraction
) -> None:
    # The lag θ_k − EMA_k is multiplied by 1 − β at every update, after θ has moved on by one slope.
    assume(beta > 0)
    line = [start + slope * k for k in range(updates + 1)]
    average = averages(line, [beta] * updates)[-1]
    lag = slope * (1 - beta) * (1 - (1 - beta) ** updates) / beta
    assert average == line[-1] - lag
    assert shadow(average, line[-1], line[0], alpha) == line[-1] - lag + alpha * slope * updates


@pytest.mark.clause("BEMA-3", "BEMA-4")
@given(points=st.lists(fractions, min_size=1, max_size=10))
def test_the_ema_is_the_mean_of_all_points_where_its_weight_is_one_over_their_number(
    points: list[Fraction],
) -> None:
    # κ = ρ = γ = φ = 1: β_t = 1 / (1 + t)
    betas = [Fraction(1, 1 + t) for t in range(1, len(points))]
    h = {"ema_power": 1.0, "lag": 1, "multiplier": 1.0, "min_ema_multiplier": 0.0}
    assert [ema_weight(t, **h) for t in range(1, len(points))] == [float(beta) for beta in betas]
    assert averages(points, betas)[-1] == Fraction(sum(points), len(points))


@pytest.mark.clause("BEMA-4", "BEMA-6")
@given(
    points=st.lists(fractions, min_size=9, max_size=9),
    betas=st.lists(weights, max_size=8),
    alpha=weights,
    shift=fractions,
    scale=fractions,
)
def test_shifting_and_scaling_the_trajectory_shifts_and_scales_the_shadow(
    points: list[Fraction], betas: list[Fraction], alpha: Fraction, shift: Fraction, scale: Fraction
) -> None:
    def last_shadow(points: list[Fraction]) -> Fraction:
        return shadow(averages(points, betas)[-1], points[-1], points[0], alpha)

    points = points[: len(betas) + 1]
    assert last_shadow([scale * x + shift for x in points]) == scale * last_shadow(points) + shift


# The recurrence in the reference's own arithmetic


@pytest.mark.clause("BEMA-1", "BEMA-2", "BEMA-3", "BEMA-4", "BEMA-5", "BEMA-6")
@given(trajectory=trajectories(dtype=torch.float64, elements=3), h=hyperparameters())
def test_the_reference_is_the_weighted_sum_to_within_its_own_bound(
    args: TrainingArguments, trajectory: Tensor, h: dict[str, Any]
) -> None:
    callback = BEMACallback(**h)
    seen = lead(
        [callback],
        one_parameter(trajectory),
        args,
        lambda _: (callback.shadow_values()["w"], callback.shadow_bounds(torch.float64)["w"]),
    )
    for t, (values, bounds) in enumerate(seen):
        assert (distance(values, exact_shadow(trajectory, t, **h)) <= bounds).all()


@pytest.mark.clause("BEMA-3", "BEMA-5")
@given(trajectory=trajectories(), h=hyperparameters(ema_power=st.just(0.0), bias_power=st.just(0.0)))
def test_without_averaging_and_correction_the_shadow_is_the_weights_of_the_last_update(
    args: TrainingArguments, trajectory: Tensor, h: dict[str, Any]
) -> None:
    for t, values in enumerate(reference_run(trajectory, args, **h)):
        last = max([min(t, h["update_after"]), *instants(t, **_timing(h))])
        assert values.equal(trajectory[last].double())


@pytest.mark.clause("BEMA-3", "BEMA-4")
@given(
    trajectory=trajectories(),
    h=hyperparameters(
        ema_power=st.just(2000.0),
        lag=st.integers(2, 9),
        min_ema_multiplier=st.just(0.0),
        bias_power=st.just(0.0),
    ),
)
def test_a_large_ema_power_leaves_the_average_at_the_snapshot(
    args: TrainingArguments, trajectory: Tensor, h: dict[str, Any]
) -> None:
    for t, values in enumerate(reference_run(trajectory, args, **h)):
        assert values.equal(trajectory[min(t, h["update_after"])].double())


@pytest.mark.clause("BEMA-5", "BEMA-6")
@given(trajectory=trajectories(), h=hyperparameters(lag=st.integers(2, 9)))
def test_no_correction_is_the_limit_of_a_large_bias_power(
    args: TrainingArguments, trajectory: Tensor, h: dict[str, Any]
) -> None:
    without = reference_run(trajectory, args, **(h | {"bias_power": 0.0}))
    large = reference_run(trajectory, args, **(h | {"bias_power": 2000.0}))
    assert all(a.equal(b) for a, b in zip(without, large, strict=True))


@pytest.mark.clause("BEMA-4", "BEMA-6")
@given(
    trajectory=trajectories(),
    h=hyperparameters(),
    exponent=st.integers(-20, 20),
    sign=st.sampled_from([1, -1]),
)
def test_scaling_by_a_power_of_two_scales_every_bit(
    args: TrainingArguments, trajectory: Tensor, h: dict[str, Any], exponent: int, sign: int
) -> None:
    scale = sign * 2.0**exponent
    plain = reference_run(trajectory.double(), args, **h)
    scaled = reference_run(trajectory.double() * scale, args, **h)
    # A product that underflows without the scale may not do so with it.
    assert all(torch.allclose(b, a * scale, rtol=0, atol=1e-300) for a, b in zip(plain, scaled, strict=True))


@pytest.mark.clause("BEMA-1", "BEMA-2", "BEMA-3")
@given(
    trajectory=trajectories(),
    h=hyperparameters(lag=st.integers(1, 20), multiplier=st.integers(0, 5), update_after=st.integers(0, 8)),
)
def test_a_burn_in_shifts_the_instants_and_ages_the_schedule(
    args: TrainingArguments, trajectory: Tensor, h: dict[str, Any]
) -> None:
    τ = h["update_after"]
    assume(len(trajectory) > τ + 1)
    burned_in = reference_run(trajectory, args, **h)[τ:]
    aged = reference_run(trajectory[τ:], args, **(h | {"update_after": 0, "lag": h["lag"] + h["multiplier"] * τ}))
    assert all(a.equal(b) for a, b in zip(burned_in, aged, strict=True))


# Arguments


@pytest.mark.clause("BEMA-14")
@pytest.mark.parametrize("arguments", BAD_ARGUMENTS, ids=str)
def test_a_bad_argument_is_named_with_its_value(arguments: dict[str, Any]) -> None:
    ((name, value),) = arguments.items()
    with pytest.raises(ValueError, match=re.escape(repr(value))) as refusal:
        BEMACallback(**arguments)
    assert str(refusal.value).startswith(name)


@pytest.mark.clause("BEMA-14")
@pytest.mark.parametrize("arguments", BAD_SCHEDULES, ids=str)
def test_a_schedule_that_would_extrapolate_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"lag \+ multiplier \* .* must be at least 1"):
        BEMACallback(**arguments)


@pytest.mark.clause("BEMA-14")
@given(h=hyperparameters())
def test_every_allowed_argument_is_accepted(h: dict[str, Any]) -> None:
    BEMACallback(**h)


@pytest.mark.clause("BEMA-14")
def test_a_schedule_that_starts_at_one_is_accepted() -> None:
    BEMACallback(lag=0, multiplier=0.25, update_freq=2, update_after=2)


def _timing(h: dict[str, Any]) -> dict[str, int]:
    return {name: h[name] for name in ("update_after", "update_freq")}
