"""What the properties of LogCompletions are stated over: prompts of every kind, tiny models, trainings led by hand."""

import copy
import dataclasses
import datetime
import decimal
import fractions
import json
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from hypothesis import settings
from hypothesis import strategies as st
from peft import PromptTuningConfig, get_peft_model
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BloomConfig,
    BloomForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    ProcessorMixin,
    T5Config,
    T5ForConditionalGeneration,
    TrainerCallback,
    TrainingArguments,
)
from truestep_fixtures import data, models
from truestep_fixtures.training import Events

from truestep_spec_tests.implementation import Implementation
from truestep_spec_tests.observe import completions
from truestep_spec_tests.options import require

Row = dict[str, Any]

WINDOW = 128
"""The tokens that the models of the fixtures take."""

LEARNED_TOKENS = 5
"""The tokens of a learned prompt."""

BEGIN = "<|system|>"
"""The text that stands for the beginning of a sequence, where a tokenizer has such a token."""

END = "<|end|>"

SPECIAL = ("<|pad|>", END, "<|system|>", "<|user|>", "<|assistant|>")
"""The texts of all special tokens."""

fewer = settings(max_examples=6)
"""For properties of which an example takes many forwards."""

# Tokenizers


def _adding(template: str, **tokens: str) -> Callable[[], Any]:
    def build() -> Any:
        tokenizer = data.tokenizer()
        ids = [(text, tokenizer.convert_tokens_to_ids(text)) for text in (BEGIN, END)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=ids)
        for name, text in tokens.items():
            setattr(tokenizer, name, text)
        return tokenizer

    return build


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "adds nothing": data.tokenizer,
    "begins": _adding(f"{BEGIN} $A", bos_token=BEGIN),
    "ends": _adding(f"$A {END}"),
    "begins and ends": _adding(f"{BEGIN} $A {END}", bos_token=BEGIN),
    "begins with its end": _adding(f"{END} $A", bos_token=END),
    "knows a beginning": _adding("$A", bos_token=BEGIN),
    "no padding": _adding("$A", pad_token=None),
}
"""Tokenizers by what they add to a text."""


class Processor(ProcessorMixin):
    """A processor that has nothing but a tokenizer, and maybe a template of its own."""

    attributes = ("tokenizer",)
    tokenizer_class = "AutoTokenizer"

    def __init__(self, tokenizer: Any, chat_template: str | None = None) -> None:
        super().__init__(tokenizer, chat_template=chat_template)


# Models


_SIZES = {"vocab_size": models.VOCABULARY, "bos_token_id": 0, "eos_token_id": data.END, "pad_token_id": 0}


def _bloom() -> PreTrainedModel:
    """Its positions come from the attention mask."""
    return BloomForCausalLM(BloomConfig(hidden_size=16, n_layer=2, n_head=2, **_SIZES))


def _mamba() -> PreTrainedModel:
    """It has a state, through which padding would go as well."""
    return MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=2, state_size=4, **_SIZES))


def _mistral() -> PreTrainedModel:
    """It sees six tokens back, which padding must not use up."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "max_position_embeddings": WINDOW}
    return MistralForCausalLM(MistralConfig(sliding_window=6, **sizes, **heads, **_SIZES))


def _t5() -> PreTrainedModel:
    """An encoder-decoder without a window."""
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(decoder_start_token_id=0, tie_word_embeddings=False, **sizes, **_SIZES))


def _bart() -> PreTrainedModel:
    """An encoder-decoder with positions, which it counts whatever the mask."""
    layers = {f"{part}_{name}": 2 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    sizes = {"d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 64}
    parts = {**sizes, **layers, **_SIZES}
    return BartForConditionalGeneration(
        BartConfig(decoder_start_token_id=data.END, forced_eos_token_id=None, tie_word_embeddings=False, **parts)
    )


def _eager() -> PreTrainedModel:
    """Its attention is not a number behind padding in float64."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "max_position_embeddings": WINDOW}
    return LlamaForCausalLM(LlamaConfig(attn_implementation="eager", **sizes, **heads, **_SIZES))


