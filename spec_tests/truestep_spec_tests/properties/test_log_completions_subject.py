"""What holds of any LogCompletionsCallback, in a single process, with models that are made on the spot."""

import copy
import json
import logging
import math
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainerCallback
from truestep_fixtures import data, topologies
from truestep_fixtures.models import VOCABULARY
from truestep_fixtures.training import train

from truestep_spec_tests.implementation import Implementation
from truestep_spec_tests.observe import completions
from truestep_spec_tests.properties.log_completions_cases import (
    BEGIN,
    CELLS,
    ENCODER_DECODERS,
    END,
    KINDS,
    LEARNED_TOKENS,
    NO_COUNTS,
    NO_DATASETS,
    NO_MATTER,
    OPTIONS,
    SAMPLING,
    SPEAKING,
    SPECIAL,
    TEXTS,
    TITLES,
    TOKENIZERS,
    WINDOW,
    Processor,
    Subject,
    fewer,
    greedy,
    rows_of,
    speaking,
    speaking_in_special_tokens,
    text_sets,
    texts,
)

CONVERSATION = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def subject(implementation: Implementation, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return Subject(
        implementation, topologies.training_arguments("single", tmp_path_factory.mktemp("out"), max_steps=20)
    )


# When it logs


@pytest.mark.clause("LOGC-1")
@given(freq=st.integers(1, 5), steps=st.lists(st.integers(1, 20), unique=True, max_size=8).map(sorted))
@fewer
def test_rows_are_added_at_the_multiples_of_the_interval(subject: Subject, freq: int, steps: list[int]) -> None:
    found = subject.saying(max_new_tokens=1).rows(rows_of("ab"), steps, freq=freq)
    expected = [(t, prompt) for t in steps if t % freq == 0 for prompt in "ab"]
    assert expected == [(row["step"], row["prompt"]) for row in found]


@pytest.mark.clause("LOGC-1")
def test_a_step_is_logged_once_and_the_beginning_not_at_all(subject: Subject) -> None:
    trainer, table = subject.begin(rows_of("a"))
    trainer.fire("on_step_begin")
    assert table() == []
    trainer.step(1)
    trainer.fire("on_step_end")
    assert [row["step"] for row in table()] == [1]


@pytest.mark.clause("LOGC-1")
def test_a_callback_begins_anew_with_each_training(subject: Subject) -> None:
    trainer, table = subject.begin(rows_of("a"), freq=2)
    for _ in range(2):
        for t in (1, 2):
            trainer.step(t)
        assert [row["step"] for row in table()] == [2]
        trainer.train_end()
        trainer.train_begin()


@pytest.mark.clause("LOGC-1")
@pytest.mark.parametrize(
    ("eval_steps", "max_steps", "expected"),
    [(3, 10, [3, 6, 9]), (0.3, 10, [3, 6, 9]), (0.3, 11, [4, 8]), (0.01, 5, [1, 2, 3, 4, 5]), (1, 3, [1, 2, 3])],
)
def test_without_an_interval_it_is_that_of_evaluations(
    subject: Subject, eval_steps: float, max_steps: int, expected: list[int]
) -> None:
    by_evaluations = subject.on(fields={"eval_steps": eval_steps, "max_steps": max_steps})
    found = by_evaluations.rows(rows_of("a"), range(1, max_steps + 1), freq=None)
    assert expected == [row["step"] for row in found]


@pytest.mark.clause("LOGC-1")
def test_the_interval_of_evaluations_is_that_of_the_training_that_goes_on_not_of_its_checkpoint(
    subject: Subject,
) -> None:
    # A state that comes from a checkpoint has the interval of the training that wrote it.
    trainer, table = subject.on(fields={"eval_steps": 2}).begin(rows_of("a"), freq=None)
    trainer.state.eval_steps = 500
    for t in (1, 2, 3, 4):
        trainer.step(t)
    assert [row["step"] for row in table()] == [2, 4]


@pytest.mark.clause("LOGC-1")
@pytest.mark.parametrize("freq", NO_COUNTS, ids=repr)
def test_an_interval_that_is_no_count_is_named_with_its_value(subject: Subject, freq: Any) -> None:
    message = subject.on(fields={"eval_steps": 5}).refusal(rows_of("a"), freq=freq)
    assert "freq" in message
    assert repr(freq) in message


@pytest.mark.clause("LOGC-1")
@pytest.mark.parametrize("eval_steps", [None, 0])
def test_without_any_interval_there_is_an_error(subject: Subject, eval_steps: int | None) -> None:
    message = subject.on(fields={"eval_steps": eval_steps}).refusal(rows_of("a"), freq=None)
    assert "freq" in message
    assert "eval_steps" in message


@pytest.mark.clause("LOGC-1", "LOGC-2")
def test_integers_of_numpy_are_integers(subject: Subject) -> None:
    found = subject.rows(rows_of("abc"), (1, 2), freq=np.int64(2), num_prompts=np.int32(2))
    assert [(row["step"], row["prompt"]) for row in found] == [(2, "a"), (2, "b")]


@pytest.mark.clause("LOGC-2")
def test_a_real_training_logs_the_prompts_in_their_order(implementation: Implementation, tmp_path: Any) -> None:
    made: list[Any] = []

    def attach(trainer: Any) -> Sequence[TrainerCallback]:
        made.append(
            implementation.LogCompletionsCallback(freq=2, num_prompts=3, generation_config=None, trainer=trainer)
        )
        return made

    dataset = data.prompts("mixed")
    result = train(
        "single",
        "gpt2",
        output_dir=tmp_path,
        attach=attach,
        steps=5,
        eval_dataset=dataset,
        processing_class=data.tokenizer(),
    )
    table = [json.loads(row) for row in completions(made[0], result.args, result.state)]
    expected = [(t, prompt) for t in (2, 4) for prompt in dataset["prompt"][:3]]
    assert expected == [(row["step"], row["prompt"]) for row in table]


# Where prompts come from


@pytest.mark.clause("LOGC-2", "LOGC-11")
@pytest.mark.parametrize("number", [None, 1, 3, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_a_dataset_of_any_kind_gives_its_first_prompts(subject: Subject, kind: str, number: int | None) -> None:
    prompts = ["The quick", "", "ö", "a", "The quick"]
    found = subject.saying(max_new_tokens=1).rows(
        KINDS[kind](rows_of(prompts)), num_prompts=number, columns=("number",)
    )
    assert list(enumerate(prompts[:number])) == [(row["number"], row["prompt"]) for row in found]
    assert list(found[0]) == ["step", "prompt", "completion", "number"]


@pytest.mark.clause("LOGC-2")
@pytest.mark.parametrize("kind", ["dataset", "dataset in arrays", "dataset in tensors", "stream", "list"])
def test_a_conversation_survives_a_dataset_of_any_kind(subject: Subject, kind: str) -> None:
    conversations = [CONVERSATION, [{"role": "system", "content": "be", "name": "x"}, *CONVERSATION]]
    expected = ["<|user|>hi<|end|><|assistant|>", "<|system|>be<|end|><|user|>hi<|end|><|assistant|>"]
    assert expected == [row["prompt"] for row in subject.rows(KINDS[kind](rows_of(conversations)))]


@pytest.mark.clause("LOGC-2")
def test_of_an_endless_stream_no_more_is_taken_than_asked_for(subject: Subject) -> None:
    taken: list[int] = []

    def endless() -> Any:
        while True:
            taken.append(len(taken))
            yield {"prompt": str(taken[-1])}

    assert [row["prompt"] for row in subject.rows(endless(), num_prompts=3)] == ["0", "1", "2"]
    assert taken == [0, 1, 2]


@pytest.mark.clause("LOGC-2")
@pytest.mark.parametrize("number", [None, 1, 2])
def test_of_each_of_several_datasets_the_first_prompts_are_taken_with_its_name(
    subject: Subject, number: int | None
) -> None:
    parts = {"dev": ["a", "b", "c"], "test": ["a", "d", "e"]}
    datasets = {"dev": Dataset.from_list(rows_of(parts["dev"])), "test": iter(rows_of(parts["test"]))}
    found = subject.rows(datasets, num_prompts=number)
    expected = [(name, prompt) for name, part in parts.items() for prompt in part[:number]]
    assert expected == [(row["dataset"], row["prompt"]) for row in found]
    assert list(found[0]) == ["step", "prompt", "completion", "dataset"]


@pytest.mark.clause("LOGC-2")
@pytest.mark.parametrize(("dataset", "found"), NO_DATASETS, ids=lambda value: repr(value)[:40])
def test_a_dataset_without_prompts_is_an_error_that_says_what_was_found(
    subject: Subject, dataset: Any, found: str
) -> None:
    message = subject.refusal(dataset)
    assert "eval_dataset" in message
    assert found.replace("\\", "") in message


@pytest.mark.clause("LOGC-2")
def test_an_empty_stream_is_an_error(subject: Subject) -> None:
    assert "eval_dataset" in subject.refusal(iter([]))


@pytest.mark.clause("LOGC-2")
@pytest.mark.parametrize("number", NO_COUNTS, ids=repr)
def test_a_number_of_prompts_that_is_no_count_is_named_with_its_value(subject: Subject, number: Any) -> None:
    message = subject.refusal(rows_of("a"), num_prompts=number)
    assert "num_prompts" in message
    assert repr(number) in message


@pytest.mark.clause("LOGC-2")
@pytest.mark.parametrize(
    ("dataset", "number", "warned"),
    [
        (rows_of("ab"), 3, True),
        (rows_of("ab"), 2, False),
        (rows_of("ab"), 1, False),
        (rows_of("ab"), None, False),
        ({"dev": rows_of("ab"), "test": rows_of("a")}, 2, True),
        ({"dev": rows_of("ab"), "test": rows_of("ab")}, 2, False),
        (Dataset.from_list(rows_of("ab")).to_iterable_dataset(), 3, True),
    ],
    ids=str,
)
def test_a_warning_says_if_there_are_fewer_prompts_than_asked_for(
    subject: Subject, caplog: pytest.LogCaptureFixture, dataset: Any, number: int | None, warned: bool
) -> None:
    with caplog.at_level(logging.WARNING):
        found = subject.rows(dataset, num_prompts=number)
    warnings = [text for text in caplog.messages if "num_prompts" in text]
    assert warned == (len(warnings) == 1)
    assert all(f"num_prompts={number}" in text and str(len(found)) in text for text in warnings)


@pytest.mark.clause("LOGC-2")
def test_without_a_tokenizer_there_is_an_error(subject: Subject) -> None:
    assert "processing_class" in subject.on(tokenizer=None).refusal(rows_of("a"))


@pytest.mark.clause("LOGC-2")
def test_a_model_that_cannot_generate_is_an_error_that_names_it(subject: Subject) -> None:
    assert "Linear" in subject.on(model=torch.nn.Linear(2, 2)).refusal(rows_of("a"))


@pytest.mark.clause("LOGC-2")
def test_a_conversation_without_a_template_is_an_error(subject: Subject) -> None:
    tokenizer = data.tokenizer()
    tokenizer.chat_template = None
    assert "chat_template" in subject.on(tokenizer=tokenizer).refusal(rows_of(["a", CONVERSATION]))
    assert [row["prompt"] for row in subject.on(tokenizer=tokenizer).rows(rows_of("a"))] == ["a"]


# What the model reads


@pytest.mark.clause("LOGC-2")
@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=texts)
@fewer
def test_a_text_is_read_as_it_is_behind_one_beginning_and_before_no_end_that_was_added(
    subject: Subject, name: str, text: str
) -> None:
    tokens = data.tokenizer()(text)["input_ids"]  # it adds nothing
    begin = {"begins": BEGIN, "begins and ends": BEGIN, "begins with its end": END}.get(name)
    first = data.tokenizer().convert_tokens_to_ids(begin) if begin else None
    expected = tokens if first is None or tokens[:1] == [first] else [first, *tokens]
    if not expected:
        expected = data.tokenizer().convert_tokens_to_ids([BEGIN if name == "knows a beginning" else END])
    room = WINDOW - 4
    assert expected[-room:] == subject.on(tokenizer=TOKENIZERS[name]()).read(text)


@pytest.mark.clause("LOGC-2")
@pytest.mark.parametrize("name", ENCODER_DECODERS)
@pytest.mark.parametrize(
    ("text", "expected"), [("hi", f"hi{END}"), ("", END), (f"hi{END}", f"hi{END}{END}"), (BEGIN, f"{BEGIN}{END}")]
)
def test_an_encoder_reads_the_end_of_a_text(subject: Subject, name: str, text: str, expected: str) -> None:
    reading = subject.on(model=speaking(name), tokenizer=TOKENIZERS["ends"]())
    assert data.tokenizer()(expected)["input_ids"] == reading.read(text)


@pytest.mark.clause("LOGC-2")
@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("begin", ["{{ bos_token }}", ""])
def test_a_conversation_is_read_as_its_template_renders_it(subject: Subject, name: str, begin: str) -> None:
    tokenizer = TOKENIZERS[name]()
    tokenizer.chat_template = begin + "{% for m in messages %}{{ m['content'] }}" + END + "{% endfor %}"
    expected = f"{tokenizer.bos_token or '' if begin else ''}hi{END}"
    (row,) = subject.on(tokenizer=tokenizer).rows(rows_of([CONVERSATION]))
    assert expected == row["prompt"]
    assert data.tokenizer()(expected)["input_ids"] == subject.on(tokenizer=tokenizer).read(CONVERSATION)


@pytest.mark.clause("LOGC-2")
@pytest.mark.parametrize(
    ("roles", "expected"),
    [
        (["user"], "<|user|>0<|end|><|assistant|>"),
        (["system", "user"], "<|system|>0<|end|><|user|>1<|end|><|assistant|>"),
        (["user", "assistant"], "<|user|>0<|end|><|assistant|>1"),
        (["assistant"], "<|assistant|>0"),
        (["user", "assistant", "user"], "<|user|>0<|end|><|assistant|>1<|end|><|user|>2<|end|><|assistant|>"),
    ],
)
def test_the_assistants_message_goes_on_or_begins(subject: Subject, roles: list[str], expected: str) -> None:
    conversation = [{"role": role, "content": str(number)} for number, role in enumerate(roles)]
    (row,) = subject.rows(rows_of([conversation]))
    assert expected == row["prompt"]
    assert data.tokenizer()(expected)["input_ids"] == subject.read(conversation)


@pytest.mark.clause("LOGC-2")
def test_a_processors_tokenizer_is_used_and_its_template(subject: Subject) -> None:
    prompts = [*TEXTS[:4], CONVERSATION]
    expected = subject.rows(rows_of(prompts))
    assert expected == subject.on(tokenizer=Processor(data.tokenizer())).rows(rows_of(prompts))
    without = data.tokenizer()
    without.chat_template = None
    with_own = Processor(without, data.tokenizer().chat_template)
    assert expected == subject.on(tokenizer=with_own).rows(rows_of(prompts))


@pytest.mark.clause("LOGC-2")
def test_a_processors_template_renders_messages_of_several_parts(subject: Subject) -> None:
    template = "{% for m in messages %}{% for part in m['content'] %}[{{ part['text'] }}]{% endfor %}{% endfor %}"
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    (row,) = subject.on(tokenizer=Processor(data.tokenizer(), template)).rows(
        rows_of([[{"role": "user", "content": parts}]])
    )
    assert row["prompt"] == "[a][b]"


@pytest.mark.clause("LOGC-2")
@given(letters=st.integers(0, 300), new=st.integers(1, WINDOW - 1), limit=st.none() | st.integers(5, 200))
@fewer
def test_a_prompt_that_leaves_no_room_keeps_its_last_tokens_and_says_so(
    subject: Subject, letters: int, new: int, limit: int | None
) -> None:
    tokenizer = data.tokenizer()
    if limit is not None:
        tokenizer.model_max_length = limit
        new = min(new, limit - 1)
    text = "".join(random.Random(letters).choices("0123456789", k=letters)) + "."
    tokens = tokenizer(text, verbose=False)["input_ids"]
    room = min(WINDOW, limit or WINDOW) - new
    shortened = subject.on(tokenizer=tokenizer).saying(max_new_tokens=new, eos_token_id=list(range(VOCABULARY)))
    (row,) = shortened.rows(rows_of([text]))
    assert tokens[-room:] == shortened.read(text)
    left_out = len(tokens) - room
    expected = text if left_out <= 0 else f"[{left_out} tokens left out] {tokenizer.decode(tokens[-room:])}"
    assert expected == row["prompt"]


@pytest.mark.clause("LOGC-2")
@pytest.mark.parametrize("new", [WINDOW, WINDOW + 1, 10 * WINDOW])
def test_new_tokens_that_take_up_the_window_are_an_error(subject: Subject, new: int) -> None:
    message = subject.saying(max_new_tokens=new).refusal(rows_of("a"))
    assert str(new) in message
    assert str(WINDOW) in message


@pytest.mark.clause("LOGC-2")
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True}], ids=str)
def test_several_completions_of_a_prompt_are_an_error(subject: Subject, options: dict[str, Any]) -> None:
    message = subject.saying(num_return_sequences=3, **options).refusal(rows_of("a"))
    assert "num_return_sequences" in message
    assert "3" in message


