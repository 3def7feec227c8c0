"""What ranks say to each other, and what they allocate, seen where every operator of torch passes by."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, UntypedStorage
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import TrainerCallback


@dataclass(frozen=True)
class Message:
    """One operation that communicates.

    Attributes:
        operation: Its name.
        numel: Elements in the largest tensor that it was given.
    """

    operation: str
    numel: int


class Traffic(TorchDispatchMode):
    """Notes each collective and each message between two ranks that this rank takes part in within a `with` block.

    All of `torch.distributed`, of DTensor and of `deepspeed.comm` come down to operators of c10d.

    Attributes:
        messages: What was noted so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[Message] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if "c10d" in func.namespace:
            sizes = [tensor.numel() for tensor in _tensors((args, kwargs))]
            self.messages.append(Message(str(func), max(sizes, default=0)))
        return func(*args, **(kwargs or {}))


class Tapped(TrainerCallback):
    """Passes a training's events on to a callback and notes what the callback communicates at each step's end.

    Attributes:
        messages: What was noted, by step.
    """

    def __init__(self, callback: TrainerCallback) -> None:
        self.messages: dict[int, list[Message]] = {}
        self._callback = callback

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._callback.on_train_begin(args, state, control, **kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.messages[state.global_step] = messages_of(
            lambda: self._callback.on_step_end(args, state, control, **kwargs)
        )


def messages_of(action: Callable[[], object]) -> list[Message]:
    """What an action communicates from this rank."""
    with Traffic() as traffic:
        action()
    return traffic.messages


class Allocations(TorchDispatchMode):
    """Notes the largest tensor that comes into being within a `with` block, in memory that is not an argument's.

    Attributes:
        largest: Its bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {storage.data_ptr() for storage in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        made = [storage.nbytes() for storage in _storages(result) if storage.data_ptr() not in given]
        self.largest = max([self.largest, *made])
        return result


def largest_allocation(action: Callable[[], object]) -> int:
    """Bytes of the largest tensor that an action makes on this rank."""
    with Allocations() as allocations:
        action()
    return allocations.largest


def _storages(tree: object) -> list[UntypedStorage]:
    """The memory of the tensors; that of a DTensor is its local tensor's, which passes by as well."""
    return [tensor.untyped_storage() for tensor in _tensors(tree) if not isinstance(tensor, DTensor)]


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
