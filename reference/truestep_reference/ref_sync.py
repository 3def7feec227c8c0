r"""A reference model that follows the policy: the executable specification.

At the end of every step t with t mod n = 0, for every parameter of the reference,

    reference ← α·policy + (1 − α)·reference

rounded once to the reference's dtype. n is ``args.ref_model_sync_steps`` and α is ``args.ref_model_mixup_alpha``.

References:
    A. Gorbatovski et al., "Learn Your Reference Model for Real Good Alignment", arXiv:2404.09656, 2024.
"""

import logging
import re
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from truestep_reference import arguments, rounding, whole
from truestep_reference.state import Origin, checkpoint_resumed, checkpoint_written, read_tensors, write_tensors

logger = logging.getLogger(__name__)

STATE_DIRECTORY = "truestep_reference_ref_model"

WRAPPERS = re.compile(r"(_checkpoint_wrapped_module|_orig_mod)\.")
WRAPPERS_OF_PEFT = re.compile(r"(?<=\.)(base_layer|original_module|token_adapter)\.")


def is_sync(t: int, *, sync_steps: int) -> bool:
    """Tells whether the reference moves at step t: t > 0 and t mod n = 0.

    Args:
        t: The global step, 0 at the beginning of training.
        sync_steps: n, in steps.

    Returns:
        True at n, 2n, …
    """
    return t > 0 and t % sync_steps == 0


def blend(policy: Tensor, reference: Tensor, alpha: float) -> Tensor:
    """α·policy + (1 − α)·reference; at α = 1 the policy alone and at α = 0 the reference alone, infinite or not.

    Args:
        policy: Float64.
        reference: Float64, of the same shape.
        alpha: α, in [0, 1].

    Returns:
        The blend, float64, not yet rounded to the reference's dtype.

    Example:
        >>> blend(torch.tensor(1.0), torch.tensor(3.0), 0.25)
        tensor(2.5000)
    """
    if alpha == 1:
        return policy
    if alpha == 0:
        return reference
    return alpha * policy + (1 - alpha) * reference


def blend_error(
    error: Tensor, *, policy: Tensor, reference: Tensor, blended: Tensor, alpha: float, dtype: torch.dtype
) -> Tensor:
    """Bounds |subject − reference| after a blend, before it is rounded to the reference's dtype.

    A blend is one update of a moving average with β = α, and ``rounding.ema_error`` bounds that. α reaches the subject
    as a float64 number, which it may round once to the dtype that it computes in.

    Args:
        error: The bound before the blend.
        policy: Float64.
        reference: What the reference model held before, float64.
        blended: What ``blend`` gave.
        alpha: α.
        dtype: What the subject computes in.

    Returns:
        The bound, shaped like the blend. A copy adds nothing.
    """
    if alpha == 1:
        return torch.zeros_like(error)
    if alpha == 0:
        return error
    w = rounding.unit_roundoff(dtype) * alpha
    return rounding.ema_error(error, before=reference, after=blended, theta=policy, beta=alpha, w=w, dtype=dtype)


def partners(policy: nn.Module, reference: nn.Module) -> dict[str, nn.Parameter]:
    """Finds the parameter of the policy that each parameter of the reference follows: the one of the same name.

    If one of the models alone has adapters of PEFT, base weights go by the names that they had before.

    Args:
        policy: The unwrapped model that is trained.
        reference: The unwrapped model that follows it.

    Returns:
        Name of each parameter of the reference, a tied one once, to the policy's. Parameters that both models share
        are left out.

    Raises:
        ValueError: A parameter of the reference has no partner, one of another shape, or, being tied, several.
    """
    one_has_adapters = _has_adapters(policy) != _has_adapters(reference)

    def known_as(name: str) -> str:
        name = WRAPPERS.sub("", name)
        return _base_name(name) if one_has_adapters else name

    candidates = {known_as(name): p for name, p in policy.named_parameters(remove_duplicate=False)}
    names_of: dict[nn.Parameter, list[str]] = {}
    for name, parameter in reference.named_parameters(remove_duplicate=False):
        names_of.setdefault(parameter, []).append(name)
    found = {}
    for parameter, names in names_of.items():
        of_these = {candidates[known_as(name)] for name in names if known_as(name) in candidates}
        if len(of_these) != 1:
            raise ValueError(
                f"parameter {names[0]} of the reference has {len(of_these) or 'no'} partners in the policy, by the "
                f"names {names}: it must have one"
            )
        (partner,) = of_these
        if _shape(partner) != _shape(parameter):
            raise ValueError(
                f"parameter {names[0]} has shape {_shape(parameter)} in the reference and {_shape(partner)} in the "
                "policy: the models must have one architecture"
            )
        if not _is_shared(partner, parameter):
            found[names[0]] = partner
    return found


