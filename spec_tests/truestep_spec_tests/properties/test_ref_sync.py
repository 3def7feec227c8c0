"""The reference's blend and its rounding bound, against exact arithmetic."""

from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from truestep_fixtures.topologies import training_arguments
from truestep_reference import rounding
from truestep_reference.ref_sync import blend, blend_error, is_sync

from truestep_spec_tests.implementation import Implementation
from truestep_spec_tests.properties.bema_cases import Weights
from truestep_spec_tests.properties.ref_sync_cases import (
    DTYPES,
    NARROW,
    ORDERS,
    Subject,
    anything,
    bits,
    computing,
    courses,
    exact_reference,
    exactly,
    fewer,
    rounded,
    running_bound,
    strayed,
    weights,
)

U64 = Fraction(1, 2**53)

fractions = st.fractions(-1000, 1000, max_denominator=1000)
shares = st.fractions(0, 1, max_denominator=1000)
orders = st.sampled_from(sorted(ORDERS))
wide = st.sampled_from([torch.float32, torch.float64])


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """The reference, led like any subject."""
    return Subject(Implementation("truestep_reference"), training_arguments("single", tmp_path_factory.mktemp("out")))


def one_error(start: Tensor, policy: Tensor, alpha: float, dtype: torch.dtype) -> Tensor:
    """The bound for a single blend that is computed, and kept, in a dtype."""
    return running_bound(start, policy.unsqueeze(0), alpha, computed_in=dtype, kept_in=dtype)


