"""The reference's functions of scores and of names, each by itself."""

import math
from collections.abc import Mapping
from decimal import Decimal
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import BaseModel
from truestep_fixtures import models
from truestep_reference import scores, weave_eval, whole

from truestep_spec_tests.differential.cases import logged_warnings

finite = st.floats(allow_nan=False, allow_infinity=False)
integers = st.integers(-(2**70), 2**70)
numbers = finite | integers
names = st.text(min_size=1, max_size=8)

NO_NUMBERS = [None, "1", b"1", 1j, Decimal(1), Fraction(1, 2), [1.0], {"a": 1}, {1}, object(), 10**400, -(10**309)]
NO_NUMBERS += [math.nan, math.inf, -math.inf, np.float32("nan"), torch.tensor(math.inf), np.datetime64("2026-01-01")]
NO_NUMBERS += [np.array([1.0]), torch.tensor([1.0]), torch.tensor(1j), np.complex64(1)]

# What counts as a number


@pytest.mark.clause("WEAVE-4")
@given(value=numbers)
def test_a_finite_number_is_its_own_score(value: float | int) -> None:
    found = scores.score(value)
    assert (type(value), repr(value)) == (type(found), repr(found))


@pytest.mark.clause("WEAVE-4")
@pytest.mark.parametrize("holds", [bool, np.bool_, torch.tensor, np.array])
@pytest.mark.parametrize("truth", [False, True])
def test_truth_counts_as_1_and_0(truth: bool, holds: Any) -> None:
    found = scores.score(holds(truth))
    assert repr(int(truth)) == repr(found)


@pytest.mark.clause("WEAVE-4")
@given(value=st.floats(-1e4, 1e4), integer=st.integers(-100, 100))
def test_a_scalar_is_the_number_that_it_holds(value: float, integer: int) -> None:
    for dtype in (np.float16, np.float32, np.float64, np.longdouble):
        held = dtype(value)
        assert repr(float(held)) == repr(scores.score(held)) == repr(scores.score(np.array(held)))
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        tensor = torch.tensor(value, dtype=dtype, requires_grad=True)
        assert repr(tensor.item()) == repr(scores.score(tensor))
    for scalar in (np.int8(integer), np.int64(integer), torch.tensor(integer), torch.tensor(integer, dtype=torch.int8)):
        assert repr(integer) == repr(scores.score(scalar))


@pytest.mark.clause("WEAVE-4")
@pytest.mark.parametrize("value", NO_NUMBERS, ids=lambda value: repr(value)[:20])
def test_nothing_else_is_a_score(value: Any) -> None:
    assert scores.score(value) is None


# What a weave.Scorer's result holds


class Judgement(BaseModel):
    fluent: bool
    why: str
    inner: dict[str, Any]


nested = st.recursive(
    numbers | st.booleans() | st.none() | st.text(max_size=3) | st.lists(integers, max_size=2),
    lambda inner: st.dictionaries(names, inner, max_size=3),
    max_leaves=8,
)


def leaves(value: Any, path: tuple[str, ...]) -> dict[tuple[str, ...], Any]:
    """Whatever is no dict, by the keys that lead to it."""
    if not isinstance(value, dict):
        return {path: value}
    return {where: leaf for key, inner in value.items() for where, leaf in leaves(inner, (*path, key)).items()}


@pytest.mark.clause("WEAVE-4")
@given(result=nested, name=names)
def test_scores_in_a_dict_are_its_numbers_by_the_keys_that_lead_to_them(result: Any, name: str) -> None:
    paths = leaves(result, (name,))
    joined = {".".join(path): leaf for path, leaf in paths.items()}
    assume(len(joined) == len(paths))
    expected = {path: scores.score(leaf) for path, leaf in joined.items()}
    found = scores.flattened(name, result)
    assert repr({path: number for path, number in expected.items() if number is not None}) == repr(found)


@pytest.mark.clause("WEAVE-4")
@given(number=numbers)
def test_a_model_counts_as_its_fields_at_any_depth(number: float | int) -> None:
    inner = Judgement(fluent=False, why="", inner={"n": number})
    judgement = Judgement(fluent=True, why="short", inner={"second": inner})
    fields = judgement.model_dump()
    assert scores.flattened("j", fields) == scores.flattened("j", judgement)
    assert list(scores.flattened("j", judgement).values()) == [1, 0, number]


