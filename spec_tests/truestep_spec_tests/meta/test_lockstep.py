"""The comparison can fail: what is wrong by the least that can be wrong is reported, and nothing else is."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from truestep_fixtures.ranks import RankPool
from truestep_reference import BEMACallback as ReferenceBEMACallback

from truestep_spec_tests.lockstep import Comparison, Comparisons, Divergence
from truestep_spec_tests.recording import Recorded, Recorder, Trajectory, draw
from truestep_spec_tests.runs import Outcome, Setup, follow_in_lockstep, same_bits, train_in_lockstep

Ranks = Callable[[int], RankPool]

STEP, RANK, PARAMETER, INDEX = 5, 1, "cube", (1, 0, 3)

# Updates at 3, 5 and 7: STEP is one of them, so its bound is not zero.
HYPERPARAMETERS = {"update_freq": 2, "update_after": 1, "lag": 1}


# ── Subjects ──────────────────────────────────────────────────────────────────


class Right(ReferenceBEMACallback):
    """The reference itself, which shows its values rounded to the dtype of the model."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_step_end(args, state, control, **kwargs)
        self.step = state.global_step

    def shadow_state_dict(self) -> dict[str, Tensor]:
        shown = super().shadow_state_dict()
        if getattr(self, "step", 0) == STEP and _rank() == min(RANK, _world_size() - 1):
            self.make_a_mistake(shown)
        return shown

    def make_a_mistake(self, shown: dict[str, Tensor]) -> None:
        """Changes what is shown at one step on one rank."""

    def largest_allowed(self) -> Tensor:
        """The largest value of float32 within the bound, at the place of the mistake."""
        value = self.shadow_values()[PARAMETER][INDEX]
        bound = self.shadow_bounds(torch.float32, torch.float32)[PARAMETER][INDEX]
        largest = (value + bound).float()
        while largest.double() - value > bound:
            largest = torch.nextafter(largest, torch.tensor(-math.inf))
        return largest


class WithinTheBound(Right):
    def make_a_mistake(self, shown: dict[str, Tensor]) -> None:
        shown[PARAMETER][INDEX] = self.largest_allowed()


class BeyondTheBound(Right):
    """Wrong by one unit in the last place more than the bound allows, in one element."""

    def make_a_mistake(self, shown: dict[str, Tensor]) -> None:
        shown[PARAMETER][INDEX] = torch.nextafter(self.largest_allowed(), torch.tensor(math.inf))


class NotANumber(Right):
    def make_a_mistake(self, shown: dict[str, Tensor]) -> None:
        shown[PARAMETER][INDEX] = math.nan


class Infinite(Right):
    def make_a_mistake(self, shown: dict[str, Tensor]) -> None:
        shown[PARAMETER][INDEX] = math.inf


class Incomplete(Right):
    def make_a_mistake(self, shown: dict[str, Tensor]) -> None:
        del shown[PARAMETER]


class OfAnotherShape(Right):
    def make_a_mistake(self, shown: dict[str, Tensor]) -> None:
        shown[PARAMETER] = shown[PARAMETER].flatten()


