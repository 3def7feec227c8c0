"""The shadow as code gets at it: read at any time, swapped in for an evaluation, kept over trainings."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import TrainerCallback
from truestep_fixtures.events import Events
from truestep_fixtures.ranks import RankPool
from truestep_fixtures.topologies import training_arguments
from truestep_fixtures.training import train

from truestep_spec_tests.differential.cases import error_of, placements, require
from truestep_spec_tests.differential.traffic import Message, messages_of
from truestep_spec_tests.implementation import Implementation
from truestep_spec_tests.lockstep import Comparisons
from truestep_spec_tests.lockstep.bema import lockstep
from truestep_spec_tests.runs import Setup, Walk, same_bits

Ranks = Callable[[int], RankPool]
Weights = dict[str, Tensor]

BATCH = torch.arange(36).view(3, 12)


# ── What the ranks do ─────────────────────────────────────────────────────────


def walk_to_the_end(setup: Setup, directory: Path) -> tuple[Any, Walk]:
    subject = setup.subject()
    walk = Walk(setup, directory, [subject])
    walk.begin()
    walk.go_to(setup.steps)
    return subject, walk


def assert_same_weights(expected: Weights, actual: Weights) -> None:
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        assert same_bits(value, actual[name]), name


def read_in_every_way(setup: Setup, directory: Path) -> None:
    """Reads at every step in each of the ways that there are, and checks them against each other."""
    subject = setup.subject()
    before = error_of(subject.shadow_state_dict)
    assert before is not None
    walk = Walk(setup, directory, [subject])
    walk.begin()
    model = walk.placed.model
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for step in range(setup.steps + 1):
        walk.go_to(step)
        live = walk.placed.read() | dict(model.named_buffers())
        shown = subject.shadow_state_dict()
        assert list(model.state_dict()) == list(shown)
        for name, value in live.items():
            if name in shown:
                assert type(shown[name]) is Tensor
                assert shown[name].device.type == "cpu"
                assert shown[name].shape == value.shape
                assert name in trainable or same_bits(value, shown[name]), name
        for key, value in model.state_dict().items():
            assert value.dtype == shown[key].dtype

        wide = subject.shadow_state_dict(torch.float64)
        for name, value in shown.items():
            averaged = wide[name].dtype == torch.float64
            assert averaged or name not in trainable
            assert same_bits(value, wide[name].to(value.dtype)), name

        for_main = subject.shadow_state_dict(rank0_only=True)
        assert_same_weights(shown if walk.events.state.is_world_process_zero else {}, for_main)

        # What is returned is the caller's.
        kept = {name: value.clone() for name, value in shown.items()}
        for value in (*shown.values(), *wide.values()):
            value.zero_()
        assert_same_weights(kept, subject.shadow_state_dict())
        assert_same_weights({name: live[name] for name in walk.points[0]}, walk.placed.read())


def tied_entries(setup: Setup, directory: Path) -> None:
    subject, walk = walk_to_the_end(setup, directory)
    shown = subject.shadow_state_dict()
    assert "lm_head.weight" not in walk.points[0]
    assert shown["lm_head.weight"] is shown["model.embed_tokens.weight"]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        model.eval()
        computed: Tensor = model(input_ids=BATCH)["logits"]
    return computed.clone()


def evaluate_with_shadow(setup: Setup, directory: Path, evaluated_before: bool) -> None:
    """Forward passes of the engine see the shadow within the block, twice, and the live weights after it, twice."""
    subject, walk = walk_to_the_end(setup, directory)
    live, shadow = walk.placed.read(), subject.shadow_state_dict()
    with_live, with_shadow = (setup.build_model() for _ in range(2))
    with_live.load_state_dict(live, strict=False)
    with_shadow.load_state_dict(shadow)
    expected_live, expected_shadow = logits(with_live), logits(with_shadow)
    assert not same_bits(expected_live, expected_shadow)
    if evaluated_before:
        assert same_bits(expected_live, logits(walk.placed.engine))
    with subject.shadow_weights(walk.placed.engine):
        assert same_bits(expected_shadow, logits(walk.placed.engine))
        assert same_bits(expected_shadow, logits(walk.placed.engine))
        assert_same_weights({name: shadow[name] for name in live}, walk.placed.read())
        assert_same_weights(shadow, subject.shadow_state_dict())
    assert_same_weights(live, walk.placed.read())
    assert same_bits(expected_live, logits(walk.placed.engine))
    assert same_bits(expected_live, logits(walk.placed.engine))
    assert_same_weights(shadow, subject.shadow_state_dict())


def leave_by_exception(setup: Setup, directory: Path) -> None:
    """The last rank fails within the block, the others do not; all have their weights back."""
    subject, walk = walk_to_the_end(setup, directory)
    live = walk.placed.read()
    last = not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1
    with suppress(LookupError), subject.shadow_weights(walk.placed.model):
        logits(walk.placed.engine)
        if last:
            raise LookupError
    assert_same_weights(live, walk.placed.read())
    with subject.shadow_weights(walk.placed.model):
        pass
    assert_same_weights(live, walk.placed.read())


def messages_on_leaving(setup: Setup, directory: Path) -> list[Message]:
    subject, walk = walk_to_the_end(setup, directory)
    block = subject.shadow_weights(walk.placed.model)
    block.__enter__()
    logits(walk.placed.engine)
    return messages_of(lambda: block.__exit__(None, None, None))


def misuse(setup: Setup, directory: Path) -> dict[str, str | None]:
    """The errors of everything that one may not do with the block."""
    untrained = setup.subject()
    subject, walk = walk_to_the_end(setup, directory)
    model, live = walk.placed.model, walk.placed.read()
    errors = {
        "before training": error_of(lambda: untrained.shadow_weights(model).__enter__()),
        "another model": error_of(lambda: subject.shadow_weights(setup.build_model()).__enter__()),
    }
    with subject.shadow_weights(model):
        errors["twice"] = error_of(lambda: subject.shadow_weights(model).__enter__())
        errors["a step inside"] = error_of(lambda: walk.events.step(setup.steps + 1))
    assert_same_weights(live, walk.placed.read())
    with subject.shadow_weights(model):
        pass
    return errors


class Interruption(TrainerCallback):
    """Raises at the end of a step."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._step:
            raise InterruptedError


