"""Completions as evaluations, with or without scores: the executable specification.

At an evaluation, for every prompt number i of the dataset that is evaluated, one prediction

    prompt i, what the model makes of prompt i alone, what each scorer makes of both

Every rank completes every prompt; the main process scores them and keeps the transcript.
"""

import logging
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from transformers import GenerationConfig, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from truestep_reference import arguments, generation, scores, whole
from truestep_reference.completer import Completer, Ready
from truestep_reference.scores import Scores

logger = logging.getLogger(__name__)

PREFIX = "eval"
"""The prefix of an evaluation's metrics, unless another one is given."""


class Prediction(NamedTuple):
    """A row of an evaluation.

    Attributes:
        prompt: Its text.
        completion: What the model made of it.
        scores: By name.
    """

    prompt: str
    completion: str
    scores: Scores


class Evaluation(NamedTuple):
    """What Weave is to be told of one evaluation.

    Attributes:
        project: ``entity/project``, or the project alone.
        training_step: t.
        model_name: The name of the model.
        dataset_name: The name of the dataset, whose rows are the prompts.
        generation_config: All fields.
        metric_key_prefix: That of the trainer's metrics.
        predictions: In the order of the prompts.
        summary: None without scorers.
    """

    project: str
    training_step: int
    model_name: str
    dataset_name: str
    generation_config: dict[str, Any]
    metric_key_prefix: str
    predictions: list[Prediction]
    summary: dict[str, float | int] | None


class Part(NamedTuple):
    """A dataset that is evaluated by itself.

    Attributes:
        name: Its name in evaluations.
        title: What errors and warnings call it.
        dataset: The rows.
        prefix: That of its metrics.
    """

    name: str
    title: str
    dataset: Any
    prefix: str


def name_of_another(prefix: str, own_name: str | None, dataset_name: str) -> str:
    """The name of a dataset that is not the trainer's.

    Args:
        prefix: The prefix of its metrics.
        own_name: The name that it has of its own, if any.
        dataset_name: The argument.

    Returns:
        The prefix without ``eval_``; if that is the usual prefix, one of the others.

    Example:
        >>> name_of_another("eval_math", "squad", "held out"), name_of_another("test", None, "held out")
        ('math', 'test')
        >>> name_of_another("eval", "squad", "held out"), name_of_another("eval", None, "held out")
        ('squad', 'held out')
    """
    if prefix == PREFIX:
        return own_name or dataset_name
    return prefix.removeprefix(f"{PREFIX}_") or dataset_name


def parts_evaluated(evaluated: Any, prefix: str, own: Any, dataset_name: str) -> list[Part]:
    """What an evaluation consists of.

    Args:
        evaluated: A dataset; a dict of these; or the name of a part of the trainer's dict.
        prefix: The prefix of its metrics.
        own: The trainer's evaluation dataset.
        dataset_name: The name that this has.

    Returns:
        The datasets.

    Example:
        >>> own = {"dev": [{"prompt": "a"}], "hard": [{"prompt": "b"}]}
        >>> [part.name for part in parts_evaluated(own, "eval", own, "data")]
        ['data/dev', 'data/hard']
        >>> [part.name for part in parts_evaluated("dev", "eval_dev", own, "data")]
        ['data/dev']
        >>> [part.name for part in parts_evaluated([{"prompt": "c"}], "eval_new", own, "data")]
        ['new']
    """
    title = "trainer.eval_dataset"
    if evaluated is own and not isinstance(own, Mapping):
        return [Part(dataset_name, title, own, prefix)]
    own_parts = own if isinstance(own, Mapping) else {}
    for key, part in own_parts.items():
        if evaluated is part or (isinstance(evaluated, str) and evaluated == key):
            return [Part(f"{dataset_name}/{key}", f"{title}[{key!r}]", part, prefix)]
    if isinstance(evaluated, Mapping):
        parts = [parts_evaluated(part, f"{prefix}_{key}", own, dataset_name) for key, part in evaluated.items()]
        return [one for part in parts for one in part]
    own_name = getattr(getattr(evaluated, "info", None), "dataset_name", None)
    return [Part(name_of_another(prefix, own_name, dataset_name), "the evaluated dataset", evaluated, prefix)]


