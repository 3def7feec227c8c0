"""How much longer a training takes with truestep's WeaveCallback and with TRL's than without one."""

from __future__ import annotations

import logging
import os
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import truestep
from datasets import Dataset
from log_completions_prompts import prompts, tokenizer
from measuring import wait_for_idle
from models import qwen2
from running import in_fresh_process
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from truestep_fixtures.data import language_dataset
from truestep_fixtures.training import train
from truestep_fixtures.weave_records import Evaluation
from truestep_fixtures.weave_server import recording_server

NONE, TRUESTEP, TRACED, TRL = CONTESTANTS = "none", "truestep", "truestep, trace_scores=True", "TRL"

PREDICTIONS = 200
SCORERS = {
    "words": lambda prompt, completion: len(completion.split()),
    "letters": lambda prompt, completion: len(completion) / (1 + len(prompt)),
    "repeats": lambda prompt, completion: completion.split()[0] in prompt.split(),
}

_NEW_TOKENS = 2
_VOCABULARY = 4_096
_PROJECT = "entity/project"


@dataclass(frozen=True)
class Case:
    """A training.

    Attributes:
        name: What is special about it.
        steps: How many it has.
        evaluations: After which of them it evaluates.
    """

    name: str
    steps: int
    evaluations: tuple[int, ...]


CASES = (
    Case("1, at the end", 300, (300,)),
    Case("3, on the way", 1200, (300, 600, 900)),
)


class _Evaluations(TrainerCallback):
    """Has the trainer evaluate after some steps; its own strategies all evaluate after the last one too."""

    def __init__(self, steps: Sequence[int]) -> None:
        self._steps = steps

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_evaluate = state.global_step in self._steps


class _Timed(TrainerCallback):
    """Passes a callback its events, and takes the time.

    What a callback does in an evaluation until the model's last forward is over counts as completing: to encode and to
    decode the texts is part of it, apart from the decoding of the last batch.

    Attributes:
        callback: The callback.
        seconds: Of all events.
        completing: How much of that was completing.
    """

    def __init__(self, callback: Any, model: torch.nn.Module) -> None:
        self.callback = callback
        self.seconds = self.completing = self._forwarded = 0.0
        model.register_forward_hook(self._note)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._pass(self.callback.on_train_begin, args, state, control, **kwargs)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        begin = time.perf_counter()
        self._pass(self.callback.on_evaluate, args, state, control, **kwargs)
        self.completing += self._forwarded - begin

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._pass(self.callback.on_train_end, args, state, control, **kwargs)

    def _pass(self, event: Any, *arguments: Any, **kwargs: Any) -> None:
        begin = time.perf_counter()
        event(*arguments, **kwargs)
        self.seconds += time.perf_counter() - begin

    def _note(self, *unused: Any) -> None:
        self._forwarded = time.perf_counter()


def compare(case: Case, rounds: int, patience: float) -> dict[str, Any]:
    """Measure a training with each callback and without, in turn, each time in a process of its own.

    Args:
        case: The training.
        rounds: How often each is measured.
        patience: Seconds to wait, before each training, for an idle machine.

    Returns:
        A row of the report: `evaluations`, the name of the case, and by contestant what `compete` returns, round by
        round, `samples`.

    Raises:
        RuntimeError: Something has not arrived at the server.
    """
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in CONTESTANTS}
    for number in range(rounds):
        print(f"evaluations: {case.name}; round {number + 1} of {rounds}", flush=True)
        shift = number % len(CONTESTANTS)
        for name in CONTESTANTS[shift:] + CONTESTANTS[:shift]:
            with recording_server(own_process=True) as server:
                wait_for_idle(patience)
                samples[name].append(in_fresh_process(compete, case, name, server.environment, forked=True))
                if name != NONE:
                    _require_all(case, name, server.evaluations())
    return {"evaluations": case.name, "samples": samples}