def train_repeatedly(setup: Setup, directory: Path) -> list[Comparisons]:
    """One callback in three trainings, of which the second ends with an exception, in lockstep with new references."""
    subject = setup.subject()
    results = []
    for number in range(3):
        shadows: list[Weights] = []
        callbacks, comparisons = lockstep(
            subject,
            setup.reference(),
            directory / f"reference {number}",
            lambda step, live, shown, shadows=shadows: shadows.append(shown),
        )
        with suppress(InterruptedError):
            train(
                setup.topology,
                setup.on(seed=number).build_model(),
                output_dir=directory,
                callbacks=[*callbacks, *([Interruption(3)] if number == 1 else [])],
                steps=setup.steps,
                dtype=setup.torch_dtype,
                seed=number,
            )
        after = subject.shadow_state_dict()
        assert_same_weights(shadows[-1], {name: after[name] for name in shadows[-1]})
        results.append(comparisons)
    return results


def change_what_is_trainable(setup: Setup, directory: Path) -> Comparisons:
    """Before the snapshot, what was trainable is frozen, and what was frozen becomes trainable."""
    callbacks, comparisons = lockstep(setup.subject(), setup.reference(), directory / "reference")
    walk = Walk(setup, directory, callbacks)
    walk.begin()
    walk.go_to(1)
    for parameter in walk.placed.model.parameters():
        parameter.requires_grad_(not parameter.requires_grad)
    walk.go_to(setup.steps)
    shown, live = callbacks[0].shadow_state_dict(), walk.placed.read()
    for name, parameter in walk.placed.model.named_parameters():
        assert parameter.requires_grad == same_bits(live[name], shown[name]), name
    return comparisons


class Curious(nn.Module):
    """A parameter that can be averaged, and one of another type."""

    def __init__(self, odd: Tensor, trainable: bool) -> None:
        super().__init__()
        self.usual = nn.Parameter(torch.ones(5, 4))
        self.curious = nn.Parameter(odd, requires_grad=trainable)


def fsdp1() -> nn.Module:
    return FullyShardedDataParallel(Curious(torch.ones(4), True), device_id=torch.device("cpu"))


def columns() -> nn.Module:
    model = Curious(torch.ones(5, 4), True)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model.curious = nn.Parameter(distribute_tensor(model.curious.detach(), mesh, [Shard(1)]))
    return model


def complex_numbers() -> nn.Module:
    return Curious(torch.ones(3, dtype=torch.complex64), True)


def eight_bits() -> nn.Module:
    return Curious(torch.ones(3).to(torch.float8_e4m3fn), True)


