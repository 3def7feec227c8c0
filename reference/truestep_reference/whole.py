"""Whole tensors of models whose parameters may be spread over ranks.

Every function here that reads values is collective: each rank calls it with the same model, and each rank
gets everything.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, distribute_tensor


def unwrap(model: nn.Module) -> nn.Module:
    """Takes a model out of DDP, a DeepSpeed engine and ``torch.compile``.

    Args:
        model: The model as a trainer holds it.

    Returns:
        The user's own module.

    Raises:
        ValueError: Something in the model is wrapped by FSDP1, whose flat parameters have no names.
    """
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ValueError(
            "model is wrapped by FullyShardedDataParallel (FSDP1), whose flat parameters cannot be averaged "
            "by name: use FSDP2 (fully_shard), DeepSpeed ZeRO or DDP"
        )
    module: nn.Module = extract_model_from_parallel(model, keep_torch_compile=False)
    return module


def class_name(model: nn.Module) -> str:
    """The name of a model's class.

    Args:
        model: An unwrapped model.

    Returns:
        The name that the class has without FSDP2, which puts one of its own in its place.
    """
    return next(class_.__name__ for class_ in type(model).__mro__ if not issubclass(class_, FSDPModule))


def require_supported(model: nn.Module) -> None:
    """Refuses models whose trained weights cannot be had whole, or cannot be saved when they are averaged.

    Args:
        model: An unwrapped model.

    Raises:
        ValueError: A parameter is a different part of the model on each rank, as its engine has marked it; or the
            model is a learned prompt, of which PEFT saves the live weights whatever it is given.
    """
    for name, parameter in model.named_parameters():
        if getattr(parameter, "tensor_model_parallel", False) or not getattr(parameter, "allreduce", True):
            raise ValueError(
                f"parameter {name} is tensor- or expert-parallel, a different part on each rank: use DDP, DeepSpeed "
                "ZeRO or FSDP2 alone"
            )
    for adapter, config in getattr(model, "peft_config", {}).items():
        if getattr(config, "is_prompt_learning", False):
            raise ValueError(f"adapter {adapter} is a learned prompt: use one with weights of its own, such as LoRA")


def whole(tensor: Tensor) -> Tensor:
    """Copies a tensor, whole, whatever part of it this rank holds.

    Args:
        tensor: A parameter or buffer: plain, partitioned by ZeRO-3, or an FSDP2 ``DTensor``.

    Returns:
        A new plain tensor of the global shape, of the same dtype and device.
    """
    if isinstance(tensor, DTensor):
        full: Tensor = tensor.full_tensor()
        return full.detach().clone()
    if hasattr(tensor, "ds_id"):  # DeepSpeed's mark of a parameter under ZeRO-3
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor.detach().clone()


def write(parameter: nn.Parameter, value: Tensor) -> None:
    """Sets a parameter, whatever part of it this rank holds. Collective.

    Args:
        parameter: Plain, partitioned by ZeRO-3, or an FSDP2 ``DTensor``.
        value: The whole value, the same on every rank; rounded once to the parameter's dtype.
    """
    value = value.to(parameter.device, parameter.dtype)
    with torch.no_grad():
        if isinstance(parameter, DTensor):
            parameter.copy_(distribute_tensor(value, parameter.device_mesh, parameter.placements))
        elif hasattr(parameter, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.copy_(value)
        else:
            parameter.copy_(value)


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Lists the parameters that training holds between two steps, by name, a tied one once.

    Args:
        model: An unwrapped model.

    Returns:
        The parameters, in the model's order.
    """
    reshard(model)
    return dict(model.named_parameters())


def reshard(model: nn.Module) -> None:
    """Has FSDP2 let go of the whole copies, maybe in a narrower dtype, that a forward left in the parameters' places.

    Args:
        model: An unwrapped model.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def state_dict_with(model: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Any]:
    """Reads the model's state dict, with other values for some parameters.

    Args:
        model: An unwrapped model.
        values: Parameter name to whole value, in any floating dtype.

    Returns:
        The keys of ``model.state_dict()``, each with a whole CPU tensor of the live dtype: ``values`` rounded
        once, everything else (frozen parameters, buffers) from the live model. Tied keys share one tensor. What
        a module's ``get_extra_state`` gives, which may be anything, is copied.
    """
    replacements = {id(p): values[name] for name, p in named_parameters(model).items() if name in values}
    entries: dict[int, Any] = {}
    state = model.state_dict(keep_vars=True)
    for live in state.values():
        if not isinstance(live, Tensor):
            entries[id(live)] = copy.deepcopy(live)
        elif id(live) not in entries:
            value = replacements[id(live)] if id(live) in replacements else whole(live)
            entries[id(live)] = value.to("cpu", live.dtype, copy=True)
    return {key: entries[id(live)] for key, live in state.items()}


def barrier() -> None:
    """Waits until every rank is here. Returns at once in a single process."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def from_every_rank(value: Any) -> list[Any]:
    """Collects what every rank has to say.

    Args:
        value: This rank's value; it can be pickled.

    Returns:
        The values of all ranks, in their order.
    """
    values = [value]
    if torch.distributed.is_initialized():
        values = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(values, value)
    return values


def from_main_process(message: str | None) -> str | None:
    """Tells every rank what the main process has to say, and waits for it.

    Args:
        message: The main process's message. What the other ranks give is ignored.

    Returns:
        That message, on every rank.
    """
    messages = [message]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(messages, src=0)
    return messages[0]