@pytest.mark.clause("LOGC-2")
def test_an_encoder_has_the_window_for_a_prompt_alone(subject: Subject) -> None:
    reading = subject.on(model=speaking("bart"), tokenizer=TOKENIZERS["ends"]()).saying(max_new_tokens=60)
    tokens = data.tokenizer()("0" * 70)["input_ids"]
    (row,) = reading.rows(rows_of(["0" * 70]))
    assert f"[{len(tokens) + 1 - 64} tokens left out] " in row["prompt"]
    assert [*tokens[-63:], data.END] == reading.read("0" * 70)


@pytest.mark.clause("LOGC-2")
def test_a_learned_prompt_takes_up_room(subject: Subject) -> None:
    reading = subject.on(model=speaking("learned prompt")).saying(max_new_tokens=8)
    tokens = data.tokenizer()("0" * 200)["input_ids"]
    (row,) = reading.rows(rows_of(["0" * 200]))
    assert row["prompt"].startswith(f"[{len(tokens) - (WINDOW - LEARNED_TOKENS - 8)} tokens left out] ")


@pytest.mark.clause("LOGC-2")
def test_a_decoder_of_its_own_has_a_position_for_each_new_token(subject: Subject) -> None:
    writing = subject.on(model=speaking("bart"), tokenizer=TOKENIZERS["ends"]())
    assert len(writing.saying(max_new_tokens=64).rows(rows_of("a"))) == 1
    assert "64" in writing.saying(max_new_tokens=65).refusal(rows_of("a"))


