"""Completions of prompts by a model that is being trained, which does not notice."""

import copy
import inspect
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from truestep.batching import Batch, batches, rounds, share
from truestep.collectives import agree, exchange, rank, world_size
from truestep.export import learned_prompt_length
from truestep.observation import left_as_found, ready_for_generation, without_engine
from truestep.prompts import Encoder, Prompt
from truestep.sampling import OwnGenerators, prompt_seed, random_states_kept, seed_global_generators
from truestep.topology import Topology

DEFAULT_NEW_TOKENS = 20
"""What Transformers generates where nothing limits it."""

_BLIND_TO_PADDING = frozenset(
    {
        *("max_new_tokens", "max_length", "min_new_tokens", "early_stopping", "num_beams", "length_penalty"),
        *("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h"),
        *("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "use_cache", "suppress_tokens"),
        *("transformers_version", "cache_implementation", "cache_config", "compile_config", "disable_compile"),
        *("renormalize_logits", "remove_invalid_values", "num_return_sequences", "_from_model_config"),
        *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
    }
)
"""Settings of generation that do not look at the tokens so far, so that a prompt gets the same behind padding."""


class Settings:
    """What decides on a completion besides the model's weights. Of one training.

    Args:
        model: The unwrapped model.
        longest_text: The tokenizer's own limit of tokens, if it has one.
        generation_config: None: the model's.

    Raises:
        ValueError: The model cannot generate, or not one completion for each prompt.
    """

    def __init__(self, model: nn.Module, longest_text: int | None, generation_config: GenerationConfig | None) -> None:
        own: Any = getattr(model, "generation_config", None)
        if own is None or not hasattr(model, "generate"):
            raise ValueError(
                f"trainer.model={type(model).__name__}: it has no generate(), so it cannot complete prompts"
            )
        given = own if generation_config is None else generation_config
        self.config: GenerationConfig = copy.deepcopy(given)
        for name, value in own.to_dict().items():
            if getattr(self.config, name, None) is None:
                setattr(self.config, name, copy.deepcopy(value))
        if (self.config.num_return_sequences or 1) > 1:
            raise ValueError(
                f"generation_config.num_return_sequences={self.config.num_return_sequences}: must be 1, as a prompt "
                "gets one completion"
            )
        # Drafting tokens is to make the same completion faster, but only that of one prompt.
        self.config.prompt_lookup_num_tokens = self.config.assistant_early_exit = None
        # The trainer turns the cache off in the config of a model with gradient checkpointing.
        if generation_config is None or generation_config.use_cache is None:
            self.config.use_cache = True
        self.config.return_dict_in_generate = False
        ends = self.config.eos_token_id
        self.ends: list[int] = list(ends) if isinstance(ends, list | tuple) else [] if ends is None else [int(ends)]
        # Any would do: padding is masked, and what follows the end of a completion is cut off.
        self.config.pad_token_id = self.ends[0] if self.ends else self.config.pad_token_id or 0
        config: Any = model.config
        self.is_encoder_decoder = bool(config.is_encoder_decoder)
        self._reads = _limit(config, "max_encoder_position_embeddings"), longest_text
        self._writes = _limit(config, "max_decoder_position_embeddings")
        self._virtual_tokens = learned_prompt_length(model)
        self._sees_padding = not (self.is_encoder_decoder or _takes_positions(model)) or _minds_padding(model)
        self._require_room()

    @property
    def window(self) -> int | None:
        """Tokens that the model takes, if there is a limit; of an encoder-decoder, tokens of a prompt."""
        limits = [int(limit) for limit in self._reads if limit is not None and limit > 0]  # some models have -1
        return min(limits) - self._virtual_tokens if limits else None

    @property
    def room(self) -> int | None:
        """How many tokens a prompt may have, if there is a limit."""
        if self.is_encoder_decoder:
            return self.window
        if self._fixed_new_tokens is None:
            limit = int(self.config.max_length or 0)
            return min(limit, self.window or limit) - 1
        return None if self.window is None else self.window - self._fixed_new_tokens

    def new_tokens(self, prompt: Prompt) -> int:
        """How many tokens a prompt may get."""
        if self._fixed_new_tokens is not None:
            return self._fixed_new_tokens
        assert self.room is not None
        return self.room + 1 - len(prompt.tokens)

    @property
    def is_batched(self) -> bool:
        """Whether prompts may go together: Transformers lets a row that has ended go on where no token is the end."""
        return bool(self.ends) or not self.config.stop_strings

    @property
    def copies(self) -> int:
        """Rows that the model computes for each prompt."""
        return (self.config.num_beams or 1) * (1 if self.config.guidance_scale in (None, 1) else 2)

    @property
    def is_padded(self) -> bool:
        """Whether a prompt's completion is the same behind padding."""
        given = {name for name, value in self.config.to_diff_dict().items() if value is not None}
        return not self._sees_padding and given <= _BLIND_TO_PADDING

    @property
    def _fixed_new_tokens(self) -> int | None:
        """New tokens for any prompt; None where `max_length` counts the prompt too."""
        if self.config.max_new_tokens is not None:
            return int(self.config.max_new_tokens)
        if self.config.max_length is None:
            return DEFAULT_NEW_TOKENS
        # Of an encoder-decoder it counts the token that the decoder starts with.
        return max(self.config.max_length - 1, 1) if self.is_encoder_decoder else None

    def _require_room(self) -> None:
        asked = f"generation_config.max_new_tokens={self.config.max_new_tokens}, max_length={self.config.max_length}: "
        if self.room is not None and self.room < 1:
            raise ValueError(f"{asked}leaves no room for a prompt in the {self.window} tokens that the model takes")
        if self.is_encoder_decoder and self._writes and (self._fixed_new_tokens or 0) > self._writes:
            raise ValueError(f"{asked}the decoder takes {self._writes} tokens")


class Completer:
    """Completes prompts with the model that is trained.

    Constructing it is collective.

    Args:
        model: The model, wrapped or not.
        encoder: Of its tokenizer.
        settings: What is generated.
        device: Where the model computes.
        batch_tokens: How many tokens are generated with at a time; see `truestep.batching`.
        gather: Whether a sharded model is made whole on every rank, so that no rank waits for another. None: where
            it fits into half of the free memory.

    Raises:
        UnsupportedModelError: Ranks cannot work apart on a model that is laid out like this.
    """

    def __init__(
        self,
        model: nn.Module,
        encoder: Encoder,
        settings: Settings,
        device: torch.device,
        batch_tokens: int,
        gather: bool | None,
    ) -> None:
        self._topology = Topology(model)
        self._encoder = encoder
        self._settings = settings
        self._device = device
        self._batch_tokens = batch_tokens
        self._gather = gather
        self._is_sharded = any(not shard.is_replicated for shard in self._topology.shards.values())

    @torch.no_grad()
    def complete(self, prompts: Sequence[Prompt], seed: int, step: int) -> list[str]:
        """Complete prompts. Collective.

        Args:
            prompts: The same on every rank.
            seed: The training's seed.
            step: The global step.

        Returns:
            A completion for each prompt, in their order, on every rank.
        """
        model: Any = self._topology.model
        settings = self._settings
        found = batches(
            prompts,
            settings.new_tokens,
            self._batch_tokens if settings.is_batched else 1,
            copies=settings.copies,
            is_padded=settings.is_padded,
        )
        with ExitStack() as at_the_end:
            at_the_end.enter_context(random_states_kept())
            self._topology.release()
            at_the_end.callback(self._topology.release)
            at_the_end.enter_context(left_as_found(model))
            ready_for_generation(model)
            # Transformers says so at each batch where the model's own one is in force beside `max_new_tokens`.
            model.generation_config.max_length = None
            if self._is_sharded and not self._is_gathered():
                mine = self._complete_together(found, seed, step)
            else:
                if self._is_sharded:
                    without_engine(model, self._topology.materialize(self._device))
                share_of_rank = share(found, world_size())[rank()]
                mine = agree(
                    lambda: [pair for batch in share_of_rank for pair in self._generate(batch, seed, step)],
                    RuntimeError,
                )
        completions = dict(pair for of_rank in exchange(mine) for pair in of_rank)
        return [completions[prompt.index] for prompt in prompts]

    def _is_gathered(self) -> bool:
        if self._gather is not None:
            return self._gather
        needed = sum(shard.numel * shard.parameter.element_size() for shard in self._topology.shards.values())
        return all(exchange(2 * needed <= _free_bytes(self._device)))

    def _complete_together(self, found: list[Batch], seed: int, step: int) -> list[tuple[int, str]]:
        """In every forward all ranks take part; one without a batch goes along with a prompt of one token."""
        completed: list[tuple[int, str]] = []
        for of_ranks in rounds(found, world_size()):
            batch = of_ranks[rank()]
            if batch is not None:
                completed += self._generate(batch, seed, step, together=True)
                continue
            present = next(other for other in of_ranks if other is not None)
            idle = Prompt(0, "", present.prompts[0].tokens[:1], {})
            self._generate(Batch((idle,), present.new_tokens), seed, step, together=True)
        return completed

    def _generate(self, batch: Batch, seed: int, step: int, together: bool = False) -> list[tuple[int, str]]:
        """The completions of one batch, each with its prompt's index."""
        settings, seeds = self._settings, [prompt_seed(seed, step, prompt.index) for prompt in batch.prompts]
        config = copy.deepcopy(settings.config)
        config.max_new_tokens, config.max_length = batch.new_tokens, None
        tokens, mask = self._padded(batch)
        seed_global_generators(seeds[0])
        with ExitStack() as sampling:
            if config.do_sample:
                sampling.enter_context(OwnGenerators(seeds))
            model: Any = self._topology.model
            generated: Tensor = model.generate(
                input_ids=tokens,
                attention_mask=mask,
                generation_config=config,
                synced_gpus=together,
                **({"tokenizer": self._encoder.tokenizer} if config.stop_strings else {}),
            )
        new = generated[:, 1 if settings.is_encoder_decoder else tokens.shape[1] :].tolist()
        return [
            (prompt.index, self._encoder.decode(_up_to_the_end(row, settings.ends)))
            for prompt, row in zip(batch.prompts, new, strict=True)
        ]

    def _padded(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask of a batch, of shape `(prompts, longest prompt)`.

        An encoder's positions are counted from the left, whatever the mask, a decoder's by the mask.
        """
        shape = (len(batch.prompts), len(batch.prompts[0].tokens))
        assert self._settings.config.pad_token_id is not None
        tokens, mask = torch.full(shape, self._settings.config.pad_token_id), torch.zeros(shape, dtype=torch.long)
        for row, prompt in enumerate(batch.prompts):
            length = len(prompt.tokens)
            place = slice(0, length) if self._settings.is_encoder_decoder else slice(shape[1] - length, shape[1])
            tokens[row, place], mask[row, place] = torch.tensor(prompt.tokens), 1
        return tokens.to(self._device), mask.to(self._device)


def _limit(config: Any, of_half: str) -> int | None:
    """How many positions a model has; some encoder-decoders have a number for either half."""
    text = config.get_text_config()
    limit: int | None = getattr(text, of_half, None) or getattr(text, "max_position_embeddings", None)
    return limit


def _takes_positions(model: Any) -> bool:
    """Whether a model is told where tokens are. Others count padding, or are not made for it."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # of PEFT
    # PEFT drops positions where it puts tokens of its own before the others.
    return "position_ids" in inspect.signature(inner.forward).parameters and learned_prompt_length(model) == 0


def _minds_padding(model: Any) -> bool:
    """Whether padding changes what a model makes of a prompt although it is masked."""
    is_eager = getattr(model.config.get_text_config(), "_attn_implementation", None) == "eager"
    # Transformers' eager attention masks with the least float64, and takes its softmax in float32, where that is
    # infinite and a row of padding NaN.
    return bool(getattr(model, "_is_stateful", False)) or (is_eager and model.dtype == torch.float64)


def _up_to_the_end(tokens: list[int], ends: Sequence[int]) -> list[int]:
    return tokens[: next((place for place, token in enumerate(tokens, start=1) if token in ends), None)]


def _free_bytes(device: torch.device) -> int:
    """Memory that this rank may count on."""
    if device.type == "cpu":
        import psutil  # which Accelerate depends on

        return int(psutil.virtual_memory().available) // world_size()
    module: Any = torch.get_device_module(device)
    free: int = module.mem_get_info(device)[0]
    return free + int(module.memory_reserved(device)) - int(module.memory_allocated(device))
