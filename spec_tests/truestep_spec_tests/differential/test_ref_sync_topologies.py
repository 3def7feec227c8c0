"""The reference model's bits do not depend on where the two models lie, and little is moved to get them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from truestep_fixtures import topologies
from truestep_fixtures.events import Events
from truestep_fixtures.ranks import RankPool
from truestep_fixtures.topologies import Placed

from truestep_spec_tests.differential.cases import DTYPES, PLACEMENTS, error_of, placements, skip_the_reference
from truestep_spec_tests.differential.ref_sync_cases import syncing
from truestep_spec_tests.differential.traffic import Message, Tapped, largest_allocation
from truestep_spec_tests.implementation import Implementation
from truestep_spec_tests.lockstep import Comparisons
from truestep_spec_tests.lockstep.ref_sync import logits
from truestep_spec_tests.options import require
from truestep_spec_tests.runs import Setup, Walk, same_bits, sync_in_lockstep, walked

Ranks = Callable[[int], RankPool]
Weights = dict[int, dict[str, Tensor]]


# ── What the ranks do ─────────────────────────────────────────────────────────


def follow_with_engines(setup: Setup, directory: Path, **zero_optimization: Any) -> tuple[Comparisons, int]:
    """Lockstep with both models under DeepSpeed's settings; also how many secondary partitions the reference has."""
    policy = topologies.place(setup.build_model(), setup.topology, setup.torch_dtype, **zero_optimization)
    placed, callbacks, comparisons = sync_in_lockstep(setup, **zero_optimization)
    walk = Walk(setup, directory, callbacks, placed=policy)
    walk.begin()
    logits(placed.engine)
    secondary = sum(getattr(p, "ds_secondary_tensor", None) is not None for p in placed.model.parameters())
    walk.go_to(setup.steps)
    return comparisons, secondary


def follow_while_both_are_evaluated(setup: Setup, directory: Path) -> Comparisons:
    """Lockstep in which, before each step, both models make forwards that leave whole copies behind."""
    placed, callbacks, comparisons = sync_in_lockstep(setup)
    walk = Walk(setup, directory, callbacks)
    walk.begin()
    walk.placed.engine.eval()
    for step in range(1, setup.steps + 1):
        for _ in range(3):
            logits(placed.engine)
            logits(walk.placed.engine)
        walk.go_to(step)
    return comparisons


def follow_and_show(setup: Setup, directory: Path) -> tuple[Comparisons, Weights]:
    """Lockstep, and the subject's reference model at each step as this rank has it."""
    shown: Weights = {}
    _, callbacks, comparisons = sync_in_lockstep(setup, lambda step, live, weights: shown.update({step: weights}))
    walk = Walk(setup, directory, callbacks)
    walk.begin()
    walk.go_to(setup.steps)
    return comparisons, shown


def messages_of_steps(setup: Setup, directory: Path) -> dict[int, list[Message]]:
    """What a subject communicates at each step."""
    placed = setup.place_ref_model()
    tapped = Tapped(setup.subject(placed.engine, None))
    walk = Walk(setup, directory, [tapped])
    walk.begin()
    walk.go_to(setup.steps)
    return tapped.messages


def largest_allocation_of_a_sync(setup: Setup, directory: Path, rows: int) -> int:
    """Bytes of the largest tensor that comes into being in a sync of one large parameter."""
    policy = topologies.place(Large(rows), setup.topology, setup.torch_dtype)
    dtype = getattr(torch, setup.ref_model.get("dtype", setup.dtype))
    topology = setup.ref_model.get("topology", setup.topology)
    placed = topologies.place_for_evaluation(Large(rows), topology, dtype)
    walk = Walk(setup, directory, [subject := setup.subject(placed.engine, None)], placed=policy)
    walk.begin()
    state = walk.events.state
    state.global_step = 2
    return largest_allocation(
        lambda: subject.on_step_end(walk.events.args, state, walk.events.control, model=policy.model)
    )


class Large(nn.Module):
    """One parameter whose size no number of ranks divides."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.linspace(-1, 1, rows * 1021).view(rows, 1021))

    def forward(self, values: Tensor) -> Tensor:
        return values @ self.matrix


def walk_wrapped(setup: Setup, directory: Path, wrap: Callable[[nn.Module], nn.Module]) -> dict[str, Tensor]:
    """The reference model's weights at the end of a walk in which both models come wrapped."""
    placed = setup.place_ref_model()
    walk = Walk(setup, directory, [])
    subject = setup.subject(wrap(placed.model), None)
    walk.events = Events(wrap(walk.placed.model), walk.events.args, [subject])
    walk.begin()
    walk.go_to(setup.steps)
    return placed.read()