@pytest.mark.clause("LOGC-2")
@pytest.mark.parametrize("generation", [None, {}, {"max_new_tokens": None}], ids=str)
def test_without_a_limit_there_are_as_many_new_tokens_as_transformers_makes(
    subject: Subject, generation: dict[str, Any] | None
) -> None:
    model = speaking("qwen2")
    tokens = data.tokenizer()("The quick")["input_ids"]
    kept = model.generation_config.eos_token_id
    try:
        model.generation_config.eos_token_id = data.END
        expected = data.tokenizer().decode(greedy(model.eval(), tokens, 20), skip_special_tokens=True)
        assert [expected] == subject.on(model=model, generation=generation).completed(["The quick"])
    finally:
        model.generation_config.eos_token_id = kept


# Completions


@pytest.mark.clause("LOGC-3")
@pytest.mark.parametrize("name", SPEAKING)
def test_a_completion_is_the_text_of_the_likeliest_tokens_up_to_the_end(subject: Subject, name: str) -> None:
    model = speaking(name).eval()
    tokenizer = TOKENIZERS["ends"]() if name in ENCODER_DECODERS else data.tokenizer()
    expected = []
    for text in TEXTS:
        tokens = tokenizer(text)["input_ids"] or [data.END]
        expected.append(tokenizer.decode(greedy(model, tokens, 6), skip_special_tokens=True))
    found = subject.on(model=model, tokenizer=tokenizer).saying(max_new_tokens=6).completed(TEXTS)
    assert expected == found
    assert len(set(found)) > len(TEXTS) / 3  # otherwise they say little


