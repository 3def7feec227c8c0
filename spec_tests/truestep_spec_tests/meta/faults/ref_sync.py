"""The faults that a reference model that follows can have."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from truestep_fixtures import topologies
from truestep_fixtures.events import Events
from truestep_fixtures.topologies import read_parameters

from truestep_spec_tests.differential.traffic import Tapped
from truestep_spec_tests.lockstep.ref_sync import logits
from truestep_spec_tests.meta.faults import Values, first_difference, unless_it_raises
from truestep_spec_tests.meta.specification import constructor
from truestep_spec_tests.properties.ref_sync_cases import BAD_SETTINGS, set_field
from truestep_spec_tests.runs import Setup, Walk, same_bits, sync_in_lockstep

# On a trajectory


def with_secondary_partitions(setup: Setup, directory: Path) -> str | None:
    """It leaves the reference where DeepSpeed keeps secondary partitions."""
    policy = topologies.place(setup.build_model(), setup.topology, zero_hpz_partition_size=2)
    _, callbacks, comparisons = sync_in_lockstep(setup, zero_hpz_partition_size=2)
    walk = Walk(setup, directory, callbacks, placed=policy)
    walk.begin()
    walk.go_to(setup.steps)
    return None if comparisons.divergence is None else str(comparisons.divergence)


def in_its_traffic(setup: Setup, directory: Path) -> str | None:
    """It communicates at a step."""
    tapped = Tapped(setup.subject(setup.place_ref_model().engine, None))
    walk = Walk(setup, directory, [tapped])
    walk.begin()
    walk.go_to(setup.steps)
    sent = {step: messages for step, messages in tapped.messages.items() if messages}
    return f"it communicates: {sent}" if sent else None


def after_a_change_of_settings(setup: Setup, directory: Path) -> str | None:
    """It goes on with the settings of before."""
    reference = setup.build_ref_model()
    walk = Walk(setup, directory, [setup.subject(reference, None)])
    walk.begin()
    for step, (interval, alpha) in enumerate([(1, 0.25), (1, 0.75), (3, 0.75), (2, 0.5)], start=1):
        args: Any = walk.events.args
        args.ref_model_sync_steps, args.ref_model_mixup_alpha = interval, alpha
        before = read_parameters(reference)
        walk.go_to(step)
        weight = alpha if step % interval == 0 else 0.0
        fault = _not_blended(read_parameters(reference), before, walk.points[step], weight)
        if fault is not None:
            return f"step {step}: {fault}"
    return None


def with_a_reference_that_is_not_finite(setup: Setup, directory: Path) -> str | None:
    """With α = 1 it is not a copy of the policy."""
    reference = setup.build_ref_model()
    with torch.no_grad():
        for parameter, value in zip(reference.parameters(), [torch.inf, torch.nan] * 100, strict=False):
            parameter.fill_(value)
    walk = Walk(setup, directory, [setup.subject(reference, None)])
    walk.begin()
    walk.go_to(2)
    return first_difference(read_parameters(reference), walk.points[2])


def in_the_policy(setup: Setup, directory: Path) -> str | None:
    """The policy is not what the trajectory has made it."""
    walk = Walk(setup, directory, [setup.subject(setup.build_ref_model(), None)])
    walk.begin()
    for step in range(1, setup.steps + 1):
        walk.go_to(step)
        fault = first_difference(walk.placed.read(), walk.points[step])
        if fault is not None:
            return f"step {step}: {fault}"
    return None


def in_a_second_training(setup: Setup, directory: Path) -> str | None:
    """It follows the policy of the training before."""
    reference = setup.build_ref_model()
    subject = setup.subject(reference, None)
    for seed in (0, 1):
        walk = Walk(setup.on(seed=seed), directory, [subject])
        walk.begin()
        walk.go_to(1)
        before = read_parameters(reference)
        walk.go_to(2)
    return _not_blended(read_parameters(reference), before, walk.points[2], setup.training["ref_model_mixup_alpha"])


def in_forwards_after_resuming(setup: Setup, directory: Path, step: int, secondary: int = 1) -> str | None:
    """A forward after train begin does not see the weights that were restored."""
    partitions = {"zero_hpz_partition_size": secondary}
    policy = topologies.place(setup.build_model(), setup.topology, **partitions)
    placed, fresh = setup.place_ref_model(**partitions), setup.build_ref_model()
    walk = Walk(setup, directory, [setup.subject(placed.engine, None)], placed=policy)
    for _ in range(2):
        logits(placed.engine)
    walk.begin(step)
    found = [logits(placed.engine) for _ in range(2)]
    topologies.write_parameters(fresh, placed.read())
    expected = logits(fresh)
    return None if all(same_bits(one, expected) for one in found) else "a forward sees other weights"


def in_a_failed_resumption(setup: Setup, directory: Path, step: int) -> str | None:
    """A damaged state is accepted, or has changed something."""
    reference = setup.build_ref_model()
    before = read_parameters(reference)
    walk = Walk(setup, directory, [setup.subject(reference, None)])
    accepted = unless_it_raises(lambda: walk.begin(step))
    return accepted or first_difference(read_parameters(reference), before)


def with_two_references(setup: Setup, directory: Path) -> str | None:
    """After resuming, one of them is not what it was."""
    saved, resumed = ([setup.on(seed=seed).build_ref_model() for seed in (0, 1)] for _ in range(2))
    walk = Walk(setup, directory, [setup.subject(reference, None) for reference in saved])
    walk.begin()
    walk.go_to(2)
    walk.events.save()
    Walk(setup, directory, [setup.subject(reference, None) for reference in resumed]).begin(2)
    pairs = zip(resumed, saved, strict=True)
    faults = (first_difference(read_parameters(one), read_parameters(other)) for one, other in pairs)
    return next(filter(None, faults), None)


# With pairs of models


class Two(nn.Module):
    """Two parameters of one shape, in the order that is asked for."""

    def __init__(self, names: str, shape: tuple[int, ...] = (2, 3)) -> None:
        super().__init__()
        for name in names:
            self.register_parameter(name, nn.Parameter(torch.full(shape, float(ord(name)))))


def with_another_order(setup: Setup, directory: Path) -> str | None:
    """Parameters are taken by where they stand."""
    policy, reference = Two("abc"), Two("cb")
    expected = read_parameters(reference)
    _sync_once(setup, directory, policy, reference)
    return first_difference(read_parameters(reference), expected)


def with_a_parameter_too_many(setup: Setup, directory: Path) -> str | None:
    """It is not refused, or something was changed before."""
    return _unless_refused(setup, directory, Two("ab"), Two("abc"))


def with_another_shape(setup: Setup, directory: Path) -> str | None:
    """It is not refused."""
    return _unless_refused(setup, directory, Two("ab", (1, 3)), Two("ab", (2, 3)))


def in_shared_memory(setup: Setup, directory: Path) -> str | None:
    """A layer that is shared by its memory is changed."""
    policy, reference = Two("ab"), Two("ab")
    policy.a.data[0, 0] = torch.inf
    reference.a.data = policy.a.data
    before = read_parameters(policy)
    _sync_once(setup, directory, policy, reference)
    return first_difference(read_parameters(policy), before)


def with_adapters_on_the_policy(setup: Setup, directory: Path) -> str | None:
    """The reference is refused, or does not follow the base weights."""
    policy = setup.build_model()
    reference = setup.on(model="qwen2").build_ref_model()
    before = read_parameters(reference)
    try:
        _sync_once(setup, directory, policy, reference)
    except ValueError as error:
        return str(error)
    base = {
        name.replace(".base_layer", "").removeprefix("base_model.model."): p
        for name, p in read_parameters(policy).items()
    }
    return _not_blended(read_parameters(reference), before, base, setup.training["ref_model_mixup_alpha"])


# Before any of that


def with_bad_settings(setup: Setup, directory: Path) -> str | None:
    """Train begin accepts what no interval or α can be."""
    for field, value in BAD_SETTINGS:
        events = _events(setup, directory, Two("ab"), Two("ab"))
        set_field(events.args, field, value)
        if unless_it_raises(events.train_begin) is not None:
            return f"{field}={value} is accepted"
    return None


def with_settings_of_one_rank(setup: Setup, directory: Path, alpha: float) -> str | None:
    """Train begin is not an error on a rank, although rank 1 has another α than rank 0."""
    mine = setup.training | ({"ref_model_mixup_alpha": alpha} if dist.get_rank() == 1 else {})
    args = topologies.training_arguments("ddp", directory, **mine)
    events = Events(Two("ab"), args, [setup.subject(Two("ab"), None)])
    return unless_it_raises(events.train_begin)


def in_the_constructor(setup: Setup, directory: Path) -> str | None:
    """Its arguments are not the documented ones, or more can be given by position."""
    shown = inspect.signature(type(setup.subject(None, None))).parameters.values()
    by_position = [parameter.name for parameter in shown if parameter.kind != inspect.Parameter.KEYWORD_ONLY]
    documented = [parameter.name for parameter in constructor(setup.callback)]
    return None if by_position == documented else f"{by_position} stands where {documented} is documented"


# Parts


def _events(setup: Setup, directory: Path, policy: nn.Module, reference: nn.Module) -> Events:
    args = topologies.training_arguments("single", directory, **setup.training)
    return Events(policy, args, [setup.subject(reference, None)])


def _sync_once(setup: Setup, directory: Path, policy: nn.Module, reference: nn.Module) -> None:
    events = _events(setup, directory, policy, reference)
    events.train_begin()
    events.step(setup.training["ref_model_sync_steps"])


def _unless_refused(setup: Setup, directory: Path, policy: nn.Module, reference: nn.Module) -> str | None:
    before = read_parameters(reference)
    refused: Callable[[], object] = _events(setup, directory, policy, reference).train_begin
    return unless_it_raises(refused) or first_difference(read_parameters(reference), before)


def _not_blended(found: Values, before: Values, policy: Values, alpha: float) -> str | None:
    """The first value that is further from the blend than four roundings of its terms; an unchanged one is exact."""
    for name, old in before.items():
        new: Tensor = policy[name].double()
        expected = old.double() + alpha * (new - old.double())
        allowed = 4 * 2.0**-24 * (old.double().abs() + new.abs()) if alpha else torch.zeros_like(new)
        if not ((found[name].double() - expected).abs() <= allowed).all():
            return f"{name} is not the blend"
    return None
