"""Which dataset an evaluation is of, and what it and the model are called, in trainings by real trainers."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import pytest
from datasets import Dataset
from transformers import GenerationConfig, Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainerCallback
from truestep_fixtures import data, models, topologies
from truestep_fixtures.weave_server import RecordingServer, recording_server

from truestep_spec_tests.differential.cases import logged_warnings
from truestep_spec_tests.differential.weave_eval_cases import Evaluating
from truestep_spec_tests.implementation import Implementation
from truestep_spec_tests.properties.weave_eval_cases import Seen, requires_weave, seen

pytestmark = requires_weave

NAME = "own/data: größe 漢字 🙂 v1"
"""What the trainer's dataset is called."""

NAMES = ["meta-llama/Llama-3.1-8B", "größe 漢字 🙂: v1", "漢", "../out/model-7", "./", "🙂", "x" * 300, "<b>&amp;</b>"]
"""Names of models and datasets."""

Action = Callable[[Trainer], object]


def dataset(*prompts: str, name: str | None = None) -> Dataset:
    """Prompts that a trainer can evaluate."""
    made = Dataset.from_dict({"prompt": list(prompts)} | data.language_dataset(len(prompts)).to_dict())
    made.info.dataset_name = name
    return made


OWN = dataset("one", "two", "three")
OTHER = dataset("four", "five", "six", "seven")
ANOTHER = dataset("eight", "nine")
NAMED = dataset("ten", "eleven", name="squad")


class OwnTrainer(Trainer):
    """A trainer that evaluates in a way of its own."""

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        return metrics


def evaluate_with_another(trainer: Trainer) -> None:
    """Evaluates a dataset that has taken the place of the trainer's, which is put back."""
    own, trainer.eval_dataset = trainer.eval_dataset, ANOTHER
    trainer.evaluate()
    trainer.eval_dataset = own


def evaluating(*evaluations: Mapping[str, Any]) -> Action:
    """Evaluates with these arguments, one after the other."""
    return lambda trainer: [trainer.evaluate(**arguments) for arguments in evaluations]


# Of each: what a training does at a step, and dataset, prefix and prompts of the evaluations that this makes.
# Two prompts are asked for of each dataset.
CASES: dict[str, tuple[Action, list[tuple[str, str, list[str]]]]] = {
    "the trainer's": (evaluating({}), [(NAME, "eval", ["one", "two"])]),
    "the trainer's twice": (evaluating({}, {}), [(NAME, "eval", ["one", "two"])]),
    "the trainer's by two prefixes": (
        evaluating({}, {"metric_key_prefix": "test"}, {}),
        [(NAME, "eval", ["one", "two"]), (NAME, "test", ["one", "two"])],
    ),
    "the trainer's, given": (evaluating({"eval_dataset": OWN}), [(NAME, "eval", ["one", "two"])]),
    "another": (
        evaluating({"eval_dataset": OTHER, "metric_key_prefix": "test"}),
        [("test", "test", ["four", "five"])],
    ),
    "another twice": (
        evaluating(*[{"eval_dataset": OTHER, "metric_key_prefix": "test"}] * 2),
        [("test", "test", ["four", "five"])],
    ),
    "another and then the trainer's": (
        evaluating({"eval_dataset": OTHER, "metric_key_prefix": "test"}, {}),
        [("test", "test", ["four", "five"]), (NAME, "eval", ["one", "two"])],
    ),
    "a prefix of the usual form": (
        evaluating({"eval_dataset": OTHER, "metric_key_prefix": "eval_math"}),
        [("math", "eval_math", ["four", "five"])],
    ),
    "without a prefix": (evaluating({"eval_dataset": OTHER}), [(NAME, "eval", ["four", "five"])]),
    "several without a prefix": (
        evaluating({"eval_dataset": OTHER}, {"eval_dataset": ANOTHER}, {"eval_dataset": OTHER}),
        [(NAME, "eval", ["four", "five"]), (NAME, "eval", ["eight", "nine"])],
    ),
    "with a name of its own": (evaluating({"eval_dataset": NAMED}), [("squad", "eval", ["ten", "eleven"])]),
    "with a name of its own and a prefix": (
        evaluating({"eval_dataset": NAMED, "metric_key_prefix": "test"}),
        [("test", "test", ["ten", "eleven"])],
    ),
    "a dict": (
        evaluating({"eval_dataset": {"math": OTHER, "code/größe": ANOTHER}}),
        [("math", "eval_math", ["four", "five"]), ("code/größe", "eval_code/größe", ["eight", "nine"])],
    ),
    "a dict and a prefix": (
        evaluating({"eval_dataset": {"math": OTHER}, "metric_key_prefix": "test"}),
        [("test_math", "test_math", ["four", "five"])],
    ),
    "a stream": (
        evaluating({"eval_dataset": OTHER.to_iterable_dataset(), "metric_key_prefix": "eval_stream"}),
        [("stream", "eval_stream", ["four", "five"])],
    ),
    "one that has taken the trainer's place": (evaluate_with_another, [(NAME, "eval", ["eight", "nine"])]),
    "the trainer's again": (evaluating({}), [(NAME, "eval", ["one", "two"])]),
    "without prompts": (
        evaluating({"eval_dataset": data.language_dataset(2), "metric_key_prefix": "eval_no prompts"}),
        [],
    ),
    "a part without prompts": (
        evaluating({"eval_dataset": {"no prompts": data.language_dataset(2), "math": OTHER}}),
        [("math", "eval_math", ["four", "five"])],
    ),
}
"""Evaluations in a training."""


