"""What holds of any SyncRefModelCallback, in a single process, after a policy that the test writes."""

import inspect
import logging
import random
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import TrainerCallback
from truestep_fixtures import models, topologies

from truestep_spec_tests.implementation import Implementation
from truestep_spec_tests.properties.bema_cases import Weights
from truestep_spec_tests.properties.ref_sync_cases import (
    BAD_SETTINGS,
    DTYPES,
    FIELDS,
    MISSING,
    NARROW,
    Subject,
    Tied,
    all_bits,
    anything,
    base_weight,
    bits,
    computing,
    courses,
    exact_reference,
    exactly,
    fewer,
    of,
    running_bound,
    same_bits,
    set_field,
    strayed,
    weights,
    with_trained_head,
)


@pytest.fixture(scope="module")
def subject(implementation: Implementation, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return Subject(implementation, topologies.training_arguments("single", tmp_path_factory.mktemp("out")))


# When it moves


@pytest.mark.clause("SYNC-1")
@given(plan=st.lists(st.tuples(st.integers(1, 4), st.sampled_from([0, 1]) | weights), min_size=1, max_size=12))
@fewer
def test_each_sync_uses_the_interval_and_the_weight_that_the_arguments_have_then(
    subject: Subject, plan: list[tuple[int, float]]
) -> None:
    reference, policy = of(0.0), of(1.0)
    events = subject.begin(policy, reference, alpha=0.5)
    for t, settings in enumerate(plan, start=1):
        for field, value in zip(FIELDS, settings, strict=True):
            set_field(events.args, field, value)
        before = reference.w.detach().clone()
        events.step(t, lambda t=t: policy.w.data.fill_(t))
        sync_steps, alpha = settings
        if t % sync_steps:
            assert bits(before).equal(bits(reference.w))
        else:
            points = policy.w.detach().unsqueeze(0)
            errors = running_bound(before, points, alpha, computed_in=torch.float32, kept_in=torch.float32)
            exact = exact_reference(before, points, alpha)
            assert strayed(reference.w, exact, errors, computed_in=torch.float32) == []


@pytest.mark.clause("SYNC-1")
@given(steps=st.integers(1, 20), sync_steps=st.integers(1, 6))
@fewer
def test_the_reference_moves_at_multiples_of_the_interval_and_stands_still_in_between(
    subject: Subject, steps: int, sync_steps: int
) -> None:
    # With α = 1 it is the policy of the last sync, which holds the number of its step.
    count = torch.arange(1.0, steps + 1).unsqueeze(1)
    seen = subject.followed(torch.zeros(1), count, 1.0, sync_steps)
    assert [t // sync_steps * sync_steps for t in range(steps + 1)] == [values.item() for values in seen]


@pytest.mark.clause("SYNC-1")
def test_nothing_happens_before_the_first_step(subject: Subject) -> None:
    reference = of(0.0)
    events = subject.begin(of(1.0), reference, alpha=1.0)
    for event in ("on_epoch_begin", "on_step_begin", "on_substep_end", "on_pre_optimizer_step", "on_optimizer_step"):
        events.fire(event)
    assert torch.zeros(3).equal(reference.w)


# What follows what

SHAPES = [(), (0,), (1,), (3,), (2, 3), (3, 2), (2, 3, 5)]


@pytest.mark.clause("SYNC-2")
@given(data=st.data(), shapes=st.lists(st.sampled_from(SHAPES), min_size=2, max_size=5), more=st.integers(0, 2))
def test_parameters_follow_those_of_the_same_name_wherever_they_stand(
    subject: Subject, data: st.DataObject, shapes: list[tuple[int, ...]], more: int
) -> None:
    def model(parts: list[int], value: Callable[[int], float]) -> nn.Module:
        shape = dict(enumerate([*shapes, *shapes]))
        return nn.ModuleDict({f"m{k}": Weights({f"w{k}": torch.full(shape[k], value(k))}) for k in parts})

    reference = model(data.draw(st.permutations(range(len(shapes)))), lambda k: 0.0)
    policy = model(data.draw(st.permutations(range(len(shapes) + more))), lambda k: k + 1.0)
    subject.begin(policy, reference, 0.5).step(1)
    for k, shape in enumerate(shapes):
        assert torch.full(shape, (k + 1) / 2).equal(reference.get_parameter(f"m{k}.w{k}"))


@pytest.mark.clause("SYNC-2")
@pytest.mark.parametrize("partner", [None, (), (1,), (6,), (3, 2), (2, 3, 1), (2, 4)], ids=str)
def test_a_parameter_without_a_partner_of_its_shape_is_named_before_anything_is_changed(
    subject: Subject, partner: tuple[int, ...] | None
) -> None:
    reference = Weights({"first": torch.zeros(3), "odd_one": torch.zeros(2, 3), "last": torch.zeros(3)})
    policy = Weights({"first": torch.ones(3), "more": torch.ones(2, 3), "last": torch.ones(3)})
    if partner is not None:
        policy.odd_one = nn.Parameter(torch.ones(partner))
    assert "odd_one" in subject.refusal(policy, reference)


@pytest.mark.clause("SYNC-2")
@pytest.mark.parametrize("names", ["a", "b", "c", "bc", "cba"])
def test_a_tied_parameter_moves_once_with_the_partner_that_any_of_its_names_has(subject: Subject, names: str) -> None:
    reference = Tied(0.0, *"abc")
    subject.begin(Tied(1.0, *names), reference, 0.25).step(1)
    assert reference.a is reference.b is reference.c
    assert torch.full((3,), 0.25).equal(reference.a)


@pytest.mark.clause("SYNC-2")
def test_a_tied_parameter_with_several_partners_is_named(subject: Subject) -> None:
    policy = Weights({"first": torch.ones(3), "second": torch.ones(3)})
    assert re.search("first|second", subject.refusal(policy, Tied(0.0, "first", "second")))


@pytest.mark.clause("SYNC-2")
def test_several_parameters_may_follow_a_tied_one(subject: Subject) -> None:
    reference = Weights({"a": torch.zeros(3), "b": torch.full((3,), 2.0)})
    subject.begin(Tied(1.0, "a", "b"), reference, 0.5).step(1)
    assert torch.full((3,), 0.5).equal(reference.a)
    assert torch.full((3,), 1.5).equal(reference.b)


@pytest.mark.clause("SYNC-2")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(data=st.data(), alpha=st.just(1.0) | weights)
@fewer
def test_buffers_and_shared_parameters_keep_every_bit(
    subject: Subject, dtype: torch.dtype, data: st.DataObject, alpha: float
) -> None:
    reference, policy = of(0.0), of(1.0)
    policy.shared = reference.shared = nn.Parameter(data.draw(anything(dtype)))
    policy.memory = nn.Parameter(data.draw(anything(dtype)))
    reference.memory = nn.Parameter(policy.memory.detach())
    for model in (reference, policy):
        model.register_buffer("buffer", data.draw(anything(dtype)))
    before = all_bits(reference)
    subject.begin(policy, reference, alpha).step(1)
    after = all_bits(reference)
    assert before | {"w": after["w"]} == after


@pytest.mark.clause("SYNC-1", "SYNC-2")
@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
@pytest.mark.parametrize("wrapped", ["none", "reference", "policy", "reference and policy"])
@pytest.mark.parametrize("accelerated", [False, True])
def test_models_are_paired_in_their_wrappers_with_and_without_an_accelerator(
    subject: Subject, wrap: Callable[[nn.Module], nn.Module], wrapped: str, accelerated: bool
) -> None:
    accelerator = Accelerator(cpu=topologies.device().type == "cpu") if accelerated else None
    reference, policy = of(0.0), of(1.0)
    outer_reference = wrap(reference) if "reference" in wrapped else reference
    events = subject.events(
        subject.callback(outer_reference, accelerator), wrap(policy) if "policy" in wrapped else policy, 0.5
    )
    events.train_begin()
    events.step(1)
    assert torch.full((3,), 0.5).equal(reference.w)


# The blend


@pytest.mark.parametrize(
    "master_weights",
    [
        pytest.param(False, marks=pytest.mark.clause("SYNC-3")),
        pytest.param(True, marks=pytest.mark.clause("SYNC-3", "SYNC-11")),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(data=st.data(), policy_dtype=st.sampled_from(DTYPES))
@fewer
def test_alpha_of_one_copies_and_alpha_of_zero_keeps_whatever_both_held(
    subject: Subject, dtype: torch.dtype, master_weights: bool, data: st.DataObject, policy_dtype: torch.dtype
) -> None:
    subject = subject.having(master_weights=master_weights)
    start, policy = data.draw(anything(dtype)), data.draw(anything(policy_dtype))
    kept, copied = (subject.followed(start, policy.unsqueeze(0), alpha)[-1] for alpha in (0.0, 1.0))
    assert bits(start).equal(bits(kept))
    # A number that a narrower dtype does not have is rounded once, for which there are two ways from float64.
    width = torch.promote_types(dtype, policy_dtype)
    is_rounded = policy.isfinite() if width != dtype else torch.zeros_like(policy, dtype=torch.bool)
    assert same_bits(policy[~is_rounded].to(dtype), copied[~is_rounded])
    assert policy[is_rounded].signbit().equal(copied[is_rounded].signbit())
    exact = exactly(policy[is_rounded])
    assert strayed(copied[is_rounded], exact, torch.zeros(len(exact)), computed_in=width) == []


@pytest.mark.clause("SYNC-4")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(data=st.data(), policy_dtype=st.sampled_from(DTYPES), alpha=weights)
def test_every_blend_is_rounded_once(
    subject: Subject, dtype: torch.dtype, data: st.DataObject, policy_dtype: torch.dtype, alpha: float
) -> None:
    start, points = data.draw(courses(dtype, policy_dtype, steps=3))
    width = computing(dtype, policy_dtype)
    seen = subject.followed(start, points, alpha)
    for before, after, point in zip(seen[:-1], seen[1:], points.split(1), strict=True):
        errors = running_bound(before, point, alpha, computed_in=width, kept_in=width)
        assert strayed(after, exact_reference(before, point, alpha), errors, computed_in=width) == []


@pytest.mark.clause("SYNC-4")
@pytest.mark.parametrize("policy_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_element_does_not_depend_on_where_it_is_in_a_tensor(
    subject: Subject, dtype: torch.dtype, policy_dtype: torch.dtype
) -> None:
    # 1009 is a prime: among a million elements each of them comes at every offset from where a vector begins.
    start, policy = torch.randn(2, 1009, generator=torch.Generator().manual_seed(0))
    start, points = start.to(dtype), policy.to(policy_dtype).unsqueeze(0)
    alone = subject.followed(start, points, 0.6)[-1]
    among = subject.followed(start.repeat(1200), points.repeat(1, 1200), 0.6)[-1]
    assert same_bits(alone.repeat(1200), among)


@pytest.mark.clause("SYNC-1")
@pytest.mark.parametrize("transposed", ["reference", "policy", "reference and policy"])
def test_the_layout_in_memory_does_not_matter(subject: Subject, transposed: str) -> None:
    reference, policy = of(0.0, 3, 5), Weights({"w": torch.arange(15.0).view(3, 5)})
    for name, model in (("reference", reference), ("policy", policy)):
        if name in transposed:
            model.w = nn.Parameter(model.w.detach().T.contiguous().T)
    memory = reference.w.data_ptr()
    subject.begin(policy, reference, 0.5).step(1)
    assert (torch.arange(15.0) / 2).equal(reference.w.flatten())
    assert memory == reference.w.data_ptr()


@pytest.mark.clause("SYNC-5")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(data=st.data(), reference_dtype=st.sampled_from(DTYPES), alpha=st.just(1.0) | weights)
@fewer
def test_the_policy_its_gradients_its_optimizer_and_random_numbers_stay_as_they_are(
    subject: Subject, dtype: torch.dtype, data: st.DataObject, reference_dtype: torch.dtype, alpha: float
) -> None:
    values, gradient, momentum = (data.draw(anything(dtype)) for _ in range(3))
    policy, reference = Weights({"w": values}), Weights({"w": torch.zeros(8, dtype=reference_dtype)})
    policy.w.grad = gradient.clone()
    optimizer = torch.optim.SGD(policy.parameters(), momentum=0.9)
    optimizer.state[policy.w]["momentum_buffer"] = momentum.clone()
    reference.requires_grad_(False)

    def generators() -> list[Any]:
        return [torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()]

    before = generators()
    events = subject.events(subject.callback(reference), policy, alpha, optimizer=optimizer)
    events.train_begin()
    events.step(1)
    events.train_end()
    assert before == generators()
    assert bits(values).equal(bits(policy.w))
    assert bits(gradient).equal(bits(policy.w.grad))
    assert bits(momentum).equal(bits(optimizer.state[policy.w]["momentum_buffer"]))
    assert (policy.w.requires_grad, reference.w.requires_grad, reference.w.grad) == (True, False, None)


# Arguments

bad_settings = pytest.mark.parametrize(("field", "value"), BAD_SETTINGS, ids=str)


@pytest.mark.clause("SYNC-8")
@pytest.mark.parametrize("syncs", [0, 1], ids=["at_train_begin", "at_a_later_sync"])
@bad_settings
def test_a_bad_setting_is_named_with_its_value(subject: Subject, syncs: int, field: str, value: Any) -> None:
    reference = of(0.0)
    events = subject.events(subject.callback(reference), of(1.0), 0.5)
    if syncs:
        events.train_begin()
        events.step(syncs)
    set_field(events.args, field, value)
    with pytest.raises(ValueError, match=field) as error:
        events.step(syncs + 1) if syncs else events.train_begin()
    assert value is MISSING or str(value) in str(error.value)
    assert torch.full((3,), syncs / 2).equal(reference.w)


@pytest.mark.clause("SYNC-8")
@bad_settings
def test_without_a_reference_nothing_happens_whatever_the_settings(subject: Subject, field: str, value: Any) -> None:
    policy = of(1.0)
    events = subject.events(subject.callback(None), policy, 0.5)
    set_field(events.args, field, value)
    events.train_begin()
    events.step(1)
    events.train_end()
    assert torch.ones(3).equal(policy.w)


@pytest.mark.clause("SYNC-10")
def test_the_constructor_is_the_documented_one(implementation: Implementation, subject: Subject) -> None:
    callback_class, reference = implementation.SyncRefModelCallback, of(0.0)
    first, second, *others = inspect.signature(callback_class).parameters.values()
    assert [first.name, second.name] == ["ref_model", "accelerator"]
    assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in others)
    assert issubclass(callback_class, TrainerCallback)
    events = subject.events(callback_class(accelerator=None, ref_model=reference), of(1.0), 0.5)
    events.train_begin()
    events.step(1)
    assert torch.full((3,), 0.5).equal(reference.w)


# Adapters


ADAPTED = {"lora": lambda: models.build("lora"), "lora_and_head": with_trained_head}


@pytest.mark.clause("SYNC-9")
@pytest.mark.parametrize("adapted", ADAPTED)
def test_a_plain_reference_follows_the_base_weights_under_adapters(subject: Subject, adapted: str) -> None:
    policy, reference = ADAPTED[adapted](), models.build("qwen2", seed=1)
    events = subject.begin(policy, reference, 1.0)
    for t in (1, 2):
        events.step(t, lambda: [parameter.data.add_(torch.randn_like(parameter)) for parameter in policy.parameters()])
        for name, parameter in reference.named_parameters():
            assert same_bits(base_weight(policy, name), parameter)


@pytest.mark.clause("SYNC-9")
@pytest.mark.parametrize("trained", [0, 3])
@pytest.mark.parametrize("adapted", ADAPTED)
def test_a_warning_says_that_adapters_are_left_out_and_how_many_base_weights_are_trained(
    subject: Subject, caplog: pytest.LogCaptureFixture, adapted: str, trained: int
) -> None:
    policy, reference = ADAPTED[adapted](), models.build("qwen2", seed=1)
    for name in [name for name, _ in reference.named_parameters()][:trained]:
        base_weight(policy, name).requires_grad_(True)
    with caplog.at_level(logging.WARNING):
        subject.begin(policy, reference, 1.0)
    (warning,) = [text for text in caplog.messages if "adapter" in text]
    assert re.search(rf"\b{trained}\b", warning)


@pytest.mark.clause("SYNC-9")
def test_an_adapter_of_the_reference_has_no_partner_in_a_plain_policy(subject: Subject) -> None:
    assert "lora_" in subject.refusal(models.build("qwen2"), models.build("lora"))


@pytest.mark.clause("SYNC-9")
def test_adapters_of_both_models_are_partners(subject: Subject, caplog: pytest.LogCaptureFixture) -> None:
    policy, reference = models.build("lora"), models.build("lora", seed=1)
    for parameter in policy.parameters():
        parameter.data.add_(torch.randn_like(parameter))
    with caplog.at_level(logging.WARNING):
        subject.begin(policy, reference, 1.0).step(1)
    assert all_bits(policy) == all_bits(reference)
    assert not [text for text in caplog.messages if "adapter" in text]


@pytest.mark.clause("SYNC-2", "SYNC-9")
def test_without_adapters_a_name_that_peft_would_give_is_like_any_other(subject: Subject) -> None:
    reference, policy = (nn.ModuleDict({"outer": of(value)}) for value in (0.0, 1.0))
    reference["outer"].base_layer, policy["outer"].base_layer = of(0.0), of(2.0)
    subject.begin(policy, reference, 0.5).step(1)
    assert torch.full((3,), 0.5).equal(reference["outer"].w)
    assert torch.full((3,), 1.0).equal(reference["outer"].base_layer.w)


# Beyond the documentation


@pytest.mark.clause("SYNC-11")
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_master_weights_go_all_the_way_where_a_narrow_reference_stands_still(
    subject: Subject, dtype: torch.dtype
) -> None:
    # Beside x there is no number that is closer than u·|x|: less than half of that is rounded away, each time anew.
    with_master = subject.having(master_weights=True)
    alpha, syncs, u = 0.01, 200, torch.finfo(dtype).eps / 2
    start, move = torch.randn(2, 256, generator=torch.Generator().manual_seed(0))
    start = start.to(dtype)
    policy = (start * (1 + u / 2 / alpha * move.clamp(-0.9, 0.9))).to(dtype)
    constant = policy.expand(syncs, -1)
    assert bits(start).equal(bits(subject.followed(start, constant, alpha)[-1]))
    values = with_master.followed(start, constant, alpha)[-1]
    left = (1 - Fraction(alpha)) ** syncs
    exact = [p + left * (r - p) for r, p in zip(exactly(start), exactly(policy), strict=True)]
    errors = running_bound(start, constant, alpha, computed_in=torch.float32, kept_in=torch.float32)
    assert strayed(values, exact, errors, computed_in=torch.float32) == []


@pytest.mark.clause("SYNC-11")
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@given(data=st.data(), alpha=weights)
@fewer
def test_with_master_weights_many_blends_are_rounded_once(
    subject: Subject, dtype: torch.dtype, data: st.DataObject, alpha: float
) -> None:
    subject = subject.having(master_weights=True)
    start, points = data.draw(courses(dtype, steps=8))
    for t, values in enumerate(subject.followed(start, points, alpha)):
        exact = exact_reference(start, points[:t], alpha)
        errors = running_bound(start, points[:t], alpha, computed_in=torch.float32, kept_in=torch.float32)
        assert strayed(values, exact, errors, computed_in=torch.float32) == []


@pytest.mark.clause("SYNC-11")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@given(data=st.data(), alpha=weights)
@fewer
def test_master_weights_change_nothing_for_wide_parameters(
    subject: Subject, dtype: torch.dtype, data: st.DataObject, alpha: float
) -> None:
    with_master = subject.having(master_weights=True)
    start, points = data.draw(courses(dtype))
    expected, seen = (one.followed(start, points, alpha) for one in (subject, with_master))
    assert all(same_bits(a, b) for a, b in zip(expected, seen, strict=True))


@pytest.mark.clause("SYNC-13")
@pytest.mark.parametrize("master_weights", [False, True])
@given(course=courses(), alpha=weights)
@fewer
def test_a_second_training_pairs_anew_and_goes_on_from_the_weights_that_the_reference_then_has(
    subject: Subject, master_weights: bool, course: tuple[Tensor, Tensor], alpha: float
) -> None:
    subject = subject.having(master_weights=master_weights)
    start, points = course
    reference = Weights({"w": start})
    callback = subject.callback(reference)
    for changed, policy in ((start, points), (None, points.flip(0)), (points[0], points)):
        if changed is not None:
            reference.w.data.copy_(changed)
        expected = subject.followed(reference.w.detach(), policy, alpha)
        seen = subject.follow(callback, reference, policy, alpha)
        assert all(same_bits(a, b) for a, b in zip(expected, seen, strict=True))


@pytest.mark.clause("SYNC-13")
@pytest.mark.parametrize("master_weights", [False, True])
def test_a_callback_that_is_added_in_the_middle_of_a_training_begins_with_its_first_sync(
    subject: Subject, master_weights: bool
) -> None:
    subject = subject.having(master_weights=master_weights)
    reference, policy = of(0.0).bfloat16(), of(1.0).bfloat16()
    events = subject.events(subject.callback(reference), policy, 0.5, sync_steps=2)
    for t, expected in ((5, 0.0), (6, 0.5), (7, 0.5), (8, 0.75)):
        events.step(t)
        assert torch.full((3,), expected).equal(reference.w.float())