def one_sync(subject: Subject, start: Tensor, policy: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """The reference's blend of one sync, and its bound for a subject's weights."""
    reference = Weights({"w": start})
    callback: Any = subject.callback(reference)
    subject.follow(callback, reference, policy.unsqueeze(0), alpha)
    return callback.blended_values()["w"], callback.blended_bounds()["w"]


def as_in_a_training(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weights of size 1/50, and a policy that has gone away from them by a tenth of that."""
    start, move = torch.randn(2, 1024, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (0.02 * start).to(dtype), (0.02 * start + 0.002 * move).to(dtype)


# The blend in exact arithmetic: the same function, fed with fractions


@pytest.mark.clause("SYNC-1")
@given(sync_steps=st.integers(1, 50))
def test_syncs_are_the_multiples_of_n_and_not_zero(sync_steps: int) -> None:
    assert list(range(sync_steps, 200, sync_steps)) == [t for t in range(200) if is_sync(t, sync_steps=sync_steps)]


@pytest.mark.clause("SYNC-1")
@given(policy=fractions, reference=fractions, alpha=shares)
def test_the_blend_lies_between_both_models_at_alpha_of_the_way(
    policy: Fraction, reference: Fraction, alpha: Fraction
) -> None:
    blended = blend(policy, reference, alpha)
    assert reference + alpha * (policy - reference) == blended
    assert min(policy, reference) <= blended <= max(policy, reference)


@pytest.mark.clause("SYNC-1")
@given(policy=fractions, reference=fractions, alpha=shares)
@fewer
def test_exchanging_the_models_exchanges_the_weights(policy: Fraction, reference: Fraction, alpha: Fraction) -> None:
    assert blend(reference, policy, 1 - alpha) == blend(policy, reference, alpha)


@pytest.mark.clause("SYNC-1")
@given(policy=fractions, reference=fractions, alpha=shares, shift=fractions, scale=fractions)
@fewer
def test_shifting_and_scaling_both_models_shifts_and_scales_the_blend(
    policy: Fraction, reference: Fraction, alpha: Fraction, shift: Fraction, scale: Fraction
) -> None:
    moved = blend(scale * policy + shift, scale * reference + shift, alpha)
    assert scale * blend(policy, reference, alpha) + shift == moved


@pytest.mark.clause("SYNC-1")
@given(start=fractions, policy=fractions, alpha=shares, syncs=st.integers(0, 10))
def test_the_distance_to_a_constant_policy_shrinks_geometrically(
    start: Fraction, policy: Fraction, alpha: Fraction, syncs: int
) -> None:
    reference = start
    for _ in range(syncs):
        reference = blend(policy, reference, alpha)
    assert policy + (1 - alpha) ** syncs * (start - policy) == reference


@pytest.mark.clause("SYNC-1")
@given(start=fractions, alphas=st.lists(st.tuples(shares, fractions), max_size=8))
@fewer
def test_the_weights_of_all_models_so_far_are_not_negative_and_sum_to_one(
    start: Fraction, alphas: list[tuple[Fraction, Fraction]]
) -> None:
    # The blend is linear: what one model adds to the outcome is the outcome where all others are zero.
    points = [start, *(point for _, point in alphas)]

    def outcome(points: list[Fraction]) -> Fraction:
        reference = points[0]
        for (alpha, _), policy in zip(alphas, points[1:], strict=True):
            reference = blend(policy, reference, alpha)
        return reference

    response = [outcome([Fraction(i == k) for i in range(len(points))]) for k in range(len(points))]
    assert all(weight >= 0 for weight in response)
    assert sum(response) == 1
    assert sum(weight * point for weight, point in zip(response, points, strict=True)) == outcome(points)


# The blend in the reference's own arithmetic


@pytest.mark.clause("SYNC-1", "SYNC-4")
@given(course=courses(torch.float64, torch.float64), alpha=weights)
def test_the_float64_blend_errs_by_the_roundings_of_its_four_operations_alone(
    course: tuple[Tensor, Tensor], alpha: float
) -> None:
    # α·p has one rounding, 1 − α and its product with r have two, and the sum rounds both once more. A product that
    # underflows errs by half of the smallest number, which the sum can but double.
    start, (policy, *_) = course
    exact = exact_reference(start, policy.unsqueeze(0), alpha)
    values = exactly(blend(policy, start, alpha))
    for value, truth, p, r in zip(values, exact, exactly(policy), exactly(start), strict=True):
        products = Fraction(alpha) * abs(p) * ((1 + U64) ** 2 - 1) + (1 - Fraction(alpha)) * abs(r) * (
            (1 + U64) ** 3 - 1
        )
        error = products + Fraction(2.0**-1073)
        assert abs(value - truth) <= error
        assert min(p, r) - error <= value <= max(p, r) + error


@pytest.mark.clause("SYNC-3")
@given(policy=anything(torch.float64), reference=anything(torch.float64))
def test_alpha_of_one_gives_the_policy_and_alpha_of_zero_the_reference_whatever_the_other_holds(
    policy: Tensor, reference: Tensor
) -> None:
    assert bits(policy).equal(bits(blend(policy, reference, 1.0)))
    assert bits(reference).equal(bits(blend(policy, reference, 0.0)))


@pytest.mark.clause("SYNC-1", "SYNC-4")
@given(course=courses(torch.float64, torch.float64), alpha=weights, syncs=st.integers(1, 20))
@fewer
def test_after_some_syncs_the_reference_is_the_weighted_sum_over_the_policies(
    subject: Subject, course: tuple[Tensor, Tensor], alpha: float, syncs: int
) -> None:
    # No number is larger than M, the largest that came in. A blend errs by ((1 + u)³ − 1)·M at most, see above, and
    # multiplies the error before it by (1 + u)³ at most: after k of them it is ((1 + u)³ᵏ − 1)·M.
    start, points = course
    for policies in (points, points[:1].expand(syncs, -1)):
        values = subject.followed(start, policies, alpha)[-1]
        exact = exact_reference(start, policies, alpha)
        largest = torch.cat([start.unsqueeze(0), policies]).abs().amax(0)
        for value, truth, m in zip(exactly(values), exact, exactly(largest), strict=True):
            error = ((1 + U64) ** (3 * len(policies)) - 1) * m + len(policies) * Fraction(2.0**-1073)
            assert abs(value - truth) <= error


@pytest.mark.clause("SYNC-11")
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@given(data=st.data(), alpha=weights)
@fewer
def test_master_weights_remember_all_syncs_to_float64(
    subject: Subject, dtype: torch.dtype, data: st.DataObject, alpha: float
) -> None:
    start, points = data.draw(courses(dtype, dtype))
    reference = Weights({"w": start})
    callback: Any = subject.having(master_weights=True).callback(reference)
    subject.follow(callback, reference, points, alpha)
    blended = callback.blended_values()["w"]
    # The bound is of a float64 subject's distance from exact arithmetic and the reference's own; one of them is here.
    errors = running_bound(start, points, alpha, computed_in=torch.float64, kept_in=torch.float64)
    assert strayed(blended, exact_reference(start, points, alpha), errors, computed_in=torch.float64) == []
    assert bits(blended.to(dtype)).equal(bits(reference.w))


@pytest.mark.clause("SYNC-1", "SYNC-4")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(data=st.data())
@fewer
def test_before_the_first_sync_the_reference_is_known_exactly(
    subject: Subject, dtype: torch.dtype, data: st.DataObject
) -> None:
    start, points = data.draw(courses(dtype, dtype))
    reference = Weights({"w": start})
    callback: Any = subject.callback(reference)
    subject.follow(callback, reference, points[:1], 0.5, sync_steps=2)
    assert start.double().equal(callback.blended_values()["w"])
    assert torch.zeros_like(start, dtype=torch.float64).equal(callback.blended_bounds()["w"])


@pytest.mark.clause("SYNC-4")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(data=st.data(), alpha=weights)
@fewer
def test_without_master_weights_the_bound_is_that_of_the_last_sync_alone(
    subject: Subject, dtype: torch.dtype, data: st.DataObject, alpha: float
) -> None:
    start, points = data.draw(courses(dtype))
    reference = Weights({"w": start})
    callback: Any = subject.callback(reference)
    before = subject.follow(callback, reference, points, alpha)[-2]
    blended, bounds = one_sync(subject, before, points[-1], alpha)
    assert blended.equal(callback.blended_values()["w"])
    assert bounds.equal(callback.blended_bounds()["w"])


# The rounding bound: no honest evaluation exceeds it


@pytest.mark.clause("SYNC-4")
@given(data=st.data(), dtype=wide, narrow=st.sampled_from([None, *NARROW]), alpha=weights, order=orders)
def test_no_order_of_evaluation_exceeds_the_bound(
    data: st.DataObject, dtype: torch.dtype, narrow: torch.dtype | None, alpha: float, order: str
) -> None:
    start, points = data.draw(courses(narrow or dtype, narrow or dtype))
    values = start.to(dtype)
    for point in points.to(dtype):
        values = ORDERS[order](values, point, alpha)
    errors = running_bound(start, points, alpha, computed_in=dtype, kept_in=dtype)
    exact = exact_reference(start, points, alpha)
    distances = [abs(value - truth) for value, truth in zip(exactly(values), exact, strict=True)]
    assert all(d <= e for d, e in zip(distances, exactly(errors), strict=True))


@pytest.mark.clause("SYNC-4")
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@given(data=st.data(), policy_dtype=st.sampled_from(DTYPES), alpha=weights, order=orders)
def test_no_blend_that_is_rounded_once_exceeds_the_bound(
    subject: Subject,
    dtype: torch.dtype,
    data: st.DataObject,
    policy_dtype: torch.dtype,
    alpha: float,
    order: str,
) -> None:
    start, (policy, *_) = data.draw(courses(dtype, policy_dtype))
    width = computing(dtype, policy_dtype)
    values = ORDERS[order](start.to(width), policy.to(width), alpha).to(dtype)
    blended, bounds = one_sync(subject, start, policy, alpha)
    assert ((values.double() - blended).abs() <= bounds).all()


@pytest.mark.clause("SYNC-4")
@given(course=courses(torch.float32, torch.float32), alpha=weights, order=orders, exponent=st.integers(100, 149))
def test_the_bound_holds_while_subnormal_numbers_are_flushed_to_zero(
    course: tuple[Tensor, Tensor], alpha: float, order: str, exponent: int
) -> None:
    start, policy = (values * 2.0**-exponent for values in (course[0], course[1][0]))
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush subnormal numbers")
    try:
        values = ORDERS[order](start, policy, alpha)
    finally:
        torch.set_flush_denormal(False)
    distances = (values.double() - blend(policy.double(), start.double(), alpha)).abs()
    assert (distances <= one_error(start, policy, alpha, torch.float32)).all()


@pytest.mark.clause("SYNC-3", "SYNC-4")
@given(course=courses(), errors=st.floats(0, 1), dtype=wide)
def test_copying_the_policy_forgets_every_error_and_keeping_the_reference_keeps_them(
    course: tuple[Tensor, Tensor], errors: float, dtype: torch.dtype
) -> None:
    reference, policy = course[0].double(), course[1][0].double()
    before = torch.full_like(reference, errors)
    for alpha, after in ((1.0, torch.zeros_like(before)), (0.0, before)):
        blended = blend(policy, reference, alpha)
        known = {"policy": policy, "reference": reference, "blended": blended, "alpha": alpha, "dtype": dtype}
        assert after.equal(blend_error(before, **known))


# The bound is tight enough to tell right from wrong


@pytest.mark.clause("SYNC-4")
@given(course=courses(), alpha=weights, dtype=wide)
def test_the_bound_is_at_most_four_roundings_of_both_models_on_either_side(
    course: tuple[Tensor, Tensor], alpha: float, dtype: torch.dtype
) -> None:
    # To first order each of the three orders of evaluation errs by 3u(|p| + |r|) at most before its last operation,
    # which adds u(|p| + |r|), and the reference errs by as much in float64. 1/1024 of it exceeds the higher orders, and
    # 33 times the smallest normal number what may underflow.
    u, least = rounding.unit_roundoff(dtype), torch.finfo(dtype).smallest_normal
    reference, policy = course[0].double(), course[1][0].double()
    sizes = policy.abs() + reference.abs()
    most = 4 * (u + float(U64)) * sizes * (1 + 1 / 1024) + 33 * least
    assert (one_error(reference, policy, alpha, dtype) <= most).all()


@pytest.mark.clause("SYNC-4")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_the_bound_is_within_a_factor_of_twenty_of_what_an_honest_subject_needs(order: str, dtype: torch.dtype) -> None:
    start, policy = as_in_a_training(dtype)
    exact = exact_reference(start, policy.unsqueeze(0), 0.6)
    values = ORDERS[order](start, policy, 0.6)
    errors = one_error(start, policy, 0.6, dtype)
    distances = [abs(value - truth) for value, truth in zip(exactly(values), exact, strict=True)]
    ratios = [float(d / e) for d, e in zip(distances, exactly(errors), strict=True)]
    assert 1 / 20 <= max(ratios) <= 1


@pytest.mark.clause("SYNC-4", "SYNC-11")
@given(course=courses(torch.float32, torch.float32), alpha=st.floats(2.0**-10, 1, exclude_max=True))
@fewer
def test_the_bound_of_many_syncs_is_at_most_that_of_one_divided_by_alpha(
    course: tuple[Tensor, Tensor], alpha: float
) -> None:
    # With e the bound grows by (1 − α)·e + 3u·e to first order: a geometric series, whose ratio is below 1 − α + 8u.
    # Its terms are largest where both models are as large as they can be, and apart; their sum then vanishes for α = ½,
    # and its rounding, which is below 2u times the larger model, is added.
    start, (policy, *_) = course
    largest = torch.maximum(start.abs(), policy.abs())
    own = one_error(-largest, largest, alpha, torch.float32)
    limit = (own + 2 * rounding.U32 * largest) / (alpha - 8 * rounding.U32)
    for syncs in (1, 10, 100):
        many = running_bound(start, policy.expand(syncs, -1), alpha, computed_in=torch.float32, kept_in=torch.float32)
        assert (many <= limit).all()


@pytest.mark.clause("SYNC-4")
@pytest.mark.parametrize("alpha", [0.01, 0.6, 0.9])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_rounding_the_product_and_then_the_sum_exceeds_the_bound(
    subject: Subject, dtype: torch.dtype, alpha: float
) -> None:
    start, policy = as_in_a_training(dtype)
    blended, bounds = one_sync(subject, start, policy, alpha)
    twice = start.clone().mul_(1 - alpha).add_(policy, alpha=alpha)
    assert ((twice.double() - blended).abs() > bounds).any()


@pytest.mark.clause("SYNC-4")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_a_wrong_weight_exceeds_the_bound(subject: Subject, dtype: torch.dtype, order: str) -> None:
    start, policy = as_in_a_training(dtype)
    blended, bounds = one_sync(subject, start, policy, 0.6)
    for wrong in (1 - 0.6, float(torch.tensor(0.6, dtype=torch.bfloat16)), 0.0, 1.0):
        values = ORDERS[order](start, policy, wrong)
        assert ((values.double() - blended).abs() > bounds).any()


# The oracle's own tool


@pytest.mark.clause("SYNC-4")
@given(value=st.floats(width=32, allow_nan=False, allow_infinity=False), dtype=st.sampled_from(NARROW))
def test_rounding_a_fraction_once_is_what_a_conversion_does(value: float, dtype: torch.dtype) -> None:
    assert torch.tensor(value, dtype=torch.float32).to(dtype).item() == rounded(Fraction(value), dtype)