def scorer(score: Any, column_map: Mapping[str, str] | None = None) -> Any:
    """What there is to see of a ``weave.Scorer``."""
    return SimpleNamespace(score=score, column_map=column_map)


ROW = {"output": "c", "prompt": "p"}


@pytest.mark.clause("WEAVE-4")
@pytest.mark.parametrize(
    ("one", "expected"),
    [
        (scorer(lambda output: 0), {"output": "c"}),
        (scorer(lambda *, output, prompt: 0), ROW),
        (scorer(lambda prompt, output, threshold=1: 0), ROW),
        (scorer(lambda output, question: 0, {"question": "prompt"}), {"output": "c", "question": "p"}),
        (scorer(lambda output, prompt, question: 0, {"question": "prompt"}), {**ROW, "question": "p"}),
        (scorer(lambda output, question: 0, {"question": "another column"}), {"output": "c"}),
        (scorer(lambda output, **row: 0), {**ROW, "inputs": {"prompt": "p"}}),
        (scorer(lambda output, question, **row: 0, {"question": "prompt"}), {"output": "c", "question": "p"}),
    ],
)
def test_a_scorer_gets_the_completion_as_output_and_the_prompt_where_it_takes_it(
    one: Any, expected: dict[str, Any]
) -> None:
    assert expected == scores.arguments_of(one, "p", "c")


# Predictions that are scored


async def slow(prompt: str, completion: str) -> float:
    return len(prompt) / 4


async def broken(prompt: str, completion: str) -> float:
    raise LookupError(prompt)


@pytest.mark.clause("WEAVE-4")
def test_every_scorer_is_asked_in_order_and_those_that_fail_are_warned_of() -> None:
    asked: list[str] = []

    def asking(name: str, result: Any) -> Any:
        def one(prompt: str, completion: str) -> Any:
            asked.append(f"{name}: {prompt} {completion}")
            return result

        return one

    scorers = {
        "text": asking("text", "yes"),
        "number": asking("number", np.float32(0.5)),
        "slow": slow,
        "broken": broken,
        "raises": lambda prompt, completion: {}[completion],
        "a function's dict": asking("dict", {"a": 1.0}),
        "last": asking("last", True),
    }
    with logged_warnings() as warned:
        found = scores.scored(scorers, "the prompt", "its end")
    assert found == {name: {} for name in scorers} | {
        "number": {"number": 0.5},
        "slow": {"slow": 2.5},
        "last": {"last": 1},
    }
    assert list(scorers) == list(found)
    assert asked == [f"{name}: the prompt its end" for name in ("text", "number", "dict", "last")]
    assert len(warned) == 4
    for message, name in zip(warned, ("text", "broken", "raises", "a function's dict"), strict=True):
        assert repr(name) in message
        assert "'the prompt'" in message


@pytest.mark.clause("WEAVE-8")
@pytest.mark.parametrize(
    "given_scorers", [[len], "len", {"a": 1}, {"": len}, {" ": len}, {1: len}, {"a": None}], ids=repr
)
def test_scorers_are_functions_by_name(given_scorers: Any) -> None:
    with pytest.raises(ValueError, match="scorers"):
        scores.require_scorers(given_scorers)


# What a summary says


@pytest.mark.clause("WEAVE-5")
@given(values=st.lists(finite, min_size=1, max_size=20))
def test_a_mean_is_the_float64_next_to_the_exact_one(values: list[float]) -> None:
    found = scores.mean(values)
    exact = sum(map(Fraction, values)) / len(values)
    neighbours = [math.nextafter(found, direction) for direction in (-math.inf, math.inf)]
    error = abs(Fraction(found) - exact)
    assert all(error <= abs(Fraction(other) - exact) for other in neighbours if math.isfinite(other))
    assert min(values) <= found <= max(values)


@pytest.mark.clause("WEAVE-5")
@given(value=numbers, count=st.integers(1, 10), seed=st.randoms(use_true_random=False))
def test_a_mean_of_equal_scores_is_that_score_and_order_changes_none(value: float, count: int, seed: Any) -> None:
    assert float(value) == scores.mean([value] * count)
    mixed = [value, *(seed.uniform(-1, 1) for _ in range(count))]
    assert scores.mean(mixed) == scores.mean(seed.sample(mixed, len(mixed)))


