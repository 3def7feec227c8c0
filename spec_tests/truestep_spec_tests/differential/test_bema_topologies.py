"""The same trajectory gives the same bits wherever the weights lie, shared out over the ranks and without a word."""

import gc
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback
from truestep_fixtures import topologies
from truestep_fixtures.events import Events
from truestep_fixtures.ranks import RankPool
from truestep_fixtures.topologies import Placed

from truestep_spec_tests.differential.cases import DTYPES, PLACEMENTS, odd, placements, require
from truestep_spec_tests.differential.traffic import Message, Tapped, messages_of
from truestep_spec_tests.implementation import Implementation
from truestep_spec_tests.lockstep import Comparisons
from truestep_spec_tests.lockstep.bema import lockstep
from truestep_spec_tests.recording import Kind
from truestep_spec_tests.runs import Setup, Walk, same_bits, walked

Ranks = Callable[[int], RankPool]
Shadows = dict[int, dict[str, Tensor]]

KINDS: tuple[Kind, ...] = ("walk", "jumps", "cancelling")
ARGUMENTS = {"update_freq": 2, "update_after": 1, "lag": 3}


# ── What the ranks do ─────────────────────────────────────────────────────────


class Hybrid(Placed):
    """FSDP2 with replicas: rows over one dimension of the mesh, copies over the other."""

    def write(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self.model.named_parameters():
            assert isinstance(parameter, DTensor)
            placed = distribute_tensor(values[name], parameter.device_mesh, parameter.placements)
            with torch.no_grad():
                parameter.to_local().copy_(placed.to_local())


def walk_with_replicas(setup: Setup, directory: Path) -> tuple[Shadows, int]:
    """The shadow at each step, and the bytes that the callback holds on this rank."""
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicas", "rows"))
    model = fully_shard(setup.build_model(), mesh=mesh)
    subject = setup.subject()
    walk = Walk(setup, directory, [subject], placed=Hybrid("fsdp2", model, model))
    walk.placed.write(walk.points[0])
    before = tensors_in_memory()
    walk.begin()
    held = bytes_since(before)
    shadows = {}
    for step in range(setup.steps + 1):
        walk.go_to(step)
        shown = subject.shadow_state_dict()
        shadows[step] = {name: shown[name] for name in walk.points[0]}
    return shadows, held


def walk_wrapped(setup: Setup, directory: Path, wrap: Callable[[nn.Module], nn.Module]) -> dict[str, Tensor]:
    """The last shadow of a walk whose events come with a wrapped model."""
    subject = setup.subject()
    walk = Walk(setup, directory, [])
    walk.events = Events(wrap(walk.placed.model), walk.events.args, [subject])
    walk.begin()
    walk.go_to(setup.steps)
    shadow: dict[str, Tensor] = subject.shadow_state_dict()
    return shadow


def walk_through_extremes(setup: Setup, directory: Path) -> Shadows:
    """The shadow at each step of a walk in which every third number is an extreme one of its dtype.

    Infinities meet, so there are NaNs in the shadow. The weights have none: they have many bit patterns, and already
    torch's conversion from float16 gives them different ones in a vector than in the rest of a loop.
    """
    subject = setup.subject()
    walk = Walk(setup, directory, [subject])
    generator = torch.Generator().manual_seed(setup.seed)
    limits = torch.finfo(setup.torch_dtype)
    magnitudes = (0.0, limits.smallest_normal / 4, limits.smallest_normal, limits.eps, limits.max, math.inf)
    extremes = torch.tensor([*magnitudes, *(-magnitude for magnitude in magnitudes)], dtype=setup.torch_dtype)
    shadows = {}
    for step, point in walk.points.items():
        for value in point.values():
            chosen = extremes[torch.randint(len(extremes), value.shape, generator=generator)]
            value.copy_(torch.where(torch.rand(value.shape, generator=generator) < 1 / 3, chosen, value))
        if step == 0:
            walk.begin()
        walk.go_to(step)
        shown = subject.shadow_state_dict()
        shadows[step] = {name: shown[name] for name in point}
        if step <= setup.hyperparameters["update_after"]:
            assert all(same_bits(value, shown[name]) for name, value in point.items())
    return shadows


def bytes_held(setup: Setup, directory: Path) -> int:
    """The bytes of the tensors that a callback keeps once it has made an update."""
    walk = Walk(setup, directory, [setup.subject()])
    walk.placed.write(walk.points[0])
    before = tensors_in_memory()
    walk.begin()
    walk.go_to(setup.steps)
    return bytes_since(before)


class Large(nn.Module):
    """More elements than a loop over pieces takes at a time, and not a round number of them."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(1451, 1453, generator=generator))


class Unusual(nn.Module):
    """Parameters of all kinds that may occur together."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.scalar = nn.Parameter(torch.tensor(0.5))
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.transposed = nn.Parameter(torch.randn(5, 7, generator=generator).T)
        self.channels_last = nn.Parameter(
            torch.randn(2, 3, 5, 7, generator=generator).to(memory_format=torch.channels_last)
        )
        self.in_half = nn.Parameter(torch.randn(11, generator=generator).half())
        self.in_bfloat16 = nn.Parameter(torch.randn(3, 13, generator=generator).bfloat16())


def walk_large_in_lockstep(setup: Setup, directory: Path) -> tuple[Comparisons, dict[str, Tensor]]:
    return walk_in_lockstep(setup, directory, topologies.place(Large(), setup.topology, setup.torch_dtype))


def walk_large(setup: Setup, directory: Path, threads: int) -> dict[str, Tensor]:
    """The last shadow, computed by so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        subject = setup.subject()
        placed = topologies.place(Large(), setup.topology, setup.torch_dtype)
        return walk_and_swap(setup, directory, subject, [subject], placed)
    finally:
        torch.set_num_threads(before)


def walk_unusual(setup: Setup, directory: Path) -> tuple[Comparisons, dict[str, Tensor]]:
    model = Unusual()
    engine = DistributedDataParallel(model) if dist.is_initialized() else model
    return walk_in_lockstep(setup, directory, Placed(setup.topology, model, engine))


def walk_in_lockstep(setup: Setup, directory: Path, placed: Placed) -> tuple[Comparisons, dict[str, Tensor]]:
    """How subject and reference compare, and the last shadow, after it was swapped in and out once."""
    subject = setup.subject()
    callbacks, comparisons = lockstep(subject, setup.reference(), directory / "reference")
    return comparisons, walk_and_swap(setup, directory, subject, callbacks, placed)


def walk_and_swap(
    setup: Setup, directory: Path, subject: Any, callbacks: list[TrainerCallback], placed: Placed
) -> dict[str, Tensor]:
    """The last shadow of one of the callbacks, after it was swapped in and out once."""
    walk = Walk(setup, directory, callbacks, placed=placed)
    walk.begin()
    walk.go_to(setup.steps)
    shadow: dict[str, Tensor] = subject.shadow_state_dict()
    live = placed.read()
    with subject.shadow_weights(placed.model):
        within = placed.read()
    after = placed.read()
    for name, value in live.items():
        assert same_bits(shadow[name], within[name]), name
        assert same_bits(value, after[name]), name
    return shadow


def tensors_in_memory() -> dict[int, Tensor]:
    """A floating-point tensor for each piece of memory that Python's tensors use in this process."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor) and not thing.is_meta]
    plain = [tensor for tensor in tensors if tensor.is_floating_point() and not isinstance(tensor, DTensor)]
    return {tensor.untyped_storage().data_ptr(): tensor for tensor in plain}


def bytes_since(before: dict[int, Tensor]) -> int:
    """The bytes of tensors that came into being since; those from before are kept, so that no memory is reused."""
    new = [tensor for memory, tensor in tensors_in_memory().items() if memory not in before]
    return sum(tensor.untyped_storage().nbytes() for tensor in new)


def save_at_end(setup: Setup, directory: Path) -> None:
    walked(setup, directory, save=True)


def messages_of_steps(setup: Setup, directory: Path) -> tuple[dict[int, list[Message]], list[Message]]:
    """What a callback communicates at each step, and then when its shadow is read."""
    subject = setup.subject()
    tapped = Tapped(subject)
    walk = Walk(setup, directory, [tapped])
    walk.begin()
    walk.go_to(setup.steps)
    return tapped.messages, messages_of(subject.shadow_state_dict)


# ── Bits ──────────────────────────────────────────────────────────────────────


def assert_same_shadows(expected: Shadows, actual: Shadows) -> None:
    assert list(expected) == list(actual)
    for step, shown in expected.items():
        assert list(shown) == list(actual[step])
        for name, value in shown.items():
            assert same_bits(value, actual[step][name]), f"step {step}, {name}: {value} and {actual[step][name]}"


@pytest.fixture(scope="module")
def in_one_process(
    implementation: Implementation, ranks: Ranks, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Setup, Kind], Shadows]:
    """The shadows of a setup in a single process, computed once for each trajectory."""
    known: dict[str, Shadows] = {}

    def shadows(setup: Setup, kind: Kind = "walk") -> Shadows:
        alone = setup.on(topology="single", ranks=1)
        key = f"{alone}, {kind}"
        if key not in known:
            (known[key],) = ranks(1).run(walked, alone, tmp_path_factory.mktemp("alone"), kind=kind)
        return known[key]

    return shadows