@pytest.fixture(scope="module")
def without_options(subject: Subject) -> list[str]:
    return subject.saying(max_new_tokens=8).completed(TEXTS)


@pytest.mark.clause("LOGC-3")
@pytest.mark.parametrize("name", OPTIONS)
def test_with_any_option_a_prompt_gets_what_it_would_get_alone(
    subject: Subject, without_options: list[str], name: str
) -> None:
    using = subject.saying(max_new_tokens=8).saying(**OPTIONS[name])
    together = using.completed(TEXTS)
    assert [using.completed([text])[0] for text in TEXTS[::4]] == together[::4]
    assert without_options != together  # otherwise the option says little


@pytest.mark.clause("LOGC-3")
@pytest.mark.parametrize("name", NO_MATTER)
def test_options_of_other_things_change_no_completion(subject: Subject, name: str) -> None:
    assert subject.completed(TEXTS) == subject.saying(**NO_MATTER[name]).completed(TEXTS)


@pytest.mark.clause("LOGC-3")
def test_a_stop_string_ends_a_completion(subject: Subject) -> None:
    plain = subject.saying(max_new_tokens=8)
    for before, after in zip(plain.completed(TEXTS), plain.saying(stop_strings=["K"]).completed(TEXTS), strict=True):
        assert before.partition("K")[0] + ("K" if "K" in before else "") == after


