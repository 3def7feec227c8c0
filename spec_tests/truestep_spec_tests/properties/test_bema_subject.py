"""What holds of any BEMACallback, in a single process, on a trajectory that the test writes."""

import inspect
import re
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import mpmath
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments
from truestep_fixtures.topologies import training_arguments
from truestep_fixtures.training import Events
from truestep_reference import BEMACallback as ReferenceBEMACallback

from truestep_spec_tests.differential.cases import require
from truestep_spec_tests.implementation import Implementation
from truestep_spec_tests.observe import shadow, shadow_now
from truestep_spec_tests.properties.bema_cases import (
    BAD_ARGUMENTS,
    BAD_SCHEDULES,
    Point,
    Weights,
    distance,
    exact_shadow,
    hyperparameters,
    instants,
    lead,
    one_parameter,
    trajectories,
)

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

T = TypeVar("T")

NO_CORRECTION = {"bias_power": st.just(2000.0), "lag": st.integers(2, 20)}
"""Hyperparameters with which α is zero, without the argument that turns the correction off."""


COMPUTED = [
    pytest.param(dtype, marks=pytest.mark.clause("BEMA-3", "BEMA-4", "BEMA-6"), id=str(dtype)) for dtype in DTYPES[:2]
] + [pytest.param(dtype, marks=pytest.mark.clause("BEMA-8"), id=str(dtype)) for dtype in DTYPES[2:]]
"""Dtypes: wide ones show whether the formulas are the right ones, narrow ones how precisely they are computed."""


@pytest.fixture(autouse=True)
def precision() -> Iterator[None]:
    with mpmath.workdps(60):
        yield


@pytest.fixture(scope="module")
def args(tmp_path_factory: pytest.TempPathFactory) -> TrainingArguments:
    return training_arguments("single", tmp_path_factory.mktemp("out"))


def shown(callback: TrainerCallback, events: Events) -> dict[str, Tensor]:
    """The callback's shadow, in copies."""
    return {name: value.clone() for name, value in shadow_now(callback, events).items()}


def run(
    implementation: Implementation,
    points: Sequence[Point],
    args: TrainingArguments,
    model: nn.Module | None = None,
    **h: Any,
) -> list[dict[str, Tensor]]:
    """The subject's shadow at train begin and after each step."""
    callback = implementation.BEMACallback(**h)
    return lead([callback], points, args, lambda events: shown(callback, events), model)


def run_with_bounds(
    implementation: Implementation, trajectory: Tensor, args: TrainingArguments, **h: Any
) -> list[tuple[Tensor, Tensor]]:
    """The subject's shadow of one parameter and its bound, at train begin and after each step."""
    callback, reference = implementation.BEMACallback(**h), ReferenceBEMACallback(**h)
    computing = torch.promote_types(trajectory.dtype, torch.float32)
    return lead(
        [callback, reference],
        one_parameter(trajectory),
        args,
        lambda events: (shown(callback, events)["w"], reference.shadow_bounds(computing, trajectory.dtype)["w"]),
    )


def updated(seen: Sequence[T], h: dict[str, Any]) -> list[tuple[int, T]]:
    """What was seen at steps from the first update on, with these steps."""
    return list(enumerate(seen))[h["update_after"] + h["update_freq"] :]


def last_move(t: int, h: dict[str, Any]) -> int:
    """The step whose weights the shadow at step t was formed from."""
    updates = instants(t, update_after=h["update_after"], update_freq=h["update_freq"])
    return max([min(t, h["update_after"]), *updates])


# The average


@pytest.mark.clause("BEMA-1")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(data=st.data(), h=hyperparameters(update_after=st.integers(0, 14)))
def test_up_to_the_first_update_the_shadow_is_the_weights_of_the_snapshot_or_those_before_it(
    implementation: Implementation,
    args: TrainingArguments,
    dtype: torch.dtype,
    data: st.DataObject,
    h: dict[str, Any],
) -> None:
    trajectory = data.draw(trajectories(dtype=dtype))
    τ = h["update_after"]
    for t, seen in enumerate(run(implementation, one_parameter(trajectory), args, **h)[: τ + h["update_freq"]]):
        assert seen["w"].equal(trajectory[min(t, τ)])


@pytest.mark.clause("BEMA-2")
@given(trajectory=trajectories(), h=hyperparameters())
def test_between_updates_the_shadow_does_not_move(
    implementation: Implementation, args: TrainingArguments, trajectory: Tensor, h: dict[str, Any]
) -> None:
    seen = run(implementation, one_parameter(trajectory), args, **h)
    for t, values in enumerate(seen):
        assert values["w"].equal(seen[last_move(t, h)]["w"])