@pytest.mark.clause("BEMA-12", "BEMA-18")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("topology", "count"), PLACEMENTS[1:])
def test_the_shadow_of_a_trajectory_has_the_same_bits_as_in_one_process(
    implementation: Implementation,
    ranks: Ranks,
    in_one_process: Callable[[Setup, Kind], Shadows],
    tmp_path: Path,
    topology: str,
    count: int,
    dtype: str,
) -> None:
    kind = KINDS[(count + DTYPES.index(dtype)) % len(KINDS)]
    setup = Setup(implementation.name, topology, count, dtype, odd(implementation), seed=3, hyperparameters=ARGUMENTS)
    expected = in_one_process(setup, kind)
    for actual in ranks(count).run(walked, setup, tmp_path, kind=kind):
        assert_same_shadows(expected, actual)


@pytest.mark.clause("BEMA-1", "BEMA-12")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("topology", "count"), [("ddp", 3), ("zero3", 2), ("fsdp2", 3)])
def test_extreme_numbers_have_the_same_bits_as_in_one_process(
    implementation: Implementation, ranks: Ranks, tmp_path: Path, topology: str, count: int, dtype: str
) -> None:
    require(implementation, "shadow_state_dict")
    setup = Setup(implementation.name, topology, count, dtype, "odd", steps=4, hyperparameters=ARGUMENTS)
    (expected,) = ranks(1).run(walk_through_extremes, setup.on(topology="single", ranks=1), tmp_path / "alone")
    for actual in ranks(count).run(walk_through_extremes, setup, tmp_path / "ranks"):
        assert_same_shadows(expected, actual)