def _learned_prompt() -> nn.Module:
    """PEFT puts tokens of its own before a prompt, and before padding."""
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LEARNED_TOKENS)
    return get_peft_model(models.build("gpt2"), config)


BUILT_HERE: dict[str, Callable[[], nn.Module]] = {
    "bloom": _bloom,
    "mamba": _mamba,
    "mistral": _mistral,
    "t5": _t5,
    "bart": _bart,
    "eager": _eager,
    "learned prompt": _learned_prompt,
}
"""Models that differ in how they know where a token stands, each with something that padding can get wrong."""

ENCODER_DECODERS = ("t5", "bart")

SPEAKING = ("qwen2", "llama", "gpt2", "tied", "lora", *BUILT_HERE)
"""All models that complete prompts here."""


@cache
def speaking(name: str) -> nn.Module:
    """A model of `SPEAKING` in float64 that says different things. It is built once."""
    if name in BUILT_HERE:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: nn.Module = BUILT_HERE[name]().to(torch.float64)
    else:
        model = models.build(name, torch.float64)
    return models.speaking(model, data.END, data.unprintable())


@cache
@torch.no_grad()
def speaking_in_special_tokens() -> nn.Module:
    """A model in float64 that often says a token that is special. It is built once."""
    model = models.speaking(models.build("qwen2", torch.float64), data.END)
    special = data.tokenizer().convert_tokens_to_ids(list(SPECIAL))
    model.get_output_embeddings().weight[special] *= 2
    return model


@torch.no_grad()
def greedy(model: Any, tokens: Sequence[int], count: int) -> list[int]:
    """The tokens with the largest logits, one after the other, from forwards over all tokens so far.

    Args:
        model: In eval mode, in float64.
        tokens: A prompt.
        count: How many new tokens there are at most.

    Returns:
        The new tokens; the last one may be the end.
    """
    start = [model.config.decoder_start_token_id] if model.config.is_encoder_decoder else list(tokens)
    sequence = list(start)
    while len(sequence) < len(start) + count and sequence[len(start) :][-1:] != [data.END]:
        inputs = {"input_ids": torch.tensor([sequence])}
        if model.config.is_encoder_decoder:
            inputs = {"input_ids": torch.tensor([tokens]), "decoder_input_ids": torch.tensor([sequence])}
        sequence.append(int(model(**inputs, use_cache=False).logits[0, -1].argmax()))
    return sequence[len(start) :]


# Ways of generating

OPTIONS: dict[str, dict[str, Any]] = {
    "repetition penalty": {"repetition_penalty": 1.8},
    "large repetition penalty": {"repetition_penalty": 10.0},
    "no token twice": {"no_repeat_ngram_size": 1},
    "no n-gram twice": {"no_repeat_ngram_size": 2},
    "at least so many new tokens": {"min_new_tokens": 5},
    "at least so many tokens": {"min_length": 9},
    "beams": {"num_beams": 3},
    "short beams": {"num_beams": 3, "length_penalty": -2.0, "early_stopping": True},
    "tokens in all": {"max_new_tokens": None, "max_length": 14},
    "several ends": {"eos_token_id": [data.END, *range(40, 90)]},
    "stop strings": {"stop_strings": ["ith", "K", "R"]},
    "stop strings and no end": {"stop_strings": ["ith", "K", "R"], "eos_token_id": None},
    "stop strings and padding that shows": {"stop_strings": ["ith", "K", "R"], "pad_token_id": 60},
    "stop strings, padding that shows and no end": {"stop_strings": ["K"], "pad_token_id": 60, "eos_token_id": None},
    "no end": {"eos_token_id": None},
    "tokens suppressed": {"suppress_tokens": list(range(40, 90))},
    "tokens suppressed at first": {"begin_suppress_tokens": list(range(40, 90))},
    "guidance": {"guidance_scale": 1.5},
    "penalty for length": {"exponential_decay_length_penalty": (2, 1.5)},
    "forced end": {"forced_eos_token_id": data.END},
}
"""Fields of a generation config with which the next token is not simply the one with the largest logit, or not until
the same end."""

