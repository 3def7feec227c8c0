"""A reference model that follows the policy, without gathering either."""

import logging
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from truestep.arguments import require_integer, require_real
from truestep.blending import BlendedReference
from truestep.checkpoint import (
    CheckpointError,
    SavedState,
    checkpoint_resumed,
    checkpoint_written,
    discard_state,
    save_state,
)
from truestep.collectives import agree, exchange, rank
from truestep.numbering import numbered
from truestep.pairing import is_adapter_left_out
from truestep.topology import Topology

logger = logging.getLogger(__name__)

STATE_DIRECTORY = "truestep_ref_model"
"""Where the state is in a checkpoint; of a second callback in one training it is `truestep_ref_model_2`."""


class SyncRefModelCallback(TrainerCallback):
    r"""Have a reference model follow the policy, the model that is trained, at a distance (TR-DPO).

    At the end of each step :math:`t` with :math:`t \bmod n = 0`, for each parameter of the reference,

    .. math::

        π_{ref} ← α\, π_θ + (1 - α)\, π_{ref}

    with :math:`n` = `args.ref_model_sync_steps` and :math:`α` = `args.ref_model_mixup_alpha`, both read at that step.
    Parameters are paired by name. Each is rounded once per sync, to the dtype of the reference.

    Each rank blends the elements that it holds. Where policy and reference are laid out alike (both under ZeRO-3, both
    under FSDP2, both whole on every rank), or the policy is whole, nothing is communicated and nothing of the size of
    the model is allocated. Otherwise the policy is assembled, one parameter at a time. The reference is part of the
    Trainer's checkpoints from the first sync on, and is restored on any number of ranks.

    Args:
        ref_model: The reference, wrapped (DeepSpeed, `torch.compile`) or not, or None: nothing happens then.
        accelerator: Its `unwrap_model` unwraps both models. None: they are unwrapped without it.
        master_weights: Whether a float16 or bfloat16 reference is blended in a float32 copy, of which its weights are
            the rounded values. Without, syncs that move a weight by less than half a unit in its last place do not
            move it at all: in bfloat16 that is most of them for α below about 0.1. Takes 4 bytes for each weight of
            the reference that a rank holds.
        save_reference: Whether the reference, and its float32 copy, is saved with checkpoints and restored from them.

    Raises:
        ValueError: At train begin, on every rank and before any step: `args` lacks one of the two fields,
            `ref_model_sync_steps` is no integer of at least 1, or `ref_model_mixup_alpha` is no number in [0, 1], or
            ranks have different ones; or a parameter of the reference has no partner in the policy, or one of another
            shape. Later, where they have become such.
        UnsupportedModelError: A model is laid out or stored in a way that is not supported; what is, it lists.
        CheckpointError: State in a checkpoint cannot be used.

    Example:
        >>> from truestep import SyncRefModelCallback
        >>> callback = SyncRefModelCallback(None, None)  # without a reference nothing happens
        >>> trainer.add_callback(SyncRefModelCallback(ref_model, trainer.accelerator))  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP

    References:
        Gorbatovski et al. (2024), "Learn Your Reference Model for Real Good Alignment", arXiv 2404.09656.
    """

    def __init__(
        self,
        ref_model: nn.Module | None,
        accelerator: Accelerator | None,
        *,
        master_weights: bool = False,
        save_reference: bool = True,
    ) -> None:
        self.ref_model = ref_model
        self.accelerator = accelerator
        self.master_weights = master_weights
        self.save_reference = save_reference
        self._blended: BlendedReference | None = None
        self._has_moved = False
        self._directory = STATE_DIRECTORY

    # Events of the Trainer

    @torch.no_grad()
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Pair the two models, and take the reference over from the checkpoint that the training resumes from."""
        self._blended = None
        if self.ref_model is None:
            return
        if state.is_hyper_param_search and state.is_world_process_zero:
            logger.warning("SyncRefModel: in a hyperparameter search checkpoints get no reference")
        interval, _ = _agreed_settings(args)
        self._directory = numbered(STATE_DIRECTORY, self, state)
        blended = self._blend_with(kwargs["model"])
        if self.save_reference and state.global_step > 0:
            directory = checkpoint_resumed(args, state) / self._directory
            if self._restore(blended, directory, state, is_expected=state.global_step >= interval):
                self._has_moved = True
        self._blended = blended

    @torch.no_grad()
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Sync, where the step is one of those."""
        if self.ref_model is None:
            return
        interval, weight = _settings(args)
        if state.global_step == 0 or state.global_step % interval != 0:
            return
        if self._blended is None:  # added in the middle of a training
            self._directory = numbered(STATE_DIRECTORY, self, state)
            self._blended = self._blend_with(kwargs["model"])
        self._blended.move(weight)
        self._has_moved = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the reference to the checkpoint that the Trainer has just written, once it is not what it was given."""
        if self.ref_model is None or state.is_hyper_param_search:  # a search keeps checkpoints elsewhere
            return
        directory = checkpoint_written(args, state) / self._directory
        try:
            if self._blended is not None and self._has_moved and self.save_reference:
                metadata = {
                    "callback": type(self).__name__,
                    "step": state.global_step,
                    "master_weights": self.master_weights,
                }
                save_state(directory, self._blended.shards, self._blended.tensors(), metadata)
            elif state.is_world_process_zero:
                discard_state(directory)
        except CheckpointError as error:
            if state.is_world_process_zero:
                logger.warning(
                    "SyncRefModel: the reference in this checkpoint is missing or not up to date, do not resume from "
                    "it: %s",
                    error,
                )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let go of the policy and of the master copy."""
        self._blended = None

    # Parts

    def _blend_with(self, model: nn.Module) -> BlendedReference:
        assert self.ref_model is not None
        unwrapper = None if self.accelerator is None else self.accelerator.unwrap_model
        policy, reference = Topology(model, unwrapper), Topology(self.ref_model, unwrapper)
        blended = BlendedReference(policy, reference, self.master_weights)
        if is_adapter_left_out(policy.model, reference.model) and rank() == 0:
            trained = sum(one.policy.parameter.requires_grad for one in blended.pairs)
            logger.warning(
                "SyncRefModel: the reference follows the policy's base weights, of which %d of %d are trained, and not "
                "its adapters, nor modules that are trained in the place of others",
                trained,
                len(blended.pairs),
            )
        return blended

    def _restore(self, blended: BlendedReference, directory: Path, state: TrainerState, is_expected: bool) -> bool:
        """Take over the reference in a checkpoint; False where there is none, with a warning if there should be."""
        if not any(exchange(SavedState.exists(directory))):
            if is_expected and state.is_world_process_zero:
                logger.warning(
                    "SyncRefModel: %s has no reference. Its syncs up to step %d are lost; it goes on from the weights "
                    "that it was given",
                    directory,
                    state.global_step,
                )
            return False
        found = agree(lambda: _read_state(blended, directory, state.global_step), CheckpointError)
        blended.restore(found)
        return True


