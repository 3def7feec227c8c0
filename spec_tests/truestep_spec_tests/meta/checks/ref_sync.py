"""The suite's ways of looking at a reference model that follows."""

from typing import Any

from truestep_spec_tests.differential.ref_sync_cases import syncing
from truestep_spec_tests.meta.checks.suspect import Suspect, difference
from truestep_spec_tests.meta.faults import ref_sync as faults
from truestep_spec_tests.runs import Setup, walked

# Between two syncs: what the last one left counts.
SAVED_AT = 3
STEPS = 6


def _setup(suspect: Suspect, topology: str = "single", ranks: int = 1, *, model: str = "odd", **changes: Any) -> Setup:
    """A run; by default on the model whose shapes no number of ranks divides."""
    return syncing(suspect.package, topology, ranks, model=model, **({"steps": STEPS} | changes))


# Against the reference, at every step of a trajectory


def syncs_like_the_reference(suspect: Suspect) -> str | None:
    """In one process, in float32."""
    return suspect.divergence(_setup(suspect))


def syncs_in_bfloat16_with_one_rounding(suspect: Suspect) -> str | None:
    """Both models in bfloat16."""
    return suspect.divergence(_setup(suspect, dtype="bfloat16"))


def syncs_across_types_with_one_rounding(suspect: Suspect) -> str | None:
    """A bfloat16 reference of a float32 policy."""
    return suspect.divergence(_setup(suspect, ref_model={"dtype": "bfloat16"}))


def keeps_what_a_rounding_takes_away(suspect: Suspect) -> str | None:
    """Master weights, with an α that bfloat16 alone cannot follow."""
    setup = _setup(suspect, dtype="bfloat16", alpha=0.02, every=1, hyperparameters={"master_weights": True})
    return suspect.divergence(setup.on(steps=20))


def syncs_on_every_rank(suspect: Suspect) -> str | None:
    """Under DDP: bitwise what one process has, on each of two ranks."""
    alone = suspect.run(_setup(suspect), walked)[0]
    return difference(suspect.run(_setup(suspect, "ddp", 2), walked), alone)


def syncs_under_zero3_with_persistent_parameters(suspect: Suspect) -> str | None:
    """The logits of two forwards after each step tell whether whole copies are stale."""
    return suspect.divergence(_setup(suspect, "zero3_persistent", 2, model="qwen2"))


def syncs_under_zero3_with_secondary_partitions(suspect: Suspect) -> str | None:
    """With hpZ, by the logits."""
    return suspect.fault(_setup(suspect, "zero3", 2, model="qwen2"), faults.with_secondary_partitions)


def syncs_under_fsdp2(suspect: Suspect) -> str | None:
    """By the logits."""
    return suspect.divergence(_setup(suspect, "fsdp2", 2, model="qwen2"))


def syncs_a_sharded_reference_of_a_whole_policy(suspect: Suspect) -> str | None:
    """Each rank takes its range out of the policy."""
    return suspect.divergence(_setup(suspect, "ddp", 2, ref_model={"topology": "zero3"}))


def syncs_a_whole_reference_of_a_sharded_policy(suspect: Suspect) -> str | None:
    """The policy is assembled."""
    return suspect.divergence(_setup(suspect, "zero3", 2, ref_model={"topology": "single"}))


def sends_nothing_where_shards_are_alike(suspect: Suspect) -> str | None:
    """Under ZeRO-3, two ranks."""
    return suspect.fault(_setup(suspect, "zero3", 2), faults.in_its_traffic)


# Settings


def reads_its_settings_at_each_step(suspect: Suspect) -> str | None:
    """Interval and α change in the middle of a training."""
    return suspect.fault(_setup(suspect), faults.after_a_change_of_settings)


def copies_at_one_whatever_the_reference_held(suspect: Suspect) -> str | None:
    """Infinities and NaN."""
    return suspect.fault(_setup(suspect, alpha=1.0), faults.with_a_reference_that_is_not_finite)


def refuses_bad_settings(suspect: Suspect) -> str | None:
    """Those that no number is, and those out of range."""
    return suspect.fault(_setup(suspect), faults.with_bad_settings)


def refuses_settings_that_differ_between_ranks(suspect: Suspect) -> str | None:
    """Each would do by itself."""
    return suspect.fault(_setup(suspect, "ddp", 2), faults.with_settings_of_one_rank, 0.9)


def has_the_constructor_of_the_documentation(suspect: Suspect) -> str | None:
    """Names and order."""
    return suspect.fault(_setup(suspect), faults.in_the_constructor)


# Pairs


def pairs_by_name(suspect: Suspect) -> str | None:
    """The reference has its parameters in another order."""
    return suspect.fault(_setup(suspect), faults.with_another_order)


