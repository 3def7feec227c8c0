"""The reference's functions of prompts and completions, each by itself."""

import hashlib
import json
import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationConfig
from truestep_fixtures import data
from truestep_reference import generation, prompts
from truestep_reference.generation import prompt_seed
from truestep_reference.log_completions import is_logging, steps_between

from truestep_spec_tests.properties.log_completions_cases import (
    CELLS,
    ENCODER_DECODERS,
    END,
    NO_COUNTS,
    NO_MATTER,
    OPTIONS,
    SAMPLING,
    SPECIAL,
    TEXTS,
    TOKENIZERS,
    conversations,
    fewer,
    greedy,
    speaking,
    texts,
)

names = st.lists(st.sampled_from(["step", "prompt", "completion", "dataset", "topic", "eval_step", "eval_eval_step"]))

OWN = ["step", "prompt", "completion"]


def merged(**fields: Any) -> GenerationConfig:
    """A generation config with these fields, completed by a model's."""
    return generation.merged(GenerationConfig(**fields), speaking("qwen2"))


# When


@pytest.mark.clause("LOGC-1")
@given(freq=st.integers(1, 50))
def test_loggings_are_the_multiples_of_the_interval_and_not_zero(freq: int) -> None:
    assert list(range(freq, 200, freq)) == [t for t in range(200) if is_logging(t, freq=freq)]


@pytest.mark.clause("LOGC-1")
@given(share=st.integers(1, 99), max_steps=st.integers(1, 10**6))
def test_a_share_of_all_steps_is_rounded_up_to_whole_ones(share: int, max_steps: int) -> None:
    interval = steps_between(None, share / 100, max_steps)
    # The share is a float64 and its product is rounded: off by a part of 2·2⁻⁵³ at most, before it is rounded up.
    exact = Fraction(share, 100) * max_steps
    assert math.ceil(exact * (1 - Fraction(1, 2**51))) <= interval <= math.ceil(exact * (1 + Fraction(1, 2**51)))
    assert 1 <= interval <= max_steps


@pytest.mark.clause("LOGC-1")
@given(freq=st.integers(1, 1000), eval_steps=st.none() | st.floats(0, 1000), max_steps=st.integers(1, 1000))
def test_an_interval_that_is_given_is_the_one(freq: int, eval_steps: float | None, max_steps: int) -> None:
    assert freq == steps_between(freq, eval_steps, max_steps)
    assert freq == steps_between(None, freq, max_steps)


@pytest.mark.clause("LOGC-1")
@pytest.mark.parametrize("freq", NO_COUNTS, ids=repr)
def test_an_interval_is_a_count(freq: Any) -> None:
    with pytest.raises(ValueError, match="freq"):
        steps_between(freq, 10, 100)


# Where a prompt comes from, and what is shown with it


@pytest.mark.clause("LOGC-11")
@given(columns=names, taken=st.sampled_from([OWN, [*OWN, "dataset"]]))
def test_every_column_has_one_name_of_its_own_which_ends_with_its_name(columns: list[str], taken: list[str]) -> None:
    found = prompts.named(columns, taken)
    assert list(dict.fromkeys(columns)) == list(found)
    assert len(found) == len(set(found.values()) - set(taken))
    for column, title in found.items():
        assert title.endswith(column)
        assert title.removesuffix(column) == "eval_" * title.removesuffix(column).count("eval_")
        assert title == column or column in taken or column in found.values()


@pytest.mark.clause("LOGC-11")
@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=6,
    )
)
def test_a_cell_is_a_value_of_json_and_others_are_shown_in_json_where_they_can_be(value: Any) -> None:
    shown = prompts.cell(value)
    assert repr(shown) == repr(json.loads(json.dumps(shown, allow_nan=False)))
    if isinstance(value, list | dict):
        try:
            json.dumps(value, allow_nan=False)
        except ValueError:
            assert str(value) == shown
        else:
            assert value == json.loads(str(shown))
    elif not isinstance(value, float) or math.isfinite(value):
        assert repr(value) == repr(shown)
    else:
        assert str(value) == shown


