"""How long truestep's LogCompletionsCallback and TRL's take to complete prompts, inside one training."""

from __future__ import annotations

import json
import logging
import tempfile
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import truestep
from log_completions_prompts import lengths, prompts, tokenizer
from measuring import stopwatch, wait_for_idle
from models import MODELS, build
from transformers import GenerationConfig, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl.trainer.callbacks import LogCompletionsCallback
from truestep_fixtures.data import language_dataset
from truestep_fixtures.ranks import RankPool
from truestep_fixtures.training import train

NEW_TOKENS = 32

_TIMEOUT = 3600.0

Table = Counter[tuple[str, str]]
"""How many rows there are of a prompt and a completion."""


class _Contestants(TrainerCallback):
    """Has both callbacks complete the prompts at every step of one training, in turn, and takes their times.

    Attributes:
        seconds: By contestant, what it took at each step on this rank.
    """

    def __init__(self, trainer: Trainer, patience: float) -> None:
        config = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
        self.seconds: dict[str, list[float]] = {"truestep": [], "TRL": []}
        self._theirs = LogCompletionsCallback(trainer, config, freq=1)
        self._callbacks: dict[str, TrainerCallback] = {
            "truestep": truestep.LogCompletionsCallback(trainer, config, freq=1),
            "TRL": self._theirs,
        }
        self._file = Path(trainer.args.output_dir, "completions.jsonl")
        self._patience = patience

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for callback in self._callbacks.values():
            callback.on_train_begin(args, state, control, **kwargs)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:  # the others wait for it
            wait_for_idle(self._patience)
        for name in sorted(self._callbacks, reverse=state.global_step % 2 == 1):
            action = partial(self._callbacks[name].on_step_end, args, state, control, **kwargs)
            self.seconds[name].append(stopwatch(action, start=dist.barrier if dist.is_initialized() else None))

    def tables(self, step: int) -> dict[str, Table]:
        """What each has logged at a step; on the main process."""
        rows = [json.loads(line) for line in self._file.read_text(encoding="utf-8").splitlines()]
        return {
            "truestep": Counter((row["prompt"], row["completion"]) for row in rows if row["step"] == step),
            "TRL": Counter(tuple(row[1:]) for row in self._theirs.table if int(row[0]) == step),
        }


def compare(
    pool: RankPool, family: str, size: float, dtype: torch.dtype, count: int, rounds: int, patience: float
) -> dict[str, Any]:
    """Measure both on ranks of one thread each: in one process, or under DDP.

    Args:
        pool: The ranks.
        family: A key of `MODELS`.
        size: A key of `MODELS[family]`.
        dtype: What the parameters are.
        count: Number of prompts.
        rounds: How often each completes all prompts.
        patience: Seconds to wait, before each round, for an idle machine.

    Returns:
        A row of the report: what was measured; `seconds` of each round by contestant, of the slowest rank; how many
        rows each has logged at the last step, `rows`, and how many different ones they have in common, `same`.
    """
    reports = pool.run(compete, family, size, dtype, count, rounds, patience, timeout=_TIMEOUT)
    return reports[0] | {"ranks": len(reports), "seconds": _slowest([report["seconds"] for report in reports])}


def compete(family: str, size: float, dtype: torch.dtype, count: int, rounds: int, patience: float) -> dict[str, Any]:
    """What one rank measures; see `compare`."""
    logging.disable(logging.WARNING)  # Transformers warns at each of TRL's batches
    vocabulary = MODELS[family][size].vocab_size
    dataset = prompts(count, vocabulary)
    model = build(family, size)
    found: list[_Contestants] = []

    def attach(trainer: Trainer) -> Sequence[TrainerCallback]:
        found.append(_Contestants(trainer, patience))
        return found

    with tempfile.TemporaryDirectory() as directory:
        result = train(
            "ddp" if dist.is_initialized() else "single",
            model,
            output_dir=directory,
            attach=attach,
            steps=rounds,
            dtype=dtype,
            train_dataset=language_dataset(8, vocab=vocabulary),
            eval_dataset=dataset,
            processing_class=tokenizer(vocabulary),
            learning_rate=1e-5,  # completions of a model that has learnt three sentences are all alike
            per_device_eval_batch_size=8,  # the default
        )
        tables = found[0].tables(rounds) if result.state.is_world_process_zero else {}
    in_order = sorted(lengths(dataset))
    return {
        "model": family,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(dtype).removeprefix("torch."),
        "prompts": count,
        "tokens": {"shortest": in_order[0], "median": in_order[count // 2], "longest": in_order[-1]},
        "seconds": found[0].seconds,
        "rows": {name: table.total() for name, table in tables.items()},
        "same": len(tables["truestep"].keys() & tables["TRL"].keys()) if tables else 0,
        "different completions": len({completion for _, completion in tables["truestep"]}) if tables else 0,
    }


def _slowest(reports: Sequence[dict[str, list[float]]]) -> dict[str, list[float]]:
    return {
        name: [max(of_ranks) for of_ranks in zip(*(report[name] for report in reports), strict=True)]
        for name in reports[0]
    }
