"""Mistakes that someone could make in the optimized BEMA, as small patches, each with the check that finds it.

A mutant is a copy of the package `truestep` under another name in which one passage is replaced by a wrong one. What
the check does to it, it does to any implementation, so a mutant that survives shows a gap in the suite.
"""

import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from truestep_spec_tests.meta import checks
from truestep_spec_tests.meta.checks import Check

ORIGINAL = "truestep"


@dataclass(frozen=True)
class Mutant:
    """A patch of the optimized code.

    Attributes:
        name: The mistake.
        clause: The clause that it breaks.
        module: The file that it is in.
        before: The right passage, which the file has exactly once.
        after: The wrong one in its place.
        killed_by: The check that finds it.
    """

    name: str
    clause: str
    module: str
    before: str
    after: str
    killed_by: Check

    def applied_to(self, source: str) -> str:
        """The file's text with the mistake in it.

        Raises:
            ValueError: The patch does not fit: the passage is not there exactly once, or remains.
        """
        count = source.count(self.before)
        if count != 1 or self.after == self.before:
            raise ValueError(f"mutant {self.name}: {self.module} has its passage {count} times:\n{self.before}")
        return source.replace(self.before, self.after)


def copy_package(directory: Path, name: str, mutant: Mutant | None = None) -> None:
    """Writes a copy of the installed package to `directory / name`, with one mistake or as it is."""
    for file, source in _sources():
        if mutant is not None and str(file) == mutant.module:
            source = mutant.applied_to(source)
        target = directory / name / file
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(re.sub(rf"\b(from|import) {ORIGINAL}\b", rf"\1 {name}", source), encoding="utf-8")


def _sources() -> Iterator[tuple[Path, str]]:
    spec = importlib.util.find_spec(ORIGINAL)
    assert spec is not None
    assert spec.origin is not None
    root = Path(spec.origin).parent
    for file in sorted(root.rglob("*.py")):
        yield file.relative_to(root), file.read_text(encoding="utf-8")


