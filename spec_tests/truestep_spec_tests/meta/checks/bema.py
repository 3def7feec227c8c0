"""The suite's ways of looking at BEMA, each asked for a verdict on a package that claims to be right."""

import json
from pathlib import Path
from typing import Any

import torch

from truestep_spec_tests.meta.checks.suspect import Suspect, difference
from truestep_spec_tests.meta.faults import bema as faults
from truestep_spec_tests.runs import Setup, walked

# With these, a wrong step, weight or instant shows within a few steps.
SCHEDULE = {"update_freq": 2, "update_after": 3, "lag": 1, "ema_power": 0.6, "bias_power": 0.3}
STEPS = 8

# Between two updates: what was kept of the last one counts, and the live weights are others.
SAVED_AT = 6


def _setup(suspect: Suspect, topology: str = "single", ranks: int = 1, *, model: str = "odd", **changes: Any) -> Setup:
    """A run; by default on the model whose shapes no number of ranks divides."""
    setup = Setup(suspect.package, topology, ranks, model=model, steps=STEPS, hyperparameters=SCHEDULE)
    return setup.on(**changes)


# Against the reference, at every step of a trajectory


def follows_the_reference(suspect: Suspect) -> str | None:
    """In one process, in float32, with burn-in and correction."""
    return suspect.divergence(_setup(suspect))


def follows_the_reference_without_burn_in(suspect: Suspect) -> str | None:
    """The snapshot is taken at train begin."""
    return suspect.divergence(_setup(suspect, hyperparameters=SCHEDULE | {"update_after": 0}))


def follows_the_reference_without_correction(suspect: Suspect) -> str | None:
    """With η = 0."""
    return suspect.divergence(_setup(suspect, hyperparameters=SCHEDULE | {"bias_power": 0.0}))


def follows_the_reference_with_a_floor(suspect: Suspect) -> str | None:
    """With a β_min above what the power gives."""
    return suspect.divergence(_setup(suspect, hyperparameters=SCHEDULE | {"min_ema_multiplier": 0.8}))


def follows_the_reference_in_bfloat16(suspect: Suspect) -> str | None:
    """Weights in bfloat16; the shadow is read in bfloat16 and in float32."""
    return suspect.divergence(_setup(suspect, dtype="bfloat16"))


def follows_the_reference_under_ddp(suspect: Suspect) -> str | None:
    """Each of two ranks owns a slice."""
    return suspect.divergence(_setup(suspect, "ddp", 2))


def follows_the_reference_under_zero3(suspect: Suspect) -> str | None:
    """Two ranks, and partitions that are padded."""
    return suspect.divergence(_setup(suspect, "zero3", 2))


# Bitwise: against one process, and against a training that was not interrupted


def is_bitwise_the_same_on_three_ranks(suspect: Suspect) -> str | None:
    """The shadow at every step, under DDP."""
    alone = suspect.run(_setup(suspect), walked)[0]
    return difference(suspect.run(_setup(suspect, "ddp", 3), walked), alone)


def resumes_bitwise(suspect: Suspect) -> str | None:
    """In one process, from a checkpoint between two updates."""
    return _difference_of_resuming(suspect, _setup(suspect), _setup(suspect))


def resumes_bitwise_on_fewer_ranks(suspect: Suspect) -> str | None:
    """Saved on three ranks, resumed on two."""
    return _difference_of_resuming(suspect, _setup(suspect, "ddp", 3), _setup(suspect, "ddp", 2))


def _difference_of_resuming(suspect: Suspect, before: Setup, after: Setup) -> str | None:
    uninterrupted = suspect.run(before, walked)[0]
    _save(suspect, before)
    return difference(suspect.run(after, walked, first=SAVED_AT), uninterrupted)


# Checkpoints


