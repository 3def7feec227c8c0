"""Bias-corrected exponential moving average of the weights, sharded over the ranks."""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from truestep.averaging import ShardedAverages, buffer_device
from truestep.checkpoint import (
    CheckpointError,
    SavedState,
    checkpoint_resumed,
    checkpoint_written,
    discard_state,
    save_state,
)
from truestep.collectives import agree, exchange, rank
from truestep.export import ExportError, has_adapter, has_learned_prompt, is_saved_with_adapter, save_pretrained
from truestep.schedule import BEMASchedule
from truestep.topology import Shard, Topology, UnsupportedModelError, require_supported_dtypes, unwrap

logger = logging.getLogger(__name__)

STATE_DIRECTORY = "truestep_bema"
OUTPUT_DIRECTORY = "bema"


class BEMACallback(TrainerCallback):
    r"""Keep a bias-corrected exponential moving average (BEMA) of the trained weights beside the training.

    With :math:`θ_t` the trainable parameters after step :math:`t`, at :math:`t = τ`:
    :math:`θ_0 ← θ_τ` and :math:`EMA ← θ_τ`; then at every :math:`t > τ` with :math:`(t - τ) \bmod φ = 0`:

    .. math::

        β_t &= \max((ρ + γ t)^{-κ}, β_{min}) \\
        EMA_t &= (1 - β_t)\, EMA_{prev} + β_t\, θ_t \\
        α_t &= (ρ + γ t)^{-η} \text{ if } η > 0 \text{ else } 0 \\
        θ'_t &= EMA_t + α_t\, (θ_t - θ_0)

    θ′ is the *shadow*. It is saved to `{output_dir}/bema` at the end of training, in the dtype of the model, and can be
    read and swapped in at any time. EMA is computed in float32 (float64 for float64 parameters), whatever the dtype
    of the model. Each rank keeps buffers for the elements that it owns and communicates nothing at an update. The
    state is part of the Trainer's checkpoints; a resumed run ends with bitwise the shadow of an uninterrupted one, on
    any number of ranks.

    Args:
        update_freq: φ, steps between two updates; at least 1.
        ema_power: κ, power of the EMA weight; not negative. 0 disables the EMA: EMA_t = θ_t.
        bias_power: η, power of the bias weight; not negative. 0 disables the bias correction: θ′ = EMA.
        lag: ρ, offset of the schedule in steps; not negative.
        update_after: τ, the step of the snapshot; at least 0.
        multiplier: γ, speed of the schedule; not negative.
        min_ema_multiplier: β_min, lower bound of β; in [0, 1].
        device: Where the buffers are. To "cpu", a GPU copies its weights beside the training; the host moves the
            average at the end of the next step.

    Raises:
        ValueError: An argument is outside its range, or ρ + γ·(τ + φ) < 1, or the device does not exist here.

    Example:
        >>> from transformers import Trainer
        >>> from truestep import BEMACallback
        >>> bema = BEMACallback(update_freq=10, update_after=100)
        >>> trainer = Trainer(..., callbacks=[bema])  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
        >>> with bema.shadow_weights(trainer.model):  # doctest: +SKIP
        ...     trainer.evaluate()

    References:
        Block and Zhang (2025), "EMA Without the Lag: Bias-Corrected Iterate Averaging Schemes", arXiv 2508.00180.
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
        self.schedule = BEMASchedule(
            update_freq=update_freq,
            ema_power=ema_power,
            bias_power=bias_power,
            lag=lag,
            update_after=update_after,
            multiplier=multiplier,
            min_ema_multiplier=min_ema_multiplier,
        )
        self.device = buffer_device(device)
        self._topology: Topology | None = None
        self._trained: dict[str, Shard] = {}
        self._averages: ShardedAverages | None = None
        self._bias_weight = 0.0
        self._swapped_in = False

    # Events of the Trainer

    @torch.no_grad()
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin afresh, or from the state in the checkpoint that the training resumes from."""
        self._topology, self._averages = None, None
        if state.is_hyper_param_search and state.is_world_process_zero:
            logger.warning("BEMA: in a hyperparameter search checkpoints get no state of the shadow")
        self._topology = Topology(kwargs["model"])
        shards = self._topology.shards
        self._trained = {name: shard for name, shard in shards.items() if shard.parameter.requires_grad}
        agree(self._require_supported, UnsupportedModelError)
        if state.global_step > 0 and self._restore(checkpoint_resumed(args, state) / STATE_DIRECTORY, state):
            return
        if state.global_step >= self.schedule.update_after:
            self._take_snapshot()

    @torch.no_grad()
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take the snapshot at t = τ, update at the update instants."""
        self._require_training()
        if self._swapped_in:
            raise RuntimeError(
                "a training step ended inside `with shadow_weights(...)`: leave the block before training"
            )
        if self._averages is None:
            if state.global_step >= self.schedule.update_after:
                self._take_snapshot()
        elif self.schedule.is_update(state.global_step):
            self._averages.update(self.schedule.ema_weight(state.global_step))
            self._bias_weight = self.schedule.bias_weight(state.global_step)
        else:
            self._averages.settle()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Finish an update that is under way, before the Trainer may load its best model over the weights."""
        if self._averages is not None:
            self._averages.settle()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add this callback's state to the checkpoint that the Trainer has just written."""
        if state.is_hyper_param_search:  # its checkpoints lie where the trial's number leads
            return
        directory = checkpoint_written(args, state) / STATE_DIRECTORY
        metadata = {
            "callback": type(self).__name__,
            "step": state.global_step,
            "bias_weight": self._bias_weight,
            "hyperparameters": self.schedule.hyperparameters(),
        }
        try:
            if self._averages is not None:
                save_state(directory, self._averages.shards, self._averages.tensors(), metadata)
            elif state.is_world_process_zero:
                discard_state(directory)
        except CheckpointError as error:
            if state.is_world_process_zero:
                logger.warning(
                    "BEMA: this checkpoint has no state of the shadow, a resume from it starts afresh: %s", error
                )

    @torch.no_grad()
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the shadow to `{output_dir}/bema`."""
        topology = self._require_training()
        if self._averages is None and state.is_world_process_zero:
            logger.warning(
                "BEMA: the training ended at step %d, before update_after=%d; %s holds the live weights",
                state.global_step,
                self.schedule.update_after,
                OUTPUT_DIRECTORY,
            )
        assert args.output_dir is not None
        directory = Path(args.output_dir, OUTPUT_DIRECTORY)
        weights = self._entries(keep=args.should_save, adapter_only=has_adapter(topology.model))
        processing_class = kwargs.get("processing_class")
        agree(
            lambda: save_pretrained(directory, topology.model, weights, processing_class) if args.should_save else None,
            ExportError,
        )

    # Reading the shadow

    @torch.no_grad()
    def shadow_state_dict(self, dtype: torch.dtype | None = None, rank0_only: bool = False) -> dict[str, Tensor]:
        """The model's weights with the shadow in place of the trainable parameters.

        Collective: all ranks call it. Parameters are gathered one at a time.

        Args:
            dtype: What the shadow is rounded to, once; the dtype of each live parameter by default. `torch.float32`
                shows all that a bfloat16 model's shadow holds.
            rank0_only: Whether ranks other than 0 get an empty dict, and keep no memory for it.

        Returns:
            The entries of the unwrapped model's `state_dict()`, whole and on the CPU: the shadow of the trainable
            parameters, frozen parameters and buffers as they are live. Before the snapshot all are live. Entries
            that are tied in the model share one tensor.

        Raises:
            RuntimeError: No training has begun yet.
        """
        return self._entries(keep=rank() == 0 or not rank0_only, dtype=dtype)

    @contextmanager
    def shadow_weights(self, model: nn.Module) -> Iterator[None]:
        """Have the model hold the shadow within a `with` block, for an evaluation say.

        Collective: all ranks enter and leave. At the end, also after an exception, the live weights are put back
        bitwise, without communication, from a copy on the buffers' device of what each rank holds.

        Args:
            model: The model that is trained, wrapped or not.

        Raises:
            RuntimeError: No training has begun yet, or the block is inside another one.
            ValueError: It is not the model that is trained.

        Example:
            >>> with bema.shadow_weights(trainer.model):  # doctest: +SKIP
            ...     metrics = trainer.evaluate(metric_key_prefix="eval_bema")
        """
        topology = self._require_training()
        if unwrap(model) is not topology.model:
            raise ValueError(f"model={type(model).__name__}: not the model that this callback has seen in training")
        if self._swapped_in:
            raise RuntimeError("shadow_weights(...) inside shadow_weights(...): the model holds the shadow already")
        averages = self._averages
        live: dict[str, Tensor] = {}
        self._swapped_in = True
        try:
            with torch.no_grad():
                for name, shard in averages.shards.items() if averages is not None else ():
                    shadow = self._shadow_piece(name, shard.parameter.dtype)
                    values = topology.assemble(name, shadow).view(-1) if shard.is_replicated else shadow
                    live[name] = shard.elements().to(self.device, copy=True)
                    shard.overwrite(values)
                topology.release()
            yield
        finally:
            with torch.no_grad():
                for name, values in live.items():
                    topology.shards[name].overwrite(values)
                topology.release()
            self._swapped_in = False

    # Parts

    def _require_training(self) -> Topology:
        if self._topology is None:
            raise RuntimeError("there is no shadow yet: it begins with Trainer.train()")
        return self._topology

    def _require_supported(self) -> None:
        require_supported_dtypes(self._trained.values())
        if has_learned_prompt(self._require_training().model):
            raise UnsupportedModelError(
                "the PEFT adapter is a learned prompt, which PEFT saves from the live weights only; "
                "supported: adapters with weights of their own, such as LoRA"
            )

    def _take_snapshot(self) -> None:
        self._averages = ShardedAverages(self._trained, self.device, self.schedule.corrects_bias)
        self._averages.snapshot()
        self._bias_weight = 0.0

    def _shadow_piece(self, name: str, dtype: torch.dtype) -> Tensor:
        assert self._averages is not None
        return self._averages.shadow(name, self._bias_weight, dtype)

    def _whole(self, name: str, dtype: torch.dtype | None) -> Tensor:
        """One parameter as the shadow has it, whole, in memory of its own on the CPU."""
        topology = self._require_training()
        shown_in = topology.shards[name].parameter.dtype
        if name in self._trained:
            shown_in = dtype or shown_in
            if self._averages is not None:
                return topology.assemble(name, self._shadow_piece(name, shown_in)).cpu()
        return topology.whole(name).to("cpu", shown_in, copy=True)

    def _entries(self, keep: bool, dtype: torch.dtype | None = None, adapter_only: bool = False) -> dict[str, Tensor]:
        """The state dict as the shadow has it; only gathered for others, and empty, unless `keep`."""
        topology = self._require_training()
        names = {id(shard.parameter): name for name, shard in topology.shards.items()}
        entries: dict[str, Tensor] = {}
        first_keys: dict[str, str] = {}
        for key, value in topology.model.state_dict(keep_vars=True).items():
            if adapter_only and not is_saved_with_adapter(topology.model, key, value):
                continue
            name = names.get(id(value))
            if name is None:
                entries |= {key: _copied(value)} if keep else {}
            elif name not in first_keys:
                first_keys[name] = key
                whole = self._whole(name, dtype)
                entries |= {key: whole} if keep else {}
            elif keep:
                entries[key] = entries[first_keys[name]]
        unseen = self._trained.keys() - first_keys.keys()
        if unseen:
            raise RuntimeError(
                f"the model's state_dict() does not contain its trainable parameters {sorted(unseen)} themselves: "
                "an override or a hook has put others in their places"
            )
        return entries

    def _restore(self, directory: Path, state: TrainerState) -> bool:
        """Take over the state in a checkpoint; False, with a warning, where it has none."""
        if not any(exchange(SavedState.exists(directory))):
            # Up to the snapshot there is nothing to lose.
            if state.is_world_process_zero and state.global_step > self.schedule.update_after:
                logger.warning(
                    "BEMA: %s has no state of the shadow. What was averaged up to step %d is lost; "
                    "a new average begins with the weights at this step",
                    directory,
                    state.global_step,
                )
            return False
        averages = ShardedAverages(self._trained, self.device, self.schedule.corrects_bias)
        self._bias_weight = agree(lambda: self._read_state(directory, averages, state.global_step), CheckpointError)
        self._averages = averages
        return True

    def _read_state(self, directory: Path, averages: ShardedAverages, step: int) -> float:
        saved = SavedState(directory)
        expected = {"callback": type(self).__name__, "step": step, "hyperparameters": self.schedule.hyperparameters()}
        saved.require_metadata(expected)
        saved.require_parameters(averages.shards)
        try:
            for name, buffers in averages.tensors().items():
                for kind, buffer in buffers.items():
                    saved.read(name, kind, averages.shards[name].owned, buffer)
            return float(saved.metadata["bias_weight"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{saved.index}: damaged ({error!r}); {saved.advice}") from error


def _copied(value: Any) -> Any:
    """An entry of a state dict that is no parameter: a buffer, or what a module's `get_extra_state` gives."""
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else copy.deepcopy(value)