predictions = st.lists(
    st.fixed_dictionaries(
        {name: st.just({}) | st.dictionaries(st.sampled_from([f"{name}.x", f"{name}.y"]), numbers) for name in "ab"}
    ),
    max_size=6,
)


@pytest.mark.clause("WEAVE-5")
@given(of_predictions=predictions)
def test_a_summary_counts_and_averages_what_there_is(of_predictions: list[dict[str, scores.Scores]]) -> None:
    found = scores.summary(["a", "b"], of_predictions)
    every = {}
    for scored in of_predictions:
        for name, number in (scored["a"] | scored["b"]).items():
            every.setdefault(f"avg_{name}", []).append(number)
    assert len(of_predictions) == found.pop("total_predictions")
    failed = [scored for scored in of_predictions if not scored["a"] or not scored["b"]]
    assert len(of_predictions) - len(failed) == found.pop("successful_predictions")
    assert {name: scores.mean(given) for name, given in every.items()} == found


# What is evaluated, and what it is called


@pytest.mark.clause("WEAVE-1")
@given(key=names, own=st.none() | names, dataset_name=names)
def test_another_dataset_is_called_after_its_metrics(key: str, own: str | None, dataset_name: str) -> None:
    assert key == weave_eval.name_of_another(f"eval_{key}", own, dataset_name)
    assert (own or dataset_name) == weave_eval.name_of_another("eval", own, dataset_name)
    if key != "eval" and not key.startswith("eval_"):
        assert key == weave_eval.name_of_another(key, own, dataset_name)


def evaluated(what: Any, prefix: str, own: Any) -> list[tuple[str, Any, str]]:
    parts = weave_eval.parts_evaluated(what, prefix, own, "mine")
    return [(part.name, part.dataset, part.prefix) for part in parts]


@pytest.mark.clause("WEAVE-1")
def test_the_trainers_dataset_has_the_given_name_whatever_its_metrics_are_called() -> None:
    own = [{"prompt": "a"}]
    assert evaluated(own, "eval", own) == [("mine", own, "eval")]
    assert evaluated(own, "test", own) == [("mine", own, "test")]
    assert evaluated(list(own), "test", own) == [("test", own, "test")]


@pytest.mark.clause("WEAVE-1")
def test_each_of_a_dict_of_datasets_is_evaluated_by_itself() -> None:
    own = {"x": [{"prompt": "a"}], "y/z": [{"prompt": "b"}]}
    both = [("mine/x", own["x"], "eval_x"), ("mine/y/z", own["y/z"], "eval_y/z")]
    assert evaluated(own, "eval", own) == both
    for key, one in zip(own, both, strict=True):
        assert evaluated(key, f"eval_{key}", own) == [one]
        assert evaluated(own[key], f"eval_{key}", own) == [one]
    others = {"x": [{"prompt": "c"}]}
    assert evaluated(others, "test", own) == [("test_x", others["x"], "test_x")]
    assert evaluated(others["x"], "eval_x", own) == [("x", others["x"], "eval_x")]


@pytest.mark.clause("WEAVE-1")
def test_a_dataset_that_has_a_name_keeps_it_where_its_metrics_say_nothing() -> None:
    dataset = Dataset.from_dict({"prompt": ["a"]})
    own = [{"prompt": "a"}]
    assert [part[0] for part in evaluated(dataset, "eval", own)] == ["mine"]
    dataset.info.dataset_name = "squad"
    assert [part[0] for part in evaluated(dataset, "eval", own)] == ["squad"]
    assert [part[0] for part in evaluated(dataset, "eval_other", own)] == ["other"]
    assert [part[0] for part in evaluated(dataset, "eval", dataset)] == ["mine"]


@pytest.mark.clause("WEAVE-3")
@pytest.mark.parametrize("name", ["qwen2", "gpt2", "odd"])
def test_a_model_is_called_after_its_class(name: str) -> None:
    model = models.build(name)
    assert type(model).__name__ == whole.class_name(model)
