"""Completions of the evaluation prompts as a table: the executable specification.

At the end of every step t with t mod freq = 0, for every prompt number i, one row

    t, prompt i, what the model makes of prompt i alone

Every rank completes every prompt, so that all take part in every forward, and each has the whole table.
"""

import copy
import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from truestep_reference import arguments, generation, prompts, whole
from truestep_reference.prompts import Prompt, Row
from truestep_reference.state import checkpoint_resumed, checkpoint_written

logger = logging.getLogger(__name__)

STATE_FILE = "truestep_reference_completions"


def is_logging(t: int, *, freq: int) -> bool:
    """Tells whether completions are logged at step t: t > 0 and t mod freq = 0.

    Args:
        t: The global step, 0 at the beginning of training.
        freq: In steps.

    Returns:
        True at freq, 2·freq, …
    """
    return t > 0 and t % freq == 0


def prompt_seed(seed: int, step: int, index: int) -> int:
    """The seed of what a prompt draws at a step: BLAKE2b of 8 bytes of ``{seed}/{t}/{i}``, big-endian, modulo 2⁶³.

    Args:
        seed: The training's ``args.seed``.
        step: ``t``.
        index: ``i``, the number of the prompt, counted from 0.

    Returns:
        The seed.

    Example:
        >>> prompt_seed(42, 100, 0) == int(hashlib.blake2b(b"42/100/0", digest_size=8).hexdigest(), 16) % 2**63
        True
    """
    digest = hashlib.blake2b(f"{seed}/{step}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, byteorder="big") % 2**63


def steps_between(freq: int | None, eval_steps: float | None, max_steps: int) -> int:
    """The steps between two loggings.

    Args:
        freq: The argument, or None.
        eval_steps: ``args.eval_steps``: a number of steps, or below 1 a share of all.
        max_steps: The number of steps of the training.

    Returns:
        A number of steps, at least 1.

    Raises:
        ValueError: Neither is given, or they are no such numbers.

    Example:
        >>> steps_between(None, 0.3, 11), steps_between(None, 50, 11), steps_between(2, 50, 11)
        (4, 50, 2)
    """
    if freq is not None:
        return arguments.integer("freq", freq, at_least=1)
    if not eval_steps:
        raise ValueError(f"freq is None and args.eval_steps is {eval_steps!r}: give one of them, in steps")
    return math.ceil(max_steps * eval_steps) if eval_steps < 1 else int(eval_steps)


class LogCompletionsCallback(TrainerCallback):
    """Completes the evaluation prompts as training goes on.

    What happens when is said at the head of this module. The table is an attribute, and goes nowhere else.

    Args:
        trainer: The trainer: its model, tokenizer, arguments and evaluation dataset.
        generation_config: How completions are generated, or None: as the model's own config says.
        num_prompts: How many prompts are used, the first ones; None for all.
        freq: Steps between two loggings; None for the trainer's ``eval_steps``.
        columns: Further columns of the evaluation dataset that the table has.

    Attributes:
        table: The rows of the training so far, in order; the same on every rank.

    Raises:
        ValueError: There is nothing to complete, nothing to complete it with, or an argument is out of range.
    """

    def __init__(
        self,
        trainer: Any,
        generation_config: GenerationConfig | None = None,
        num_prompts: int | None = None,
        freq: int | None = None,
        *,
        columns: Sequence[str] = (),
    ) -> None:
        steps_between(freq, trainer.args.eval_steps, max_steps=1)
        if num_prompts is not None:
            num_prompts = arguments.integer("num_prompts", num_prompts, at_least=1)
        if trainer.processing_class is None:
            raise ValueError("trainer.processing_class is None: completing prompts takes a tokenizer")
        model: Any = whole.unwrap(trainer.model)
        if not callable(getattr(model, "generate", None)):
            raise ValueError(f"trainer.model is a {type(model).__name__}, which has no generate: use a language model")
        self.table: list[Row] = []
        self.trainer = trainer
        self.generation_config = generation_config
        self.freq = freq
        # A copy, as a tokenizer remembers how it was called last.
        self._tokenizer = copy.deepcopy(getattr(trainer.processing_class, "tokenizer", trainer.processing_class))
        self._is_encoder_decoder = bool(model.config.is_encoder_decoder)
        self._window = generation.window(model, self._tokenizer)
        room = self._room(model)
        found = prompts.read(trainer.eval_dataset, num_prompts, columns)
        self._prompts = [(*self._text_and_tokens(prompt, room), prompt.cells) for prompt in found]
        parts = len(trainer.eval_dataset) if isinstance(trainer.eval_dataset, Mapping) else 1
        if num_prompts is not None and len(found) < num_prompts * parts and trainer.args.process_index == 0:
            logger.warning(
                f"num_prompts={num_prompts}, but trainer.eval_dataset has fewer rows than that: all are used, "
                f"{len(found)} in total"
            )

    # The trainer's events

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begins with an empty table, or with that of a checkpoint if t > 0."""
        self.table = []
        if state.global_step > 0:
            file = self._file(checkpoint_resumed(args, state.global_step))
            if file.exists():
                self.table = json.loads(file.read_text(encoding="utf-8"))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Completes every prompt at the steps that are multiples of freq, once."""
        t = state.global_step
        is_logged = any(row["step"] == t for row in self.table)
        if is_logged or not is_logging(t, freq=steps_between(self.freq, args.eval_steps, state.max_steps)):
            return
        model = whole.unwrap(kwargs["model"])
        with generation.in_eval_mode(model), generation.random_states_kept():
            for i, (text, tokens, cells) in enumerate(self._prompts):
                torch.manual_seed(prompt_seed(args.seed, t, i))
                completion = self._complete(model, tokens, args.device)
                self.table.append({"step": t, "prompt": text, "completion": completion, **cells})
        whole.reshard(model)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Puts the table into the checkpoint that was just written."""
        if state.is_world_process_zero:
            directory = checkpoint_written(args, state.global_step)
            directory.mkdir(parents=True, exist_ok=True)
            self._file(directory).write_text(json.dumps(self.table), encoding="utf-8")
        whole.barrier()

    # Parts

    def _text_and_tokens(self, prompt: Prompt, room: float) -> tuple[str, list[int]]:
        """What rows show of a prompt, and what the model reads."""
        is_rendered = not isinstance(prompt.content, str)
        of_tokenizer = getattr(self._tokenizer, "chat_template", None)
        is_processor = hasattr(self.trainer.processing_class, "tokenizer")
        # The template of a processor also knows messages that hold more than text.
        of_processor = getattr(self.trainer.processing_class, "chat_template", None) if is_processor else None
        if is_rendered and of_tokenizer is None and of_processor is None:
            raise ValueError(
                f"trainer.eval_dataset has the conversation {prompt.content!r:.80}, but the tokenizer has no "
                "chat_template to render it with"
            )
        text = prompts.rendered(prompt.content, self._tokenizer, of_processor)
        tokens = prompts.encode(
            text, self._tokenizer, is_rendered=is_rendered, is_encoder_decoder=self._is_encoder_decoder
        )
        return prompts.cut(text, tokens, room, self._tokenizer)

    def _room(self, model: Any) -> float:
        """How many tokens a prompt may have."""
        config = generation.merged(self.generation_config, model)
        if self._is_encoder_decoder:
            generation.require_positions(config, model)
        return generation.room(config, self._window, is_encoder_decoder=self._is_encoder_decoder)

    def _complete(self, model: Any, tokens: list[int], device: torch.device) -> str:
        """The text that follows a prompt."""
        config = generation.merged(self.generation_config, model)
        count = generation.new_tokens(config, self._window, len(tokens), is_encoder_decoder=self._is_encoder_decoder)
        new = generation.complete(model, tokens, count, config, self._tokenizer, device)
        text: str = self._tokenizer.decode(new, skip_special_tokens=True)
        return text

    def _file(self, directory: Path) -> Path:
        """Where a checkpoint has the table; of a second such callback in the training, under a name of its own."""
        alike = [one for one in self.trainer.callback_handler.callbacks if isinstance(one, LogCompletionsCallback)]
        number = alike.index(self) + 1 if self in alike else 1
        return directory / (f"{STATE_FILE}_{number}.json" if number > 1 else f"{STATE_FILE}.json")