MUTANTS = (
    # When it acts, and with which weights
    Mutant(
        "ema_weight_of_the_step_before",
        "BEMA-3",
        "schedule.py",
        "self._base(step) ** -self.ema_power",
        "self._base(step - 1) ** -self.ema_power",
        checks.follows_the_reference,
    ),
    Mutant(
        "powers_swapped",
        "BEMA-3",
        "bema.py",
        "ema_power=ema_power,\n            bias_power=bias_power,",
        "ema_power=bias_power,\n            bias_power=ema_power,",
        checks.follows_the_reference,
    ),
    Mutant(
        "schedule_begins_after_the_burn_in",
        "BEMA-3",
        "schedule.py",
        "self.lag + self.multiplier * step)",
        "self.lag + self.multiplier * (step - self.update_after))",
        checks.follows_the_reference,
    ),
    Mutant(
        "floor_of_the_ema_weight_ignored",
        "BEMA-3",
        "schedule.py",
        "max(self._base(step) ** -self.ema_power, self.min_ema_multiplier)",
        "self._base(step) ** -self.ema_power",
        checks.follows_the_reference_with_a_floor,
    ),
    Mutant(
        "bias_power_zero_taken_literally",
        "BEMA-5",
        "schedule.py",
        "return self.bias_power > 0",
        "return self.bias_power >= 0",
        checks.follows_the_reference_without_correction,
    ),
    Mutant(
        "snapshot_one_step_late",
        "BEMA-1",
        "bema.py",
        "            if state.global_step >= self.schedule.update_after:\n                self._take_snapshot()",
        "            if state.global_step > self.schedule.update_after:\n                self._take_snapshot()",
        checks.follows_the_reference,
    ),
    Mutant(
        "snapshot_after_the_first_step",
        "BEMA-1",
        "bema.py",
        "        if state.global_step >= self.schedule.update_after:\n            self._take_snapshot()",
        "        if state.global_step > self.schedule.update_after:\n            self._take_snapshot()",
        checks.follows_the_reference_without_burn_in,
    ),
    Mutant(
        "snapshot_at_train_begin_whatever_the_burn_in",
        "BEMA-1",
        "bema.py",
        "        if state.global_step >= self.schedule.update_after:\n            self._take_snapshot()",
        "        if state.global_step >= 0:\n            self._take_snapshot()",
        checks.follows_the_reference,
    ),
    Mutant(
        "update_instants_ignore_the_burn_in",
        "BEMA-2",
        "schedule.py",
        "(step - self.update_after) % self.update_freq == 0",
        "step % self.update_freq == 0",
        checks.follows_the_reference,
    ),
    Mutant(
        "bad_argument_accepted",
        "BEMA-14",
        "schedule.py",
        "if isinstance(value, bool) or not isinstance(value, Integral)",
        "if not isinstance(value, Integral)",
        checks.refuses_bad_arguments,
    ),
    Mutant(
        "default_changed",
        "BEMA-20",
        "bema.py",
        "update_freq: int = 400,",
        "update_freq: int = 100,",
        checks.has_the_documented_constructor,
    ),
    # What it keeps
    Mutant(
        "average_kept_in_the_dtype_of_the_parameter",
        "BEMA-8",
        "averaging.py",
        "ema=buffer(torch.promote_types(dtype, torch.float32)),",
        "ema=buffer(dtype),",
        checks.follows_the_reference_in_bfloat16,
    ),
    Mutant(
        "shadow_rounded_twice",
        "BEMA-8",
        "averaging.py",
        "torch.add(average.ema, moved, alpha=bias_weight).to(dtype)",
        "average.ema.to(dtype) + (bias_weight * moved).to(dtype)",
        checks.follows_the_reference_in_bfloat16,
    ),
    Mutant(
        "weights_of_the_average_exchanged",
        "BEMA-4",
        "averaging.py",
        "lerp_(self._converted(theta[piece], ema.dtype), weight)",
        "lerp_(self._converted(theta[piece], ema.dtype), 1 - weight)",
        checks.follows_the_reference,
    ),
    Mutant(
        "correction_taken_from_the_average",
        "BEMA-6",
        "averaging.py",
        "- average.anchor.to(average.ema.dtype)",
        "- average.ema",
        checks.follows_the_reference,
    ),
    Mutant(
        "shadow_formed_from_the_weights_of_now",
        "BEMA-2",
        "averaging.py",
        "moved = average.latest.to(average.ema.dtype)",
        "moved = self.shards[name].owned_elements().to(average.ema.dtype)",
        checks.follows_the_reference,
    ),
    Mutant(
        "last_elements_of_a_range_rounded_differently",
        "BEMA-12",
        "averaging.py",
        "return torch.add(average.ema, moved, alpha=bias_weight).to(dtype)",
        "shadow = torch.add(average.ema, moved, alpha=bias_weight)\n"
        "        rest = slice(len(shadow) // 8 * 8, None)\n"
        "        before = average.ema[rest].sub(average.anchor[rest], alpha=bias_weight)\n"
        "        shadow[rest] = before.add(average.latest[rest], alpha=bias_weight)\n"
        "        return shadow.to(dtype)",
        checks.is_bitwise_the_same_on_three_ranks,
    ),
    Mutant(
        "average_written_to_the_live_weights",
        "BEMA-13",
        "averaging.py",
        "ema[piece].lerp_(self._converted(theta[piece], ema.dtype), weight)",
        "ema[piece].copy_(theta[piece].lerp_(ema[piece], 1 - weight))",
        checks.only_watches,
    ),
    Mutant(
        "state_of_the_training_before_kept",
        "BEMA-15",
        "bema.py",
        "self._topology, self._averages = None, None",
        "self._topology = None",
        checks.begins_every_training_afresh,
    ),
    Mutant(
        "frozen_parameters_averaged",
        "BEMA-7",
        "bema.py",
        "for name, shard in shards.items() if shard.parameter.requires_grad}",
        "for name, shard in shards.items()}",
        checks.shows_frozen_parameters_live,
    ),
    Mutant(
        "unsupported_dtype_accepted",
        "BEMA-18",
        "topology.py",
        "SUPPORTED_DTYPES = (",
        "SUPPORTED_DTYPES = (torch.complex64, ",
        checks.refuses_complex_parameters,
    ),
    # Where it lies
    Mutant(
        "every_rank_keeps_everything",
        "BEMA-19",
        "topology.py",
        "self.owned = _chunk(self.numel, world_size(), rank())",
        "self.owned = self.held",
        checks.shares_what_it_keeps_among_the_ranks,
    ),
    Mutant(
        "gathered_from_the_main_rank_only",
        "BEMA-12",
        "collectives.py",
        "src=source,",
        "src=0,",
        checks.follows_the_reference_under_ddp,
    ),
    Mutant(
        "ranges_of_zero3_ignore_the_padding",
        "BEMA-12",
        "topology.py",
        "min(part * partition.ds_numel, numel) for part in",
        "part * numel // dist.get_world_size(parameter.ds_process_group) for part in",
        checks.follows_the_reference_under_zero3,
    ),
    # Swapping the shadow in
    Mutant(
        "whole_copies_of_zero3_left_stale",
        "BEMA-17",
        "topology.py",
        'if self.parameter.ds_status.name == "AVAILABLE":',
        'if self.parameter.ds_status.name == "INFLIGHT":',
        checks.swaps_the_shadow_in_under_zero3,
    ),
    Mutant(
        "whole_copies_of_fsdp2_left_stale",
        "BEMA-17",
        "topology.py",
        "            module.reshard()",
        "            pass",
        checks.swaps_the_shadow_in_under_fsdp2,
    ),
    Mutant(
        "live_weights_kept_by_reference",
        "BEMA-17",
        "bema.py",
        "live[name] = shard.elements().to(self.device, copy=True)",
        "live[name] = shard.elements().to(self.device)",
        checks.swaps_the_shadow_in,
    ),
    Mutant(
        "live_weights_lost_by_an_exception",
        "BEMA-17",
        "bema.py",
        "            yield\n        finally:",
        "            yield\n        except BaseException:\n            raise\n        else:",
        checks.swaps_the_shadow_out_after_an_exception,
    ),
    # What it leaves
    Mutant(
        "saved_in_float32",
        "BEMA-10",
        "bema.py",
        "self._entries(keep=args.should_save,",
        "self._entries(keep=args.should_save, dtype=torch.float32,",
        checks.leaves_the_shadow_as_a_model,
    ),
    Mutant(
        "tokenizer_not_saved",
        "BEMA-10",
        "export.py",
        'if hasattr(processing_class, "save_pretrained"):',
        "if False:",
        checks.leaves_the_shadow_as_a_model,
    ),
    Mutant(
        "earlier_result_moved_away_too_soon",
        "BEMA-10",
        "export.py",
        "        new.mkdir()\n        write(new)\n        if directory.exists():\n            directory.rename(old)",
        "        if directory.exists():\n            directory.rename(old)\n        new.mkdir()\n        write(new)",
        checks.keeps_the_earlier_model_until_the_new_one_is_complete,
    ),
    Mutant(
        "second_name_of_a_tied_parameter_left_out",
        "BEMA-16",
        "bema.py",
        "elif keep:",
        "elif False:",
        checks.shows_tied_parameters_under_each_name,
    ),
    # Checkpoints
    Mutant(
        "bias_weight_lost_in_a_checkpoint",
        "BEMA-11",
        "bema.py",
        'return float(saved.metadata["bias_weight"])',
        "return 0.0",
        checks.resumes_bitwise,
    ),
    Mutant(
        "weights_of_the_last_update_lost_in_a_checkpoint",
        "BEMA-11",
        "averaging.py",
        '{"anchor": self.anchor, "latest": self.latest}',
        '{"anchor": self.anchor}',
        checks.resumes_bitwise,
    ),
    Mutant(
        "pieces_read_from_their_beginning",
        "BEMA-11",
        "checkpoint.py",
        'values[start - piece["start"] : stop - piece["start"]]',
        "values[: stop - start]",
        checks.resumes_bitwise_on_fewer_ranks,
    ),
    Mutant(
        "checksum_not_compared",
        "BEMA-11",
        "checkpoint.py",
        'if _checksum(values) != piece["crc32"].get(kind):',
        'if kind not in piece["crc32"]:',
        checks.refuses_a_damaged_state,
    ),
    Mutant(
        "error_stays_on_its_rank",
        "BEMA-11",
        "collectives.py",
        "        if message is not None:\n",
        "        if message is not None and other == rank():\n",
        checks.refuses_a_damaged_state,
    ),
    Mutant(
        "hyperparameters_of_a_checkpoint_not_compared",
        "BEMA-11",
        "bema.py",
        '"step": step, "hyperparameters": self.schedule.hyperparameters()}',
        '"step": step}',
        checks.refuses_the_state_of_another_schedule,
    ),
    Mutant(
        "index_of_the_earlier_state_left_in_place",
        "BEMA-11",
        "checkpoint.py",
        'for stale in (directory / INDEX, *directory.glob("rank-*.safetensors")):',
        'for stale in directory.glob("rank-*.safetensors"):',
        checks.leaves_no_index_to_what_it_could_not_write,
    ),
)
"""All mutants. Each is wrong in one way, or its death would prove little."""
