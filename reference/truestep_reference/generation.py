"""One completion of one prompt: no batch, no padding, no cache."""

import copy
import hashlib
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

DEFAULT_NEW_TOKENS = 20

GREEDY_WITHOUT = {
    "do_sample": False,
    "num_beams": 1,
    "num_beam_groups": 1,
    "diversity_penalty": 0,
    "repetition_penalty": 1,
    "encoder_repetition_penalty": 1,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "guidance_scale": 1,
    "remove_invalid_values": False,
}
"""The values with which options that could change greedy decoding do not."""

NO_MATTER_IN_GREEDY = {
    *("max_new_tokens", "max_length", "eos_token_id", "bos_token_id", "pad_token_id", "decoder_start_token_id"),
    *("temperature", "top_k", "top_p", "top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    *("length_penalty", "early_stopping", "num_return_sequences", "renormalize_logits", "low_memory"),
    *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size"),
    *("disable_compile", "compile_config", "continuous_batching_config", "return_dict_in_generate"),
    *("output_scores", "output_logits", "output_attentions", "output_hidden_states", "transformers_version"),
    *("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
    *("assistant_lookbehind", "target_lookbehind"),
}
"""Options that say where greedy decoding stops, or nothing that it heeds."""


def merged(given: GenerationConfig | None, model: Any) -> GenerationConfig:
    """Combines a generation config with the model's, which says what the given one leaves open.

    Args:
        given: A config, or None.
        model: The model.

    Returns:
        A config of its own, which asks for one completion and no cache.

    Raises:
        ValueError: Several completions are asked for.
    """
    config = GenerationConfig() if given is None else copy.deepcopy(given)  # type: ignore[no-untyped-call]
    for name, value in vars(model.generation_config).items():
        if not name.startswith("_") and getattr(config, name, None) is None:
            setattr(config, name, copy.deepcopy(value))
    if config.num_return_sequences is not None and config.num_return_sequences > 1:
        raise ValueError(f"num_return_sequences={config.num_return_sequences}: ask for one completion of a prompt")
    config.use_cache, config.cache_implementation = False, None
    config.return_dict_in_generate = False
    config.prompt_lookup_num_tokens, config.assistant_early_exit = None, None  # drafts, which change no completion
    return config


def is_greedy(config: GenerationConfig) -> bool:
    """Tells whether the next token is always the one with the largest logit.

    Args:
        config: What ``merged`` gave.

    Returns:
        True without sampling, beams, penalties and the like.

    Example:
        >>> is_greedy(GenerationConfig(max_new_tokens=3, temperature=0.5))
        True
        >>> is_greedy(GenerationConfig(repetition_penalty=1.5))
        False
    """
    return all(
        name in NO_MATTER_IN_GREEDY or value is None or (name in GREEDY_WITHOUT and value == GREEDY_WITHOUT[name])
        for name, value in vars(config).items()
        if not name.startswith("_")
    )


def window(model: Any, tokenizer: Any) -> float:
    """How many tokens model and tokenizer can deal with.

    Args:
        model: The model.
        tokenizer: The tokenizer.

    Returns:
        The smaller one of their limits; infinity if there is none.
    """
    of_tokenizer = getattr(tokenizer, "model_max_length", None) or math.inf
    return min(positions(model, "encoder"), of_tokenizer) - learned_tokens(model)


def positions(model: Any, half: str) -> float:
    """How many positions a model has.

    Args:
        model: The model.
        half: ``"encoder"`` or ``"decoder"``, which of some encoder-decoders have numbers of their own.

    Returns:
        The number; infinity if there is no limit.
    """
    config = model.config.get_text_config()
    limit = getattr(config, f"max_{half}_position_embeddings", None) or getattr(config, "max_position_embeddings", None)
    return limit if limit is not None and limit > 0 else math.inf


def learned_tokens(model: Any) -> int:
    """How many virtual tokens PEFT puts before a prompt.

    Args:
        model: The model.

    Returns:
        The number, 0 where it learns no prompt.
    """
    learned = [c.num_virtual_tokens for c in getattr(model, "peft_config", {}).values() if c.is_prompt_learning]
    return max(learned, default=0)


def room(config: GenerationConfig, window: float, *, is_encoder_decoder: bool) -> float:
    """How many tokens of a prompt leave room for the new ones.

    Args:
        config: What ``merged`` gave.
        window: What prompt and new tokens have to fit into.
        is_encoder_decoder: Whether the model is one: the prompt then has the window for itself.

    Returns:
        The number; infinity if there is no limit.

    Raises:
        ValueError: It is less than one.

    Example:
        >>> room(GenerationConfig(max_new_tokens=30), 128, is_encoder_decoder=False)
        98
        >>> room(GenerationConfig(max_length=30), 128, is_encoder_decoder=False)
        29
    """
    if is_encoder_decoder:
        left = window
    elif config.max_new_tokens is None and config.max_length is not None:
        left = min(config.max_length, window) - 1
    else:
        left = window - (DEFAULT_NEW_TOKENS if config.max_new_tokens is None else config.max_new_tokens)
    if left < 1:
        raise ValueError(
            f"max_new_tokens={config.max_new_tokens} and max_length={config.max_length} leave no room for a prompt "
            f"in a window of {window} tokens: ask for fewer new tokens"
        )
    return left


def require_positions(config: GenerationConfig, model: Any) -> None:
    """Checks that the decoder of an encoder-decoder has a position for each new token.

    Args:
        config: What ``merged`` gave.
        model: The model.

    Raises:
        ValueError: It has not.
    """
    count, limit = new_tokens(config, math.inf, 0, is_encoder_decoder=True), positions(model, "decoder")
    if count > limit:
        raise ValueError(f"{count} new tokens are asked for, and the decoder takes {limit}: ask for fewer")


def new_tokens(config: GenerationConfig, window: float, prompt_length: int, *, is_encoder_decoder: bool) -> int:
    """How many tokens a completion has at most.

    Args:
        config: What ``merged`` gave.
        window: What prompt and new tokens have to fit into.
        prompt_length: How many tokens the prompt has, no more than ``room``.
        is_encoder_decoder: Whether the model is one: its new tokens follow the one that the decoder starts with.

    Returns:
        The number, at least one.

    Example:
        >>> new_tokens(GenerationConfig(), 128, 10, is_encoder_decoder=False)
        20
        >>> new_tokens(GenerationConfig(max_length=30), 128, 10, is_encoder_decoder=False)
        20
        >>> new_tokens(GenerationConfig(max_length=30, max_new_tokens=5), 128, 10, is_encoder_decoder=False)
        5
    """
    if config.max_new_tokens is not None:
        return int(config.max_new_tokens)
    if config.max_length is None:
        return DEFAULT_NEW_TOKENS
    if is_encoder_decoder:
        return max(1, int(config.max_length) - 1)
    return int(min(config.max_length, window)) - prompt_length


def prompt_seed(seed: int, step: int, index: int) -> int:
    """The seed of what a prompt draws at a step: BLAKE2b of 8 bytes of ``{seed}/{t}/{i}``, big-endian, modulo 2⁶³.

    Args:
        seed: The training's ``args.seed``.
        step: ``t``.
        index: ``i``, the number of the prompt, counted from 0.

    Returns:
        The seed.

    Example:
        >>> prompt_seed(42, 100, 0) == int(hashlib.blake2b(b"42/100/0", digest_size=8).hexdigest(), 16) % 2**63
        True
    """
    digest = hashlib.blake2b(f"{seed}/{step}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, byteorder="big") % 2**63


@torch.no_grad()
def complete(
    model: Any, tokens: list[int], count: int, config: GenerationConfig, tokenizer: Any, device: torch.device
) -> list[int]:
    """Completes one prompt. Collective where the model is sharded.

    Args:
        model: The unwrapped model, in eval mode.
        tokens: The prompt.
        count: How many new tokens there are at most.
        config: What ``merged`` gave.
        tokenizer: For ``stop_strings``.
        device: Where the model takes its input.

    Returns:
        The new tokens, with the one that ends the sequence if it has come.
    """
    prompt = torch.tensor([tokens], device=device)
    if is_greedy(config):
        return _greedy(model, prompt, count, config)
    config = copy.deepcopy(config)
    config.max_new_tokens, config.max_length = count, None
    completed: Tensor = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        generation_config=config,
        tokenizer=tokenizer,
    )
    begins = 1 if model.config.is_encoder_decoder else len(tokens)
    return [int(token) for token in completed[0, begins:]]


def _greedy(model: Any, prompt: Tensor, count: int, config: GenerationConfig) -> list[int]:
    """The token with the largest logit, again and again."""
    ends = torch.tensor([] if config.eos_token_id is None else config.eos_token_id).flatten().tolist()
    new: list[int] = []
    while len(new) < count and (not new or new[-1] not in ends):
        if model.config.is_encoder_decoder:
            start = config.bos_token_id if config.decoder_start_token_id is None else config.decoder_start_token_id
            inputs = {"input_ids": prompt, "decoder_input_ids": prompt.new_tensor([[start, *new]])}
        else:
            inputs = {"input_ids": torch.cat([prompt, prompt.new_tensor([new])], dim=1)}
        mask = torch.ones_like(inputs["input_ids"])
        logits = model(**inputs, attention_mask=mask, use_cache=False).logits
        new.append(int(logits[0, -1].argmax()))
    return new


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Has every module of a model in eval mode within a ``with`` block, and as it was after it.

    After it modules have their old attributes, the mode among them, and what they have of lists and buffers its old
    contents.

    Args:
        model: The model.
    """
    attributes = [(module, dict(vars(module))) for module in model.modules()]
    lists = [(value, list(value)) for _, old in attributes for value in old.values() if isinstance(value, list)]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    model.eval()
    try:
        yield
    finally:
        for module, old in attributes:
            vars(module).clear()
            vars(module).update(old)
        for found, contents in lists:
            found[:] = contents
        for buffer, value in buffers:
            buffer.data.copy_(value)


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Has all global random number generators go on after a ``with`` block as if there had been none."""
    import numpy as np

    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        for number, state in enumerate(devices):
            torch.cuda.set_rng_state(state, number)
