"""The suite's ways of looking, each asked for a verdict on a package that claims to be right.

A check runs on ranks of its choice, and returns the first fault that it finds or None. A package that crashes
instead of being wrong makes it raise, which is no verdict.
"""

import importlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from truestep_fixtures.ranks import RankPool

from truestep_spec_tests.meta import faults
from truestep_spec_tests.runs import Setup, follow_in_lockstep, walked

# With these, a wrong step, weight or instant shows within a few steps.
SCHEDULE = {"update_freq": 2, "update_after": 3, "lag": 1, "ema_power": 0.6, "bias_power": 0.3}
STEPS = 8

# Between two updates: what was kept of the last one counts, and the live weights are others.
SAVED_AT = 6


@dataclass(frozen=True)
class Suspect:
    """A package that is looked at, and what to look at it with.

    Attributes:
        package: Its import name.
        path: The directory that it is imported from.
        directory: Where a check may write.
        ranks: The pool for each world size.
    """

    package: str
    path: Path
    directory: Path
    ranks: Callable[[int], RankPool]

    def setup(self, topology: str = "single", ranks: int = 1, *, model: str = "odd", **changes: Any) -> Setup:
        """A run; by default on the model whose shapes no number of ranks divides."""
        setup = Setup(self.package, topology, ranks, model=model, steps=STEPS, hyperparameters=SCHEDULE)
        return setup.on(**changes)

    def run(self, setup: Setup, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> list[Any]:
        """Runs `function(setup, directory, …)` on every rank of the setup, where the package can be imported."""
        pool = self.ranks(setup.ranks)
        return pool.run(_with_path, self.path, function, setup, self.directory, *args, **kwargs)

    def fault(self, setup: Setup, function: Callable[..., str | None], /, *args: Any) -> str | None:
        """Runs a function of `faults`; the first fault on any rank."""
        return _first(self.run(setup, function, *args))


Check = Callable[[Suspect], str | None]


def _with_path(path: Path, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    sys.path.insert(0, str(path))
    importlib.invalidate_caches()
    try:
        return function(*args, **kwargs)
    finally:
        sys.path.remove(str(path))


def _first(faults_by_rank: list[str | None]) -> str | None:
    return next((f"rank {rank}: {fault}" for rank, fault in enumerate(faults_by_rank) if fault is not None), None)


# Against the reference, at every step of a trajectory


def _divergence(suspect: Suspect, setup: Setup) -> str | None:
    divergence = suspect.run(setup, follow_in_lockstep)[0].comparisons.divergence
    return None if divergence is None else str(divergence)


def follows_the_reference(suspect: Suspect) -> str | None:
    """In one process, in float32, with burn-in and correction."""
    return _divergence(suspect, suspect.setup())


def follows_the_reference_without_burn_in(suspect: Suspect) -> str | None:
    """The snapshot is taken at train begin."""
    return _divergence(suspect, suspect.setup(hyperparameters=SCHEDULE | {"update_after": 0}))


def follows_the_reference_without_correction(suspect: Suspect) -> str | None:
    """With η = 0."""
    return _divergence(suspect, suspect.setup(hyperparameters=SCHEDULE | {"bias_power": 0.0}))


def follows_the_reference_with_a_floor(suspect: Suspect) -> str | None:
    """With a β_min above what the power gives."""
    return _divergence(suspect, suspect.setup(hyperparameters=SCHEDULE | {"min_ema_multiplier": 0.8}))


def follows_the_reference_in_bfloat16(suspect: Suspect) -> str | None:
    """Weights in bfloat16; the shadow is read in bfloat16 and in float32."""
    return _divergence(suspect, suspect.setup(dtype="bfloat16"))


def follows_the_reference_under_ddp(suspect: Suspect) -> str | None:
    """Each of two ranks owns a slice."""
    return _divergence(suspect, suspect.setup("ddp", 2))


def follows_the_reference_under_zero3(suspect: Suspect) -> str | None:
    """Two ranks, and partitions that are padded."""
    return _divergence(suspect, suspect.setup("zero3", 2))


# Bitwise: against one process, and against a training that was not interrupted


def is_bitwise_the_same_on_three_ranks(suspect: Suspect) -> str | None:
    """The shadow at every step, under DDP."""
    alone = suspect.run(suspect.setup(), walked)[0]
    return _difference(suspect.run(suspect.setup("ddp", 3), walked), alone)


def resumes_bitwise(suspect: Suspect) -> str | None:
    """In one process, from a checkpoint between two updates."""
    return _difference_of_resuming(suspect, suspect.setup(), suspect.setup())


def resumes_bitwise_on_fewer_ranks(suspect: Suspect) -> str | None:
    """Saved on three ranks, resumed on two."""
    return _difference_of_resuming(suspect, suspect.setup("ddp", 3), suspect.setup("ddp", 2))


def _difference_of_resuming(suspect: Suspect, before: Setup, after: Setup) -> str | None:
    uninterrupted = suspect.run(before, walked)[0]
    _save(suspect, before)
    return _difference(suspect.run(after, walked, first=SAVED_AT), uninterrupted)


def _difference(found: list[dict[int, dict[str, Tensor]]], expected: dict[int, dict[str, Tensor]]) -> str | None:
    for rank, shadows in enumerate(found):
        for step, values in shadows.items():
            difference = faults.first_difference(values, expected[step])
            if difference is not None:
                return f"rank {rank}, step {step}: {difference}"
    return None


# Checkpoints


def refuses_a_damaged_state(suspect: Suspect) -> str | None:
    """One bit of the second rank's file is another; no rank may go on."""
    setup = suspect.setup("ddp", 2)
    _save(suspect, setup)
    damaged = _state_directory(suspect) / "rank-00001-of-00002.safetensors"
    contents = bytearray(damaged.read_bytes())
    contents[-1] ^= 1
    damaged.write_bytes(contents)
    return suspect.fault(setup, faults.in_resuming, SAVED_AT)


def refuses_the_state_of_another_schedule(suspect: Suspect) -> str | None:
    """Saved with one update frequency, resumed with another."""
    _save(suspect, suspect.setup())
    other = suspect.setup(hyperparameters=SCHEDULE | {"update_freq": 4})
    return suspect.fault(other, faults.in_resuming, SAVED_AT)


def leaves_no_index_to_what_it_could_not_write(suspect: Suspect) -> str | None:
    """A state is written anew, but a directory is where one of its files should be."""
    _save(suspect, suspect.setup())
    directory = _state_directory(suspect)
    for file in directory.glob("rank-*.safetensors"):
        file.unlink()
        file.mkdir()
    _save(suspect, suspect.setup())
    return "the index of the earlier state is still there" if (directory / "index.json").exists() else None


def shares_what_it_keeps_among_the_ranks(suspect: Suspect) -> str | None:
    """Of a parameter of n elements, each of N ranks has at most ⌈n/N⌉ in its state."""
    setup = suspect.setup("ddp", 3)
    _save(suspect, setup)
    index = json.loads((_state_directory(suspect) / "index.json").read_text(encoding="utf-8"))
    for name, parameter in index["parameters"].items():
        most = -(-torch.Size(parameter["shape"]).numel() // setup.ranks)
        for piece in parameter["pieces"]:
            if piece["stop"] - piece["start"] > most:
                return f"{piece['file']} has more than {most} elements of {name}"
    return None


def _save(suspect: Suspect, setup: Setup) -> None:
    suspect.run(setup, walked, last=SAVED_AT, save=True)


def _state_directory(suspect: Suspect) -> Path:
    return suspect.directory / f"checkpoint-{SAVED_AT}" / "truestep_bema"


# What users see


def leaves_the_shadow_as_a_model(suspect: Suspect) -> str | None:
    """A model of Transformers in bfloat16, with a tokenizer."""
    return suspect.fault(suspect.setup(model="qwen2", dtype="bfloat16"), faults.when_it_is_saved)


def keeps_the_earlier_model_until_the_new_one_is_complete(suspect: Suspect) -> str | None:
    """A disk that is full at the last file."""
    return suspect.fault(suspect.setup(), faults.when_it_cannot_be_saved)


def shows_frozen_parameters_live(suspect: Suspect) -> str | None:
    """The trajectory moves them as well."""
    return suspect.fault(suspect.setup(model="frozen"), faults.when_it_is_read)


def shows_tied_parameters_under_each_name(suspect: Suspect) -> str | None:
    """The entries are those of the state dict."""
    return suspect.fault(suspect.setup(model="tied"), faults.when_it_is_read)


def swaps_the_shadow_in(suspect: Suspect) -> str | None:
    """In one process."""
    return suspect.fault(suspect.setup(), faults.when_it_is_swapped_in)


def swaps_the_shadow_in_under_zero3(suspect: Suspect) -> str | None:
    """With small parameters that are whole on every rank besides."""
    return suspect.fault(suspect.setup("zero3_persistent", 2), faults.when_it_is_swapped_in)


def swaps_the_shadow_in_under_fsdp2(suspect: Suspect) -> str | None:
    """After a forward that leaves whole parameters behind."""
    return suspect.fault(suspect.setup("fsdp2", 2), faults.when_it_is_swapped_in)


def swaps_the_shadow_out_after_an_exception(suspect: Suspect) -> str | None:
    """In one process."""
    return suspect.fault(suspect.setup(), faults.when_an_exception_leaves_the_block)


def begins_every_training_afresh(suspect: Suspect) -> str | None:
    """One object, two trainings."""
    return suspect.fault(suspect.setup(), faults.in_a_second_training)


def only_watches(suspect: Suspect) -> str | None:
    """A training by the Trainer, with η = 0: nothing needs a copy of the weights there."""
    setup = suspect.setup(hyperparameters=SCHEDULE | {"bias_power": 0.0})
    return suspect.fault(setup, faults.in_a_real_training)


def refuses_bad_arguments(suspect: Suspect) -> str | None:
    """Those of the properties, one by one."""
    return suspect.fault(suspect.setup(), faults.with_bad_arguments)


def refuses_complex_parameters(suspect: Suspect) -> str | None:
    """At train begin, before the snapshot."""
    return suspect.fault(suspect.setup(), faults.with_a_complex_parameter)


def has_the_documented_constructor(suspect: Suspect) -> str | None:
    """Names, order and defaults."""
    return suspect.fault(suspect.setup(), faults.in_the_constructor)
