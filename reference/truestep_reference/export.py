"""A model directory that holds the shadow instead of the live weights."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.import_utils import is_peft_available


def has_save_pretrained(model: nn.Module) -> bool:
    """Tells whether the model writes its own directory from a state dict.

    Args:
        model: An unwrapped model.

    Returns:
        True for models of transformers and of PEFT.
    """
    if is_peft_available():
        from peft import PeftModel

        return isinstance(model, PreTrainedModel | PeftModel)
    return isinstance(model, PreTrainedModel)


def write_model(directory: Path, model: nn.Module, state_dict: Mapping[str, Any], processing_class: Any) -> None:
    """Writes a directory from which the shadow can be loaded, in place of an earlier one once it is complete.

    A transformers model is for ``from_pretrained`` and brings its config and generation config along; a PEFT
    model writes its adapter only; a plain module is for ``safetensors.torch.load_model``.

    Args:
        directory: Where to; its parents are made if need be.
        model: The unwrapped model that says how to write. Its own weights are not read.
        state_dict: What to write: the model's keys, whole tensors.
        processing_class: A tokenizer or processor to put beside the weights, or None.
    """
    partial = directory.with_name(f"{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if has_save_pretrained(model):
        model.save_pretrained(partial, state_dict=dict(state_dict))  # type: ignore[operator]
    else:
        save_file(one_name_each(state_dict), partial / "model.safetensors", metadata={"format": "pt"})
    if processing_class is not None:
        processing_class.save_pretrained(partial)
    shutil.rmtree(directory, ignore_errors=True)
    partial.rename(directory)


def one_name_each(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """Drops every name but the first of a tensor that has several, and what is no tensor: files hold neither.

    Args:
        state_dict: Names to entries, where tied names share one tensor object.

    Returns:
        Each tensor once.
    """
    names: dict[int, str] = {}
    for name, entry in state_dict.items():
        if isinstance(entry, Tensor):
            names.setdefault(id(entry), name)
    return {name: state_dict[name].contiguous() for name in names.values()}