@pytest.mark.clause("LOGC-3")
@pytest.mark.parametrize("options", [{}, {"pad_token_id": 60}, {"num_beams": 2}], ids=str)
def test_a_stop_string_ends_a_completion_also_where_no_token_does(subject: Subject, options: dict[str, Any]) -> None:
    # Rows of a batch that have ended are not filled up there: they go on.
    model = copy.deepcopy(speaking("qwen2"))
    model.generation_config.eos_token_id = None
    stopping = subject.on(model=model).saying(
        max_new_tokens=8, eos_token_id=None, stop_strings=["ith", "K", "R"], **options
    )
    together = stopping.completed(TEXTS)
    assert [stopping.completed([text])[0] for text in TEXTS[6:]] == together[6:]
    assert len({len(found) for found in together[6:]}) > 1  # otherwise they end at the same time


@pytest.mark.clause("LOGC-3")
def test_a_limit_for_prompt_and_completion_together_leaves_the_rest_to_the_completion(subject: Subject) -> None:
    model, tokenizer = speaking("qwen2").eval(), data.tokenizer()
    expected = []
    for text in TEXTS:
        tokens = (tokenizer(text)["input_ids"] or [data.END])[-13:]
        expected.append(tokenizer.decode(greedy(model, tokens, 14 - len(tokens)), skip_special_tokens=True))
    assert expected == subject.on(generation={"max_length": 14}).completed(TEXTS)