@pytest.mark.clause("LOGC-11")
@pytest.mark.parametrize(("value", "expected"), CELLS, ids=repr)
def test_a_cell_of_any_type_is_shown(value: Any, expected: Any) -> None:
    assert repr(expected) == repr(prompts.cell(value))


@pytest.mark.clause("LOGC-2")
@given(conversation=conversations())
def test_a_conversation_is_rendered_up_to_where_the_assistant_goes_on(conversation: list[dict[str, Any]]) -> None:
    text = prompts.rendered(conversation, data.tokenizer())
    whole = "".join(f"<|{message['role']}|>{message['content']}{END}" for message in conversation)
    expected = whole.removesuffix(END) if conversation[-1]["role"] == "assistant" else f"{whole}<|assistant|>"
    assert expected == text


# What the model reads


@pytest.mark.clause("LOGC-2")
@pytest.mark.parametrize("is_encoder_decoder", [False, True])
@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=texts)
@fewer
def test_tokens_are_those_of_the_text_between_those_that_the_tokenizer_adds(
    name: str, is_encoder_decoder: bool, text: str
) -> None:
    tokenizer = TOKENIZERS[name]()
    own = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    tokens = prompts.encode(text, tokenizer, is_rendered=False, is_encoder_decoder=is_encoder_decoder)
    first, last = tokenizer.bos_token_id, tokenizer.eos_token_id
    begins = name in ("begins", "begins and ends", "begins with its end") and own[:1] != [first]
    ends = name in ("ends", "begins and ends") and is_encoder_decoder
    expected = [*([first] if begins else []), *own, *([last] if ends else [])]
    assert (expected or [last if first is None else first]) == tokens


@pytest.mark.clause("LOGC-2")
@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=texts.filter(len))
@fewer
def test_what_a_template_rendered_is_read_as_it_is(name: str, text: str) -> None:
    tokens = prompts.encode(text, TOKENIZERS[name](), is_rendered=True, is_encoder_decoder=False)
    assert data.tokenizer()(text, verbose=False)["input_ids"] == tokens
    assert text == data.tokenizer().decode(tokens)


@pytest.mark.clause("LOGC-2")
@given(text=texts.filter(len), room=st.integers(1, 40) | st.just(math.inf))
def test_what_is_left_of_a_prompt_are_its_last_tokens_and_their_text(text: str, room: float) -> None:
    tokenizer = data.tokenizer()
    tokens = tokenizer(text, verbose=False)["input_ids"]
    shown, kept = prompts.cut(text, tokens, room, tokenizer)
    left_out = len(tokens) - len(kept)
    assert min(room, len(tokens)) == len(kept)
    assert tokens[left_out:] == kept
    assert shown == (f"[{left_out} tokens left out] {tokenizer.decode(kept)}" if left_out else text)


@pytest.mark.clause("LOGC-2")
@given(
    window=st.integers(2, 200) | st.just(math.inf),
    limits=st.fixed_dictionaries(
        {}, optional={"max_new_tokens": st.integers(1, 200), "max_length": st.integers(2, 200)}
    ),
    prompt=st.integers(1, 400),
)
def test_prompt_and_new_tokens_fit_into_the_window(window: float, limits: dict[str, int], prompt: int) -> None:
    config = GenerationConfig(**limits)
    count = limits.get("max_new_tokens", 20 if "max_length" not in limits else 1)
    if count >= window:
        with pytest.raises(ValueError, match="max_new_tokens"):
            generation.room(config, window, is_encoder_decoder=False)
        return
    room = generation.room(config, window, is_encoder_decoder=False)
    length = int(min(prompt, room))
    new = generation.new_tokens(config, window, length, is_encoder_decoder=False)
    assert new >= 1
    assert length + new <= window
    if "max_new_tokens" in limits or "max_length" not in limits:
        assert count == new
        assert room == window - count
    else:
        assert length + new == min(limits["max_length"], window)


