"""Which elements of a model's parameters a rank holds, whatever engine placed them there.

Every engine comes down to one idea. Of each parameter, taken as a flat row-major array, a rank *holds* a half-open
range of elements, and *owns* a range within it: the part that it works on. Together the owned ranges of all ranks
cover the parameter. One process holds and owns everything; under DDP and ZeRO-1/2 a rank holds everything and owns an
even slice; under ZeRO-3 and FSDP2 it owns what it holds. What is built on ranges (averaging, checkpoints, gathering)
never asks which engine it is.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn

from truestep.collectives import agree, assemble, exchange, rank, world_size

SUPPORTED_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

SUPPORTED = "a single process, DataParallel, DDP, DeepSpeed ZeRO-1/2/3, and FSDP2 (fully_shard) with Shard(0)"


class UnsupportedModelError(RuntimeError):
    """The model, or one of its parameters, is laid out or stored in a way that is not supported."""


class Extent(NamedTuple):
    """A half-open range `[start, stop)` of the elements of a flat parameter."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.stop - self.start


class Shard(ABC):
    """One parameter as one rank sees it.

    Attributes:
        name: The parameter's name in the unwrapped model; of a tied parameter the first one.
        parameter: The live parameter.
        shape: Shape of the whole parameter.
        held: The elements that are in this rank's memory.
        owned: The elements that this rank works on, within `held`.
        is_replicated: Whether every rank holds all elements. The same on every rank, also for a parameter so small
            that one rank holds all of it by chance: what to communicate is decided by it.
    """

    is_replicated = False

    def __init__(self, name: str, parameter: nn.Parameter, shape: torch.Size, held: Extent) -> None:
        self.name = name
        self.parameter = parameter
        self.shape = shape
        self.held = held
        self.owned = held

    @property
    def numel(self) -> int:
        """Elements of the whole parameter."""
        return self.shape.numel()

    @abstractmethod
    def elements(self) -> Tensor:
        """The live elements of `held`, flat, without communication; a view where the memory is contiguous."""

    def owned_elements(self) -> Tensor:
        """The live elements of `owned`, like `elements`."""
        return self.elements().narrow(0, self.owned.start - self.held.start, self.owned.size)

    def overwrite(self, values: Tensor) -> None:
        """Set the live elements of `held` to `values`, so that the next forward uses them. No communication."""
        elements = self.elements()
        elements.copy_(values)
        self.commit(elements)

    @abstractmethod
    def commit(self, elements: Tensor) -> None:
        """Have the next forward use what was written into `elements`, which came from `elements()`."""


class ReplicatedShard(Shard):
    """A parameter that is whole on every rank; each owns an even slice of it."""

    is_replicated = True

    def __init__(self, name: str, parameter: nn.Parameter) -> None:
        super().__init__(name, parameter, parameter.shape, Extent(0, parameter.numel()))
        self.owned = _chunk(self.numel, world_size(), rank())

    def elements(self) -> Tensor:
        """The live elements; a copy where the parameter's memory is not contiguous."""
        return self.parameter.detach().reshape(-1)

    def commit(self, elements: Tensor) -> None:
        """Write a copy back; a view is the parameter's memory."""
        if elements.data_ptr() != self.parameter.data_ptr():
            self.parameter.detach().copy_(elements.view(self.shape))


class ZeroPartition(Shard):
    """A parameter that DeepSpeed ZeRO-3 has partitioned: `ds_tensor`, without the padding at its end."""

    parameter: Any
    """DeepSpeed gives its parameters attributes that are not in their type."""

    def __init__(self, name: str, parameter: Any) -> None:
        partition = parameter.ds_tensor
        on_disk = getattr(partition.final_location, "value", None) == "nvme"
        if on_disk or hasattr(partition, "ds_quant_scale"):
            what = "offloaded to NVMe" if on_disk else "quantised"
            raise UnsupportedModelError(
                f"parameter {name!r} is partitioned by ZeRO-3 and {what}; supported: {SUPPORTED}"
            )
        group_rank = dist.get_rank(parameter.ds_process_group)
        numel = parameter.ds_numel
        start, stop = (min(part * partition.ds_numel, numel) for part in (group_rank, group_rank + 1))
        super().__init__(name, parameter, torch.Size(parameter.ds_shape), Extent(start, stop))

    def elements(self) -> Tensor:
        """The partition's elements, a view."""
        partition: Tensor = self.parameter.ds_tensor
        return partition.detach().narrow(0, 0, self.held.size)

    def commit(self, elements: Tensor) -> None:
        """Let go of whole copies."""
        # Where the parameter is also whole (below the persistence threshold, or after an evaluation), that copy is
        # stale now. Secondary partitions go with `Topology.release`.
        if self.parameter.ds_status.name == "AVAILABLE":
            self.parameter.partition()