def error_at_train_begin(setup: Setup, directory: Path, spoil: Callable[[Placed], None]) -> tuple[str | None, bool]:
    """The error of a training whose reference model was spoiled, and whether its weights are what they were."""
    placed = setup.place_ref_model()
    before = placed.read()
    spoil(placed)
    walk = Walk(setup, directory, [setup.subject(placed.engine, None)])
    message = error_of(walk.begin)
    after = dict(placed.model.named_parameters()) if spoil is leave_on_meta else placed.read()
    return message, all(same_bits(value, after[name]) for name, value in before.items() if name != "up")


def offload_to_nvme(placed: Placed) -> None:
    """Marks one parameter as DeepSpeed marks it; the offload itself needs a library that not every machine has."""
    from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum

    placed.model.get_parameter("up").ds_tensor.final_location = OffloadDeviceEnum.nvme


def quantise(placed: Placed) -> None:
    """Marks one parameter as DeepSpeed marks it; quantising needs a GPU."""
    placed.model.get_parameter("up").ds_tensor.ds_quant_scale = torch.ones(1)


def make_integer(placed: Placed) -> None:
    placed.model.up = nn.Parameter(torch.zeros(7, 3, dtype=torch.int8), requires_grad=False)


def leave_on_meta(placed: Placed) -> None:
    placed.model.up = nn.Parameter(placed.model.up.to("meta"), requires_grad=False)


def wrap_in_fsdp1(model: nn.Module) -> nn.Module:
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"))


class Unwrapping:
    """An accelerator, as far as the callback needs one."""

    def unwrap_model(self, model: nn.Module) -> nn.Module:
        inner: Any = model
        while isinstance(inner, FullyShardedDataParallel | Wrapped):
            inner = inner.module
        return inner


