"""A directory that `from_pretrained` loads, written whole or not at all."""

import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn


class ExportError(RuntimeError):
    """A model's directory cannot be written; the message names it."""


def has_adapter(model: nn.Module) -> bool:
    """Whether `save_pretrained` of the model writes a PEFT adapter instead of the model."""
    return bool(getattr(model, "peft_config", None))


def has_learned_prompt(model: nn.Module) -> bool:
    """Whether PEFT trains a prompt: it saves what it computes from the live prompt, whatever it is given."""
    return learned_prompt_length(model) > 0


def learned_prompt_length(model: nn.Module) -> int:
    """Virtual tokens that PEFT puts before others, of whichever adapter has most; 0 where it trains no prompt."""
    configs = getattr(model, "peft_config", {}).values()
    learned = [config.num_virtual_tokens for config in configs if getattr(config, "is_prompt_learning", False)]
    return max(learned, default=0)


def is_saved_with_adapter(model: nn.Module, key: str, value: object) -> bool:
    """Whether PEFT may want an entry of the state dict to save an adapter.

    That is what is trained, what has an adapter's name in its path, and the embeddings, which PEFT saves along where
    they are a target or were resized. The rest of the base model would be gathered for nothing.
    """
    if getattr(value, "requires_grad", False) or not set(key.split(".")).isdisjoint(getattr(model, "peft_config", {})):
        return True
    getters = (getattr(model, name, None) for name in ("get_input_embeddings", "get_output_embeddings"))
    embeddings = (getter() for getter in getters if getter is not None)
    return any(value is parameter for module in embeddings if module is not None for parameter in module.parameters())


def save_pretrained(
    directory: Path, model: nn.Module, state_dict: dict[str, Tensor], processing_class: Any = None
) -> None:
    """Write a model's directory with other weights than the model's own. On one rank.

    The files are written to a sibling directory, which then takes the place of `directory`.

    Args:
        directory: Where to; replaced if it exists.
        model: The unwrapped model. Without `save_pretrained` (a plain module), `model.safetensors` alone is written,
            for `safetensors.torch.load_model`.
        state_dict: Its weights, whole; entries that are tied share one tensor.
        processing_class: The tokenizer or processor, saved along if it has `save_pretrained`.

    Raises:
        ExportError: The files cannot be written.
    """

    def write(target: Path) -> None:
        save_model: Any = getattr(model, "save_pretrained", None)
        if save_model is not None:
            save_model(target, state_dict=state_dict)
        else:
            _save_plain(target / "model.safetensors", state_dict)
        if hasattr(processing_class, "save_pretrained"):
            processing_class.save_pretrained(target)

    try:
        _replace_directory(directory, write)
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{directory}: cannot be written ({error})") from error


def _save_plain(file: Path, state_dict: dict[str, Tensor]) -> None:
    """A plain module's weights; the metadata names a tied entry's twin, as `load_model` expects it."""
    # A module's `get_extra_state` may give anything; the file holds tensors.
    tensors = {key: value for key, value in state_dict.items() if isinstance(value, Tensor)}
    first_key: dict[int, str] = {}
    tied: dict[str, str] = {}
    for key, tensor in tensors.items():
        if first_key.setdefault(id(tensor), key) != key:
            tied[key] = first_key[id(tensor)]
    contents = {key: tensor.contiguous() for key, tensor in tensors.items() if key not in tied}
    save_file(contents, file, metadata={"format": "pt", **tied})


def _replace_directory(directory: Path, write: Callable[[Path], None]) -> None:
    directory.parent.mkdir(parents=True, exist_ok=True)
    workspace = Path(mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        new, old = workspace / "new", workspace / "old"
        new.mkdir()
        write(new)
        if directory.exists():
            directory.rename(old)
        try:
            new.rename(directory)
        except OSError:
            if old.exists():
                old.rename(directory)
            raise
    finally:
        shutil.rmtree(workspace, ignore_errors=True)