def refusal(setup: Setup, directory: Path, build: Callable[[], nn.Module]) -> str | None:
    """The error at train begin."""
    model = build()
    args = training_arguments("ddp" if dist.is_initialized() else "single", directory)
    events = Events(model, args, [setup.subject()])
    return error_of(events.train_begin)


def read_frozen(setup: Setup, directory: Path, dtype: torch.dtype) -> None:
    """A frozen parameter of a type that is not averaged is read as it is live."""
    subject = setup.subject()
    model = Curious(torch.ones(3).to(dtype), trainable=False)
    events = Events(model, training_arguments("ddp", directory), [subject])
    events.train_begin()
    with torch.no_grad():
        model.curious.copy_(torch.full((3,), 2).to(dtype))
    assert same_bits(model.curious.detach(), subject.shadow_state_dict()["curious"])


# ── Reading ───────────────────────────────────────────────────────────────────


@pytest.mark.clause("BEMA-7", "BEMA-8", "BEMA-16")
@pytest.mark.parametrize(
    ("topology", "count", "model", "dtype"),
    [
        ("single", 1, "tied", "bfloat16"),
        ("single", 1, "batchnorm", "float32"),
        ("ddp", 2, "lora", "float16"),
        ("ddp", 4, "odd", "bfloat16"),
        ("zero2", 2, "gpt2", "float32"),
        ("zero3", 2, "frozen", "bfloat16"),
        ("zero3", 3, "odd", "float16"),
        ("zero3_persistent", 2, "tied", "float64"),
        ("fsdp2", 2, "tied", "bfloat16"),
        ("fsdp2", 3, "odd", "float32"),
        ("fsdp2", 2, "batchnorm", "bfloat16"),
    ],
)
def test_every_reading_is_whole_complete_and_ones_own(
    implementation: Implementation,
    ranks: Ranks,
    tmp_path: Path,
    topology: str,
    count: int,
    model: str,
    dtype: str,
) -> None:
    require(implementation, "shadow_state_dict", "shadow_weights")
    arguments = {"update_freq": 2, "update_after": 1}
    setup = Setup(implementation.name, topology, count, dtype, model, steps=4, hyperparameters=arguments)
    ranks(count).run(read_in_every_way, setup, tmp_path)


@pytest.mark.clause("BEMA-7", "BEMA-16")
@pytest.mark.parametrize(("topology", "count"), [("single", 1), ("ddp", 2), ("zero3", 2), ("fsdp2", 2)])
def test_a_tied_parameter_is_one_tensor_under_each_of_its_names(
    implementation: Implementation, ranks: Ranks, tmp_path: Path, topology: str, count: int
) -> None:
    require(implementation, "shadow_state_dict")
    ranks(count).run(tied_entries, Setup(implementation.name, topology, count, model="tied"), tmp_path)


@pytest.mark.clause("BEMA-7", "BEMA-16", "BEMA-18")
@pytest.mark.parametrize("dtype", [torch.complex64, torch.int8, torch.float8_e4m3fn], ids=str)
def test_frozen_parameters_may_be_of_any_type(
    implementation: Implementation, ranks: Ranks, tmp_path: Path, dtype: torch.dtype
) -> None:
    require(implementation, "shadow_state_dict")
    ranks(2).run(read_frozen, Setup(implementation.name, "ddp", 2), tmp_path, dtype)


@pytest.mark.clause("BEMA-7")
@pytest.mark.parametrize(("topology", "count"), [("single", 1), ("zero3", 2)])
def test_what_is_averaged_is_what_was_trainable_at_train_begin(
    implementation: Implementation, ranks: Ranks, tmp_path: Path, topology: str, count: int
) -> None:
    require(implementation, "shadow_state_dict")
    arguments = {"update_freq": 2, "update_after": 2}
    setup = Setup(implementation.name, topology, count, model="frozen", steps=5, hyperparameters=arguments)
    for comparisons in ranks(count).run(change_what_is_trainable, setup, tmp_path):
        assert comparisons.divergence is None, str(comparisons.divergence)


# ── Swapping in ───────────────────────────────────────────────────────────────