@pytest.mark.clause("LOGC-3")
def test_neither_prompt_nor_special_tokens_are_in_a_completion(subject: Subject) -> None:
    model, tokenizer = speaking_in_special_tokens().eval(), data.tokenizer()
    tokens = [greedy(model, tokenizer(text)["input_ids"] or [data.END], 8) for text in TEXTS]
    special = set(tokenizer.convert_tokens_to_ids(list(SPECIAL)))
    assert any(found[-1] == data.END for found in tokens)
    assert any(special & set(found) - {data.END} for found in tokens)
    assert any(set(found) - special for found in tokens)
    expected = [tokenizer.decode([token for token in found if token not in special]) for found in tokens]
    assert expected == subject.on(model=model).saying(max_new_tokens=8).completed(TEXTS)


@pytest.mark.clause("LOGC-3", "LOGC-4")
@given(prompts=text_sets)
@fewer
def test_a_prompt_gets_the_same_completion_in_any_company(subject: Subject, prompts: list[str]) -> None:
    together = subject.completed(prompts)
    assert dict(zip(prompts, together, strict=True)) == {text: subject.completed([text])[0] for text in set(prompts)}
    assert [text for _, text in sorted(zip(prompts, together, strict=True))] == subject.completed(sorted(prompts))


# Independence