@pytest.mark.clause("BEMA-2", "BEMA-3")
@given(trajectory=trajectories(), h=hyperparameters(ema_power=st.just(0.0), **NO_CORRECTION))
def test_the_shadow_moves_at_every_update(
    implementation: Implementation, args: TrainingArguments, trajectory: Tensor, h: dict[str, Any]
) -> None:
    # θ_t = t, and without averaging or correction the shadow is θ of the last update.
    count = torch.arange(len(trajectory), dtype=torch.float32).unsqueeze(1)
    seen = updated(run(implementation, one_parameter(count), args, **h), h)
    assert [(t, round(float(values["w"]))) for t, values in seen] == [(t, last_move(t, h)) for t, _ in seen]


@pytest.mark.parametrize("dtype", COMPUTED)
@given(data=st.data(), h=hyperparameters(bias_power=st.sampled_from([0.2, 1.0]) | st.floats(0.01, 4)))
def test_the_shadow_is_the_weighted_sum_over_the_trajectory(
    implementation: Implementation,
    args: TrainingArguments,
    dtype: torch.dtype,
    data: st.DataObject,
    h: dict[str, Any],
) -> None:
    trajectory = data.draw(trajectories(steps=8, elements=3, dtype=dtype))
    assume(len(trajectory) > h["update_after"] + h["update_freq"])
    values, bound = run_with_bounds(implementation, trajectory, args, **h)[-1]
    exact = exact_shadow(trajectory, len(trajectory) - 1, **h)
    assert (distance(values, exact) <= bound).all()


@pytest.mark.parametrize("dtype", COMPUTED)
@given(data=st.data(), h=hyperparameters())
def test_a_constant_trajectory_is_a_fixed_point(
    implementation: Implementation,
    args: TrainingArguments,
    dtype: torch.dtype,
    data: st.DataObject,
    h: dict[str, Any],
) -> None:
    trajectory = data.draw(trajectories(dtype=dtype))
    constant = trajectory[:1].expand_as(trajectory)
    for values, bound in run_with_bounds(implementation, constant, args, **h):
        assert ((values - constant[0]).double().abs() <= bound).all()


@pytest.mark.clause("BEMA-5")
@given(trajectory=trajectories(), h=hyperparameters(ema_power=st.just(0.0), bias_power=st.just(0.0)))
def test_without_averaging_and_correction_the_shadow_is_the_weights_of_the_last_update(
    implementation: Implementation, args: TrainingArguments, trajectory: Tensor, h: dict[str, Any]
) -> None:
    for t, (values, bound) in updated(run_with_bounds(implementation, trajectory, args, **h), h):
        assert ((values.double() - trajectory[last_move(t, h)].double()).abs() <= bound).all()


@pytest.mark.clause("BEMA-5")
@given(trajectory=trajectories(), h=hyperparameters(lag=st.integers(2, 9)))
def test_without_correction_the_shadow_is_the_limit_of_a_large_bias_power(
    implementation: Implementation, args: TrainingArguments, trajectory: Tensor, h: dict[str, Any]
) -> None:
    points = one_parameter(trajectory)
    without = run(implementation, points, args, **(h | {"bias_power": 0.0}))
    large = run(implementation, points, args, **(h | {"bias_power": 2000.0}))
    assert all(a["w"].equal(b["w"]) for a, b in zip(without, large, strict=True))


@pytest.mark.clause("BEMA-3", "BEMA-4")
@given(trajectory=trajectories(dtype=torch.float64))
def test_the_shadow_is_the_mean_of_all_weights_where_each_of_them_weighs_the_same(
    implementation: Implementation, args: TrainingArguments, trajectory: Tensor
) -> None:
    # κ = ρ = γ = φ = 1 and τ = 0: β_t = 1 / (1 + t)
    h = {"update_freq": 1, "ema_power": 1.0, "bias_power": 2000.0, "lag": 1, "multiplier": 1.0}
    for t, (values, bound) in enumerate(run_with_bounds(implementation, trajectory, args, **h)):
        columns = trajectory[: t + 1].T.tolist()
        means = [mpmath.fsum(mpmath.mpf(x) for x in column) / (t + 1) for column in columns]
        assert (distance(values, means) <= bound).all()


