r"""BEMA, the bias-corrected exponential moving average of the weights: the executable specification.

With t the global step, θ_t the trainable parameters after step t, and at every update instant t:

    β_t  = max((ρ + γ·t)^(−κ), β_min)
    EMA_t = (1 − β_t)·EMA_prev + β_t·θ_t
    α_t  = (ρ + γ·t)^(−η),  or 0 where η = 0
    θ′_t = EMA_t + α_t·(θ_t − θ₀)

The shadow θ′ starts at the snapshot, t = τ, where θ₀ = EMA = θ′ = θ_τ. It moves every φ steps after that.

References:
    A. Block and C. Zhang, "EMA Without the Lag: Bias-Corrected Iterate Averaging Schemes", arXiv:2508.00180,
    2025.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from truestep_reference import arguments, export, rounding, whole
from truestep_reference.state import (
    SUBJECT_DTYPES,
    Average,
    Origin,
    at_snapshot,
    checkpoint_resumed,
    checkpoint_written,
    read_averages,
    write_averages,
)

logger = logging.getLogger(__name__)

STATE_DIRECTORY = "truestep_reference_bema"


def is_snapshot(t: int, *, update_after: int) -> bool:
    """Tells whether the snapshot is taken at step t: t = τ.

    Args:
        t: The global step, 0 at the beginning of training.
        update_after: τ, in steps.

    Returns:
        True at t = τ only.
    """
    return t == update_after


def is_update(t: int, *, update_after: int, update_freq: int) -> bool:
    """Tells whether the shadow moves at step t: t > τ and (t − τ) mod φ = 0.

    Args:
        t: The global step.
        update_after: τ, in steps.
        update_freq: φ, in steps.

    Returns:
        True at τ + φ, τ + 2φ, …
    """
    return t > update_after and (t - update_after) % update_freq == 0


def ema_weight(t: int, *, ema_power: float, lag: float, multiplier: float, min_ema_multiplier: float) -> float:
    """β_t = max((ρ + γ·t)^(−κ), β_min), the weight of θ_t in the average.

    Args:
        t: The global step, whatever τ is.
        ema_power: κ. At 0 the weight is 1: no averaging.
        lag: ρ.
        multiplier: γ.
        min_ema_multiplier: β_min, in [0, 1].

    Returns:
        A weight in [0, 1], where ρ + γ·t ≥ 1.

    Example:
        >>> ema_weight(90, ema_power=0.5, lag=10, multiplier=1.0, min_ema_multiplier=0.0)
        0.1
    """
    beta: float = (lag + multiplier * t) ** (-ema_power)
    return max(beta, min_ema_multiplier)


def bias_weight(t: int, *, bias_power: float, lag: float, multiplier: float) -> float:
    """α_t = (ρ + γ·t)^(−η), the weight of the correction; η = 0 disables it: α_t = 0.

    Args:
        t: The global step, whatever τ is.
        bias_power: η. The formula alone would give 1 at η = 0; the documented "disabled" is what holds.
        lag: ρ.
        multiplier: γ.

    Returns:
        A weight in [0, 1], where ρ + γ·t ≥ 1.

    Example:
        >>> bias_weight(90, bias_power=1.0, lag=10, multiplier=1.0)
        0.01
        >>> bias_weight(90, bias_power=0.0, lag=10, multiplier=1.0)
        0.0
    """
    if bias_power == 0:
        return 0.0
    alpha: float = (lag + multiplier * t) ** (-bias_power)
    return alpha


def ema(previous: Tensor, theta: Tensor, beta: float) -> Tensor:
    """EMA_t = (1 − β_t)·EMA_prev + β_t·θ_t.

    Args:
        previous: EMA_prev, float64.
        theta: θ_t, float64, of the same shape.
        beta: β_t.

    Returns:
        A new tensor.
    """
    return (1 - beta) * previous + beta * theta


def shadow(ema: Tensor, theta: Tensor, theta_0: Tensor, alpha: float) -> Tensor:
    """θ′_t = EMA_t + α_t·(θ_t − θ₀).

    Args:
        ema: EMA_t, float64.
        theta: θ_t, float64, of the same shape.
        theta_0: θ₀, float64, of the same shape.
        alpha: α_t.

    Returns:
        A new tensor.
    """
    return ema + alpha * (theta - theta_0)


class BEMACallback(TrainerCallback):
    """Keeps a bias-corrected moving average of the weights, and saves it to ``{output_dir}/bema``.

    The formulas are those at the head of this module.

    Args:
        update_freq: φ, steps between two updates.
        ema_power: κ, the power that β_t decays with. 0 disables averaging.
        bias_power: η, the power that α_t decays with. 0 disables the bias correction.
        lag: ρ, added to the step.
        update_after: τ, the step at which the snapshot is taken.
        multiplier: γ, times the step.
        min_ema_multiplier: β_min, the smallest β_t.
        device: Where the averages are kept.

    Raises:
        ValueError: An argument is outside what the specification allows.

    Example:
        >>> callback = BEMACallback(update_freq=10)
        >>> BEMACallback(update_freq=0)
        Traceback (most recent call last):
        ValueError: update_freq must be an integer of at least 1, got 0
    """

    def __init__(
        self,
        update_freq: int = 400,
        ema_power: float = 0.5,
        bias_power: float = 0.2,
        lag: int = 10,
        update_after: int = 0,
        multiplier: float = 1.0,
        min_ema_multiplier: float = 0.0,
        device: str = "cpu",
    ) -> None:
        self.update_freq = arguments.integer("update_freq", update_freq, at_least=1)
        self.ema_power = arguments.real("ema_power", ema_power)
        self.bias_power = arguments.real("bias_power", bias_power)
        self.lag = arguments.real("lag", lag)
        self.update_after = arguments.integer("update_after", update_after, at_least=0)
        self.multiplier = arguments.real("multiplier", multiplier)
        self.min_ema_multiplier = arguments.real("min_ema_multiplier", min_ema_multiplier, at_most=1.0)
        self.device = arguments.existing_device("device", device)
        arguments.schedule_base(
            lag=self.lag,
            multiplier=self.multiplier,
            update_after=self.update_after,
            update_freq=self.update_freq,
        )
        self._model: nn.Module | None = None
        self._names: list[str] = []
        self._averages: dict[str, Average] | None = None

    # The trainer's events

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Forgets the last training. Takes the snapshot if τ = 0, or continues from a checkpoint if t > 0."""
        assert model is not None, "a trainer hands its model to every event"
        self._model = whole.unwrap(model)
        whole.require_supported(self._model)
        self._names = [name for name, p in whole.named_parameters(self._model).items() if p.requires_grad]
        self._averages = None
        t = state.global_step
        if t > 0:
            directory = checkpoint_resumed(args, t) / STATE_DIRECTORY
            self._averages = read_averages(directory, self._origin(t), self.device)
            if self._averages is None and t > self.update_after and state.is_world_process_zero:
                logger.warning(
                    f"{directory} holds no state of BEMACallback: the average up to step {t} is lost, and a new "
                    "one starts from a snapshot of the weights here"
                )
        if self._averages is None and t >= self.update_after:
            self._take_snapshot()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Takes the snapshot at t = τ and updates the averages at the instants after it."""
        t = state.global_step
        if is_snapshot(t, update_after=self.update_after):
            self._take_snapshot()
        if is_update(t, update_after=self.update_after, update_freq=self.update_freq):
            self._update(t)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Puts the state into the checkpoint that was just written. Before the snapshot there is none."""
        t = state.global_step
        directory = checkpoint_written(args, t) / STATE_DIRECTORY
        origin = self._origin(t)
        if self._averages is not None and state.is_world_process_zero:
            try:
                write_averages(directory, self._averages, origin)
            except (OSError, SafetensorError) as error:
                logger.warning(f"{directory} could not be written, so resuming there loses the average: {error}")
        whole.barrier()

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        """Writes the shadow to ``{output_dir}/bema``."""
        directory = Path(str(args.output_dir)) / "bema"
        if self._averages is None and state.is_world_process_zero:
            logger.warning(
                f"training ended at step {state.global_step}, before the snapshot at update_after="
                f"{self.update_after}: {directory} will hold the live weights"
            )
        state_dict = self.shadow_state_dict()
        error = None
        if state.is_world_process_zero:
            try:
                export.write_model(directory, self._trained_model(), state_dict, processing_class)
            except Exception as reason:  # whatever it is, the other ranks have to hear of it
                error = f"{directory} could not be written: {reason!r}"
        error = whole.from_main_process(error)
        if error is not None:
            raise RuntimeError(error)

    # What can be read

    def shadow_state_dict(self) -> dict[str, Tensor]:
        """Reads the shadow as a state dict. Collective: every rank calls it, every rank gets all of it.

        Returns:
            The keys of the unwrapped model's ``state_dict()``, each with a whole CPU tensor of the live
            dtype: trainable parameters from the shadow, rounded once; frozen parameters and buffers from the
            live model. Tied keys share one tensor.

        Raises:
            RuntimeError: No training has begun.
        """
        return whole.state_dict_with(self._trained_model(), self.shadow_values())

    def shadow_values(self) -> dict[str, Tensor]:
        """Reads θ′, or the live weights before the snapshot. Collective.

        Returns:
            Name of each trainable parameter to a whole float64 tensor on ``device``, a tied one once.

        Raises:
            RuntimeError: No training has begun.
        """
        if self._averages is None:
            return self._theta()
        return {name: average.shadow for name, average in self._averages.items()}

    def shadow_bounds(self, dtype: torch.dtype, read_dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Bounds |subject − reference|, for a subject that saw the same trajectory. Collective.

        The module ``rounding`` derives them. Up to the snapshot nothing needs rounding, and the bound is
        zero.

        Args:
            dtype: What the subject computes in: float32, or float64, which float64 weights need.
            read_dtype: What the subject's shadow was rounded to when it was read; None where it was not.

        Returns:
            Name of each trainable parameter to a whole float64 tensor, not negative, on ``device``.

        Raises:
            ValueError: A subject is not allowed to compute in ``dtype``.
            RuntimeError: No training has begun.
        """
        for name, parameter in self._parameters().items():
            if dtype not in SUBJECT_DTYPES.values() or torch.promote_types(dtype, parameter.dtype) != dtype:
                raise ValueError(
                    f"dtype must be torch.float32 or wider and hold {name}, which is {parameter.dtype}: got {dtype}"
                )
        values = self.shadow_values()
        if self._averages is None:
            bounds = {name: torch.zeros_like(value) for name, value in values.items()}
        else:
            bounds = {name: average.bounds[dtype].shadow for name, average in self._averages.items()}
        if read_dtype is None:
            return bounds
        return {
            name: rounding.read_error(bounds[name], shadow=value, dtype=dtype, read_dtype=read_dtype)
            for name, value in values.items()
        }

    # The recurrence

    def _parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that are averaged: those that were trainable at train begin."""
        parameters = whole.named_parameters(self._trained_model())
        return {name: parameters[name] for name in self._names}

    def _theta(self) -> dict[str, Tensor]:
        """θ_t: every parameter that is averaged, whole, float64, on the device of the averages."""
        return {name: whole.whole(p).to(self.device, torch.float64) for name, p in self._parameters().items()}

    def _take_snapshot(self) -> None:
        """Starts every average from the live weights."""
        self._averages = {name: at_snapshot(theta) for name, theta in self._theta().items()}

    def _update(self, t: int) -> None:
        """Moves every average to θ_t."""
        assert self._averages is not None, "there is a snapshot from update_after on"
        beta = ema_weight(
            t,
            ema_power=self.ema_power,
            lag=self.lag,
            multiplier=self.multiplier,
            min_ema_multiplier=self.min_ema_multiplier,
        )
        alpha = bias_weight(t, bias_power=self.bias_power, lag=self.lag, multiplier=self.multiplier)
        theta = self._theta()
        for name, previous in self._averages.items():
            ema_t = ema(previous.ema, theta[name], beta)
            shadow_t = shadow(ema_t, theta[name], previous.theta_0, alpha)
            bounds = {
                dtype: rounding.advance(
                    bound,
                    ema_before=previous.ema,
                    ema=ema_t,
                    shadow=shadow_t,
                    theta=theta[name],
                    theta_0=previous.theta_0,
                    beta=beta,
                    alpha=alpha,
                    ema_power=self.ema_power,
                    bias_power=self.bias_power,
                    dtype=dtype,
                )
                for dtype, bound in previous.bounds.items()
            }
            self._averages[name] = Average(previous.theta_0, ema_t, shadow_t, bounds)

    # Plumbing

    def _trained_model(self) -> nn.Module:
        """The unwrapped model of the training that began last."""
        if self._model is None:
            raise RuntimeError("BEMACallback has no shadow yet: it begins with on_train_begin")
        return self._model

    def _origin(self, t: int) -> Origin:
        """What the averages of step t depend on. Collective."""
        return {
            "step": t,
            "hyperparameters": {
                "update_freq": self.update_freq,
                "ema_power": self.ema_power,
                "bias_power": self.bias_power,
                "lag": self.lag,
                "update_after": self.update_after,
                "multiplier": self.multiplier,
                "min_ema_multiplier": self.min_ema_multiplier,
            },
            "dtypes": {name: str(p.dtype) for name, p in self._parameters().items()},
            "shapes": {name: list(theta.shape) for name, theta in self._theta().items()},
        }