@pytest.mark.clause("LOGC-4")
@pytest.mark.parametrize("generation", [{}, *SAMPLING.values()], ids=str)
def test_the_size_of_batches_changes_no_completion(subject: Subject, generation: dict[str, Any]) -> None:
    saying = subject.having("batch_tokens").saying(**generation)
    expected = saying.completed(TEXTS)
    for batch_tokens in (1, 30, 100, 10**6):
        assert expected == saying.completed(TEXTS, batch_tokens=batch_tokens), batch_tokens


@pytest.mark.clause("LOGC-4")
@pytest.mark.parametrize("batch_tokens", NO_COUNTS, ids=repr)
def test_a_size_of_batches_that_is_no_count_is_an_error(subject: Subject, batch_tokens: Any) -> None:
    message = subject.having("batch_tokens").refusal(rows_of("a"), batch_tokens=batch_tokens)
    assert repr(batch_tokens) in message


@pytest.mark.clause("LOGC-4")
@pytest.mark.parametrize("size", [1, 3, 64])
def test_the_trainers_batch_size_changes_no_completion(subject: Subject, size: int) -> None:
    sized = subject.on(fields={"per_device_eval_batch_size": size, "per_device_train_batch_size": size})
    assert subject.completed(TEXTS) == sized.completed(TEXTS)


@pytest.mark.clause("LOGC-4", "LOGC-10")
@pytest.mark.parametrize("name", SAMPLING)
def test_a_sample_does_not_depend_on_what_is_completed_besides(subject: Subject, name: str) -> None:
    sampling = subject.saying(**SAMPLING[name])
    found = sampling.completed(TEXTS)
    others = [text if number % 3 else f"{text} and more of it" for number, text in enumerate(TEXTS)]
    kept = [text for number, text in enumerate(found) if number % 3]
    assert kept == [text for number, text in enumerate(sampling.completed(others)) if number % 3]
    assert found[:5] == sampling.completed(TEXTS, num_prompts=5)


# Sampling


@pytest.mark.clause("LOGC-10")
def test_samples_depend_on_seed_step_and_number_of_the_prompt_and_on_nothing_else(subject: Subject) -> None:
    sampling = subject.saying(max_new_tokens=8, **SAMPLING["temperature"])
    trainer, table = sampling.on(fields={"seed": 7}).begin(rows_of(["The", "The"]), freq=2)
    for t in range(1, 5):
        torch.manual_seed(t)  # no global generator has a part in it
        random.seed(t)
        np.random.seed(t)
        trainer.step(t)
    found = [row["completion"] for row in table()]
    assert len(set(found)) == 4
    again = sampling.on(fields={"seed": 7})
    assert found[2:] == again.completed(["The", "The"], steps=[4])
    assert found == again.completed(["The", "The"], steps=[2, 4])
    other = sampling.on(fields={"seed": 8}).completed(["The", "The"], steps=[2, 4])
    assert not set(found) & set(other)


@pytest.mark.clause("LOGC-10")
def test_prompts_are_numbered_over_all_datasets(subject: Subject) -> None:
    sampling = subject.saying(max_new_tokens=8, **SAMPLING["temperature"])
    apart = {"dev": rows_of(["The", "fox"]), "test": rows_of(["The"])}
    assert sampling.completed(["The", "fox", "The"]) == [row["completion"] for row in sampling.rows(apart)]