class ShownInOtherDtypes(Right):
    """Right in the dtype of the model, and wrong by little where float32 is asked for."""

    def shadow_state_dict(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        shown = super().shadow_state_dict()
        if dtype is None:
            return shown
        values = {name: value.to(dtype) for name, value in self.shadow_values().items()}
        values[PARAMETER][INDEX] += 1e-5
        return shown | values


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def setup_of(subject: type[Right], **changes: Any) -> Setup:
    implementation = f"BEMACallback={subject.__module__}.{subject.__qualname__}"
    return Setup(implementation, "ddp", 2, model="odd", hyperparameters=HYPERPARAMETERS).on(**changes)


def compare(setup: Setup, ranks: Ranks, directory: Path, **kwargs: Any) -> Comparisons:
    """Follows a trajectory; all ranks have to come to the same results."""
    outcomes: list[Outcome] = ranks(setup.ranks).run(follow_in_lockstep, setup, directory, **kwargs)
    first = outcomes[0].comparisons
    for outcome in outcomes[1:]:
        # NaN, which a divergence may hold, is not equal to itself.
        assert repr(outcome.comparisons) == repr(first)
    return first


def divergence_of(subject: type[Right], ranks: Ranks, directory: Path) -> Divergence:
    """The divergence of a subject that is wrong at one step on one rank."""
    comparisons = compare(setup_of(subject), ranks, directory)
    divergence = comparisons.divergence
    assert divergence is not None
    assert list(comparisons.steps) == list(range(STEP + 1))
    assert all(comparisons.steps[step].ratio <= 1 for step in range(STEP))
    assert comparisons.worst > 1
    assert comparisons.steps[STEP].outside == 1
    assert (divergence.step, divergence.rank, divergence.parameter) == (STEP, RANK, PARAMETER)
    assert f"step {STEP}, rank {RANK}, {PARAMETER}[" in str(divergence)
    return divergence


# ── Comparison ────────────────────────────────────────────────────────────────


def test_what_is_right_passes_at_every_step(ranks: Ranks, tmp_path: Path) -> None:
    comparisons = compare(setup_of(Right), ranks, tmp_path)
    assert comparisons.divergence is None
    assert list(comparisons.steps) == list(range(9))
    assert 0 < comparisons.worst <= 1


def test_a_bound_of_zero_holds_equal_values(ranks: Ranks, tmp_path: Path) -> None:
    comparisons = compare(setup_of(Right), ranks, tmp_path)
    # Up to the first update, at step 3, nothing is computed.
    assert [comparisons.steps[step][:2] for step in range(3)] == [(0, 0)] * 3


def test_the_largest_error_within_the_bound_passes(ranks: Ranks, tmp_path: Path) -> None:
    comparisons = compare(setup_of(WithinTheBound), ranks, tmp_path)
    assert comparisons.divergence is None
    assert 0.5 < comparisons.steps[STEP].ratio <= 1


def test_one_unit_in_the_last_place_more_is_reported_with_its_place(ranks: Ranks, tmp_path: Path) -> None:
    divergence = divergence_of(BeyondTheBound, ranks, tmp_path)
    assert divergence.index == INDEX
    assert divergence.shown_as == "float32"
    error, unit = divergence.subject - divergence.reference, torch.finfo(torch.float32).eps * abs(divergence.subject)
    assert divergence.bound < error <= divergence.bound + unit
    for text in (repr(divergence.subject), repr(divergence.reference), "[1, 0, 3]", f"{divergence.bound:.3g}"):
        assert text in str(divergence)


@pytest.mark.parametrize("subject", [NotANumber, Infinite])
def test_what_is_not_finite_is_reported(subject: type[Right], ranks: Ranks, tmp_path: Path) -> None:
    divergence = divergence_of(subject, ranks, tmp_path)
    assert divergence.index == INDEX
    assert not math.isfinite(divergence.subject)
    assert math.isfinite(divergence.reference)


@pytest.mark.parametrize("subject", [Incomplete, OfAnotherShape])
def test_a_parameter_that_is_missing_or_of_another_shape_is_reported(
    subject: type[Right], ranks: Ranks, tmp_path: Path
) -> None:
    assert divergence_of(subject, ranks, tmp_path).shown_as == "nothing of that shape"


def test_what_a_narrow_dtype_hides_is_found_in_float32(ranks: Ranks, tmp_path: Path) -> None:
    narrow = setup_of(ShownInOtherDtypes, dtype="bfloat16")
    divergence = compare(narrow, ranks, tmp_path).divergence
    assert divergence is not None
    assert (divergence.index, divergence.shown_as) == (INDEX, "float32")


def test_elements_that_overflow_in_the_trajectory_are_not_compared(ranks: Ranks, tmp_path: Path) -> None:
    setup = setup_of(Right, topology="single", ranks=1)
    start = {name: parameter.detach() for name, parameter in setup.build_model().named_parameters()}
    trajectory = draw(start, setup.steps, setup.seed)
    for step, values in trajectory.steps.items():
        values["up"][0, step % 3] = [math.inf, -math.inf, math.nan][step % 3]
    trajectory.save(tmp_path / "trajectory.safetensors")
    comparisons = compare(setup, ranks, tmp_path, trajectory=tmp_path / "trajectory.safetensors")
    assert comparisons.divergence is None
    assert comparisons.worst <= 1


def test_a_real_training_ends_at_the_first_divergence(ranks: Ranks, tmp_path: Path) -> None:
    outcomes: list[Outcome] = ranks(2).run(train_in_lockstep, setup_of(BeyondTheBound), tmp_path)
    for outcome in outcomes:
        assert list(outcome.comparisons.steps) == list(range(STEP + 1))
        assert outcome.comparisons.divergence is not None
        assert outcome.comparisons.divergence.rank == RANK


def test_no_step_is_not_the_same_as_no_error() -> None:
    assert Comparisons().worst == 0.0
    assert Comparisons({1: Comparison(1.0, 4.0), 2: Comparison(1.0, 2.0)}).worst == 0.5


# ── Bits ──────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        (torch.tensor([1.0, math.nan]), torch.tensor([1.0, math.nan]), True),
        (torch.tensor([0.0]), torch.tensor([-0.0]), False),
        (torch.tensor([1.0]), torch.tensor([1.0], dtype=torch.float64), False),
        (torch.tensor([[1.0]]), torch.tensor([1.0]), False),
        (torch.tensor([[1.0, 2.0], [3.0, 4.0]]).T, torch.tensor([[1.0, 3.0], [2.0, 4.0]]), True),
        (torch.tensor(2.0), torch.tensor(2.0), True),
        (torch.empty(0, 3), torch.empty(0, 3), True),
    ],
    ids=["NaN", "sign of zero", "dtype", "shape", "strides", "no dimensions", "no elements"],
)
def test_bits_are_the_same_or_not(one: Tensor, other: Tensor, equal: bool) -> None:
    assert same_bits(one, other) == equal


