"""Whole tensors of models whose parameters may be spread over ranks.

Every function here that reads values is collective: each rank calls it with the same model, and each rank
gets everything.
"""

from collections.abc import Mapping

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor


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


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Lists the parameters that training holds between two steps, by name, a tied one once.

    Args:
        model: An unwrapped model.

    Returns:
        The parameters, in the model's order.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # a forward may have left copies, in a narrower dtype, in the parameters' places
    return dict(model.named_parameters())


def state_dict_with(model: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Reads the model's state dict, with other values for some parameters.

    Args:
        model: An unwrapped model.
        values: Parameter name to whole value, in any floating dtype.

    Returns:
        The keys of ``model.state_dict()``, each with a whole CPU tensor of the live dtype: ``values`` rounded
        once, everything else (frozen parameters, buffers) from the live model. Tied keys share one tensor.
    """
    replacements = {id(p): values[name] for name, p in named_parameters(model).items() if name in values}
    tensors: dict[int, Tensor] = {}
    state = model.state_dict(keep_vars=True)
    for live in state.values():
        if id(live) not in tensors:
            value = replacements[id(live)] if id(live) in replacements else whole(live)
            tensors[id(live)] = value.to("cpu", live.dtype, copy=True)
    return {key: tensors[id(live)] for key, live in state.items()}


def barrier() -> None:
    """Waits until every rank is here. Returns at once in a single process."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


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
