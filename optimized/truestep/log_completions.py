"""Completions of the evaluation prompts, logged while a model is trained."""

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import GenerationConfig, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from truestep.arguments import require_integer
from truestep.checkpoint import checkpoint_resumed, named_checkpoint
from truestep.completions_file import Cell, CompletionsFile, Row
from truestep.numbering import numbered
from truestep.observer import Observer
from truestep.prompts import OWN_COLUMNS, Prompt
from truestep.sampling import random_states_kept
from truestep.trackers import Trackers

if TYPE_CHECKING:
    from transformers import Trainer  # which imports datasets, pandas and trackers

logger = logging.getLogger(__name__)

TABLE = "completions"
"""What the table is called; that of a second callback in one training is `completions_2`."""


class LogCompletionsCallback(TrainerCallback):
    """Log what the model makes of the evaluation prompts, and how that changes.

    At the end of each step that `freq` divides, the model completes each prompt, and the rows `step, prompt,
    completion` go to `{output_dir}/completions.jsonl` and to the trackers that `args.report_to` names: Weights &
    Biases, Comet ML, trackio, MLflow and TensorBoard. `truestep completions OUTPUT_DIR` shows them.

    The training does not notice: it ends with bitwise the weights, optimizer state and random number generators of one
    without this callback. The model generates in eval mode, with generators of its own, and everything is put back.
    Prompts of about the same length are batched, and the batches split over the ranks. They do not depend on the number
    of ranks, so neither do completions; greedy ones are those that each prompt would get alone, up to rounding. A
    sharded model (ZeRO-3, FSDP2) is made whole on every rank meanwhile where that fits; otherwise all ranks go through
    the forwards together.

    Args:
        trainer: The trainer that the callback is added to. Its evaluation dataset, or each of a dict of them, has a
            column `"prompt"` of strings or conversations.
        generation_config: None: the model's. Sampling draws from generators that are seeded with `args.seed`, the step
            and the prompt's number.
        num_prompts: How many prompts are taken from the beginning of the dataset; None: all.
        freq: Interval in steps; None: the trainer's `eval_steps`.
        columns: Further columns of the dataset that go into the table, each as `eval_{name}` if its name is taken.
        batch_tokens: How many tokens, padding and new ones included, a batch may have. Takes memory for that many
            entries of the key-value cache.
        gather: Whether a sharded model is made whole on every rank to generate. None: where it fits into half of the
            free memory, and `args.ds3_gather_for_generation`, if there is such a field, is not False. Where it is not
            made whole, an error on one rank alone leaves the others waiting, as in a step of the training.

    Raises:
        ValueError: At construction: an argument is out of its range; there is no interval, no prompt, no tokenizer, or
            the model cannot generate. The message says what was found.
        UnsupportedModelError: At train begin: ranks cannot work apart on a model that is laid out like this.

    Example:
        >>> from truestep import LogCompletionsCallback
        >>> trainer.add_callback(LogCompletionsCallback(trainer, num_prompts=8, freq=100))  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """

    def __init__(
        self,
        trainer: "Trainer",
        generation_config: GenerationConfig | None = None,
        num_prompts: int | None = None,
        freq: int | None = None,
        *,
        columns: Sequence[str] = (),
        batch_tokens: int = 4096,
        gather: bool | None = None,
    ) -> None:
        if freq is not None:
            require_integer("freq", freq, 1)
        elif not trainer.args.eval_steps:
            raise ValueError(
                f"freq is None, and trainer.args.eval_steps is {trainer.args.eval_steps!r}: give one of them"
            )
        self.trainer = trainer
        self.freq = freq
        self._observer = Observer(trainer, generation_config, batch_tokens, gather)
        self._rows = self._observer.read(num_prompts, columns)
        self._prompts: list[Prompt] = []
        self._last_step = 0
        self._file: CompletionsFile | None = None
        self._trackers: Trackers | None = None
        self._has_warned = False

    # Events of the Trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Encode the prompts, and go on with the table of the training that is resumed."""
        with random_states_kept():
            self._begin(args, state, kwargs["model"], state.global_step, is_resumed=state.global_step > 0)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Complete the prompts and log them, where the step is one of those."""
        step = state.global_step
        if step % self._interval(args, state) != 0 or step == self._last_step:
            return
        with random_states_kept():  # trackers may draw
            if not self._observer.is_ready:  # added in the middle of a training
                self._begin(args, state, kwargs["model"], step - 1, is_resumed=named_checkpoint() is not None)
            completions = self._observer.complete(self._prompts, args.seed, step)
            self._last_step = step
            if state.is_world_process_zero:
                self._log([_row(step, *pair) for pair in zip(self._prompts, completions, strict=True)])

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write what could not be written before: who resumes from this checkpoint cannot make it again."""
        self._write_pending()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write what could not be written before, and let go of the model and the trackers."""
        self._write_pending()
        self._observer.end()
        self._file, self._trackers = None, None

    # Parts

    def _interval(self, args: TrainingArguments, state: TrainerState) -> int:
        if self.freq is not None:
            return self.freq
        # Not `state.eval_steps`, which after resuming is what the checkpoint's training had.
        interval = args.eval_steps
        assert interval
        return math.ceil(state.max_steps * interval) if interval < 1 else int(interval)

    def _begin(
        self, args: TrainingArguments, state: TrainerState, model: nn.Module, step: int, *, is_resumed: bool
    ) -> None:
        self._observer.begin(args, model)
        self._prompts = self._observer.encode(self._rows)
        self._last_step = 0
        if state.is_world_process_zero:
            self._open(args, state, step, is_resumed)

    def _open(self, args: TrainingArguments, state: TrainerState, step: int, is_resumed: bool) -> None:
        assert args.output_dir is not None
        table, directory = numbered(TABLE, self, state), Path(args.output_dir)
        earlier = checkpoint_resumed(args, state).parent if is_resumed else None
        file, sent = f"{table}.jsonl", f"{table}.sent.json"
        self._file = CompletionsFile(directory / file)
        self._trackers = Trackers(list(args.report_to or ()), table, self.trainer, directory / sent)
        self._has_warned = False
        self._write(self._file.begin, step if is_resumed else 0, earlier and earlier / file)
        self._trackers.begin(step if is_resumed else 0, earlier and earlier / sent)
        if step >= self._interval(args, state) and not any(self._file.rows()):
            logger.warning("LogCompletions: %s: the rows of the steps up to %d are missing", self._file.path, step)

    def _log(self, rows: list[Row]) -> None:
        assert self._file is not None
        assert self._trackers is not None
        self._write(self._file.append, rows)
        self._trackers.send(rows, self._file.rows)

    def _write_pending(self) -> None:
        if self._file is not None:
            self._write(self._file.append, [])

    def _write(self, action: Callable[..., None], *arguments: Any) -> None:
        try:
            action(*arguments)
        except OSError as error:
            if not self._has_warned:
                logger.warning(
                    "LogCompletions: %s cannot be written (%s); its rows are kept in memory until it can be",
                    self._file and self._file.path,
                    error,
                )
            self._has_warned = True


def _row(step: int, prompt: Prompt, completion: str) -> Row:
    own: tuple[Cell, ...] = (step, prompt.text, completion)
    return dict(zip(OWN_COLUMNS, own, strict=True)) | prompt.cells