@pytest.mark.clause("BEMA-8", "BEMA-12", "BEMA-17")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_neither_size_nor_threads_nor_topology_change_a_bit_of_a_large_parameter(
    implementation: Implementation, ranks: Ranks, tmp_path: Path, dtype: str
) -> None:
    require(implementation, "shadow_state_dict", "shadow_weights")
    setup = Setup(implementation.name, dtype=dtype, steps=1, hyperparameters={"update_freq": 1})
    ((comparisons, expected),) = ranks(1).run(walk_large_in_lockstep, setup, tmp_path)
    assert comparisons.divergence is None, str(comparisons.divergence)
    for topology, count, threads in (("single", 1, 3), ("ddp", 2, 1), ("zero3", 3, 2)):
        for actual in ranks(count).run(walk_large, setup.on(topology=topology), tmp_path, threads):
            assert same_bits(expected["matrix"], actual["matrix"])


@pytest.mark.clause("BEMA-7", "BEMA-8", "BEMA-12", "BEMA-17")
def test_parameters_of_any_shape_layout_and_type_are_averaged_beside_each_other(
    implementation: Implementation, ranks: Ranks, tmp_path: Path
) -> None:
    require(implementation, "shadow_state_dict", "shadow_weights")
    setup = Setup(implementation.name, steps=4, hyperparameters=ARGUMENTS)
    ((_, expected),) = ranks(1).run(walk_unusual, setup, tmp_path)
    for count in (1, 2, 3):
        for comparisons, actual in ranks(count).run(walk_unusual, setup.on(topology="ddp"), tmp_path):
            assert comparisons.divergence is None, str(comparisons.divergence)
            assert all(same_bits(value, actual[name]) for name, value in expected.items())


