"""Prompts of mixed lengths and a tokenizer for them, made on the spot."""

from __future__ import annotations

import random

from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

_CONSONANTS, _VOWELS = "bdfghklmnprstv", "aeiou"
_MEDIAN, _SIGMA, _LONGEST = 24, 0.9, 300


def tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer to which a word is a token, so that texts are equal where tokens are.

    It has no end-of-sequence token: every completion is as long as it may be.

    Args:
        vocabulary: Number of tokens. The first is for padding, and no word.
    """
    words = {"<|pad|>": 0} | {_word(number): number for number in range(1, vocabulary)}
    model = Tokenizer(WordLevel(words, unk_token="<|pad|>"))
    model.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<|pad|>")


def prompts(count: int, vocabulary: int) -> Dataset:
    """Different prompts of log-normally distributed lengths: most are short, a few are many times longer.

    Args:
        count: How many.
        vocabulary: That of the tokenizer.

    Returns:
        A dataset with the column `prompt`, in no order of lengths.
    """
    draw = random.Random(0)
    texts: dict[str, None] = {}
    while len(texts) < count:
        length = min(max(round(_MEDIAN * draw.lognormvariate(0, _SIGMA)), 1), _LONGEST)
        texts[" ".join(_word(draw.randrange(1, vocabulary)) for _ in range(length))] = None
    return Dataset.from_dict({"prompt": list(texts)})


def lengths(dataset: Dataset) -> list[int]:
    """The tokens of each prompt."""
    return [len(prompt.split()) for prompt in dataset["prompt"]]


def _word(number: int) -> str:
    """A pronounceable word; another one for every number."""
    word = ""
    while number or not word:
        number, vowel = divmod(number, len(_VOWELS))
        number, consonant = divmod(number, len(_CONSONANTS))
        word = _CONSONANTS[consonant] + _VOWELS[vowel] + word
    return word
