"""What ranks say to each other: one verdict for all of them, and one whole tensor out of everyone's pieces."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Result = TypeVar("Result")


def rank() -> int:
    """The number of this process among the ranks, 0 without a process group."""
    return dist.get_rank() if _has_group() else 0


def world_size() -> int:
    """The number of ranks, 1 without a process group."""
    return dist.get_world_size() if _has_group() else 1


def exchange(value: object) -> list[Any]:
    """Give a small picklable object to every rank.

    Returns:
        The objects of all ranks, in rank order.
    """
    values: list[Any] = [value] * world_size()
    if _has_group():
        dist.all_gather_object(values, value)
    return values


def from_main_process(value: Result) -> Result:
    """Have every rank use what rank 0 has, a picklable object."""
    values = [value]
    if _has_group():
        dist.broadcast_object_list(values, src=0)
    return values[0]


def agree(attempt: Callable[[], Result], failure: type[Exception]) -> Result:
    """Run something that may fail on some ranks only, and fail on all of them if it does.

    A rank that raised alone would leave the others waiting in their next collective. `attempt` must not communicate.

    Args:
        attempt: What to run; it may raise anything.
        failure: What every rank raises then. Its only argument is the message.

    Returns:
        What `attempt` returned on this rank.

    Raises:
        failure: With the message of this rank's error, or else of the first rank's that failed.
    """
    error: Exception | None = None
    try:
        result = attempt()
    except failure as raised:
        error = raised
    except Exception as raised:
        error = failure(f"{type(raised).__name__}: {raised}")
        error.__cause__ = raised
    messages = exchange(None if error is None else str(error))
    if error is not None:
        raise error
    for other, message in enumerate(messages):
        if message is not None:
            raise failure(f"rank {other}: {message}")
    return result


def assemble(piece: Tensor, ranges: Sequence[tuple[int, int]], numel: int) -> Tensor:
    """Put the pieces of all ranks together, on every rank.

    Each piece is broadcast into its place, so that a rank holds one whole tensor and nothing else.

    Args:
        piece: The elements of this rank, of shape `(stop - start,)` and any dtype.
        ranges: The half-open range of each rank, in rank order. They cover `[0, numel)`; some may be equal
            (replicas) or empty.
        numel: Elements in the whole tensor.

    Returns:
        All elements, of shape `(numel,)`, in the dtype of `piece`, bitwise what their owners hold. On the device of
        `piece` where the backend can use it there, otherwise on the backend's device.
    """
    if all(extent == (0, numel) for extent in ranges):
        return piece
    whole = torch.empty(numel, dtype=piece.dtype, device=_communication_device(piece.device))
    start, stop = ranges[rank()]
    whole[start:stop] = piece
    # As bytes: every backend can send them, whatever the dtype.
    in_bytes, size = whole.view(torch.uint8), whole.element_size()
    sources = {extent: source for source, extent in reversed(list(enumerate(ranges))) if extent[0] < extent[1]}
    transfers = [
        dist.broadcast(in_bytes[start * size : stop * size], src=source, async_op=True)
        for (start, stop), source in sorted(sources.items())
    ]
    for transfer in transfers:
        transfer.wait()
    return whole


def _has_group() -> bool:
    return dist.is_available() and dist.is_initialized()


def _communication_device(preferred: torch.device) -> torch.device:
    """`preferred` where the backend sends from such devices, otherwise a device that it does send from."""
    backends = [entry.split(":")[0] for entry in dist.get_backend_config().split(",")]
    device_type = preferred.type if preferred.type in backends else backends[0]
    if device_type == "cpu":
        return torch.device("cpu")
    return torch.device(device_type, torch.accelerator.current_device_index())