class Wrapped(nn.Module):
    """A wrapper that nobody but `Unwrapping` knows."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def walk_with_accelerator(setup: Setup, directory: Path, wrap: Callable[[nn.Module], nn.Module]) -> dict[str, Tensor]:
    """The reference model at the end of a walk with an accelerator that takes the wrappers off."""
    model, reference = setup.build_model(), setup.build_ref_model()
    walk = Walk(setup, directory, [], placed=Placed("single", model, model))
    walk.events = Events(wrap(model), walk.events.args, [setup.subject(wrap(reference), Unwrapping())])
    walk.begin()
    walk.go_to(setup.steps)
    return topologies.read_parameters(reference)


def error_under_fsdp1(setup: Setup, directory: Path, wraps: Sequence[Callable[[nn.Module], nn.Module]]) -> str | None:
    policy, reference = (wrap(setup.build_model()) for wrap in wraps)
    args = topologies.training_arguments("ddp", directory, **setup.training)
    return error_of(Events(policy, args, [setup.subject(reference, Unwrapping())]).train_begin)


def wrap_blocks(model: nn.Module) -> nn.Module:
    """With activation checkpointing in every layer, as Accelerate puts it into a policy."""
    layers: Any = model.get_submodule("model.layers")
    for index, layer in enumerate(layers):
        layers[index] = checkpoint_wrapper(layer)
    return model


def walk_with_activation_checkpointing(setup: Setup, directory: Path) -> dict[str, Tensor]:
    """The reference model at the end of a walk; only the policy has activation checkpointing."""
    reference, model, walk = setup.build_ref_model(), wrap_blocks(setup.build_model()), Walk(setup, directory, [])
    walk.events = Events(model, walk.events.args, [setup.subject(reference, None)])
    for step in range(setup.steps + 1):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(walk.points[step][name.replace("_checkpoint_wrapped_module.", "")])
        walk.events.train_begin() if step == 0 else walk.events.step(step)
    return topologies.read_parameters(reference)


def error_of_one_rank(setup: Setup, directory: Path) -> str | None:
    """The error at train begin, where rank 1 alone has an α that cannot be."""
    bad = {"ref_model_mixup_alpha": -1.0} if dist.get_rank() == 1 else {}
    walk = Walk(setup.on(training=setup.training | bad), directory, [setup.subject(setup.build_ref_model(), None)])
    return error_of(walk.begin)


def make_expert(placed: Placed) -> None:
    placed.model.get_parameter("up").allreduce = False


# ── The same bits everywhere ──────────────────────────────────────────────────


def assert_same_weights(expected: Weights, actual: Weights) -> None:
    assert list(expected) == list(actual)
    for step, weights in expected.items():
        for name, value in weights.items():
            assert same_bits(value, actual[step][name]), f"step {step}, {name}"


@pytest.fixture(scope="module")
def in_one_process(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Setup], Weights]:
    """The reference model at each step of a run in a single process; each run is made once."""
    known: dict[str, Weights] = {}

    def weights(setup: Setup) -> Weights:
        alone = setup.on(topology="single", ranks=1, ref_model=setup.ref_model | {"topology": "single"})
        if str(alone) not in known:
            (known[str(alone)],) = ranks(1).run(walked, alone, tmp_path_factory.mktemp("alone"))
        return known[str(alone)]

    return weights


@pytest.mark.clause("SYNC-6")
@pytest.mark.parametrize(("topology", "count"), placements(2, 3)[1:])
def test_a_trajectory_gives_the_bits_of_one_process(
    implementation: Implementation,
    ranks: Ranks,
    in_one_process: Callable[[Setup], Weights],
    tmp_path: Path,
    topology: str,
    count: int,
) -> None:
    for dtype in DTYPES[count % 2 :: 2]:
        setup = syncing(implementation.name, topology, count, dtype=dtype, model="odd", seed=3)
        for actual in ranks(count).run(walked, setup, tmp_path / dtype):
            assert_same_weights(in_one_process(setup), actual)


LAYOUTS = [
    ("zero3", "single", 3),
    ("zero3_persistent", "single", 2),
    ("fsdp2", "single", 2),
    ("ddp", "zero3", 3),
    ("zero2", "zero3_persistent", 2),
    ("ddp", "fsdp2", 3),
    ("zero3", "fsdp2", 3),
    ("fsdp2", "zero3", 2),
    ("zero3", "zero3_persistent", 2),
]
"""Topologies of policy and reference model, and numbers of ranks; `single` is a model that is whole on each rank."""


@pytest.mark.clause("SYNC-6")
@pytest.mark.parametrize(("policy", "reference", "count"), LAYOUTS)
def test_models_that_lie_differently_give_the_bits_of_one_process(
    implementation: Implementation,
    ranks: Ranks,
    in_one_process: Callable[[Setup], Weights],
    tmp_path: Path,
    policy: str,
    reference: str,
    count: int,
) -> None:
    setup = syncing(implementation.name, policy, count, model="odd", ref_model={"topology": reference})
    for comparisons, actual in ranks(count).run(follow_and_show, setup, tmp_path):
        assert comparisons.divergence is None, str(comparisons.divergence)
        assert_same_weights(in_one_process(setup), actual)


@pytest.mark.clause("SYNC-3", "SYNC-4", "SYNC-6")
@pytest.mark.parametrize(
    ("dtype", "reference_dtype", "alpha", "topology", "count"),
    [
        ("float32", "bfloat16", 0.3, "zero3", 2),
        ("float32", "bfloat16", 1.0, "fsdp2", 3),
        ("bfloat16", "float32", 0.7, "fsdp2", 3),
        ("float64", "float32", 0.3, "ddp", 2),
        ("float32", "float64", 0.7, "single", 1),
        ("float64", "bfloat16", 0.6, "fsdp2", 2),
        ("bfloat16", "float16", 0.3, "zero3", 3),
    ],
)
def test_models_of_different_types_are_blended_in_the_wider_one(
    implementation: Implementation,
    ranks: Ranks,
    in_one_process: Callable[[Setup], Weights],
    tmp_path: Path,
    dtype: str,
    reference_dtype: str,
    alpha: float,
    topology: str,
    count: int,
) -> None:
    setup = syncing(implementation.name, topology, count, alpha=alpha, dtype=dtype, model="odd")
    setup = setup.on(ref_model={"dtype": reference_dtype})
    for comparisons, actual in ranks(count).run(follow_and_show, setup, tmp_path):
        assert comparisons.divergence is None, str(comparisons.divergence)
        assert_same_weights(in_one_process(setup), actual)


@pytest.mark.clause("SYNC-2", "SYNC-6")
@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile], ids=["DataParallel", "compile"])
def test_wrapped_models_give_the_same_bits(
    implementation: Implementation,
    ranks: Ranks,
    in_one_process: Callable[[Setup], Weights],
    tmp_path: Path,
    wrap: Callable[[nn.Module], nn.Module],
) -> None:
    setup = syncing(implementation.name, model="odd")
    (actual,) = ranks(1).run(walk_wrapped, setup, tmp_path, wrap)
    expected = in_one_process(setup)[setup.steps]
    assert all(same_bits(value, actual[name]) for name, value in expected.items())


@pytest.mark.clause("SYNC-2")
def test_an_accelerator_takes_off_what_it_alone_knows(
    implementation: Implementation, ranks: Ranks, in_one_process: Callable[[Setup], Weights], tmp_path: Path
) -> None:
    setup = syncing(implementation.name, model="odd")
    (actual,) = ranks(1).run(walk_with_accelerator, setup, tmp_path, Wrapped)
    expected = in_one_process(setup)[setup.steps]
    assert all(same_bits(value, actual[name]) for name, value in expected.items())


@pytest.mark.clause("SYNC-2")
def test_activation_checkpointing_of_one_model_is_no_part_of_a_name(
    implementation: Implementation, ranks: Ranks, in_one_process: Callable[[Setup], Weights], tmp_path: Path
) -> None:
    setup = syncing(implementation.name)
    (actual,) = ranks(1).run(walk_with_activation_checkpointing, setup, tmp_path)
    expected = in_one_process(setup)[setup.steps]
    assert all(same_bits(value, actual[name]) for name, value in expected.items())


@pytest.mark.clause("SYNC-2", "SYNC-6")
def test_models_in_ddp_wrappers_give_the_same_bits(
    implementation: Implementation, ranks: Ranks, in_one_process: Callable[[Setup], Weights], tmp_path: Path
) -> None:
    setup = syncing(implementation.name, "ddp", 2, model="odd")
    expected = in_one_process(setup)[setup.steps]
    for actual in ranks(2).run(walk_wrapped, setup, tmp_path, wrap_in_ddp):
        assert all(same_bits(value, actual[name]) for name, value in expected.items())


def wrap_in_ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model.requires_grad_())


# ── Whatever engines keep besides ─────────────────────────────────────────────


@pytest.mark.clause("SYNC-6")
@pytest.mark.parametrize("topology", ["zero3", "zero3_persistent", "fsdp2"])
def test_forwards_of_both_models_around_each_sync_see_the_weights_of_their_time(
    implementation: Implementation, ranks: Ranks, tmp_path: Path, topology: str
) -> None:
    setup = syncing(implementation.name, topology, 2, every=1, steps=4)
    for comparisons in ranks(2).run(follow_while_both_are_evaluated, setup, tmp_path):
        assert comparisons.divergence is None, str(comparisons.divergence)


@pytest.mark.clause("SYNC-6")
@pytest.mark.parametrize(("topology", "count"), [("zero3", 4), ("zero3_persistent", 2)])
def test_secondary_partitions_follow(
    implementation: Implementation, ranks: Ranks, tmp_path: Path, topology: str, count: int
) -> None:
    setup = syncing(implementation.name, topology, count, steps=5)
    for comparisons, secondary in ranks(count).run(follow_with_engines, setup, tmp_path, zero_hpz_partition_size=2):
        assert secondary > 0, "the forward has made no secondary partition"
        assert comparisons.divergence is None, str(comparisons.divergence)


@pytest.mark.clause("SYNC-6")
@pytest.mark.parametrize("topology", ["zero3", "zero3_persistent"])
def test_parameters_that_are_offloaded_to_the_cpu_follow(
    implementation: Implementation, ranks: Ranks, tmp_path: Path, topology: str
) -> None:
    setup = syncing(implementation.name, topology, 2, steps=5)
    offload = {"device": "cpu", "pin_memory": False}
    for comparisons, _ in ranks(2).run(follow_with_engines, setup, tmp_path, offload_param=offload):
        assert comparisons.divergence is None, str(comparisons.divergence)


@pytest.mark.clause("SYNC-8")
@pytest.mark.parametrize(
    ("topology", "count", "spoil", "named"),
    [
        ("zero3", 2, offload_to_nvme, "NVMe"),
        ("zero3", 2, quantise, "quantised"),
        ("ddp", 2, make_expert, "parallel"),
        ("single", 1, make_integer, "int8"),
        ("single", 1, leave_on_meta, "meta"),
    ],
)
def test_a_reference_model_that_cannot_be_synced_is_refused_by_name_before_anything_changed(
    implementation: Implementation,
    ranks: Ranks,
    tmp_path: Path,
    topology: str,
    count: int,
    spoil: Callable[[Placed], None],
    named: str,
) -> None:
    require(implementation.SyncRefModelCallback, ["master_weights"])
    if spoil is not make_expert:
        skip_the_reference(implementation, "gathers by DeepSpeed's own means, and looks at no dtype")
    setup = syncing(implementation.name, topology, count, model="odd")
    for message, is_unchanged in ranks(count).run(error_at_train_begin, setup, tmp_path, spoil):
        assert message is not None
        assert "up" in message
        assert named in message
        assert is_unchanged


@pytest.mark.clause("SYNC-8")
def test_fsdp1_is_refused_whatever_an_accelerator_would_take_off(
    implementation: Implementation, ranks: Ranks, tmp_path: Path
) -> None:
    setup = syncing(implementation.name, "ddp", 2, model="odd")
    for wraps in ([wrap_in_fsdp1, Wrapped], [Wrapped, wrap_in_fsdp1], [wrap_in_fsdp1, wrap_in_fsdp1]):
        for message in ranks(2).run(error_under_fsdp1, setup, tmp_path, wraps):
            assert message is not None
            assert "FSDP1" in message


@pytest.mark.clause("SYNC-8")
def test_a_setting_that_is_bad_on_one_rank_is_an_error_of_every_rank(
    implementation: Implementation, ranks: Ranks, tmp_path: Path
) -> None:
    for message in ranks(2).run(error_of_one_rank, syncing(implementation.name, "ddp", 2, model="odd"), tmp_path):
        assert message is not None
        assert "ref_model_mixup_alpha" in message


# ── Memory and traffic ────────────────────────────────────────────────────────


ALIKE = [
    *[(topology, topology, count) for topology, count in PLACEMENTS[1:]],
    ("ddp", "zero3", 3),
    ("ddp", "fsdp2", 3),
    ("zero3", "zero3_persistent", 2),
]


@pytest.mark.clause("SYNC-7")
@pytest.mark.parametrize(("policy", "reference", "count"), ALIKE)
def test_nothing_is_communicated_where_each_rank_holds_what_it_needs(
    implementation: Implementation, ranks: Ranks, tmp_path: Path, policy: str, reference: str, count: int
) -> None:
    skip_the_reference(implementation, "makes everything whole")
    setup = syncing(implementation.name, policy, count, ref_model={"topology": reference}, steps=4)
    for messages in ranks(count).run(messages_of_steps, setup, tmp_path):
        assert {step: [] for step in range(1, 5)} == messages


@pytest.mark.clause("SYNC-7")
@pytest.mark.parametrize(("policy", "reference", "count"), [("zero3", "single", 2), ("fsdp2", "single", 3)])
def test_otherwise_one_parameter_is_sent_at_a_time(
    implementation: Implementation, ranks: Ranks, tmp_path: Path, policy: str, reference: str, count: int
) -> None:
    skip_the_reference(implementation, "makes everything whole")
    setup = syncing(implementation.name, policy, count, ref_model={"topology": reference}, steps=4)
    largest = max(parameter.numel() * parameter.element_size() for parameter in setup.build_model().parameters())
    for messages in ranks(count).run(messages_of_steps, setup, tmp_path):
        assert [] == messages[1] == messages[3]
        assert messages[2]
        assert max(message.numel for message in messages[2]) <= largest  # as bytes


@pytest.mark.clause("SYNC-7")
@pytest.mark.parametrize(
    ("topology", "count", "dtype", "reference_dtype"),
    [
        ("single", 1, "float32", "float32"),
        ("single", 1, "bfloat16", "bfloat16"),
        ("single", 1, "float32", "bfloat16"),
        ("zero3", 2, "float32", "bfloat16"),
        ("fsdp2", 2, "bfloat16", "bfloat16"),
    ],
)
def test_no_temporary_grows_with_the_parameter_where_nothing_is_communicated(
    implementation: Implementation,
    ranks: Ranks,
    tmp_path: Path,
    topology: str,
    count: int,
    dtype: str,
    reference_dtype: str,
) -> None:
    skip_the_reference(implementation, "makes everything whole")
    setup = syncing(implementation.name, topology, count, dtype=dtype, ref_model={"dtype": reference_dtype}, steps=2)
    small, large = (max(ranks(count).run(largest_allocation_of_a_sync, setup, tmp_path, rows)) for rows in (2051, 4099))
    assert small == large
    assert large < 10_000_000


@pytest.mark.clause("SYNC-7")
@pytest.mark.parametrize("policy", ["zero3", "fsdp2"])
def test_no_temporary_is_larger_than_the_parameter_where_it_is_assembled(
    implementation: Implementation, ranks: Ranks, tmp_path: Path, policy: str
) -> None:
    skip_the_reference(implementation, "makes everything whole")
    setup = syncing(implementation.name, policy, 2, ref_model={"topology": "single"}, steps=2)
    rows = 1031
    for largest in ranks(2).run(largest_allocation_of_a_sync, setup, tmp_path, rows):
        assert rows * 1021 * 4 == largest
