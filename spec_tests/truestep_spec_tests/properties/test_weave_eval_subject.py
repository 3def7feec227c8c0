"""What holds of any WeaveCallback, in a single process, with models that are made on the spot."""

import asyncio
import logging
import math
import threading
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, normalizers
from transformers import TrainerCallback
from truestep_fixtures import data, topologies
from truestep_fixtures.weave_server import RecordingServer, recording_server

from truestep_spec_tests.implementation import Implementation
from truestep_spec_tests.properties.log_completions_cases import (
    NO_COUNTS,
    NO_DATASETS,
    greedy,
    rows_of,
    speaking,
)
from truestep_spec_tests.properties.weave_eval_cases import (
    NO_NUMBERS,
    NUMBERS,
    PROMPTS,
    SCORERS,
    Outcome,
    Scored,
    Seen,
    Subject,
    Unprintable,
    UnprintableError,
    Unreadable,
    evaluate_at,
    named,
    outcomes,
    requires_weave,
    seen,
)

pytestmark = requires_weave

PAIRS = [(prompt, name) for prompt in PROMPTS for name in SCORERS]
"""The calls of an evaluation, in the order of their scores."""


@pytest.fixture(scope="module")
def server() -> Iterator[RecordingServer]:
    with recording_server() as server:
        yield server


@pytest.fixture(scope="module")
def subject(
    implementation: Implementation, server: RecordingServer, tmp_path_factory: pytest.TempPathFactory
) -> Subject:
    args = topologies.training_arguments("single", tmp_path_factory.mktemp("out"), max_steps=20)
    return Subject(implementation, args, server)


@pytest.fixture(scope="module")
def at_once(subject: Subject) -> Iterator[Scored]:
    """A training in which eight scorers run at a time, if the implementation can do that."""
    scored = Scored(subject, "team/at once", **{"max_workers": 8} if subject.offers("max_workers") else {})
    yield scored
    scored.end()


@pytest.fixture(scope="module")
def one_by_one(subject: Subject) -> Iterator[Scored]:
    """A training in which one scorer runs at a time, and scores have calls of their own if that is offered."""
    traced = {"trace_scores": True} if subject.offers("trace_scores") else {}
    scored = Scored(subject.having("max_workers"), "team/one by one", max_workers=1, **traced)
    yield scored
    scored.end()


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def exactly(numbers: Mapping[str, Any]) -> dict[str, str]:
    """Numbers with their types and all their bits."""
    return {name: f"{type(number).__name__} {number!r}" for name, number in numbers.items()}


def summary_of(results: Mapping[tuple[str, str], Outcome]) -> dict[str, int | float]:
    """The summary of an evaluation in which scorers return this, by prompt and scorer."""
    summary: dict[str, int | float] = {
        "total_predictions": len(PROMPTS),
        "successful_predictions": sum(
            all(results[prompt, name].score is not None for name in SCORERS) for prompt in PROMPTS
        ),
    }
    for name in SCORERS:
        scores = [score for prompt in PROMPTS if (score := results[prompt, name].score) is not None]
        if scores:
            summary[f"avg_{name}"] = float(Fraction(sum(Fraction(float(score)) for score in scores), len(scores)))
    return summary


def assert_evaluation_is_of(results: Mapping[tuple[str, str], Outcome], evaluation: Seen, warnings: list[str]) -> None:
    assert list(PROMPTS) == evaluation.prompts
    shown = {name: named("scorer", name) for name in SCORERS}
    for prompt, completion, scores in evaluation.rows:
        expected = {shown[name]: score for name in SCORERS if (score := results[prompt, name].score) is not None}
        assert list(expected) == list(scores)
        assert exactly(expected) == exactly(scores)
        assert completion == completion_of(prompt)
    assert evaluation.summary is not None
    assert exactly(summary_of(results)) == exactly(evaluation.summary)
    missing = [pair for pair in PAIRS if results[pair].score is None]
    for (prompt, name), warning in zip(missing, warnings, strict=True):
        assert prompt in warning
        assert name in warning


def completion_of(prompt: str) -> str:
    tokens = data.tokenizer()(prompt)["input_ids"]
    return str(data.tokenizer().decode(greedy(speaking("qwen2").eval(), tokens, 4), skip_special_tokens=True))