@pytest.mark.clause("BEMA-4", "BEMA-6")
@given(
    trajectory=trajectories(),
    h=hyperparameters(),
    exponent=st.integers(-20, 20),
    sign=st.sampled_from([1, -1]),
)
def test_scaling_by_a_power_of_two_scales_every_bit(
    implementation: Implementation,
    args: TrainingArguments,
    trajectory: Tensor,
    h: dict[str, Any],
    exponent: int,
    sign: int,
) -> None:
    scale = sign * 2.0**exponent
    plain = run(implementation, one_parameter(trajectory), args, **h)
    scaled = run(implementation, one_parameter(trajectory * scale), args, **h)
    for a, b in zip(plain, scaled, strict=True):
        # A product that underflows without the scale may not do so with it.
        assert torch.allclose(b["w"], a["w"] * scale, rtol=0, atol=2.0**-80)


@pytest.mark.clause("BEMA-2", "BEMA-3")
@given(
    trajectory=trajectories(),
    h=hyperparameters(lag=st.integers(1, 20), multiplier=st.integers(0, 5), update_after=st.integers(0, 8)),
)
def test_a_burn_in_shifts_the_instants_and_ages_the_schedule(
    implementation: Implementation, args: TrainingArguments, trajectory: Tensor, h: dict[str, Any]
) -> None:
    τ = h["update_after"]
    assume(len(trajectory) > τ + h["update_freq"])
    aged = h | {"update_after": 0, "lag": h["lag"] + h["multiplier"] * τ}
    burned_in = updated(run(implementation, one_parameter(trajectory), args, **h), h)
    without = updated(run(implementation, one_parameter(trajectory[τ:]), args, **aged), aged)
    assert all(a["w"].equal(b["w"]) for (_, a), (_, b) in zip(burned_in, without, strict=True))


# What is averaged


@pytest.mark.clause("BEMA-7")
@given(trajectory=trajectories(), h=hyperparameters(), data=st.data())
def test_the_order_of_the_parameters_does_not_matter(
    implementation: Implementation,
    args: TrainingArguments,
    trajectory: Tensor,
    h: dict[str, Any],
    data: st.DataObject,
) -> None:
    points = [{f"w{k}": theta[k].repeat(k + 1) for k in range(len(theta))} for theta in trajectory]
    order = data.draw(st.permutations(list(points[0])))
    permuted = [{name: point[name] for name in order} for point in points]
    for a, b in zip(run(implementation, points, args, **h), run(implementation, permuted, args, **h), strict=True):
        assert a.keys() == b.keys()
        assert all(a[name].equal(b[name]) for name in a)


@pytest.mark.clause("BEMA-7", "BEMA-12")
@given(sizes=st.lists(st.integers(1, 40), min_size=2, max_size=4), seed=st.integers(0, 2**32), h=hyperparameters())
def test_an_element_does_not_depend_on_the_tensor_that_it_is_in(
    implementation: Implementation, args: TrainingArguments, sizes: list[int], seed: int, h: dict[str, Any]
) -> None:
    # All bits of the numbers matter here, as vector instructions and the rest of a loop could round differently.
    trajectory = torch.randn(7, sum(sizes), generator=torch.Generator().manual_seed(seed))
    together = run(implementation, one_parameter(trajectory), args, **h)
    apart = [{f"w{k}": part for k, part in enumerate(theta.split(sizes))} for theta in trajectory]
    for a, b in zip(together, run(implementation, apart, args, **h), strict=True):
        assert a["w"].equal(torch.cat([b[f"w{k}"] for k in range(len(sizes))]))


class _Mixed(Weights):
    """A trainable parameter under two names, a frozen one and a buffer."""

    def __init__(self, theta: Tensor) -> None:
        super().__init__({"w": theta, "frozen": theta + 1})
        self.config = theta
        self.tied = self.w
        self.frozen.requires_grad_(False)
        self.register_buffer("buffer", theta + 2)


@pytest.mark.clause("BEMA-7")
@given(trajectory=trajectories(), h=hyperparameters())
def test_frozen_parameters_and_buffers_are_live_and_a_tied_parameter_is_one(
    implementation: Implementation, args: TrainingArguments, trajectory: Tensor, h: dict[str, Any]
) -> None:
    model, callback = _Mixed(trajectory[0]), implementation.BEMACallback(**h)
    points = [{"w": theta, "frozen": 2 * theta} for theta in trajectory]

    def look(events: Events) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        model.buffer.add_(1)
        return shown(callback, events), model.frozen.detach().clone(), model.buffer.clone()

    alone = run(implementation, one_parameter(trajectory), args, **h)
    for (seen, frozen, buffer), expected in zip(lead([callback], points, args, look, model), alone, strict=True):
        assert seen.keys() == model.state_dict().keys()
        assert seen["frozen"].equal(frozen)
        assert seen["buffer"].equal(buffer)
        assert seen["w"].equal(expected["w"])
        assert seen["tied"].equal(expected["w"])


