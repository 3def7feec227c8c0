"""Weights on a GPU: buffers wherever they are asked for, copies beside the training, and the bits of a CPU run."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from truestep_fixtures.events import Events
from truestep_fixtures.topologies import Placed, training_arguments

from truestep_spec_tests.differential.cases import require
from truestep_spec_tests.implementation import Implementation
from truestep_spec_tests.lockstep.bema import lockstep
from truestep_spec_tests.observe import shows_dtypes
from truestep_spec_tests.recording import Kind
from truestep_spec_tests.runs import Setup, Walk, same_bits, train_in_lockstep

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

LARGE = 2**25  # elements: copying them to the host takes milliseconds, changing them on the GPU a fraction of one
CYCLES = 20_000_000  # of a GPU's clock: about 10 ms


class Block(nn.Module):
    """A large parameter and a small one."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.large = nn.Parameter(torch.arange(size).remainder(1021).div(64).to(dtype))
        self.small = nn.Parameter(torch.ones(3, dtype=dtype))


class Increment(torch.optim.Optimizer):
    """Adds one to every parameter: a single rounding, which is the same on every device."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.is_cuda:
                    # A copy that does not wait for this step would be done before the weights change.
                    torch.cuda._sleep(CYCLES)
                parameter.add_(1)


def on_gpu(setup: Setup, directory: Path, callbacks: list[TrainerCallback], kind: Kind = "walk") -> Walk:
    """A walk of the setup's model, placed on the GPU."""
    model = setup.build_model().cuda()
    return Walk(setup, directory, callbacks, kind=kind, placed=Placed("single", model, model))


def increments(
    callback: Any, device: str, directory: Path, *, dtype: torch.dtype, steps: int, size: int = LARGE
) -> dict[str, Tensor]:
    """The shadow after some steps with an update at each, between which nothing waits for the device."""
    model = Block(size, dtype).to(device)
    optimizer = Increment(model.parameters())
    events = Events(model, training_arguments("single", directory), [callback], optimizer=optimizer)
    events.train_begin()
    for t in range(1, steps + 1):
        events.step(t, update=optimizer.step)
    shadow: dict[str, Tensor] = callback.shadow_state_dict()
    return shadow