class Trained(NamedTuple):
    """What has come of a training: evaluations by step, and warnings."""

    seen: dict[int, list[Seen]]
    warnings: list[str]
    config: dict[str, Any]


@pytest.fixture(scope="module")
def server() -> Iterator[RecordingServer]:
    with recording_server() as server:
        yield server


def by_step(evaluations: list[Seen]) -> dict[int, list[Seen]]:
    found: dict[int, list[Seen]] = {}
    for one in evaluations:
        found.setdefault(one.step, []).append(one)
    return found


@pytest.fixture(scope="module")
def trained(
    implementation: Implementation, server: RecordingServer, tmp_path_factory: pytest.TempPathFactory
) -> Trained:
    """A training in which each of the cases has a step, and then each of the names, of the model and of a dataset."""
    model: Any = models.speaking(models.build("qwen2"), data.END)
    model.generation_config.max_new_tokens = 2
    directory = tmp_path_factory.mktemp("trained")
    args = topologies.training_arguments("single", directory, max_steps=len(CASES) + len(NAMES))
    trainer = OwnTrainer(
        model,
        args,
        train_dataset=data.language_dataset(8),
        eval_dataset=OWN,
        processing_class=data.tokenizer(),
    )

    def renaming(name: str) -> Action:
        def action(trainer: Trainer) -> None:
            model.config._name_or_path = name
            trainer.evaluate(ANOTHER, metric_key_prefix=f"eval_{name}")

        return action

    actions = [*(action for action, _ in CASES.values()), *(renaming(name) for name in NAMES)]
    callback: TrainerCallback = implementation.WeaveCallback(trainer, "team/trained", num_prompts=2, dataset_name=NAME)
    trainer.add_callback(callback)
    trainer.add_callback(Evaluating(trainer, actions))
    with logged_warnings() as warnings:
        trainer.train()
    return Trained(by_step(seen(callback, server, "team/trained")), warnings, model.generation_config.to_dict())


@pytest.mark.clause("WEAVE-1", "WEAVE-3")
@pytest.mark.parametrize("name", CASES)
def test_an_evaluation_has_the_prompts_and_the_name_of_the_dataset_that_is_evaluated(
    trained: Trained, name: str
) -> None:
    _, expected = CASES[name]
    step = list(CASES).index(name) + 1
    assert expected == [(one.dataset, one.prefix, one.prompts) for one in trained.seen.get(step, [])]


@pytest.mark.clause("WEAVE-3")
@pytest.mark.parametrize("name", NAMES)
def test_models_and_datasets_may_be_called_anything(trained: Trained, name: str) -> None:
    (evaluation,) = trained.seen[len(CASES) + 1 + NAMES.index(name)]
    assert (name, name) == (evaluation.model, evaluation.dataset)


@pytest.mark.clause("WEAVE-3")
def test_a_model_without_a_name_is_called_as_its_class_and_completes_as_its_own_config_says(trained: Trained) -> None:
    of_cases = [one for step in range(1, len(CASES) + 1) for one in trained.seen.get(step, [])]
    assert {"Qwen2ForCausalLM"} == {one.model for one in of_cases}
    assert [trained.config] * len(of_cases) == [one.config for one in of_cases]