# Scores and summary


@pytest.mark.clause("WEAVE-1", "WEAVE-4", "WEAVE-5")
@given(results=st.fixed_dictionaries(dict.fromkeys(PAIRS, outcomes)))
@settings(max_examples=settings.default.max_examples // 5)
def test_finite_numbers_are_scores_and_the_summary_is_of_them_and_all_else_is_a_warning(
    at_once: Scored, caplog: pytest.LogCaptureFixture, results: dict[tuple[str, str], Outcome]
) -> None:
    caplog.clear()
    evaluation = at_once.evaluate(results)
    assert_evaluation_is_of(results, evaluation, warnings_in(caplog))


@pytest.mark.clause("WEAVE-4", "WEAVE-5")
@given(results=st.fixed_dictionaries(dict.fromkeys(PAIRS, outcomes)))
@settings(max_examples=settings.default.max_examples // 16)
def test_scores_are_the_same_when_scorers_are_called_one_by_one(
    one_by_one: Scored, caplog: pytest.LogCaptureFixture, results: dict[tuple[str, str], Outcome]
) -> None:
    caplog.clear()
    evaluation = one_by_one.evaluate(results)
    assert_evaluation_is_of(results, evaluation, warnings_in(caplog))


@pytest.mark.clause("WEAVE-5")
@pytest.mark.parametrize(
    ("scores", "mean"),
    [((0.1, 0.2, 0.3), 0.2), ((1e16, 1.0, -1e16), 1 / 3), ((1e308, 1e308, 1e308), 1e308)],
    ids=["rounded at additions", "cancelling", "overflowing in between"],
)
def test_a_mean_is_rounded_once(at_once: Scored, scores: tuple[float, ...], mean: float) -> None:
    results = {
        (prompt, name): Outcome(one, one) for prompt, one in zip(PROMPTS, scores, strict=True) for name in SCORERS
    }
    summary = at_once.evaluate(results).summary
    assert summary is not None
    assert {f"avg_{name}": mean for name in SCORERS}.items() <= summary.items()


@pytest.mark.clause("WEAVE-4")
def test_every_kind_of_number_and_of_something_else_is_taken_for_what_it_is(
    at_once: Scored, caplog: pytest.LogCaptureFixture
) -> None:
    values = [*(Outcome(*pair) for pair in NUMBERS), *(Outcome(value, None) for value in NO_NUMBERS)]
    while values:
        some, values = values[: len(PAIRS)], values[len(PAIRS) :]
        results = dict(zip(PAIRS, some + [Outcome(0, 0)] * (len(PAIRS) - len(some)), strict=True))
        caplog.clear()
        evaluation = at_once.evaluate(results)
        assert_evaluation_is_of(results, evaluation, warnings_in(caplog))


@pytest.mark.clause("WEAVE-4", "WEAVE-6")
@pytest.mark.parametrize(
    "bad",
    [
        Outcome(Unprintable(), None),
        Outcome(UnprintableError(), None, True),
        Outcome(Unreadable(), None),
        Outcome(torch.empty((), device="meta"), None),
        Outcome(SystemExit("enough"), None, True),
    ],
    ids=["cannot be shown", "error that cannot be shown", "cannot be read", "has no value", "ends the process"],
)
def test_a_result_that_nothing_can_be_done_with_is_a_warning(
    at_once: Scored, caplog: pytest.LogCaptureFixture, bad: Outcome
) -> None:
    results = dict.fromkeys(PAIRS, Outcome(1, 1)) | {PAIRS[1]: bad, PAIRS[8]: bad}
    caplog.clear()
    evaluation = at_once.evaluate(results)
    assert_evaluation_is_of(results, evaluation, warnings_in(caplog))


# Who calls them


@pytest.mark.clause("WEAVE-4")
def test_as_many_calls_as_there_are_workers_run_at_a_time(subject: Subject, at_once: Scored) -> None:
    subject.having("max_workers")
    barrier = threading.Barrier(8, timeout=60)  # which lets nobody through before there are eight

    def wait() -> int:
        barrier.wait()
        return 1

    acts: dict[tuple[str, str], Any] = {
        (prompt, name): (lambda: asyncio.to_thread(wait)) if name == SCORERS[-1] else wait for prompt, name in PAIRS
    }
    acts[PAIRS[-1]] = lambda: 1
    evaluation = at_once.evaluate(acts)
    assert evaluation.summary is not None
    assert evaluation.summary["successful_predictions"] == len(PROMPTS)
    assert at_once.most == 8


@pytest.mark.clause("WEAVE-4")
def test_scores_and_warnings_do_not_depend_on_which_call_ends_first(
    subject: Subject, at_once: Scored, caplog: pytest.LogCaptureFixture
) -> None:
    subject.having("max_workers")
    results = dict.fromkeys(PAIRS, Outcome(None, None)) | {PAIRS[0]: Outcome(1, 1), PAIRS[6]: Outcome(3, 3)}
    last_of_plain, last_of_all = threading.Event(), threading.Event()

    def after(event: threading.Event, pair: tuple[str, str]) -> Any:
        assert event.wait(60)
        return results[pair]()

    acts: dict[tuple[str, str], Any] = dict(results)
    acts[PAIRS[0]] = lambda: after(last_of_plain, PAIRS[0])
    acts[PAIRS[1]] = lambda: after(last_of_all, PAIRS[1])
    acts[PAIRS[6]] = lambda: (last_of_plain.set(), results[PAIRS[6]]())[1]
    acts[PAIRS[8]] = lambda: last_of_all.set()
    caplog.clear()
    evaluation = at_once.evaluate(acts)
    assert_evaluation_is_of(results, evaluation, warnings_in(caplog))


@pytest.mark.clause("WEAVE-4")
def test_with_one_worker_functions_are_called_one_after_the_other_in_the_thread_of_the_training(
    one_by_one: Scored,
) -> None:
    one_by_one.evaluate(dict.fromkeys(PAIRS, Outcome(1, 1)))
    assert sorted(PAIRS) == sorted((prompt, name) for prompt, name, _ in one_by_one.calls)
    assert {threading.get_ident()} == {thread for _, name, thread in one_by_one.calls if name != SCORERS[-1]}
    assert one_by_one.most == 1


@pytest.mark.clause("WEAVE-4")
def test_a_score_has_a_call_of_its_own_if_that_is_asked_for(
    subject: Subject, at_once: Scored, one_by_one: Scored
) -> None:
    acts = dict.fromkeys(PAIRS, Outcome(0.5, 0.5)) | {PAIRS[1]: Outcome(None, None)}
    assert all(calls == {} for calls in at_once.evaluate(acts).score_calls)
    subject.having("trace_scores")
    expected = [[0.5] * (2 if prompt == PAIRS[1][0] else 3) for prompt in PROMPTS]
    assert expected == [list(calls.values()) for calls in one_by_one.evaluate(acts).score_calls]


# Rows


@pytest.mark.clause("WEAVE-1", "WEAVE-5")
def test_rows_of_any_text_length_and_number_arrive_in_their_order(subject: Subject, server: RecordingServer) -> None:
    tokenizer = data.tokenizer()
    # To the model a long text is a short one, and the other way round.
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(Regex("x+"), "x")
    tokenizer.backend_tokenizer.decoder = decoders.Sequence(
        [decoders.ByteLevel(), decoders.Replace("z", "é\n🙂" * 30_000)]
    )
    hard = ["x" * 300_000, "\x00", "🙂 漢\u2028\r\n\t", "", "  ", '{"a": 1}', "</script>", "a" * 300, "weave:///a/b"]
    prompts = [*hard, *(str(number) for number in range(1001))]
    long = subject.on(tokenizer=tokenizer, generation={"max_new_tokens": 1})
    completions: list[str] = []

    def keep(prompt: str, completion: str) -> int:
        completions.append(completion)
        return 1

    trainer, callback = long.begin(
        prompts, "team/rows", scorers={"keep": keep}, **{"max_workers": 1} if subject.offers("max_workers") else {}
    )
    evaluate_at(trainer, 1)
    trainer.train_end()
    (evaluation,) = seen(callback, server, "team/rows")
    assert prompts == [prompt if "left out" not in prompt else prompts[7] for prompt in evaluation.prompts]
    assert completions == [row.completion for row in evaluation.rows]
    assert max(map(len, completions)) >= 90_000
    assert evaluation.summary == {"total_predictions": 1010, "successful_predictions": 1010, "avg_keep": 1.0}


# Without a project


@pytest.mark.clause("WEAVE-2")
def test_without_a_project_a_training_does_not_begin_and_an_evaluation_outside_raises(subject: Subject) -> None:
    with pytest.raises(ValueError, match="project_name"):
        subject.begin(PROMPTS, None)
    trainer = subject.trainer(rows_of(PROMPTS))
    trainer.add_callback(subject.callback(trainer, None))
    with pytest.raises(ValueError, match="project_name"):
        trainer.evaluate()


# Construction


@pytest.mark.clause("WEAVE-8")
def test_it_is_a_callback_with_the_documented_arguments(subject: Subject) -> None:
    trainer = subject.trainer(rows_of(PROMPTS))
    arguments = ["team/project", {"is": lambda *_: 1}, subject.config, 2, "dataset", "model"]
    assert isinstance(subject.implementation.WeaveCallback(trainer, *arguments), TrainerCallback)
    assert isinstance(subject.implementation.WeaveCallback(trainer=trainer), TrainerCallback)


def no(prompt: str, completion: str) -> int:
    raise AssertionError("nothing is to be scored")


BAD: list[tuple[str, Any]] = [
    *(("num_prompts", number) for number in NO_COUNTS),
    *(
        ("scorers", scorers)
        for scorers in ([no], [], no, "no", {"no": 3}, {"no": "no"}, {"": no}, {3: no}, {"a": None})
    ),
    *(("project_name", name) for name in ("", " ", 3, "a/b/c")),
    *(("dataset_name", name) for name in ("", "\n", None, 3)),
    *(("model_name", name) for name in ("", " ", 3)),
]
"""Arguments that are out of their range."""


@pytest.mark.clause("WEAVE-8")
@pytest.mark.parametrize(("name", "value"), BAD, ids=[f"{name}-{index}" for index, (name, _) in enumerate(BAD)])
def test_an_argument_out_of_its_range_is_an_error_that_names_it(subject: Subject, name: str, value: Any) -> None:
    given = {"project": value} if name == "project_name" else {name: value}
    assert name in subject.refusal(rows_of(PROMPTS), **given)


BAD_OPTIONS: list[tuple[str, Any]] = [
    *(("max_workers", number) for number in NO_COUNTS),
    *(("timeout", seconds) for seconds in (0, 0.0, -1, math.nan, "3", None)),
    *(("batch_tokens", number) for number in NO_COUNTS),
]


@pytest.mark.clause("WEAVE-8")
@pytest.mark.parametrize("scorers", [None, {"no": no}], ids=["", "scorers"])
@pytest.mark.parametrize(("name", "value"), BAD_OPTIONS, ids=repr)
def test_an_option_out_of_its_range_is_an_error_that_names_it(
    subject: Subject, name: str, value: Any, scorers: Any
) -> None:
    message = subject.having(name).refusal(rows_of(PROMPTS), scorers=scorers, **{name: value})
    assert name in message
    assert repr(value) in message


@pytest.mark.clause("WEAVE-8")
@pytest.mark.parametrize(("dataset", "found"), NO_DATASETS, ids=lambda value: repr(value)[:40])
def test_a_dataset_without_prompts_is_an_error(subject: Subject, dataset: Any, found: str) -> None:
    message = subject.refusal(dataset)
    assert "eval_dataset" in message
    assert found.replace("\\", "") in message


@pytest.mark.clause("WEAVE-8")
def test_without_a_tokenizer_or_a_model_that_can_generate_there_is_an_error(subject: Subject) -> None:
    assert "processing_class" in subject.on(tokenizer=None).refusal(rows_of(PROMPTS))
    assert "Linear" in subject.on(model=torch.nn.Linear(2, 2)).refusal(rows_of(PROMPTS))


@pytest.mark.clause("WEAVE-8")
def test_more_arguments_are_given_by_name_only(subject: Subject) -> None:
    with pytest.raises(TypeError):
        subject.implementation.WeaveCallback(
            subject.trainer(rows_of(PROMPTS)), "team/project", None, None, None, "dataset", "model", True
        )