class WeaveCallback(TrainerCallback):
    """Completes and scores the prompts of the dataset that is evaluated.

    What happens when is said at the head of this module. The transcript is an attribute, and goes nowhere else.

    Args:
        trainer: The trainer: its model, tokenizer, arguments and evaluation dataset.
        project_name: The project that evaluations are for; None for that of the Weave client or Weights & Biases run
            that there is.
        scorers: Functions of a prompt and a completion, plain or async, and ``weave.Scorer`` objects, by name.
        generation_config: How completions are generated, or None: as the model's own config says.
        num_prompts: How many prompts of a dataset are used, the first ones; None for all.
        dataset_name: The name of the trainer's evaluation dataset.
        model_name: The name of the model; None for that in its config, or of its class.

    Attributes:
        evaluations: The transcript of the main process, in order. Other ranks have none.

    Raises:
        ValueError: There is nothing to complete, nothing to complete it with, or an argument is out of range.
    """

    def __init__(
        self,
        trainer: Any,
        project_name: str | None = None,
        scorers: Mapping[str, Callable[[str, str], Any]] | None = None,
        generation_config: GenerationConfig | None = None,
        num_prompts: int | None = None,
        dataset_name: str = "eval_dataset",
        model_name: str | None = None,
    ) -> None:
        self.evaluations: list[Evaluation] = []
        self.trainer = trainer
        self.project_name = None if project_name is None else arguments.name("project_name", project_name)
        if project_name is not None and len(project_name.split("/")) > 2:
            raise ValueError(f"project_name must be a project, or an entity and a project, got {project_name!r}")
        self.scorers = scores.require_scorers(scorers)
        self.generation_config = generation_config
        self.dataset_name = arguments.name("dataset_name", dataset_name)
        self.model_name = None if model_name is None else arguments.name("model_name", model_name)
        self._completer = Completer(trainer, generation_config, num_prompts)
        self._read: list[tuple[Any, list[Ready]]] = []
        parts = parts_evaluated(trainer.eval_dataset, PREFIX, trainer.eval_dataset, dataset_name)
        if not parts:
            raise ValueError(f"trainer.eval_dataset is {trainer.eval_dataset!r}: it must have at least one dataset")
        for part in parts:
            self._prompts_of(part)
        # Of the training that goes on, or None outside of one.
        self._project: str | None = None
        self._logged: list[tuple[Any, ...]] = []

    # The trainer's events

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Finds the project of the training."""
        self._project = self._find_project(args)
        self._logged = []

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Completes and scores the prompts of each dataset that is evaluated, in a training once per step."""
        project = self._project or self._find_project(args)
        with generation.random_states_kept():  # datasets and scorers may draw
            for part in parts_evaluated(*self._evaluated(), self.trainer.eval_dataset, self.dataset_name):
                self._evaluate(project, part, whole.unwrap(kwargs["model"]), args, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The next evaluation is outside of a training."""
        self._project = None

    # What they are made of

    def _find_project(self, args: TrainingArguments) -> str:
        """The project, of which the main process knows. Collective."""
        found = None
        if args.process_index == 0:
            found = self.project_name or _project_of_client() or _project_of_run()
        project = whole.from_main_process(found)
        if project is None:
            raise ValueError(
                "project_name is None, and there is neither a Weave client nor an active Weights & Biases run to take "
                "the project from: give project_name"
            )
        return project

    def _evaluated(self) -> tuple[Any, str]:
        """The dataset that is evaluated, or the name of a part of the trainer's dict, and the prefix of its metrics.

        The trainer tells no callback: they are arguments of its method that has led here. A loop without such a method
        evaluates what the trainer has.
        """
        own = self.trainer.eval_dataset
        for frame, _ in traceback.walk_stack(None):
            found = frame.f_locals
            if found.get("self") is self.trainer and {"eval_dataset", "metric_key_prefix"} <= found.keys():
                evaluated = found["eval_dataset"]
                return own if evaluated is None else evaluated, found["metric_key_prefix"]
        return own, PREFIX

    def _prompts_of(self, part: Part) -> list[Ready]:
        """The prompts of a dataset, which is read, and warned of if it has few, once."""
        for dataset, prompts in self._read:
            if dataset is part.dataset:
                return prompts
        prompts = self._completer.read(part.title, part.dataset)
        self._read.append((part.dataset, prompts))
        return prompts

    def _evaluate(self, project: str, part: Part, model: Any, args: TrainingArguments, state: TrainerState) -> None:
        t = state.global_step
        try:
            prompts = self._prompts_of(part)
        except ValueError as error:
            if state.is_world_process_zero:
                logger.warning(f"the evaluation {part.name!r} is not logged, as it has no prompts: {error}")
            return
        texts = [prompt.text for prompt in prompts]
        if self._project is not None and (t, part.name, part.prefix, texts) in self._logged:
            return
        self._logged.append((t, part.name, part.prefix, texts))
        completions = self._completer.complete(model, prompts, args, t)
        if not state.is_world_process_zero:
            return
        found = [scores.scored(self.scorers, *pair) for pair in zip(texts, completions, strict=True)]
        config = model.generation_config if self.generation_config is None else self.generation_config
        evaluation = Evaluation(
            project=project,
            training_step=t,
            model_name=self.model_name or model.config._name_or_path or whole.class_name(model),
            dataset_name=part.name,
            generation_config=config.to_dict(),
            metric_key_prefix=part.prefix,
            predictions=[
                Prediction(text, completion, {name: one for given in of_scorer.values() for name, one in given.items()})
                for text, completion, of_scorer in zip(texts, completions, found, strict=True)
            ],
            summary=scores.summary(list(self.scorers), found) if self.scorers else None,
        )
        self.evaluations.append(evaluation)


def _project_of_client() -> str | None:
    """The project of the Weave client that exists, if Weave has been imported and there is one."""
    client = sys.modules["weave"].get_client() if "weave" in sys.modules else None
    return None if client is None else f"{client.entity}/{client.project}"


def _project_of_run() -> str | None:
    """The project of the Weights & Biases run that is active, if it has been imported and there is one."""
    run = sys.modules["wandb"].run if "wandb" in sys.modules else None
    if run is None:
        return None
    return f"{run.entity}/{run.project}" if run.entity else run.project