def refuses_a_damaged_state(suspect: Suspect) -> str | None:
    """One bit of the second rank's file is another; no rank may go on."""
    setup = _setup(suspect, "ddp", 2)
    _save(suspect, setup)
    damaged = _state_directory(suspect) / "rank-00001-of-00002.safetensors"
    contents = bytearray(damaged.read_bytes())
    contents[-1] ^= 1
    damaged.write_bytes(contents)
    return suspect.fault(setup, faults.in_resuming, SAVED_AT)


def refuses_the_state_of_another_schedule(suspect: Suspect) -> str | None:
    """Saved with one update frequency, resumed with another."""
    _save(suspect, _setup(suspect))
    other = _setup(suspect, hyperparameters=SCHEDULE | {"update_freq": 4})
    return suspect.fault(other, faults.in_resuming, SAVED_AT)


def leaves_no_index_to_what_it_could_not_write(suspect: Suspect) -> str | None:
    """A state is written anew, but a directory is where one of its files should be."""
    _save(suspect, _setup(suspect))
    directory = _state_directory(suspect)
    for file in directory.glob("rank-*.safetensors"):
        file.unlink()
        file.mkdir()
    _save(suspect, _setup(suspect))
    return "the index of the earlier state is still there" if (directory / "index.json").exists() else None


def shares_what_it_keeps_among_the_ranks(suspect: Suspect) -> str | None:
    """Of a parameter of n elements, each of N ranks has at most ⌈n/N⌉ in its state."""
    setup = _setup(suspect, "ddp", 3)
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
    return suspect.fault(_setup(suspect, model="qwen2", dtype="bfloat16"), faults.when_it_is_saved)


def keeps_the_earlier_model_until_the_new_one_is_complete(suspect: Suspect) -> str | None:
    """A disk that is full at the last file."""
    return suspect.fault(_setup(suspect), faults.when_it_cannot_be_saved)


def shows_frozen_parameters_live(suspect: Suspect) -> str | None:
    """The trajectory moves them as well."""
    return suspect.fault(_setup(suspect, model="frozen"), faults.when_it_is_read)


def shows_tied_parameters_under_each_name(suspect: Suspect) -> str | None:
    """The entries are those of the state dict."""
    return suspect.fault(_setup(suspect, model="tied"), faults.when_it_is_read)


def swaps_the_shadow_in(suspect: Suspect) -> str | None:
    """In one process."""
    return suspect.fault(_setup(suspect), faults.when_it_is_swapped_in)


def swaps_the_shadow_in_under_zero3(suspect: Suspect) -> str | None:
    """With small parameters that are whole on every rank besides."""
    return suspect.fault(_setup(suspect, "zero3_persistent", 2), faults.when_it_is_swapped_in)


def swaps_the_shadow_in_under_fsdp2(suspect: Suspect) -> str | None:
    """After a forward that leaves whole parameters behind."""
    return suspect.fault(_setup(suspect, "fsdp2", 2), faults.when_it_is_swapped_in)


def swaps_the_shadow_out_after_an_exception(suspect: Suspect) -> str | None:
    """In one process."""
    return suspect.fault(_setup(suspect), faults.when_an_exception_leaves_the_block)


def begins_every_training_afresh(suspect: Suspect) -> str | None:
    """One object, two trainings."""
    return suspect.fault(_setup(suspect), faults.in_a_second_training)


def only_watches(suspect: Suspect) -> str | None:
    """A training by the Trainer, with η = 0: nothing needs a copy of the weights there."""
    setup = _setup(suspect, hyperparameters=SCHEDULE | {"bias_power": 0.0})
    return suspect.fault(setup, faults.in_a_real_training)


def refuses_bad_arguments(suspect: Suspect) -> str | None:
    """Those of the properties, one by one."""
    return suspect.fault(_setup(suspect), faults.with_bad_arguments)


def refuses_complex_parameters(suspect: Suspect) -> str | None:
    """At train begin, before the snapshot."""
    return suspect.fault(_setup(suspect), faults.with_a_complex_parameter)


def has_the_documented_constructor(suspect: Suspect) -> str | None:
    """Names, order and defaults."""
    return suspect.fault(_setup(suspect), faults.in_the_constructor)