@pytest.mark.clause("BEMA-17")
@pytest.mark.parametrize("evaluated_before", [False, True], ids=["at_first", "after_an_evaluation"])
@pytest.mark.parametrize(
    ("topology", "count", "model", "dtype"),
    [
        ("single", 1, "qwen2", "float32"),
        ("ddp", 2, "odd", "float32"),
        ("ddp", 2, "gpt2", "bfloat16"),
        ("zero2", 2, "batchnorm", "float32"),
        ("zero3", 2, "tied", "float32"),
        ("zero3", 3, "odd", "float32"),
        ("zero3_persistent", 2, "qwen2", "bfloat16"),
        ("zero3_persistent", 4, "odd", "float32"),
        ("fsdp2", 2, "qwen2", "float32"),
        ("fsdp2", 3, "odd", "bfloat16"),
        ("fsdp2", 2, "lora", "float32"),
    ],
)
def test_within_the_block_forward_passes_use_the_shadow_and_after_it_the_live_weights(
    implementation: Implementation,
    ranks: Ranks,
    tmp_path: Path,
    topology: str,
    count: int,
    model: str,
    dtype: str,
    evaluated_before: bool,
) -> None:
    require(implementation, "shadow_state_dict", "shadow_weights")
    setup = Setup(implementation.name, topology, count, dtype, model, steps=4)
    ranks(count).run(evaluate_with_shadow, setup, tmp_path, evaluated_before)


@pytest.mark.clause("BEMA-17")
@pytest.mark.parametrize(("topology", "count"), placements(2))
def test_live_weights_are_back_after_an_exception_on_one_rank(
    implementation: Implementation, ranks: Ranks, tmp_path: Path, topology: str, count: int
) -> None:
    require(implementation, "shadow_weights")
    ranks(count).run(leave_by_exception, Setup(implementation.name, topology, count, model="odd"), tmp_path)


@pytest.mark.clause("BEMA-17")
@pytest.mark.parametrize(("topology", "count"), placements(2)[1:])
def test_leaving_the_block_communicates_nothing(
    implementation: Implementation, ranks: Ranks, tmp_path: Path, topology: str, count: int
) -> None:
    require(implementation, "shadow_weights")
    setup = Setup(implementation.name, topology, count, model="qwen2")
    assert [[]] * count == ranks(count).run(messages_on_leaving, setup, tmp_path)


@pytest.mark.clause("BEMA-16", "BEMA-17")
@pytest.mark.parametrize(("topology", "count"), [("single", 1), ("zero3", 2), ("fsdp2", 2)])
def test_misuse_of_the_block_is_an_error_and_harms_nothing(
    implementation: Implementation, ranks: Ranks, tmp_path: Path, topology: str, count: int
) -> None:
    require(implementation, "shadow_weights")
    setup = Setup(implementation.name, topology, count, model="odd")
    for errors in ranks(count).run(misuse, setup, tmp_path):
        assert {what: error for what, error in errors.items() if error is None} == {}


# ── More than one training ────────────────────────────────────────────────────


@pytest.mark.clause("BEMA-15", "BEMA-16")
@pytest.mark.parametrize(("topology", "count"), [("single", 1), ("ddp", 2), ("zero2", 2), ("zero3", 2), ("fsdp2", 2)])
def test_each_training_begins_afresh_also_after_one_that_an_exception_ended(
    implementation: Implementation, ranks: Ranks, tmp_path: Path, topology: str, count: int
) -> None:
    require(implementation, "shadow_state_dict")
    arguments = {"update_freq": 2, "update_after": 1}
    setup = Setup(implementation.name, topology, count, model="odd", steps=5, hyperparameters=arguments)
    for trainings in ranks(count).run(train_repeatedly, setup, tmp_path):
        assert [len(comparisons.steps) for comparisons in trainings] == [6, 4, 6]
        assert [comparisons.divergence for comparisons in trainings] == [None] * 3


# ── What is not supported ─────────────────────────────────────────────────────


@pytest.mark.clause("BEMA-18")
@pytest.mark.parametrize("update_after", [0, 3])
@pytest.mark.parametrize(
    ("build", "count", "named"),
    [
        (fsdp1, 2, "model"),
        (columns, 2, "curious"),
        (complex_numbers, 1, "curious"),
        (complex_numbers, 2, "curious"),
        (eight_bits, 2, "curious"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_what_is_not_supported_is_an_error_at_train_begin_that_names_it(
    implementation: Implementation,
    ranks: Ranks,
    tmp_path: Path,
    build: Callable[[], nn.Module],
    count: int,
    named: str,
    update_after: int,
) -> None:
    require(implementation, "shadow_weights")
    setup = Setup(implementation.name, hyperparameters={"update_after": update_after})
    for message in ranks(count).run(refusal, setup, tmp_path, build):
        assert message is not None
        assert named in message
        assert "supported" in message