def refuses_a_parameter_without_partner(suspect: Suspect) -> str | None:
    """Before anything has changed."""
    return suspect.fault(_setup(suspect), faults.with_a_parameter_too_many)


def refuses_another_shape(suspect: Suspect) -> str | None:
    """Before anything has changed, also where shapes could be broadcast."""
    return suspect.fault(_setup(suspect), faults.with_another_shape)


def leaves_shared_memory_alone(suspect: Suspect) -> str | None:
    """A layer that both models have in one memory, with an infinity in it."""
    return suspect.fault(_setup(suspect), faults.in_shared_memory)


def follows_the_base_weights_of_an_adapted_policy(suspect: Suspect) -> str | None:
    """LoRA on the policy alone."""
    return suspect.fault(_setup(suspect, model="lora"), faults.with_adapters_on_the_policy)


# Trainings


def leaves_the_policy_alone(suspect: Suspect) -> str | None:
    """Its weights, at the steps of a trajectory."""
    return suspect.fault(_setup(suspect), faults.in_the_policy)


def pairs_anew_in_a_second_training(suspect: Suspect) -> str | None:
    """One object, two policies one after the other."""
    return suspect.fault(_setup(suspect), faults.in_a_second_training)


def resumes_the_reference(suspect: Suspect) -> str | None:
    """In one process, from a checkpoint between two syncs."""
    return _difference_of_resuming(suspect, _setup(suspect), _setup(suspect))


def resumes_the_master_copy_on_other_ranks(suspect: Suspect) -> str | None:
    """Saved on three ranks that are whole, resumed on two that are sharded."""
    changes: dict[str, Any] = {"dtype": "bfloat16", "alpha": 0.02, "hyperparameters": {"master_weights": True}}
    before, after = _setup(suspect, "ddp", 3, **changes), _setup(suspect, "zero3", 2, **changes)
    return _difference_of_resuming(suspect, before, after)


def forwards_see_what_was_restored(suspect: Suspect) -> str | None:
    """Whole copies from a forward before train begin, of parameters that are persistent."""
    return _fault_after_resuming(suspect, "zero3_persistent")


def forwards_see_what_was_restored_with_secondary_partitions(suspect: Suspect) -> str | None:
    """Secondary partitions from a forward before train begin."""
    return _fault_after_resuming(suspect, "zero3", 2)


def saves_again_what_it_has_restored(suspect: Suspect) -> str | None:
    """A save after resuming, before the next sync."""
    suspect.run(_setup(suspect), walked, last=SAVED_AT, save=True)
    suspect.run(_setup(suspect), walked, first=SAVED_AT, last=SAVED_AT, save=True)
    index = suspect.directory / f"checkpoint-{SAVED_AT}" / "truestep_ref_model" / "index.json"
    return None if index.is_file() else "the reference is not in the checkpoint"


def keeps_two_references_apart(suspect: Suspect) -> str | None:
    """Two callbacks in one training, saved and resumed."""
    return suspect.fault(_setup(suspect), faults.with_two_references)


def changes_nothing_before_all_was_read(suspect: Suspect) -> str | None:
    """The last byte of the state is damaged."""
    suspect.run(_setup(suspect), walked, last=SAVED_AT, save=True)
    (file,) = suspect.directory.glob(f"checkpoint-{SAVED_AT}/truestep_ref_model/*.safetensors")
    contents = bytearray(file.read_bytes())
    contents[-1] ^= 1
    file.write_bytes(contents)
    return suspect.fault(_setup(suspect), faults.in_a_failed_resumption, SAVED_AT)


def _fault_after_resuming(suspect: Suspect, topology: str, *secondary: int) -> str | None:
    setup = _setup(suspect, topology, 2, model="qwen2")
    suspect.run(setup, walked, last=SAVED_AT, save=True)
    return suspect.fault(setup, faults.in_forwards_after_resuming, SAVED_AT, *secondary)


def saves_nothing_where_that_is_turned_off(suspect: Suspect) -> str | None:
    """By the files in the checkpoint."""
    setup = _setup(suspect, hyperparameters={"save_reference": False})
    suspect.run(setup, walked, last=SAVED_AT, save=True)
    written = list(suspect.directory.glob("checkpoint-*/*/*"))
    return f"there is {written[0]}" if written else None


def _difference_of_resuming(suspect: Suspect, before: Setup, after: Setup) -> str | None:
    uninterrupted = suspect.run(before, walked)[0]
    suspect.run(before, walked, last=SAVED_AT, save=True)
    return difference(suspect.run(after, walked, first=SAVED_AT), uninterrupted)
