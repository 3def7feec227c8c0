"""A model that is looked at, and left as it was found."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig

_ENGINES = ("deepspeed.", "torch.distributed.fsdp.")


@contextmanager
def left_as_found(model: nn.Module) -> Iterator[None]:
    """Within a `with` block anything may be done to a model that does not write into its parameters.

    At the end, also after an exception, every attribute of every module is what it was: train or eval mode, switches
    such as `gradient_checkpointing`, hooks, the parameters in their places. Buffers, tensors, dicts and lists that are
    attributes have their old contents, and the configs their old attributes. Other objects are not looked into.

    Args:
        model: The unwrapped model.
    """
    modules = list(model.modules())
    attributes = [(owner, dict(vars(owner))) for owner in (*modules, *_configs(modules))]
    # Not parameters and submodules: reading some engines' parameters out of their dicts gathers them.
    values = [
        value for module in modules for name, value in vars(module).items() if name not in ("_parameters", "_modules")
    ]
    dicts = [(value, dict(value)) for value in values if isinstance(value, dict)]
    lists = [(value, list(value)) for value in values if isinstance(value, list)]
    tensors = [(tensor, tensor.detach().clone()) for tensor in (*model.buffers(), *filter(torch.is_tensor, values))]
    try:
        yield
    finally:
        for owner, before in attributes:
            _restore(vars(owner), before)
        for found, before in dicts:
            _restore(found, before)
        for found_list, before_list in lists:
            found_list[:] = before_list
        with torch.no_grad():
            for tensor, value in tensors:
                if not torch.equal(tensor, value):  # a version counter does not see what was written through `data`
                    tensor.copy_(value)
        # Under an outer autocast the block's casts of weights have no gradient, and would be used again.
        if torch.is_autocast_enabled():
            torch.clear_autocast_cache()


def ready_for_generation(model: nn.Module) -> None:
    """Put a model into eval mode, without gradient checkpointing, in which it would not use its cache."""
    model.eval()
    for module in model.modules():
        if vars(module).get("gradient_checkpointing") is True:
            vars(module)["gradient_checkpointing"] = False


def without_engine(model: nn.Module, whole: dict[int, Tensor]) -> None:
    """Have a model compute with whole weights, as if there were no engine.

    Args:
        model: The unwrapped model.
        whole: What to put into the place of a parameter, by the parameter's id.
    """
    replacements = {key: nn.Parameter(value, requires_grad=False) for key, value in whole.items()}
    for module in model.modules():
        own = module.named_parameters(recurse=False, remove_duplicate=False)
        absent = {name: None for name, parameter in module._parameters.items() if parameter is None}
        # Not through `module`'s methods, nor into the dict that it has: engines put dicts of their own there.
        vars(module)["_parameters"] = absent | {
            name: replacements.get(id(parameter), parameter) for name, parameter in own
        }
        for kind in ("_forward_pre_hooks", "_forward_hooks"):
            hooks = getattr(module, kind)
            vars(module)[kind] = type(hooks)((key, hook) for key, hook in hooks.items() if not _is_of_an_engine(hook))


def _is_of_an_engine(hook: Any) -> bool:
    function = getattr(hook, "func", hook)  # of a functools.partial
    return str(getattr(function, "__module__", "")).startswith(_ENGINES)


def _configs(modules: list[nn.Module]) -> list[Any]:
    """The configs that modules have, and those inside them, each once."""
    found: dict[int, Any] = {}
    waiting: list[Any] = list(modules)
    while waiting:
        for value in vars(waiting.pop()).values():
            if isinstance(value, PreTrainedConfig | GenerationConfig) and id(value) not in found:
                found[id(value)] = value
                waiting.append(value)
    return list(found.values())


def _restore(found: dict[Any, Any], before: dict[Any, Any]) -> None:
    if list(found) != list(before):  # hooks are called in their order
        found.clear()
        found.update(before)
        return
    for key, value in before.items():
        if found[key] is not value:
            found[key] = value