def compete(case: Case, contestant: str, environment: Mapping[str, str]) -> dict[str, float]:
    """What one process measures: one training.

    Returns:
        Seconds: of the `training`; of those, in the `events` of the callback, and of these, `completing`; and until
        all has been sent that had not been at the end of the training, `afterwards`.
    """
    os.environ.update(environment)
    logging.disable(logging.WARNING)  # Transformers warns at each of TRL's batches
    warnings.simplefilter("ignore", FutureWarning)  # and of what TRL's calls
    torch.set_num_threads(1)
    dataset = prompts(PREDICTIONS, _VOCABULARY)
    rows = language_dataset(PREDICTIONS, vocab=_VOCABULARY)
    timed: list[_Timed] = []
    begin = 0.0

    def attach(trainer: Trainer) -> Sequence[TrainerCallback]:
        nonlocal begin
        if contestant != NONE:
            timed.append(_Timed(_callback(contestant, trainer), trainer.model))
        begin = time.perf_counter()
        return timed

    with tempfile.TemporaryDirectory() as directory:
        torch.manual_seed(0)
        train(
            "single",
            AutoModelForCausalLM.from_config(qwen2(_VOCABULARY, 64, 128, 2, 2, 1)),
            output_dir=directory,
            callbacks=[_Evaluations(case.evaluations)],
            attach=attach,
            steps=case.steps,
            train_dataset=language_dataset(64, vocab=_VOCABULARY),
            eval_dataset=Dataset.from_dict({"prompt": dataset["prompt"], **rows.to_dict()}),
            processing_class=tokenizer(_VOCABULARY),
            per_device_eval_batch_size=64,
        )
    end = time.perf_counter()
    if contestant == TRL:
        import weave

        weave.get_client().finish(use_progress_bar=False)
    return {
        "training": end - begin,
        "events": sum(one.seconds for one in timed),
        "completing": sum(one.completing for one in timed),
        "afterwards": time.perf_counter() - end,
    }


def _callback(contestant: str, trainer: Trainer) -> TrainerCallback:
    config = GenerationConfig(max_new_tokens=_NEW_TOKENS, do_sample=False, pad_token_id=0)
    options = {"project_name": _PROJECT, "scorers": SCORERS, "generation_config": config, "model_name": "model"}
    if contestant == TRL:
        from trl.trainer.callbacks import WeaveCallback  # which imports Weave: nobody else's process is to have it

        return WeaveCallback(trainer, **options)
    return truestep.WeaveCallback(trainer, **options, trace_scores=contestant == TRACED)


def _require_all(case: Case, contestant: str, evaluations: Sequence[Evaluation]) -> None:
    """Raise unless the server has every evaluation, with every prediction, every score and a summary."""
    steps = [evaluation.attributes["training_step"] for evaluation in evaluations]
    if steps != list(case.evaluations):
        raise RuntimeError(f"{contestant}: evaluations have arrived of the steps {steps}")
    asked = prompts(PREDICTIONS, _VOCABULARY)["prompt"]
    for step, evaluation in zip(steps, evaluations, strict=True):
        of_scores = [prediction.scores for prediction in evaluation.predictions]
        of_calls = [prediction.score_calls for prediction in evaluation.predictions]
        summary = (evaluation.summary or {}).get("output", {})
        complete = {
            "evaluation": evaluation.is_finished and evaluation.exception is None,
            "prompts": [prediction.inputs["prompt"] for prediction in evaluation.predictions] == list(asked),
            "predictions": all(prediction.is_finished and prediction.output for prediction in evaluation.predictions),
            "scores": all(scores.keys() == SCORERS.keys() for scores in of_scores),
            "calls of scores": contestant == TRUESTEP or all(calls.keys() == SCORERS.keys() for calls in of_calls),
            "summary": summary.get("successful_predictions") == PREDICTIONS
            and all(f"avg_{name}" in summary for name in SCORERS),
        }
        if not all(complete.values()):
            raise RuntimeError(f"{contestant}: what has arrived of step {step}: {complete}")
