"""Rows of prompts of every kind, by every kind of tokenizer and model, beside the reference's."""

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from truestep_fixtures import data, topologies

from truestep_spec_tests.implementation import Implementation
from truestep_spec_tests.properties.log_completions_cases import (
    ENCODER_DECODERS,
    KINDS,
    OPTIONS,
    SAMPLING,
    SPEAKING,
    TEXTS,
    TOKENIZERS,
    Row,
    Subject,
    conversations,
    fewer,
    rows_of,
    speaking,
    speaking_in_special_tokens,
    text_sets,
)

ways = pytest.mark.parametrize("generation", [{}, SAMPLING["temperature"]], ids=["greedy", "sampling"])


class Both:
    """The callback under test and the reference, which complete the same prompts."""

    def __init__(self, implementation: Implementation, directory: Any) -> None:
        args = topologies.training_arguments("single", directory, max_steps=20)
        self.subject = Subject(implementation, args)
        self.reference = Subject(Implementation("truestep_reference"), args)

    def rows(self, kind: str, rows: list[Row], changes: Mapping[str, Any], **options: Any) -> list[Row]:
        """The rows of both, which are equal.

        Args:
            kind: Of dataset, see `KINDS`.
            rows: Its rows.
            changes: Attributes of `Subject`.
            options: Arguments of the constructor.
        """
        expected = self.reference.on(**changes).rows(KINDS[kind](rows), **options)
        assert expected == self.subject.on(**changes).rows(KINDS[kind](rows), **options)
        return expected


@pytest.fixture(scope="module")
def both(implementation: Implementation, tmp_path_factory: pytest.TempPathFactory) -> Both:
    return Both(implementation, tmp_path_factory.mktemp("out"))


def saying(**fields: Any) -> dict[str, Any]:
    return {"max_new_tokens": 4, **fields}


@pytest.mark.clause("LOGC-2", "LOGC-3", "LOGC-4")
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@given(prompts=text_sets, seed=st.integers(0, 9), sampling=st.sampled_from([{}, SAMPLING["temperature"]]))
@fewer
def test_rows_of_any_texts_are_the_references(
    both: Both, tokenizer: str, prompts: list[str], seed: int, sampling: dict[str, Any]
) -> None:
    changes = {"tokenizer": TOKENIZERS[tokenizer](), "generation": saying(**sampling), "fields": {"seed": seed}}
    found = both.rows("list", rows_of(prompts), changes)
    assert len(prompts) == len(found)


@pytest.mark.clause("LOGC-2", "LOGC-3", "LOGC-4")
@given(found=st.lists(conversations(), min_size=1, max_size=4), kind=st.sampled_from(["list", "dataset"]))
@fewer
def test_rows_of_any_conversations_are_the_references(both: Both, found: list[Any], kind: str) -> None:
    both.rows(kind, rows_of(found), {})


@pytest.mark.clause("LOGC-2", "LOGC-3", "LOGC-4")
@given(
    prompts=text_sets,
    limits=st.sampled_from(["max_new_tokens", "max_length"]).flatmap(
        lambda name: st.fixed_dictionaries({name: st.integers(2, 12)})
    ),
    window=st.integers(13, 40),
)
@fewer
def test_rows_in_any_window_are_the_references(
    both: Both, prompts: list[str], limits: dict[str, int], window: int
) -> None:
    tokenizer = data.tokenizer()
    tokenizer.model_max_length = window
    both.rows("list", rows_of(prompts), {"tokenizer": tokenizer, "generation": limits})


@pytest.mark.clause("LOGC-2", "LOGC-11")
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_datasets_of_any_kind_are_the_references(both: Both, kind: str) -> None:
    found = both.rows(kind, rows_of(["The", "", "Zwölf"]), {}, num_prompts=2, columns=("number",))
    assert [row["number"] for row in found] == [0, 1]


@pytest.mark.clause("LOGC-2", "LOGC-11")
@pytest.mark.parametrize("prompts", data.PROMPTS)
def test_rows_with_columns_are_the_references(both: Both, prompts: str) -> None:
    dataset = data.prompts(prompts)
    columns = ("topic", "difficulty", "weight", "hard", "source", "prompt")
    expected = both.reference.rows(dataset, num_prompts=3, columns=columns)
    assert expected == both.subject.rows(dataset, num_prompts=3, columns=columns)


@pytest.mark.clause("LOGC-3", "LOGC-4", "LOGC-10")
@pytest.mark.parametrize(
    ("name", "generation"),
    [*((name, {}) for name in SPEAKING), *((name, SAMPLING["temperature"]) for name in SPEAKING[::3])],
)
def test_rows_of_every_model_are_the_references(both: Both, name: str, generation: dict[str, Any]) -> None:
    tokenizer = TOKENIZERS["ends" if name in ENCODER_DECODERS else "adds nothing"]()
    changes = {"model": speaking(name), "tokenizer": tokenizer, "generation": saying(**generation)}
    both.rows("list", rows_of(TEXTS), changes)


@pytest.mark.clause("LOGC-3", "LOGC-4")
@pytest.mark.parametrize("generation", [*OPTIONS.values(), *SAMPLING.values()], ids=[*OPTIONS, *SAMPLING])
def test_rows_with_any_option_are_the_references(both: Both, generation: dict[str, Any]) -> None:
    both.rows("list", rows_of(TEXTS[:9]), {"generation": {"max_new_tokens": 6, **generation}})


@pytest.mark.clause("LOGC-3")
@ways
def test_rows_of_a_model_that_says_special_tokens_are_the_references(both: Both, generation: dict[str, Any]) -> None:
    changes = {"model": speaking_in_special_tokens(), "generation": {"max_new_tokens": 8, **generation}}
    both.rows("list", rows_of(TEXTS), changes)
