"""The models that callbacks are measured on: two real families, in sizes from a million parameters."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen2Config


def qwen2(vocabulary: int, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int) -> Qwen2Config:
    """A configuration of the Qwen2 family: tied embeddings, grouped queries."""
    return Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=True,
    )


def llama(vocabulary: int, hidden: int, intermediate: int, layers: int, heads: int) -> LlamaConfig:
    """A configuration of the Llama family: embeddings and head apart."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        tie_word_embeddings=False,
    )


# The largest of each family has the real vocabulary: most of a small model is its embeddings.
MODELS: Mapping[str, Mapping[float, PreTrainedConfig]] = {
    "qwen2": {
        1e6: qwen2(4_096, 128, 352, 3, 2, 1),
        1e7: qwen2(32_000, 192, 512, 10, 3, 1),
        1e8: qwen2(151_936, 512, 1_408, 8, 8, 2),
    },
    "llama": {
        1e6: llama(2_000, 128, 352, 2, 2),
        1e7: llama(8_000, 256, 704, 7, 4),
        1e8: llama(32_000, 640, 1_728, 12, 10),
    },
}
"""Configurations by family and approximate number of parameters."""


def build(family: str, size: float) -> PreTrainedModel:
    """A model with random weights, the same on every rank; `family` and `size` are keys of `MODELS`."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(MODELS[family][size])
    return model


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters, tied ones once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