NO_MATTER: dict[str, dict[str, Any]] = {
    "padding": {"pad_token_id": 5},
    "padding with the end": {"pad_token_id": data.END},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "more than tokens": {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
    "drafts": {"prompt_lookup_num_tokens": 3},
    "sampling's alone": {"do_sample": False, "temperature": 0.5, "top_k": 3},
}
"""Fields of a generation config that change no greedy completion."""

SAMPLING: dict[str, dict[str, Any]] = {
    "temperature": {"do_sample": True, "temperature": 1.5},
    "top k": {"do_sample": True, "top_k": 3},
    "top p": {"do_sample": True, "top_p": 0.5, "temperature": 2.0},
    "beams": {"do_sample": True, "num_beams": 2},
    "a penalty": {"do_sample": True, "repetition_penalty": 1.5, "min_p": 0.01},
}

# Prompts

TEXTS = [
    *("The quick brown fox", "Every step is", "a", "Zwölf", "Bar", "x y", "lazy dog"),
    *(2 * letter for letter in "cdefgh"),
]
"""Prompts of many lengths, and several of the same."""

WORDS = ("The", " quick", "fox", " ", "\n", "ö", "猫", "🙂", "\u2028", "0", "{", "ith", "<|", "\x00")

texts = st.one_of(
    st.just(""),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    st.lists(st.sampled_from([*WORDS, *SPECIAL]), max_size=6).map("".join),
    st.builds(lambda word, times: word * times, st.sampled_from([*WORDS, BEGIN, END]), st.integers(1, 60)),
    st.builds(lambda text: BEGIN + text, st.text("ab ", max_size=4)),
    st.builds(lambda text: text + END, st.text("ab ", max_size=4)),
)
"""Texts: empty and long ones, any script, with special tokens at either end and between."""

text_sets = st.lists(texts, min_size=1, max_size=5).flatmap(
    lambda found: st.lists(st.sampled_from(found), max_size=2).map(lambda again: found + again)
)
"""Sets of prompts, some of which may be there twice."""


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Draws a conversation; the assistant's message goes on where it is the last one."""
    roles = draw(st.lists(st.sampled_from(["system", "user", "assistant"]), min_size=1, max_size=4))
    words = st.lists(st.sampled_from(["The", " fox", "ö", "🙂", "0", " ", "\n", END]), max_size=4).map("".join)
    messages = [{"role": role, "content": draw(words)} for role in roles]
    messages[-1]["content"] += "."  # a template need not show an empty message that goes on
    return messages


def rows_of(prompts: Iterable[Any]) -> data.Rows:
    """Rows of a dataset, numbered in a column `number`."""
    return data.Rows({"prompt": prompt, "number": number} for number, prompt in enumerate(prompts))


class Indexed(torch.utils.data.Dataset):
    """A dataset of PyTorch's, which cannot be iterated over to its end."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        return dict(self._rows[index % len(self._rows)])


class Streamed(torch.utils.data.IterableDataset):
    """A dataset of PyTorch's without a length."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows)


def _transformed(rows: list[Row]) -> Dataset:
    dataset = Dataset.from_dict({"text": [row["prompt"] for row in rows], "nr": [row["number"] for row in rows]})
    dataset.set_transform(lambda batch: {"prompt": batch["text"], "number": batch["nr"]})
    return dataset


KINDS: dict[str, Callable[[list[Row]], Any]] = {
    "dataset": Dataset.from_list,
    "dataset in tensors": lambda rows: Dataset.from_list(rows).with_format("torch"),
    "dataset in arrays": lambda rows: Dataset.from_list(rows).with_format("numpy"),
    "dataset in tables": lambda rows: Dataset.from_list(rows).with_format("arrow"),
    "dataset with a transform": _transformed,
    "stream": lambda rows: Dataset.from_list(rows).to_iterable_dataset(),
    "stream in tensors": lambda rows: Dataset.from_list(rows).to_iterable_dataset().with_format("torch"),
    "stream without features": lambda rows: IterableDataset.from_generator(lambda: iter(rows)).map(dict),
    "list": list,
    "tuple": tuple,
    "generator": iter,
    "PyTorch dataset": Indexed,
    "PyTorch stream": Streamed,
}
"""The same rows as datasets of every kind."""

# Arguments that there is something wrong with

NO_COUNTS = [0, -1, 1.0, 2.5, "2", True, False, math.nan, np.float64(2)]
"""Values that are no integers of at least 1."""

NO_DATASETS: list[tuple[Any, str]] = [
    (None, "None"),
    (3, "int"),
    ([], "row"),
    ({}, "dataset"),
    ({"dev": []}, "dev"),
    ({"dev": rows_of("a"), "test": Dataset.from_dict({"prompt": []})}, "test"),
    ("a text", "prompt"),
    (["a"], "prompt"),
    ({"prompt": ["a"]}, "prompt"),
    ([{"text": "a"}], "text"),
    (Dataset.from_dict({"text": ["a"]}), "text"),
    ({"dev": rows_of("a"), "test": [{"text": "a"}]}, "test"),
    ([{"prompt": "a"}, {"prompt": None}], "None"),
    ([{"prompt": 17}], "17"),
    ([{"prompt": b"bytes"}], "bytes"),
    ([{"prompt": []}], r"\[\]"),
    ([{"prompt": ["a", "b"]}], "a"),
    ([{"prompt": {"role": "user", "content": "a"}}], "user"),
    ([{"prompt": [{"role": "user"}]}], "user"),
    ([{"prompt": [{"content": "only"}]}], "only"),
    ([{"prompt": [{"role": None, "content": "only"}]}], "only"),
]
"""Evaluation datasets without prompts, or with something else among them, and what an error has to say about it."""

CELLS: list[tuple[Any, Any]] = [
    *((value, value) for value in (3, -0.5, True, None, "ö", "", 10**30)),
    *((np.int64(3), 3), (np.float32(0.5), 0.5), (np.float64(0.5), 0.5), (np.bool_(True), True), (np.str_("x"), "x")),
    *((np.array(3), 3), (torch.tensor(3), 3), (torch.tensor(0.5, dtype=torch.bfloat16), 0.5)),
    *((torch.tensor(False), False), (fractions.Fraction(1, 2), 0.5)),
    *(
        (math.nan, "nan"),
        (math.inf, "inf"),
        (-math.inf, "-inf"),
        (np.float32("nan"), "nan"),
        (torch.tensor(math.nan), "nan"),
    ),
    *(([1, "ö"], '[1, "ö"]'), ((1, 2), "[1, 2]"), ({"ö": None}, '{"ö": null}'), ({}, "{}"), ([], "[]")),
    *(([math.nan], "[nan]"), ({1}, "{1}"), ({(1, 2): 3}, "{(1, 2): 3}"), (b"x", "b'x'"), (1 + 2j, "(1+2j)")),
    *((np.array([1, 2]), "[1 2]"), (torch.tensor([1]), "tensor([1])"), (decimal.Decimal("1.5"), "1.5")),
    (datetime.datetime(2026, 1, 2, 3, 4), "2026-01-02 03:04:00"),
    ([datetime.date(2026, 1, 2)], "[datetime.date(2026, 1, 2)]"),
]
"""Values of a dataset, and what the table shows."""

TITLES: list[tuple[Sequence[str], list[str]]] = [
    (("topic",), ["topic"]),
    (["topic"], ["topic"]),
    (("topic", "topic"), ["topic"]),
    (("topic", "number"), ["topic", "number"]),
    (("number", "topic"), ["number", "topic"]),
    (("prompt",), ["eval_prompt"]),
    (("completion", "step"), ["eval_completion", "eval_step"]),
    (("step", "eval_step"), ["eval_step", "eval_eval_step"]),
    (("eval_step", "step"), ["eval_step", "eval_eval_step"]),
    (("dataset",), ["dataset"]),
]
"""Columns that are asked for, and what they are called behind `step`, `prompt` and `completion`."""

# The callback under test, and how it is led


@dataclasses.dataclass(frozen=True)
class Subject:
    """A callback under test, and what it completes with.

    Args:
        implementation: Where it is from.
        args: Training arguments; each training has an `output_dir` of its own beneath theirs.
        model: What completes.
        tokenizer: The trainer's `processing_class`.
        generation: Fields of the generation config; None for no config.
        fields: Fields of the training arguments.
    """

    implementation: Implementation
    args: TrainingArguments
    model: nn.Module | None = dataclasses.field(default_factory=lambda: speaking("qwen2"))
    tokenizer: Any = dataclasses.field(default_factory=data.tokenizer)
    generation: Mapping[str, Any] | None = dataclasses.field(default_factory=lambda: {"max_new_tokens": 4})
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def on(self, **changes: Any) -> "Subject":
        """The same but for some attributes."""
        return dataclasses.replace(self, **changes)

    def saying(self, **generation: Any) -> "Subject":
        """The same with other fields of the generation config on top."""
        return self.on(generation={**(self.generation or {}), **generation})

    def having(self, *options: str) -> "Subject":
        """The same; skips the test if the constructor lacks an option."""
        require(self.implementation.LogCompletionsCallback, options)
        return self

    def trainer(self, dataset: Any) -> Events:
        """What stands in for a trainer with an evaluation dataset."""
        args = copy.copy(self.args)
        args.output_dir = tempfile.mkdtemp(dir=self.args.output_dir)
        for name, value in self.fields.items():
            setattr(args, name, value)
        rows = data.Rows(dataset) if isinstance(dataset, list) else dataset
        return Events(self.model, args, [], processing_class=self.tokenizer, eval_dataset=rows)  # type: ignore[arg-type]

    def callback(self, trainer: Events, **options: Any) -> TrainerCallback:
        """A new callback, which logs at every step unless `options` say otherwise; skips the test if it lacks one."""
        self.having(*options)
        config = None if self.generation is None else GenerationConfig(**{"eos_token_id": data.END} | self.generation)
        callback: TrainerCallback = self.implementation.LogCompletionsCallback(trainer, config, **{"freq": 1} | options)
        return callback

    def begin(self, dataset: Any, **options: Any) -> tuple[Events, Callable[[], list[Row]]]:
        """A training with a new callback, after its begin, and what reads the table that it has then."""
        trainer = self.trainer(dataset)
        callback = self.callback(trainer, **options)
        trainer.add_callback(callback)
        trainer.train_begin()
        return trainer, lambda: [json.loads(row) for row in completions(callback, trainer.args, trainer.state)]

    def rows(self, dataset: Any, steps: Iterable[int] = (1,), **options: Any) -> list[Row]:
        """The table of a training that has these steps."""
        trainer, table = self.begin(dataset, **options)
        for t in steps:
            trainer.step(t)
        rows = table()
        trainer.train_end()
        return rows

    def completed(self, prompts: Iterable[Any], **options: Any) -> list[str]:
        """The completions of prompts at a step."""
        return [row["completion"] for row in self.rows(rows_of(prompts), **options)]

    def refusal(self, dataset: Any, **options: Any) -> str:
        """The message of the error at construction."""
        trainer = self.trainer(dataset)
        with pytest.raises(ValueError) as error:  # noqa: PT011 - the test looks at the message
            self.callback(trainer, **options)
        return str(error.value)

    def read(self, prompt: Any) -> list[int]:
        """The tokens of a prompt as the model gets them."""
        seen: list[list[int]] = []

        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append(kwargs["input_ids"][0].tolist())

        assert self.model is not None
        module = getattr(self.model, "encoder", None) or getattr(getattr(self.model, "model", None), "encoder", None)
        hook = (module or self.model).register_forward_pre_hook(look, with_kwargs=True)
        try:
            self.rows([{"prompt": prompt}])
        finally:
            hook.remove()
        return seen[0]