@pytest.mark.clause("WEAVE-1")
def test_of_a_dataset_without_prompts_there_is_a_warning(trained: Trained) -> None:
    (first, second) = [warning for warning in trained.warnings if "no prompts" in warning]
    for warning in (first, second):
        assert "prompt" in warning.replace("no prompts", "")


@pytest.mark.clause("WEAVE-1", "WEAVE-5")
def test_without_scorers_there_are_neither_scores_nor_a_summary(trained: Trained) -> None:
    for one in (one for of_step in trained.seen.values() for one in of_step):
        assert [row.scores for row in one.rows] == [{}, {}]
        assert one.summary is None


# A dict of datasets, in trainings and outside of them

GIVEN = GenerationConfig(max_new_tokens=3, eos_token_id=data.END, do_sample=True, temperature=1.5, top_k=7)
MODEL = "meta-llama/größe: Llama 3.1"


class Trainings(NamedTuple):
    """Evaluations with a dict of datasets: in a training, after it, and in another training."""

    first: list[Seen]
    between: list[Seen]
    second: list[Seen]


@pytest.fixture(scope="module")
def trainings(
    implementation: Implementation, server: RecordingServer, tmp_path_factory: pytest.TempPathFactory
) -> Trainings:
    parts = {"dev": OWN, "größe/漢 字": OTHER.to_iterable_dataset()}
    directory = tmp_path_factory.mktemp("trainings")
    args = Seq2SeqTrainingArguments(
        str(directory),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        per_device_train_batch_size=2,
        max_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        eval_on_start=True,
    )
    trainer = Seq2SeqTrainer(
        models.speaking(models.build("qwen2"), data.END),
        args,
        train_dataset=data.language_dataset(8),
        eval_dataset=parts,
        processing_class=data.tokenizer(),
    )
    callback = implementation.WeaveCallback(
        trainer,
        "team/trainings",
        {"length": lambda prompt, completion: len(completion)},
        GIVEN,
        model_name=MODEL,
    )
    trainer.add_callback(callback)
    found: list[list[Seen]] = []
    again = {"eval_dataset": "dev", "metric_key_prefix": "eval_dev"}  # as at the last step of the training
    for action in (trainer.train, lambda: trainer.evaluate(**again), trainer.train):
        before = sum(map(len, found))
        action()
        found.append(seen(callback, server, "team/trainings")[before:])  # at once: all has arrived
    return Trainings(*found)


@pytest.mark.clause("WEAVE-1")
def test_of_a_dict_each_part_is_an_evaluation_of_all_its_prompts(trainings: Trainings) -> None:
    parts = [("eval_dataset/dev", "eval_dev", OWN), ("eval_dataset/größe/漢 字", "eval_größe/漢 字", OTHER)]
    expected = [(t, name, prefix, dataset["prompt"][:]) for t in (0, 2) for name, prefix, dataset in parts]
    assert expected == [(one.step, one.dataset, one.prefix, one.prompts) for one in trainings.first]


@pytest.mark.clause("WEAVE-1", "WEAVE-6")
def test_an_evaluation_outside_of_a_training_has_arrived_when_it_ends(trainings: Trainings) -> None:
    (evaluation,) = trainings.between
    assert (evaluation.step, evaluation.dataset, evaluation.prefix) == (2, "eval_dataset/dev", "eval_dev")
    assert OWN["prompt"][:] == evaluation.prompts


@pytest.mark.clause("WEAVE-1")
def test_a_second_training_is_logged_like_the_first(trainings: Trainings) -> None:
    def identities(evaluations: list[Seen]) -> list[tuple[Any, ...]]:
        return [(one.step, one.dataset, one.prefix, one.prompts) for one in evaluations]

    assert identities(trainings.first) == identities(trainings.second)


@pytest.mark.clause("WEAVE-3")
def test_the_model_has_the_name_that_is_given_and_the_config_all_fields_of_the_given_one(trainings: Trainings) -> None:
    for one in [evaluation for part in trainings for evaluation in part]:
        assert one.lacks == []
        assert one.model == MODEL
        assert GIVEN.to_dict() == one.config


@pytest.mark.clause("WEAVE-4", "WEAVE-5")
def test_scorers_get_prompt_and_completion(trainings: Trainings) -> None:
    for one in [evaluation for part in trainings for evaluation in part]:
        lengths = [len(row.completion) for row in one.rows]
        assert [{"length": length} for length in lengths] == [row.scores for row in one.rows]
        assert one.summary == {
            "total_predictions": len(lengths),
            "successful_predictions": len(lengths),
            "avg_length": sum(lengths) / len(lengths),
        }