@pytest.mark.clause("LOGC-10")
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_samples_of_one_token_have_the_models_distribution(subject: Subject, temperature: float) -> None:
    # By the inequality of Dvoretzky, Kiefer and Wolfowitz, with Massart's constant, n samples have a distribution
    # function that is further than ε from the true one with a probability of at most 2·exp(−2nε²). It is 10⁻⁶ here.
    # The seeds are specified, so that a run comes to the same each time.
    n, outcomes = 400, 12
    epsilon = math.sqrt(math.log(2e6) / (2 * n))
    tokenizer, model = data.tokenizer(), speaking("qwen2").eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokenizer("The")["input_ids"]])).logits[0, -1]
    largest = logits.topk(outcomes)
    names = [tokenizer.decode([token], skip_special_tokens=True) for token in largest.indices.tolist()]
    assert outcomes == len(set(names))
    sampling = subject.saying(max_new_tokens=1, do_sample=True, top_k=outcomes, temperature=temperature)
    counts = Counter(sampling.completed(["The"] * n))
    assert set(counts) <= set(names)

    def distance(probabilities: torch.Tensor) -> float:
        observed = torch.tensor([counts[name] / n for name in names], dtype=torch.float64)
        return float((observed.cumsum(0) - probabilities.cumsum(0)).abs().max())

    assert distance((largest.values / temperature).softmax(0)) <= epsilon
    # It tells the distribution from those of a wrong temperature.
    assert distance((largest.values / (temperature / 2)).softmax(0)) > epsilon


# Columns


@pytest.mark.clause("LOGC-11")
@pytest.mark.parametrize(("columns", "titles"), TITLES, ids=str)
def test_columns_come_behind_the_tables_own_and_never_in_the_place_of_one(
    subject: Subject, columns: Sequence[str], titles: list[str]
) -> None:
    names = ("prompt", "topic", "number", "step", "completion", "eval_step", "dataset")
    (row,) = subject.rows([{name: f"the {name}" for name in names}], columns=columns)
    assert ["step", "prompt", "completion", *titles] == list(row)
    assert [f"the {name}" for name in dict.fromkeys(columns)] == [row[title] for title in titles]
    assert (row["step"], row["prompt"]) == (1, "the prompt")


@pytest.mark.clause("LOGC-2", "LOGC-11")
def test_with_several_datasets_their_column_is_taken_too(subject: Subject) -> None:
    (row,) = subject.rows({"dev": [{"prompt": "a", "dataset": "b"}]}, columns=("dataset",))
    assert list(row) == ["step", "prompt", "completion", "dataset", "eval_dataset"]
    assert (row["dataset"], row["eval_dataset"]) == ("dev", "b")


@pytest.mark.clause("LOGC-11")
def test_values_are_shown_as_they_are_or_as_json_or_as_text(subject: Subject) -> None:
    rows = [{"prompt": "a", "value": value} for value, _ in CELLS]
    found = [row["value"] for row in subject.saying(max_new_tokens=1).rows(rows, columns=("value",))]
    expected = [shown for _, shown in CELLS]
    assert list(map(repr, expected)) == list(map(repr, found))  # True is no 1 here


@pytest.mark.clause("LOGC-11")
@pytest.mark.parametrize("kind", ["dataset", "stream", "stream without features", "list", "generator"])
def test_a_column_that_is_not_there_is_named(subject: Subject, kind: str) -> None:
    assert "topics" in subject.refusal(KINDS[kind](rows_of("a")), columns=("number", "topics"))
    assert "topics" in subject.refusal({"dev": KINDS[kind](rows_of("a"))}, columns=("topics",))


@pytest.mark.clause("LOGC-11")
def test_a_name_in_the_place_of_columns_is_an_error(subject: Subject) -> None:
    assert "number" in subject.refusal(rows_of("a"), columns="number")
