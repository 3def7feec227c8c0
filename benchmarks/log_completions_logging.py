"""What it costs to log completions to each tracker: time, and bytes on disk."""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import truestep
from log_completions_prompts import prompts, tokenizer
from measuring import wait_for_idle
from models import qwen2
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl.trainer.callbacks import LogCompletionsCallback
from truestep_fixtures.data import language_dataset
from truestep_fixtures.isolation import reset_process
from truestep_fixtures.ranks import RankPool
from truestep_fixtures.trackers import TRACKERS, storage
from truestep_fixtures.training import train

CONTESTANTS = {"truestep": truestep.LogCompletionsCallback, "TRL": LogCompletionsCallback}
TRL_TRACKERS = ("wandb", "comet_ml")

NONE = "none"
"""Neither a tracker, nor a callback."""

_NEW_TOKENS = 8
_VOCABULARY = 4_096
_TIMEOUT = 3600.0


class _Timed(TrainerCallback):
    """Passes a callback its events, and takes the time from the end of the model's last forward to the end of a step.

    That is the time of all that comes after the completions, whatever the callback calls it.

    Attributes:
        seconds: Of each step.
        processor_seconds: The same in seconds of this process's processor time, which waits for nobody.
    """

    def __init__(self, callback: TrainerCallback, model: nn.Module) -> None:
        self.callback: Any = callback
        self.seconds: list[float] = []
        self.processor_seconds: list[float] = []
        self._forwarded = self._forwarded_on_processor = 0.0
        model.register_forward_hook(self._note)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.callback.on_train_begin(args, state, control, **kwargs)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.callback.on_step_end(args, state, control, **kwargs)
        self.seconds.append(time.perf_counter() - self._forwarded)
        self.processor_seconds.append(time.process_time() - self._forwarded_on_processor)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.callback.on_train_end(args, state, control, **kwargs)

    def _note(self, *unused: Any) -> None:
        self._forwarded, self._forwarded_on_processor = time.perf_counter(), time.process_time()


def compare_trackers(loggings: int, count: int, rounds: int, patience: float) -> list[dict[str, Any]]:
    """Measure the callbacks on all trackers that they know, a training for each, in one process and in turn.

    Args:
        loggings: How often a training logs, once a step.
        count: Rows of each logging.
        rounds: Trainings of each callback with Weights & Biases; with the others there is one.
        patience: Seconds to wait, before each training, for an idle machine.

    Returns:
        A row for each tracker and callback: `seconds` of the loggings, training by training, and `processor seconds`;
        `bytes` that it has added to the tracker's files, in the median; those of the local `file`, and those of the
        `text` alone.
    """
    with RankPool(1) as pool:
        (rows,) = pool.run(compete, loggings, count, rounds, patience, timeout=_TIMEOUT)
    return rows


def compete(loggings: int, count: int, rounds: int, patience: float) -> list[dict[str, Any]]:
    """What one process measures; see `compare_trackers`."""
    logging.disable(logging.WARNING)
    rows = []
    for tracker in (*TRACKERS, NONE):
        names = [name for name in CONTESTANTS if name == "truestep" or tracker in TRL_TRACKERS]
        trainings: dict[str, list[dict[str, Any]]] = {name: [] for name in (*names, NONE)}
        for number in range(rounds if tracker == "wandb" else 1):
            shift = number % len(names)
            for name in [NONE, *names[shift:], *names[:shift]]:
                wait_for_idle(patience)
                trainings[name].append(_train(tracker, name, loggings, count))
        without = _median([training["bytes"] for training in trainings[NONE]])
        rows += [
            {
                "tracker": tracker,
                "callback": name,
                "loggings": loggings,
                "rows": count,
                "seconds": [training["seconds"] for training in trainings[name]],
                "processor seconds": [training["processor seconds"] for training in trainings[name]],
                "bytes": _median([training["bytes"] for training in trainings[name]]) - without,
                "text": trainings[name][0]["text"],
                "file": trainings[name][0]["file"],
            }
            for name in names
        ]
    return rows


def _train(tracker: str, contestant: str, loggings: int, count: int) -> dict[str, Any]:
    """One training that logs at every step, with a run of its own."""
    reset_process()
    dataset = prompts(count, _VOCABULARY)
    config = GenerationConfig(max_new_tokens=_NEW_TOKENS, do_sample=False, pad_token_id=0)
    timed: list[_Timed] = []

    def attach(trainer: Trainer) -> Sequence[TrainerCallback]:
        if contestant != NONE:
            timed.append(_Timed(CONTESTANTS[contestant](trainer, config, freq=1), trainer.model))
        return timed

    with tempfile.TemporaryDirectory() as directory:
        of_trackers, output = Path(directory, "trackers"), Path(directory, "output")
        with storage(of_trackers):
            train(
                "single",
                AutoModelForCausalLM.from_config(qwen2(_VOCABULARY, 32, 64, 1, 2, 1)),
                output_dir=output,
                attach=attach,
                steps=loggings,
                train_dataset=language_dataset(8, vocab=_VOCABULARY),
                eval_dataset=dataset,
                processing_class=tokenizer(_VOCABULARY),
                per_device_eval_batch_size=8,
                report_to=[] if tracker == NONE else [tracker],
                logging_strategy="steps",
                logging_steps=10,
            )
        file = output / "completions.jsonl"
        texts = [text for one in timed for text in _texts(one.callback, file)]
        return {
            "seconds": [seconds for one in timed for seconds in one.seconds],
            "processor seconds": [seconds for one in timed for seconds in one.processor_seconds],
            "bytes": _bytes_below(of_trackers),
            "text": sum(len(text.encode()) for text in texts),
            "file": file.stat().st_size if file.exists() else 0,
        }


def _texts(callback: Any, file: Path) -> Iterator[str]:
    """All prompts and completions that a callback has logged."""
    if isinstance(callback, LogCompletionsCallback):
        rows = [row[1:] for row in callback.table]
    else:
        lines = map(json.loads, file.read_text(encoding="utf-8").splitlines())
        rows = [(row["prompt"], row["completion"]) for row in lines]
    for row in rows:
        yield from row


def _bytes_below(directory: Path) -> int:
    """The sizes of all files, those with several names once."""
    status = [path.lstat() for path in directory.rglob("*") if not path.is_dir()]
    return sum({one.st_ino: one.st_size for one in status}.values())


def _median(values: Sequence[int]) -> int:
    return sorted(values)[len(values) // 2]