@pytest.mark.clause("BEMA-12", "BEMA-18", "BEMA-19")
def test_fsdp2_with_replicas_gives_the_same_bits_and_each_replica_holds_one_set(
    implementation: Implementation,
    ranks: Ranks,
    in_one_process: Callable[[Setup, Kind], Shadows],
    tmp_path: Path,
) -> None:
    require(implementation, "shadow_state_dict", "shadow_weights")
    setup = Setup(implementation.name, "fsdp2", 4, model="odd", hyperparameters={"update_freq": 2})
    expected = in_one_process(setup, "walk")
    outcomes = ranks(4).run(walk_with_replicas, setup, tmp_path / "replicas")
    (alone,) = ranks(1).run(bytes_held, setup.on(topology="single", ranks=1, steps=0), tmp_path / "alone")
    for shadows, _ in outcomes:
        assert_same_shadows(expected, shadows)
    assert 2 * alone == sum(held for _, held in outcomes)


@pytest.mark.clause("BEMA-18")
@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile], ids=["DataParallel", "compile"])
def test_a_wrapped_model_gives_the_same_bits(
    implementation: Implementation,
    ranks: Ranks,
    in_one_process: Callable[[Setup, Kind], Shadows],
    tmp_path: Path,
    wrap: Callable[[nn.Module], nn.Module],
) -> None:
    require(implementation, "shadow_state_dict")
    setup = Setup(implementation.name, model="odd")
    (shadow,) = ranks(1).run(walk_wrapped, setup, tmp_path, wrap)
    expected = in_one_process(setup, "walk")[setup.steps]
    assert list(expected) == list(shadow)
    assert all(same_bits(value, shadow[name]) for name, value in expected.items())


# ── One set of buffers ────────────────────────────────────────────────────────


@pytest.mark.clause("BEMA-19")
@pytest.mark.parametrize(("topology", "count"), PLACEMENTS)
def test_the_ranks_hold_together_what_one_process_holds(
    implementation: Implementation, ranks: Ranks, tmp_path: Path, topology: str, count: int
) -> None:
    require(implementation, "shadow_weights")
    setup = Setup(implementation.name, topology, count, model="odd", steps=2)
    (alone,) = ranks(1).run(bytes_held, setup.on(topology="single", ranks=1), tmp_path / "alone")
    each = ranks(count).run(bytes_held, setup, tmp_path / "ranks")
    elements = sum(parameter.numel() for parameter in setup.build_model().parameters())
    assert alone == sum(each)
    assert 12 * elements == alone  # the average, θ₀ and θ of the last update, four bytes each


@pytest.mark.clause("BEMA-11", "BEMA-19")
@pytest.mark.parametrize(("topology", "count"), PLACEMENTS)
def test_the_files_of_the_ranks_hold_each_element_once(
    implementation: Implementation, ranks: Ranks, tmp_path: Path, topology: str, count: int
) -> None:
    require(implementation, "shadow_weights")
    setup = Setup(implementation.name, topology, count, model="odd", steps=2)
    ranks(count).run(save_at_end, setup, tmp_path)
    saved: dict[str, list[int]] = {}
    for rank in range(count):
        file = tmp_path / "checkpoint-2" / "truestep_bema" / f"rank-{rank:05d}-of-{count:05d}.safetensors"
        with safe_open(file, "pt") as contents:
            sizes = {key: math.prod(contents.get_slice(key).get_shape()) for key in contents.keys()}  # noqa: SIM118
        for key, size in sizes.items():
            saved.setdefault(key, []).append(size)
    for name, parameter in setup.build_model().named_parameters():
        kinds = [sizes for key, sizes in saved.items() if key.endswith((f"/{name}", f".{name}"))]
        assert len(kinds) == 3
        for sizes in kinds:
            assert parameter.numel() == sum(sizes)
            if topology in ("ddp", "zero1", "zero2"):
                assert max(sizes) <= math.ceil(parameter.numel() / count)


# ── Communication ─────────────────────────────────────────────────────────────


@pytest.mark.clause("BEMA-19")
@pytest.mark.parametrize(("topology", "count"), placements(2)[1:])
def test_an_update_communicates_nothing_and_a_reading_one_parameter_at_a_time(
    implementation: Implementation, ranks: Ranks, tmp_path: Path, topology: str, count: int
) -> None:
    require(implementation, "shadow_weights")
    setup = Setup(implementation.name, topology, count, model="qwen2", hyperparameters={"update_freq": 2})
    largest = max(parameter.numel() * parameter.element_size() for parameter in setup.build_model().parameters())
    for steps, reading in ranks(count).run(messages_of_steps, setup, tmp_path):
        assert [[]] * setup.steps == list(steps.values())
        assert reading != [], "what counts the messages does not see any"
        assert max(message.numel for message in reading) <= largest
