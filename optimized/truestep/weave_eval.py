"""Completions of the evaluation prompts as Weave evaluations."""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import GenerationConfig, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from truestep import weave_context
from truestep.arguments import require_real
from truestep.collectives import from_main_process, rank
from truestep.evaluated import Evaluated, evaluated_by
from truestep.observer import Observer
from truestep.prompts import DATASET, Prompt, PromptRow, read_prompts
from truestep.sampling import random_states_kept
from truestep.scoring import Scoring, summarize
from truestep.topology import class_name, unwrap
from truestep.trainer_frames import is_outside_of_training
from truestep.weave_process import WeaveProcess

if TYPE_CHECKING:
    from transformers import Trainer  # which imports datasets, pandas and trackers

logger = logging.getLogger(__name__)


class WeaveCallback(TrainerCallback):
    """Log what the model makes of the evaluation prompts, with scores if there are scorers, as evaluations in Weave.

    Whenever the trainer evaluates a dataset, the model completes its prompts. Without `scorers` these predictions are
    logged; with `scorers`, the main process has them scored, and the evaluation has a summary: `total_predictions`,
    `successful_predictions`, and `avg_<scorer>` for each scorer, the mean in float64 of the scores that there are.

    The training does not notice, and hardly waits: completions are made as by `LogCompletionsCallback`, and a process
    of its own hands them to Weave. Where Weave is not installed, cannot be reached or fails, a warning says what is
    lost. Outside of a training, `trainer.evaluate()` returns when the evaluation has arrived.

    Args:
        trainer: The trainer that the callback is added to. Its evaluation dataset, or each of a dict of them, has a
            column `"prompt"` of strings or conversations.
        project_name: `"entity/project"` or `"project"`. None: that of the Weave client that there is, or else of the
            active Weights & Biases run.
        scorers: By name: functions `scorer(prompt, completion)` that return a finite number, also `async` ones, and
            `weave.Scorer` objects. A scorer that raises or returns anything else is warned of, and its score left out.
        generation_config: None: the model's. Sampling draws from generators that are seeded with `args.seed`, the step
            and the prompt's number.
        num_prompts: How many prompts are taken from the beginning of a dataset; None: all.
        dataset_name: What the trainer's evaluation dataset is called in Weave. Each of a dict of them is called
            `{dataset_name}/{key}`, another one like its `metric_key_prefix`.
        model_name: None: `model.config._name_or_path`.
        trace_scores: Whether each score is a call of its own in Weave, which takes the other process much longer; and
            whether Weave may trace what scorers call.
        max_workers: How many calls of scorers run at a time. Functions run in threads; with 1, one after the other in
            the thread of the training, for those that have to (such as those that use signals for time limits). The
            other ranks wait meanwhile, which `args.ddp_timeout` limits.
        timeout: How long Weave may take without a sign of progress, in seconds.
        batch_tokens: See `LogCompletionsCallback`.
        gather: See `LogCompletionsCallback`.

    Raises:
        ValueError: At construction: an argument is out of its range; there is no prompt, no tokenizer, or the model
            cannot generate. At train begin, or at an evaluation outside of a training, on every rank: there is no
            project.
        UnsupportedModelError: Then, too: ranks cannot work apart on a model that is laid out like this.

    Example:
        >>> from truestep import WeaveCallback
        >>> scorers = {"length": lambda prompt, completion: len(completion)}
        >>> trainer.add_callback(WeaveCallback(trainer, "my-team/my-project", scorers))  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """

    def __init__(
        self,
        trainer: "Trainer",
        project_name: str | None = None,
        scorers: Mapping[str, Any] | None = None,
        generation_config: GenerationConfig | None = None,
        num_prompts: int | None = None,
        dataset_name: str = "eval_dataset",
        model_name: str | None = None,
        *,
        trace_scores: bool = False,
        max_workers: int = 8,
        timeout: float = 30.0,
        batch_tokens: int = 4096,
        gather: bool | None = None,
    ) -> None:
        for name, value in (("project_name", project_name), ("dataset_name", dataset_name), ("model_name", model_name)):
            if not (isinstance(value, str) and value.strip()) and (value is not None or name == "dataset_name"):
                raise ValueError(f"{name}={value!r}: must be a name")
        if project_name is not None and project_name.count("/") > 1:
            raise ValueError(f"project_name={project_name!r}: must be a project, or an entity and a project: 'a/b'")
        require_real("timeout", timeout, math.inf)
        if timeout == 0:
            raise ValueError(f"timeout={timeout!r}: Weave needs some time")
        self.trainer = trainer
        self.project_name = project_name
        self.dataset_name = dataset_name
        self.model_name = model_name
        self.num_prompts = num_prompts
        self.timeout = timeout
        self.trace_scores = trace_scores
        self._scoring = Scoring({} if scorers is None else scorers, max_workers, is_traced=trace_scores)
        self._observer = Observer(trainer, generation_config, batch_tokens, gather)
        self._generation_config = generation_config
        self._dataset = trainer.eval_dataset
        self._rows = self._observer.read(num_prompts)
        self._prompts: dict[str | None, list[Prompt]] = {}
        self._logged: set[Any] = set()
        self._is_training = False
        self._is_logging = False
        self._weave: WeaveProcess | None = None

    # Events of the Trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the project, and start what logs in the background."""
        with random_states_kept():
            self._end()  # of a training that raised
            self._logged.clear()
            self._begin(args, kwargs["model"])
        self._is_training = True

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Complete the prompts of the dataset that was evaluated, and log them."""
        with random_states_kept():  # scorers may draw
            if self._is_training and is_outside_of_training():  # of a training that raised
                self._end()
            if not self._observer.is_ready:
                self._begin(args, kwargs["model"])
            try:
                for evaluated in evaluated_by(self.trainer) if self._is_logging else ():
                    self._evaluate(args, state, kwargs["model"], evaluated)
            finally:
                if not self._is_training:
                    self._end()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Wait until everything has been logged or given up."""
        self._end()

    # Parts

    def _begin(self, args: TrainingArguments, model: nn.Module) -> None:
        project, obstacle = from_main_process(
            (self.project_name or weave_context.project_of_this_process(), weave_context.obstacle(self.project_name))
        )
        if project is None:
            raise ValueError(
                "project_name is None, and there is neither a Weave client nor an active Weights & Biases run: give a "
                "project_name, or call weave.init before the training"
            )
        self._observer.begin(args, model)
        self._is_logging = obstacle is None
        if rank() == 0 and obstacle is not None:
            logger.warning("no evaluation is logged: %s", obstacle)
        elif rank() == 0:
            self._weave = WeaveProcess(project, self.timeout)

    def _end(self) -> None:
        self._is_training = False
        self._observer.end()
        self._prompts.clear()
        if self._weave is not None:
            self._weave.close()
        self._weave = None
        self._scoring.end()

    def _evaluate(self, args: TrainingArguments, state: TrainerState, model: nn.Module, evaluated: Evaluated) -> None:
        prompts = self._prompts_of(evaluated)
        name = evaluated.name(self.dataset_name)
        step = state.global_step
        identity = (step, evaluated.prefix, name, tuple(prompt.text for prompt in prompts))
        if not prompts or (self._is_training and identity in self._logged):
            return
        self._logged = {identity, *(other for other in self._logged if other[0] == step)}
        completions = self._observer.complete(prompts, args.seed, step)
        if self._weave is not None:
            pairs = [(prompt.text, completion) for prompt, completion in zip(prompts, completions, strict=True)]
            inner: Any = unwrap(model)
            config = self._generation_config or inner.generation_config
            attributes = {
                "training_step": step,
                "model_name": self.model_name or getattr(inner.config, "_name_or_path", "") or class_name(inner),
                "dataset_name": name,
                "generation_config": json.loads(config.to_json_string(use_diff=False)),
                "metric_key_prefix": evaluated.prefix,
            }
            self._log(self._weave, pairs, attributes)

    def _log(self, weave: WeaveProcess, pairs: Sequence[tuple[str, str]], attributes: dict[str, Any]) -> None:
        scored = self._scoring.score(pairs)
        try:
            shown = [weave_context.as_the_client_would(*pair) for pair in pairs]
        except Exception as error:  # of functions that the user has given to Weave
            logger.warning("the evaluation at step %d is not logged: %r", attributes["training_step"], error)
            return
        weave.log(
            {
                "attributes": attributes,
                "scorers": self._scoring.names or None,
                "trace_scores": self.trace_scores,
                "predictions": [
                    (inputs, output, scores) for (inputs, output), (scores, _) in zip(shown, scored, strict=True)
                ],
                "summary": summarize(scored) if self._scoring.names else None,
                "run": weave_context.active_run(),
            }
        )

    def _prompts_of(self, evaluated: Evaluated) -> list[Prompt]:
        """The prompts of a dataset; none, with a warning, if it is not the trainer's and has none."""
        if evaluated.is_own and self.trainer.eval_dataset is self._dataset:
            if evaluated.key not in self._prompts:
                rows = [row for row in self._rows if evaluated.key is None or row.cells[DATASET] == evaluated.key]
                self._prompts[evaluated.key] = self._observer.encode(rows)
            return self._prompts[evaluated.key]
        name = f"the dataset of {evaluated.prefix!r}"
        rows_or_fault = from_main_process(_attempt(evaluated.dataset, self.num_prompts, name) if rank() == 0 else [])
        try:
            if isinstance(rows_or_fault, str):
                raise ValueError(rows_or_fault)
            return self._observer.encode(rows_or_fault)
        except ValueError as error:
            if rank() == 0:
                logger.warning("nothing is logged of this evaluation: %s", error)
            return []


def _attempt(dataset: Any, num_prompts: int | None, name: str) -> list[PromptRow] | str:
    """The prompts of a dataset, or why there are none."""
    try:
        return read_prompts(dataset, num_prompts, name=name)
    except Exception as error:
        return str(error)