class RowShard(Shard):
    """A parameter that is a `DTensor` split into rows over one dimension of its mesh: FSDP2, also with replicas."""

    parameter: Any
    """A `DTensor`. The module that defines it is slow to import, so it is not named here."""

    def __init__(self, name: str, parameter: Any) -> None:
        placements, mesh, rows = parameter.placements, parameter.device_mesh, parameter.shape[0]
        split = [index for index, placement in enumerate(placements) if not placement.is_replicate()]
        if len(split) > 1 or any(repr(placements[index]) != "Shard(dim=0)" for index in split):
            raise UnsupportedModelError(
                f"parameter {name!r} is a DTensor with placements {placements}; supported: {SUPPORTED}"
            )
        mine = _chunk(rows, mesh.size(split[0]), mesh.get_local_rank(split[0])) if split else Extent(0, rows)
        width = parameter.numel() // max(rows, 1)
        super().__init__(name, parameter, parameter.shape, Extent(mine.start * width, mine.stop * width))
        if self.elements().numel() != self.held.size:
            raise UnsupportedModelError(
                f"parameter {name!r}: this rank holds {self.elements().numel()} elements where an even split into rows "
                f"gives {self.held.size}; supported: {SUPPORTED}"
            )

    def elements(self) -> Tensor:
        """The local rows' elements; a copy where their memory is not contiguous."""
        local: Tensor = self.parameter.detach().to_local()
        return local.reshape(-1)

    def commit(self, elements: Tensor) -> None:
        """Write a copy back; a view is the rows' memory. Whole copies go with `Topology.release`."""
        local: Tensor = self.parameter.detach().to_local()
        if elements.data_ptr() != local.data_ptr():
            local.copy_(elements.view(local.shape))