# ── Trajectories ──────────────────────────────────────────────────────────────


def assert_same_steps(expected: dict[int, dict[str, Tensor]], found: dict[int, dict[str, Tensor]]) -> None:
    assert list(expected) == list(found)
    for step, values in expected.items():
        assert values.keys() == found[step].keys()
        assert all(same_bits(value, found[step][name]) for name, value in values.items())


def test_a_trajectory_survives_being_saved(tmp_path: Path) -> None:
    start = {"a/b.weight": torch.tensor([[0.0, -0.0, math.nan]]), "bias": torch.tensor(1.5, dtype=torch.bfloat16)}
    trajectory = draw(start, steps=11, seed=3)
    trajectory.about = {"setup": {"steps": 11}, "divergence": [1, "ä", None, 0.1]}
    trajectory.save(tmp_path / "file")
    loaded = Trajectory.load(tmp_path / "file")
    assert_same_steps(trajectory.steps, loaded.steps)
    assert loaded.about == trajectory.about


def test_another_file_is_not_taken_for_a_trajectory(tmp_path: Path) -> None:
    save_file({"0/w": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors: not a trajectory"):
        Trajectory.load(tmp_path / "model.safetensors")


@pytest.mark.parametrize("kind", ["walk", "jumps", "cancelling"])
def test_a_seed_gives_one_trajectory_and_another_seed_another(kind: Any) -> None:
    start = {"w": torch.ones(5)}
    assert_same_steps(draw(start, 4, seed=1, kind=kind).steps, draw(start, 4, seed=1, kind=kind).steps)
    assert not draw(start, 4, seed=2, kind=kind).steps[1]["w"].equal(draw(start, 4, seed=1, kind=kind).steps[1]["w"])
    assert list(draw(start, 4, seed=1, kind=kind).steps) == [0, 1, 2, 3, 4]


def test_what_a_recorder_writes_is_read_in_order(tmp_path: Path) -> None:
    trajectory = draw({"x.y": torch.ones(3), "z": torch.ones(2, 2)}, steps=11, seed=0)
    recorder = Recorder(tmp_path)
    for step in reversed(trajectory.steps):
        recorder(step, trajectory.steps[step], {"x.y": torch.full((3,), float(step))})
    thetas, shadows = Recorded(tmp_path, "theta"), Recorded(tmp_path, "shown")
    assert list(thetas) == list(shadows) == list(range(12))
    for step, theta in thetas.items():
        assert_same_steps({step: trajectory.steps[step]}, {step: theta})
        assert shadows[step]["x.y"].tolist() == [step] * 3


def test_what_has_no_shadow_is_no_part_of_the_trajectory_that_is_recorded(tmp_path: Path) -> None:
    recording = tmp_path / "recording"
    setup = setup_of(Right, topology="single", ranks=1, model="frozen", steps=1)
    follow_in_lockstep(setup, tmp_path, recording=recording)
    trainable = {name for name, parameter in setup.build_model().named_parameters() if parameter.requires_grad}
    assert set(Recorded(recording, "theta")[1]) == set(Recorded(recording, "shown")[1]) == trainable