# A callback's life


@pytest.mark.clause("BEMA-13")
@given(trajectory=trajectories(), h=hyperparameters())
def test_neither_averaging_nor_reading_touches_weights_gradients_or_random_numbers(
    implementation: Implementation, args: TrainingArguments, trajectory: Tensor, h: dict[str, Any]
) -> None:
    model, callback = Weights({"w": trajectory[0]}), implementation.BEMACallback(**h)
    model.w.grad = gradient = torch.ones_like(model.w)
    generator = torch.get_rng_state()

    def look(events: Events) -> Tensor:
        shown(callback, events)
        return model.w.detach().clone()

    for theta, seen in zip(trajectory, lead([callback], one_parameter(trajectory), args, look, model), strict=True):
        assert seen.equal(theta)
    assert model.w.requires_grad
    assert model.w.grad is gradient
    assert gradient.equal(torch.ones_like(gradient))
    assert torch.get_rng_state().equal(generator)


@pytest.mark.clause("BEMA-15")
@given(first=trajectories(), second=trajectories(), h=hyperparameters())
def test_a_second_training_begins_afresh_also_on_another_model(
    implementation: Implementation, args: TrainingArguments, first: Tensor, second: Tensor, h: dict[str, Any]
) -> None:
    callback = implementation.BEMACallback(**h)
    for trajectory in (first, second, first):  # none of them ends: each was cut short by an exception, as it were
        seen = lead([callback], one_parameter(trajectory), args, lambda events: shown(callback, events)["w"])
        expected = run(implementation, one_parameter(trajectory), args, **h)
        assert all(a.equal(b["w"]) for a, b in zip(seen, expected, strict=True))


@pytest.mark.clause("BEMA-15")
def test_a_second_training_begins_afresh_after_one_that_ended(implementation: Implementation, tmp_path: Any) -> None:
    callback, args = implementation.BEMACallback(update_freq=1), training_arguments("single", tmp_path)
    for start in (0.0, 100.0):
        model = Weights({"w": torch.full((3,), start)})
        events = Events(model, args, [callback])
        events.train_begin()
        assert shown(callback, events)["w"].equal(torch.full((3,), start))
        events.step(1, lambda model=model: model.w.data.add_(1))
        events.train_end()
        assert (shown(callback, events)["w"] - start).abs().max() <= 2


@pytest.mark.clause("BEMA-16")
def test_before_any_training_there_is_no_shadow(implementation: Implementation) -> None:
    require(implementation, "shadow_state_dict")
    with pytest.raises(RuntimeError):
        shadow(implementation.BEMACallback())


# Arguments


@pytest.mark.clause("BEMA-14")
@pytest.mark.parametrize("arguments", BAD_ARGUMENTS, ids=str)
def test_a_bad_argument_is_named_with_its_value(implementation: Implementation, arguments: dict[str, Any]) -> None:
    ((name, value),) = arguments.items()
    with pytest.raises(ValueError, match=name) as refusal:
        implementation.BEMACallback(**arguments)
    assert str(value) in str(refusal.value)


@pytest.mark.clause("BEMA-14")
@pytest.mark.parametrize("arguments", BAD_SCHEDULES, ids=str)
def test_a_schedule_that_would_extrapolate_is_refused(
    implementation: Implementation, arguments: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=re.compile("lag.*multiplier", re.DOTALL)):
        implementation.BEMACallback(**arguments)


@pytest.mark.clause("BEMA-14")
@given(h=hyperparameters())
def test_every_allowed_argument_is_accepted(implementation: Implementation, h: dict[str, Any]) -> None:
    implementation.BEMACallback(**h)


@pytest.mark.clause("BEMA-20")
def test_the_constructor_is_the_documented_one(implementation: Implementation) -> None:
    parameters = inspect.signature(implementation.BEMACallback).parameters
    assert {name: parameter.default for name, parameter in parameters.items()} == {
        "update_freq": 400,
        "ema_power": 0.5,
        "bias_power": 0.2,
        "lag": 10,
        "update_after": 0,
        "multiplier": 1.0,
        "min_ema_multiplier": 0.0,
        "device": "cpu",
    }
    assert list(parameters)[:2] == ["update_freq", "ema_power"]
    assert issubclass(implementation.BEMACallback, TrainerCallback)
