"""What callbacks that complete prompts have in common: a trainer's model and tokenizer, and prompts for both."""

import copy
import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig, TrainingArguments

from truestep_reference import arguments, generation, prompts, whole
from truestep_reference.prompts import Prompt, Row

logger = logging.getLogger(__name__)


class Ready(NamedTuple):
    """A prompt that the model can read.

    Attributes:
        text: What rows show of it.
        tokens: What the model reads.
        cells: What its rows have besides.
    """

    text: str
    tokens: list[int]
    cells: Row


class Completer:
    """Completes prompts with a trainer's model.

    Args:
        trainer: The trainer: its model and its tokenizer.
        generation_config: How completions are generated, or None: as the model's own config says.
        num_prompts: How many prompts of a dataset are used, the first ones; None for all.
        columns: Further columns of datasets that rows have.

    Raises:
        ValueError: There is nothing to complete prompts with, or an argument is out of range.
    """

    def __init__(
        self,
        trainer: Any,
        generation_config: GenerationConfig | None,
        num_prompts: int | None,
        columns: Sequence[str] = (),
    ) -> None:
        if num_prompts is not None:
            num_prompts = arguments.integer("num_prompts", num_prompts, at_least=1)
        if trainer.processing_class is None:
            raise ValueError("trainer.processing_class is None: completing prompts takes a tokenizer")
        model: Any = whole.unwrap(trainer.model)
        if not callable(getattr(model, "generate", None)):
            raise ValueError(f"trainer.model is a {type(model).__name__}, which has no generate: use a language model")
        self._generation_config = generation_config
        self._num_prompts = num_prompts
        self._columns = columns
        self._is_main_process = trainer.args.process_index == 0
        # A copy, as a tokenizer remembers how it was called last.
        self._tokenizer = copy.deepcopy(getattr(trainer.processing_class, "tokenizer", trainer.processing_class))
        is_processor = hasattr(trainer.processing_class, "tokenizer")
        # The template of a processor also knows messages that hold more than text.
        self._template = getattr(trainer.processing_class, "chat_template", None) if is_processor else None
        self._is_encoder_decoder = bool(model.config.is_encoder_decoder)
        self._window = generation.window(model, self._tokenizer)
        self._room = self._find_room(model)

    def read(self, name: str, dataset: Any) -> list[Ready]:
        """Takes the prompts of a dataset, in its order.

        Args:
            name: What errors and warnings call the dataset.
            dataset: A dataset, or a dict of these.

        Returns:
            The prompts, with a warning if there are fewer than asked for.

        Raises:
            ValueError: There is no prompt, no such column, something else than a prompt, or nothing to render it with.
        """
        found = prompts.read(name, dataset, self._num_prompts, self._columns)
        ready = [self._prepare(name, prompt) for prompt in found]
        parts = len(dataset) if isinstance(dataset, Mapping) else 1
        if self._num_prompts is not None and len(found) < self._num_prompts * parts and self._is_main_process:
            logger.warning(
                f"num_prompts={self._num_prompts}, but {name} has fewer rows than that: all are used, "
                f"{len(found)} in total"
            )
        return ready

    def complete(self, model: Any, ready: Sequence[Ready], args: TrainingArguments, t: int) -> list[str]:
        """Completes prompts at a step, one after the other. Collective where the model is sharded.

        Args:
            model: The model, in any mode. It is in eval mode while it generates.
            ready: The prompts; number i of them draws from a generator of its own, seeded for i and t.
            args: The training's arguments.
            t: The step.

        Returns:
            The text that follows each prompt.
        """
        model = whole.unwrap(model)
        completions = []
        with generation.in_eval_mode(model), generation.random_states_kept():
            for i, prompt in enumerate(ready):
                torch.manual_seed(generation.prompt_seed(args.seed, t, i))
                completions.append(self._complete(model, prompt.tokens, args.device))
        whole.reshard(model)
        return completions

    def _prepare(self, name: str, prompt: Prompt) -> Ready:
        is_rendered = not isinstance(prompt.content, str)
        if is_rendered and self._template is None and getattr(self._tokenizer, "chat_template", None) is None:
            raise ValueError(
                f"{name} has the conversation {prompt.content!r:.80}, but the tokenizer has no chat_template to "
                "render it with"
            )
        text = prompts.rendered(prompt.content, self._tokenizer, self._template)
        tokens = prompts.encode(
            text, self._tokenizer, is_rendered=is_rendered, is_encoder_decoder=self._is_encoder_decoder
        )
        return Ready(*prompts.cut(text, tokens, self._room, self._tokenizer), prompt.cells)

    def _find_room(self, model: Any) -> float:
        """How many tokens a prompt may have."""
        config = generation.merged(self._generation_config, model)
        if self._is_encoder_decoder:
            generation.require_positions(config, model)
        return generation.room(config, self._window, is_encoder_decoder=self._is_encoder_decoder)

    def _complete(self, model: Any, tokens: list[int], device: torch.device) -> str:
        config = generation.merged(self._generation_config, model)
        count = generation.new_tokens(config, self._window, len(tokens), is_encoder_decoder=self._is_encoder_decoder)
        new = generation.complete(model, tokens, count, config, self._tokenizer, device)
        text: str = self._tokenizer.decode(new, skip_special_tokens=True)
        return text