class Topology:
    """The parameters of a model as this rank holds them, and how to get whole ones.

    Constructing it is collective: all ranks take part, and all fail if one does.

    Args:
        model: The model, wrapped (DDP, DeepSpeed, `torch.compile`) or not.
        unwrapper: Takes wrappers off before those that are known here, if there is one.

    Attributes:
        model: The unwrapped model.
        shards: A shard for each parameter by name, a tied parameter once.

    Raises:
        UnsupportedModelError: A parameter has no flat ranges, for example under FSDP1 or tensor parallelism.
    """

    def __init__(self, model: nn.Module, unwrapper: Callable[[nn.Module], nn.Module] | None = None) -> None:
        self.model = unwrap(model if unwrapper is None else unwrapper(model))
        self.shards = agree(lambda: self._lay_out(model), UnsupportedModelError)
        self._ranges = self._exchange_ranges()

    def assemble(self, name: str, piece: Tensor) -> Tensor:
        """Put the ranks' pieces of one parameter-sized array together. Collective.

        Args:
            name: The parameter's name.
            piece: This rank's elements, of shape `(owned.size,)` and any dtype.

        Returns:
            The whole array in the parameter's shape, on every rank; not to be written to.
        """
        shard = self.shards[name]
        return assemble(piece, self._ranges[name], shard.numel).view(shard.shape)

    def whole(self, name: str) -> Tensor:
        """The whole live parameter on every rank; not to be written to. Collective where it is sharded."""
        shard = self.shards[name]
        return shard.elements().view(shard.shape) if shard.is_replicated else self.assemble(name, shard.elements())

    def materialize(self, device: torch.device) -> dict[int, Tensor]:
        """Get the whole of every sharded parameter at once, as a forward would compute with it. Collective.

        Args:
            device: Where to.

        Returns:
            Whole tensors, by the id of the parameter whose place in the model they could take. FSDP2 has done that by
            itself, in the dtype of its mixed precision; `release` ends it.
        """
        for module in _sharded_modules(self.model):
            module.unshard()
        return {
            id(shard.parameter): self.whole(name).to(device)
            for name, shard in self.shards.items()
            if isinstance(shard, ZeroPartition)
        }

    def names(self) -> dict[str, Shard]:
        """A shard for each name of each parameter, a tied one under all that it has."""
        by_parameter = {id(shard.parameter): shard for shard in self.shards.values()}
        named = self.model.named_parameters(remove_duplicate=False)
        return {_plain(name): by_parameter[id(parameter)] for name, parameter in named}

    def release(self) -> None:
        """Drop what an engine keeps of parameters between forwards, so that the next one reads the shards.

        FSDP2 keeps whole copies, ZeRO-3's hpZ secondary partitions. Of these all go, also where only some parameters
        were changed: DeepSpeed gathers several parameters at a time from the one kind of partition or the other.
        """
        _reshard(self.model)
        for shard in self.shards.values():
            parameter: Any = shard.parameter
            if getattr(parameter, "ds_secondary_tensor", None) is not None:
                parameter.ds_secondary_tensor = None

    def _lay_out(self, wrapped: nn.Module) -> dict[str, Shard]:
        _refuse_fsdp1(wrapped)  # which an unwrapper has taken off the model
        return {shard.name: shard for shard in _shards(self.model)}

    def _exchange_ranges(self) -> dict[str, list[Extent]]:
        """The owned range of every rank, for each parameter."""
        mine = [(shard.name, shard.numel, *shard.owned) for shard in self.shards.values()]
        everyone = exchange(mine)
        agree(lambda: _require_cover(everyone), UnsupportedModelError)
        return {name: [Extent(*of_rank[index][2:]) for of_rank in everyone] for index, (name, *_) in enumerate(mine)}


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside wrappers such as DDP, `DeepSpeedEngine`, `DataParallel` and `torch.compile`."""
    inner: nn.Module = extract_model_from_parallel(model, keep_torch_compile=False)
    return inner


def class_name(model: nn.Module) -> str:
    """What the class of an unwrapped model is called; FSDP2 puts one of its own in its place."""
    from torch.distributed.fsdp import FSDPModule

    return next(kind.__name__ for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))


def require_supported_dtypes(shards: Iterable[Shard]) -> None:
    """Check that weights have a dtype that can be averaged.

    Raises:
        UnsupportedModelError: One has not; it is named.
    """
    for shard in shards:
        if shard.parameter.dtype not in SUPPORTED_DTYPES:
            raise UnsupportedModelError(
                f"parameter {shard.name!r} is {shard.parameter.dtype}; "
                f"supported: {', '.join(map(str, SUPPORTED_DTYPES))}"
            )


def _refuse_fsdp1(model: nn.Module) -> None:
    fsdp1 = next((name for name, module in model.named_modules() if hasattr(module, "_fsdp_wrapped_module")), None)
    if fsdp1 is not None:
        raise UnsupportedModelError(f"module {fsdp1 or 'model'!r} is wrapped by FSDP1; supported: {SUPPORTED}")


def _shards(model: nn.Module) -> Iterable[Shard]:
    # Between a forward and the next backward FSDP2 can have whole tensors in the places of its DTensors.
    _reshard(model)
    for wrapped_name, parameter in model.named_parameters():
        name = _plain(wrapped_name)
        if parameter.is_meta:
            raise UnsupportedModelError(
                f"parameter {name!r} is on the meta device, its values are elsewhere (offloaded by Accelerate, say); "
                f"supported: {SUPPORTED}"
            )
        # DeepSpeed marks so what lies whole on every rank but is another part of the model on each.
        if not getattr(parameter, "allreduce", True) or getattr(parameter, "tensor_model_parallel", False):
            raise UnsupportedModelError(f"parameter {name!r} is expert- or tensor-parallel; supported: {SUPPORTED}")
        if hasattr(parameter, "ds_tensor"):
            yield ZeroPartition(name, parameter)
        elif hasattr(parameter, "device_mesh"):
            yield RowShard(name, parameter)
        else:
            yield ReplicatedShard(name, parameter)


def _plain(name: str) -> str:
    """A parameter's name without the wrappers of modules in its path: activation checkpointing, `torch.compile`."""
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


def _reshard(model: nn.Module) -> None:
    for module in _sharded_modules(model):
        module.reshard()


def _sharded_modules(model: nn.Module) -> Iterable[Any]:
    """The modules that FSDP2's `fully_shard` was applied to."""
    from torch.distributed.fsdp import FSDPModule

    return (module for module in model.modules() if isinstance(module, FSDPModule))


def _chunk(length: int, parts: int, index: int) -> Extent:
    """The range of chunk `index` where `length` is cut into `parts` chunks as `torch.chunk` cuts, late ones shorter."""
    size = -(-length // parts)
    return Extent(min(index * size, length), min((index + 1) * size, length))


def _require_cover(everyone: list[list[tuple[str, int, int, int]]]) -> None:
    """All ranks list the same parameters, and their ranges leave no element out."""
    layouts = [[(name, numel) for name, numel, *_ in of_rank] for of_rank in everyone]
    for other, layout in enumerate(layouts):
        if layout != layouts[0]:
            raise UnsupportedModelError(f"ranks 0 and {other} have different parameters; supported: {SUPPORTED}")
    for index, (name, numel) in enumerate(layouts[0]):
        reached = 0
        for start, stop in sorted((of_rank[index][2], of_rank[index][3]) for of_rank in everyone):
            if start <= reached:
                reached = max(reached, stop)
        if reached < numel:
            raise UnsupportedModelError(
                f"parameter {name!r}: no rank holds its element {reached} of {numel}; supported: {SUPPORTED}"
            )