def _read_state(blended: BlendedReference, directory: Path, step: int) -> dict[str, dict[str, Tensor]]:
    saved = SavedState(directory)
    saved.require_metadata({"step": step})
    saved.require_parameters(blended.shards)
    try:
        return blended.read(saved, has_masters=bool(saved.metadata["master_weights"]))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{saved.index}: damaged ({error!r}); {saved.advice}") from error


def _agreed_settings(args: Any) -> tuple[int, float]:
    """The settings, which are checked, and the same on every rank. Collective.

    Raises:
        ValueError: On every rank, if one is missing or out of range on any, or if ranks have different ones.
    """
    mine: tuple[int, float] = agree(lambda: _settings(args), ValueError)
    everyone = exchange(mine)
    other = next((other for other, theirs in enumerate(everyone) if theirs != everyone[0]), None)
    if other is not None:
        raise ValueError(
            f"args.ref_model_sync_steps and args.ref_model_mixup_alpha are {everyone[0]} on rank 0 and "
            f"{everyone[other]} on rank {other}: give every rank the same"
        )
    return mine


def _settings(args: Any) -> tuple[int, float]:
    """Interval and α as `args` has them now.

    Raises:
        ValueError: One is missing or out of range.
    """
    names = ("ref_model_sync_steps", "ref_model_mixup_alpha")
    for name in names:
        if not hasattr(args, name):
            raise ValueError(
                f"args.{name}: {type(args).__name__} has no such field; use the arguments of a trainer with a "
                "reference model, such as trl.DPOConfig, or add the field to yours"
            )
    interval, weight = (getattr(args, name) for name in names)
    require_integer("args.ref_model_sync_steps", interval, 1)
    require_real("args.ref_model_mixup_alpha", weight, 1)
    return int(interval), float(weight)