@pytest.mark.clause("LOGC-2")
@given(window=st.integers(1, 200), limit=st.integers(1, 400))
def test_of_an_encoder_decoder_a_prompt_has_the_window_for_itself(window: int, limit: int) -> None:
    config = GenerationConfig(max_new_tokens=limit)
    assert window == generation.room(config, window, is_encoder_decoder=True)
    assert limit == generation.new_tokens(config, window, window, is_encoder_decoder=True)


# What the model says


@pytest.mark.clause("LOGC-3")
@pytest.mark.parametrize("name", ["qwen2", "gpt2", "mamba", *ENCODER_DECODERS])
def test_a_completion_is_made_of_the_likeliest_tokens(name: str) -> None:
    model, tokenizer = speaking(name).eval(), data.tokenizer()
    for text in TEXTS[::2]:
        tokens = tokenizer(text)["input_ids"] or [data.END]
        config = generation.merged(GenerationConfig(eos_token_id=data.END), model)
        expected = greedy(model, tokens, 6)
        assert expected == generation.complete(model, tokens, 6, config, tokenizer, torch.device("cpu"))
        # Asked for by an option that changes nothing, transformers' own loop comes to the same.
        config.suppress_tokens = [tokenizer.convert_tokens_to_ids(SPECIAL[0])]
        assert not generation.is_greedy(config)
        assert expected == generation.complete(model, tokens, 6, config, tokenizer, torch.device("cpu"))


@pytest.mark.clause("LOGC-3")
def test_options_that_change_the_next_token_are_told_from_those_that_do_not() -> None:
    stopping_only = ("tokens in all", "several ends", "no end")
    for name, fields in {**OPTIONS, **SAMPLING}.items():
        assert generation.is_greedy(merged(**fields)) == (name in stopping_only), name
    for name, fields in NO_MATTER.items():
        assert generation.is_greedy(merged(**fields)), name


@pytest.mark.clause("LOGC-3")
def test_a_config_that_is_given_comes_before_the_models_and_neither_is_changed() -> None:
    model: Any = speaking("qwen2")
    given_config = GenerationConfig(max_new_tokens=3, temperature=0.5)
    before = given_config.to_dict(), model.generation_config.to_dict()
    found = generation.merged(given_config, model)
    assert (3, 0.5, model.generation_config.eos_token_id) == (
        found.max_new_tokens,
        found.temperature,
        found.eos_token_id,
    )
    assert model.generation_config.eos_token_id == generation.merged(None, model).eos_token_id
    found.max_new_tokens = found.eos_token_id = 7
    assert before == (given_config.to_dict(), model.generation_config.to_dict())


# What it draws with


@pytest.mark.clause("LOGC-10")
def test_a_seed_is_the_specified_digest() -> None:
    # From `printf 42/100/0 | b2sum --length 64`, which prints b18ac0adab22c99a.
    assert prompt_seed(42, 100, 0) == 0xB18AC0ADAB22C99A % 2**63


@pytest.mark.clause("LOGC-10")
@given(seed=st.integers(0, 2**64), step=st.integers(0, 10**9), index=st.integers(0, 10**6))
def test_a_seed_is_what_a_generator_takes(seed: int, step: int, index: int) -> None:
    found = prompt_seed(seed, step, index)
    assert 0 <= found < 2**63
    digest = hashlib.blake2b(f"{seed}/{step}/{index}".encode("ascii"), digest_size=8).digest()
    assert found % 256 == digest[-1]
    assert found >> 56 == digest[0] % 128
    assert found == torch.Generator().manual_seed(found).initial_seed()


@pytest.mark.clause("LOGC-10")
def test_seeds_of_other_seeds_steps_and_prompts_are_others() -> None:
    # Of n numbers below 2⁶³ that are drawn at random, two are equal with a probability of at most n²/2⁶⁴.
    found = {prompt_seed(seed, step, index) for seed in range(20) for step in range(20) for index in range(20)}
    assert len(found) == 20**3