class SyncRefModelCallback(TrainerCallback):
    """Moves a reference model towards the policy.

    The formula is that at the head of this module.

    Args:
        ref_model: The reference model, or None: nothing happens.
        accelerator: What unwraps the models, or None.
        master_weights: Whether the blend is kept in float32 beside a reference in a 16-bit dtype. (Here in float64,
            with a bound for float32.)
        save_reference: Whether checkpoints have the reference.

    Example:
        >>> callback = SyncRefModelCallback(None, None)
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
        self._parameters: dict[str, nn.Parameter] = {}
        self._partners: dict[str, nn.Parameter] = {}
        self._values: dict[str, Tensor] = {}
        self._errors: dict[str, Tensor] = {}
        self._synced = False

    # The trainer's events

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Checks the arguments, finds the partners, and continues from a checkpoint if t > 0."""
        if self.ref_model is None:
            return
        assert model is not None, "a trainer hands its model to every event"
        sync_steps, _ = _agreed_settings(args)
        self._pair(model, state)
        if state.global_step > 0 and self.save_reference:
            directory = checkpoint_resumed(args, state.global_step) / STATE_DIRECTORY
            self._restore(directory, state, is_expected=state.global_step >= sync_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Moves the reference at the steps that are multiples of n."""
        if self.ref_model is None:
            return
        sync_steps, alpha = _settings(args)
        if is_sync(state.global_step, sync_steps=sync_steps):
            if not self._parameters:  # added in the middle of a training
                self._pair(kwargs["model"], state)
            for name in self._partners:
                self._sync(name, alpha)
            whole.reshard(self._unwrap(self.ref_model))
            self._synced = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Puts the reference into the checkpoint that was just written, if it has moved."""
        if self.ref_model is None or not self.save_reference or not self._synced:
            return
        directory = checkpoint_written(args, state.global_step) / STATE_DIRECTORY
        tensors = {f"weights/{name}": whole.whole(self._parameters[name]) for name in self._partners}
        for name in filter(self._has_master, self._partners):
            tensors |= {f"master/{name}": self._values[name], f"error/{name}": self._errors[name]}
        if state.is_world_process_zero:
            try:
                write_tensors(directory, tensors, self._origin(state.global_step))
            except (OSError, SafetensorError) as error:
                logger.warning(f"{directory} could not be written, so resuming there loses the reference: {error}")
        whole.barrier()

    # What can be read

    def blended_values(self) -> dict[str, Tensor]:
        """The blend of the last sync, or the weights from train begin.

        Returns:
            Name of each parameter of the reference that has a partner to a whole float64 tensor, not rounded to the
            parameter's dtype.
        """
        return dict(self._values)

    def blended_bounds(self) -> dict[str, Tensor]:
        """Bounds |subject − blend| for a subject's reference model, whose weights are rounded to their dtype.

        Without master weights the bound is that of one sync: subject and reference held the same before it. With
        them it is a running one, for a float32 master copy since train begin.

        Returns:
            Name to a whole float64 tensor, not negative.
        """
        return {
            name: rounding.read_error(
                self._errors[name],
                shadow=self._values[name],
                dtype=self._computed_in(name),
                read_dtype=self._parameters[name].dtype,
            )
            for name in self._partners
        }

    # Parts

    def _pair(self, model: nn.Module, state: TrainerState) -> None:
        """Finds the partners, and takes the reference as it is."""
        policy, reference = self._unwrap(model), self._unwrap(self.ref_model)
        for one in (policy, reference):
            whole.require_supported(one)
        self._parameters = whole.named_parameters(reference)
        whole.reshard(policy)
        self._partners = partners(policy, reference)
        self._values = {name: self._held(name) for name in self._partners}
        self._errors = {name: torch.zeros_like(value) for name, value in self._values.items()}
        if _has_adapters(policy) and not _has_adapters(reference) and state.is_world_process_zero:
            trained = sum(p.requires_grad for p in self._partners.values())
            logger.warning(
                "the reference follows the base weights of the policy, and not its adapters: "
                f"{trained} of {len(self._partners)} base weights are trained"
            )

    def _sync(self, name: str, alpha: float) -> None:
        """Moves one parameter."""
        policy = whole.whole(self._partners[name]).to("cpu", torch.float64)
        if not self._has_master(name):
            self._values[name] = self._held(name)
            self._errors[name] = torch.zeros_like(self._values[name])
        reference = self._values[name]
        blended = blend(policy, reference, alpha)
        self._errors[name] = blend_error(
            self._errors[name],
            policy=policy,
            reference=reference,
            blended=blended,
            alpha=alpha,
            dtype=self._computed_in(name),
        )
        self._values[name] = blended
        if alpha != 0:
            whole.write(self._parameters[name], blended)

    def _held(self, name: str) -> Tensor:
        """What the reference model holds now, exactly."""
        return whole.whole(self._parameters[name]).to("cpu", torch.float64)

    def _has_master(self, name: str) -> bool:
        """Tells whether the blend is kept in a wider dtype than that of the parameter."""
        return self.master_weights and self._parameters[name].dtype in (torch.float16, torch.bfloat16)

    def _computed_in(self, name: str) -> torch.dtype:
        """What a subject computes in: the wider dtype of the two, at least float32; a master copy is float32."""
        if self._has_master(name):
            return torch.float32
        both = torch.promote_types(self._parameters[name].dtype, self._partners[name].dtype)
        return torch.promote_types(both, torch.float32)

    def _unwrap(self, model: nn.Module | None) -> nn.Module:
        assert model is not None, "nothing is asked of a callback without a reference model"
        unwrapped = whole.unwrap(model)  # refuses FSDP1, which an accelerator would take off
        return unwrapped if self.accelerator is None else whole.unwrap(self.accelerator.unwrap_model(model))

    def _restore(self, directory: Path, state: TrainerState, is_expected: bool) -> None:
        tensors = read_tensors(directory, self._origin(state.global_step))
        if tensors is None:
            if is_expected and state.is_world_process_zero:
                logger.warning(
                    f"{directory} holds no reference: its syncs up to step {state.global_step} are lost, and it goes "
                    "on from the weights that it has"
                )
            return
        for name in self._partners:
            whole.write(self._parameters[name], tensors[f"weights/{name}"])
            self._values[name] = tensors.get(f"master/{name}", self._held(name))
            self._errors[name] = tensors.get(f"error/{name}", torch.zeros_like(self._values[name]))
        whole.reshard(self._unwrap(self.ref_model))
        self._synced = True

    def _origin(self, t: int) -> Origin:
        """What the state depends on."""
        return {
            "step": t,
            "hyperparameters": {},
            "dtypes": {name: str(self._parameters[name].dtype) for name in self._partners},
            "shapes": {name: list(_shape(self._parameters[name])) for name in self._partners},
        }


def _agreed_settings(args: Any) -> tuple[int, float]:
    """N and α, the same on every rank.

    Raises:
        ValueError: On every rank: one is missing or out of range on some rank, or ranks have different ones.
    """
    try:
        mine: tuple[int, float] | str = _settings(args)
    except ValueError as error:
        mine = str(error)
    everyone = whole.from_every_rank(mine)
    for said in everyone:
        if isinstance(said, str):
            raise ValueError(said)
    if len(set(everyone)) > 1:
        raise ValueError(
            f"args.ref_model_sync_steps and args.ref_model_mixup_alpha must be the same on all ranks, got {everyone}"
        )
    settings: tuple[int, float] = everyone[0]
    return settings


def _settings(args: Any) -> tuple[int, float]:
    """N and α, as they are in the arguments now.

    Raises:
        ValueError: One is missing or out of range.
    """
    for name in ("ref_model_sync_steps", "ref_model_mixup_alpha"):
        if not hasattr(args, name):
            raise ValueError(f"args.{name} is missing: {type(args).__name__} has no such field")
    return (
        arguments.integer("args.ref_model_sync_steps", args.ref_model_sync_steps, at_least=1),
        arguments.real("args.ref_model_mixup_alpha", args.ref_model_mixup_alpha, at_most=1.0),
    )


def _shape(parameter: Any) -> tuple[int, ...]:
    """The shape of a whole parameter, also of one that ZeRO-3 has partitioned."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _has_adapters(model: nn.Module) -> bool:
    """Tells whether PEFT has wrapped layers of the model."""
    return bool(getattr(model, "peft_config", None))


def _is_shared(one: nn.Parameter, other: nn.Parameter) -> bool:
    """Tells whether two parameters are one: the same object, or whole tensors in the same memory."""
    is_whole = not any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in (one, other))
    return one is other or (is_whole and one.numel() > 0 and _memory(one) == _memory(other))


def _memory(parameter: nn.Parameter) -> tuple[int, tuple[int, ...]]:
    """Where a whole parameter begins in memory, and the distances between its elements."""
    return parameter.data_ptr(), parameter.stride()


def _base_name(name: str) -> str:
    """The name that a weight had before PEFT wrapped its model."""
    return WRAPPERS_OF_PEFT.sub("", name.removeprefix("base_model.model."))
