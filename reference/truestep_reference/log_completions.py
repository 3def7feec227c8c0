"""Completions of the evaluation prompts as a table: the executable specification.

At the end of every step t with t mod freq = 0, for every prompt number i, one row

    t, prompt i, what the model makes of prompt i alone

Every rank completes every prompt, so that all take part in every forward, and each has the whole table.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from truestep_reference import arguments, whole
from truestep_reference.completer import Completer
from truestep_reference.prompts import Row
from truestep_reference.state import checkpoint_resumed, checkpoint_written

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
        self.table: list[Row] = []
        self.trainer = trainer
        self.freq = freq
        self._completer = Completer(trainer, generation_config, num_prompts, columns)
        self._prompts = self._completer.read("trainer.eval_dataset", trainer.eval_dataset)

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
        completions = self._completer.complete(kwargs["model"], self._prompts, args, t)
        for prompt, completion in zip(self._prompts, completions, strict=True):
            self.table.append({"step": t, "prompt": prompt.text, "completion": completion, **prompt.cells})

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Puts the table into the checkpoint that was just written."""
        if state.is_world_process_zero:
            directory = checkpoint_written(args, state.global_step)
            directory.mkdir(parents=True, exist_ok=True)
            self._file(directory).write_text(json.dumps(self.table), encoding="utf-8")
        whole.barrier()

    def _file(self, directory: Path) -> Path:
        """Where a checkpoint has the table; of a second such callback in the training, under a name of its own."""
        alike = [one for one in self.trainer.callback_handler.callbacks if isinstance(one, LogCompletionsCallback)]
        number = alike.index(self) + 1 if self in alike else 1
        return directory / (f"{STATE_FILE}_{number}.json" if number > 1 else f"{STATE_FILE}.json")