@pytest.mark.clause("BEMA-9", "BEMA-12")
@pytest.mark.parametrize("bias_power", [0.2, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_copies_beside_the_training_are_of_the_right_step(
    implementation: Implementation, tmp_path: Path, dtype: torch.dtype, bias_power: float
) -> None:
    require(implementation, "shadow_state_dict")
    shadows = [
        increments(
            implementation.BEMACallback(update_freq=1, bias_power=bias_power),
            device,
            tmp_path,
            dtype=dtype,
            steps=20,
        )
        for device in ("cuda", "cpu")
    ]
    assert all(same_bits(value, shadows[1][name]) for name, value in shadows[0].items())


@pytest.mark.clause("BEMA-1", "BEMA-2", "BEMA-4", "BEMA-6", "BEMA-8", "BEMA-9")
@pytest.mark.parametrize("kind", ["walk", "jumps", "cancelling"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64", "float16"])
def test_the_shadow_of_weights_on_a_gpu_stays_within_the_bound(
    implementation: Implementation, tmp_path: Path, dtype: str, device: str, kind: Kind
) -> None:
    arguments = {"update_freq": 1, "update_after": 1, "device": device}
    setup = Setup(implementation.name, dtype=dtype, model="odd", hyperparameters=arguments)
    callbacks, comparisons = lockstep(setup.subject(), setup.reference(), tmp_path / "reference")
    walk = on_gpu(setup, tmp_path, callbacks, kind)
    walk.begin()
    walk.go_to(setup.steps)
    assert comparisons.divergence is None, str(comparisons.divergence)
    assert list(range(setup.steps + 1)) == list(comparisons.steps)


@pytest.mark.clause("BEMA-1", "BEMA-2", "BEMA-4", "BEMA-6", "BEMA-9")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(("model", "dtype"), [("qwen2", "float32"), ("gpt2", "bfloat16"), ("batchnorm", "float32")])
def test_the_shadow_of_a_real_training_on_a_gpu_stays_within_the_bound(
    implementation: Implementation, tmp_path: Path, model: str, dtype: str, device: str
) -> None:
    arguments = {"update_freq": 2, "device": device}
    setup = Setup(implementation.name, dtype=dtype, model=model, hyperparameters=arguments, training={"use_cpu": False})
    comparisons = train_in_lockstep(setup, tmp_path).comparisons
    assert comparisons.divergence is None, str(comparisons.divergence)
    assert list(range(setup.steps + 1)) == list(comparisons.steps)


@pytest.mark.clause("BEMA-12")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64", "float16"])
def test_weights_on_a_gpu_and_on_the_cpu_give_the_same_bits(
    implementation: Implementation, tmp_path: Path, dtype: str
) -> None:
    require(implementation, "shadow_state_dict")
    setup = Setup(implementation.name, dtype=dtype, model="odd", steps=12, hyperparameters={"update_freq": 1})
    shown = []
    for place in (on_gpu, Walk):
        subject = setup.subject()
        walk = place(setup, tmp_path, [subject])
        walk.begin()
        walk.go_to(setup.steps)
        shown.append(subject.shadow_state_dict(*([torch.float64] if shows_dtypes(subject) else [])))
    assert all(same_bits(value, shown[1][name]) for name, value in shown[0].items())


@pytest.mark.clause("BEMA-9")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_none_of_the_state_is_on_the_gpu_unless_it_is_asked_for(
    implementation: Implementation, tmp_path: Path, dtype: torch.dtype
) -> None:
    require(implementation, "shadow_weights")
    size = 2**20
    for device, least in (("cpu", 0), ("cuda", 4 * size)):
        model = Block(size, dtype).cuda()
        optimizer = Increment(model.parameters())
        callback = implementation.BEMACallback(update_freq=1, device=device)
        events = Events(model, training_arguments("single", tmp_path), [callback], optimizer=optimizer)
        gc.collect()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        events.train_begin()
        for t in range(1, 4):
            events.step(t, update=optimizer.step)
        callback.shadow_state_dict()
        gc.collect()
        held = torch.cuda.memory_allocated() - before
        assert held == 0 if least == 0 else held >= least


@pytest.mark.clause("BEMA-9")
def test_weights_arrive_in_pinned_memory(implementation: Implementation, tmp_path: Path) -> None:
    require(implementation, "shadow_weights")
    size = 2**20
    model = Block(size, torch.float32).cuda()
    callback = implementation.BEMACallback(update_freq=1)
    events = Events(model, training_arguments("single", tmp_path), [callback])
    events.train_begin()
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
    pinned = [tensor for tensor in tensors if tensor.device.type == "cpu" and tensor.is_pinned()]
    assert any(tensor.numel() == size for tensor in pinned)


@pytest.mark.clause("BEMA-17")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_shadow_is_swapped_in_and_the_live_weights_are_back_after(
    implementation: Implementation, tmp_path: Path, device: str
) -> None:
    require(implementation, "shadow_state_dict", "shadow_weights")
    setup = Setup(implementation.name, model="odd", hyperparameters={"update_freq": 1, "device": device})
    subject = setup.subject()
    walk = on_gpu(setup, tmp_path, [subject])
    walk.begin()
    walk.go_to(setup.steps)
    live, shadow = walk.placed.read(), subject.shadow_state_dict()
    with subject.shadow_weights(walk.placed.model):
        within = walk.placed.read()
    after = walk.placed.read()
    for name, value in live.items():
        assert same_bits(shadow[name], within[name]), name
        assert same_bits(value, after[name]), name


@pytest.mark.clause("BEMA-11")
def test_a_training_on_a_gpu_goes_on_bitwise_on_the_cpu(implementation: Implementation, tmp_path: Path) -> None:
    require(implementation, "shadow_state_dict")
    setup = Setup(implementation.name, model="odd", hyperparameters={"update_freq": 1})
    whole = setup.subject()
    for callback, place, first, last in (
        (whole, on_gpu, 0, setup.steps),
        (setup.subject(), on_gpu, 0, 3),
        (moved := setup.subject(), Walk, 3, setup.steps),
    ):
        walk = place(setup, tmp_path, [callback])
        walk.begin(first)
        walk.go_to(last)
        if last == 3:
            walk.events.save()
    shown = moved.shadow_state_dict()
    assert all(same_bits(value, shown[name]) for name, value in whole.shadow_state_dict().items())
