"""What callbacks share that complete the evaluation prompts of a training."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn
from transformers import GenerationConfig, TrainingArguments

from truestep.arguments import require_integer
from truestep.collectives import agree, from_main_process, rank
from truestep.generation import Completer, Settings
from truestep.prompts import Encoder, Prompt, PromptRow, read_prompts
from truestep.sampling import random_states_kept
from truestep.topology import unwrap

if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.getLogger(__name__)


class Observer:
    """Completes prompts with the model of a trainer, which does not notice.

    Args:
        trainer: The trainer.
        generation_config: None: the model's.
        batch_tokens: See `Completer`.
        gather: See `Completer`. None also asks `args.ds3_gather_for_generation`.

    Raises:
        ValueError: An argument is out of its range.
    """

    def __init__(
        self, trainer: "Trainer", generation_config: GenerationConfig | None, batch_tokens: int, gather: bool | None
    ) -> None:
        require_integer("batch_tokens", batch_tokens, 1)
        self._trainer = trainer
        self._generation_config = generation_config
        self._batch_tokens = batch_tokens
        self._gather = gather
        self._ready: tuple[Encoder, Settings, Completer] | None = None

    @property
    def is_ready(self) -> bool:
        """Whether prompts can be encoded and completed: after `begin`, before `end`."""
        return self._ready is not None

    def read(self, num_prompts: int | None, columns: Sequence[str] = ()) -> list[PromptRow]:
        """Take the prompts out of the trainer's evaluation dataset, or datasets.

        Args:
            num_prompts: See `read_prompts`.
            columns: See `read_prompts`.

        Raises:
            ValueError: There are none, or the trainer's model and tokenizer cannot complete them.
        """
        dataset = self._trainer.eval_dataset
        with random_states_kept():  # a dataset may draw
            rows = read_prompts(dataset, num_prompts, columns)
        encoder, _ = self._understood(self._trainer.model)
        encoder.require_template(rows)
        asked = (num_prompts or 0) * (len(dataset) if isinstance(dataset, dict) else 1)
        if len(rows) < asked and self._trainer.args.process_index == 0:
            logger.warning(
                "num_prompts=%d: the evaluation dataset has %d prompts in all, and all are used", num_prompts, len(rows)
            )
        return rows

    def begin(self, args: TrainingArguments, model: nn.Module | None) -> None:
        """Get ready for a model, wrapped or not. Collective.

        Raises:
            ValueError: The model cannot complete prompts.
            UnsupportedModelError: Ranks cannot work apart on a model that is laid out like this.
        """
        encoder, settings = self._understood(model)
        assert model is not None
        gather = self._gather
        if gather is None and getattr(args, "ds3_gather_for_generation", None) is False:
            gather = False
        self._ready = encoder, settings, Completer(model, encoder, settings, args.device, self._batch_tokens, gather)

    def end(self) -> None:
        """Let go of the model."""
        self._ready = None

    def encode(self, rows: Sequence[PromptRow]) -> list[Prompt]:
        """Encode prompts. Collective; what the main process has is what all ranks get.

        Raises:
            ValueError: On every rank, if they cannot be encoded.
        """
        assert self._ready is not None
        encoder, settings, _ = self._ready

        def encoded() -> list[Prompt]:
            encoder.require_template(rows)
            return [
                encoder.encode(row, index, settings.room, keeps_end=settings.is_encoder_decoder)
                for index, row in enumerate(rows)
            ]

        return from_main_process(agree(lambda: encoded() if rank() == 0 else [], ValueError))

    def complete(self, prompts: Sequence[Prompt], seed: int, step: int) -> list[str]:
        """Complete prompts, as `Completer.complete` does. Collective."""
        assert self._ready is not None
        _, _, completer = self._ready
        return completer.complete(prompts, seed, step)

    def _understood(self, model: nn.Module | None) -> tuple[Encoder, Settings]:
        assert model is not None
        encoder = Encoder(self._trainer.processing_class)
        return encoder, Settings(unwrap(model), encoder.longest, self._generation_config)
