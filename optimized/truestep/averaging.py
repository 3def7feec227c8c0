"""The buffers of an exponential moving average over this rank's elements, and how they follow the parameters."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from truestep.side_stream import SideStream
from truestep.topology import Shard

# Elements that an update takes at a time. Few enough that θ is still in the cache when it is read for the second time;
# so many that starting a loop for each costs nothing, also while other threads want the cores.
PIECE_ELEMENTS = 2 * 1024 * 1024


def buffer_device(device: str | torch.device) -> torch.device:
    """The device that an argument `device` names.

    Raises:
        ValueError: There is no such device here.
    """
    try:
        parsed = torch.device(device)
        module = torch.get_device_module(parsed)
        available = parsed.type == "cpu" or (module.is_available() and (parsed.index or 0) < module.device_count())
    except (RuntimeError, TypeError, AttributeError):
        available = False
    if not available:
        raise ValueError(f"device={device!r}: must be the name of a device that is available here, such as 'cpu'")
    return parsed


@dataclass
class Average:
    """The buffers of one parameter's owned elements, all of shape `(owned.size,)`.

    Attributes:
        ema: EMA_t, in float64 for a float64 parameter, otherwise in float32.
        anchor: θ₀ in the parameter's dtype, which holds it exactly; None without bias correction.
        latest: θ_t of the last update, in the parameter's dtype; None where nobody needs it.
    """

    ema: Tensor
    anchor: Tensor | None
    latest: Tensor | None

    def tensors(self) -> dict[str, Tensor]:
        """The buffers that a checkpoint needs, by name: `latest` counts only with an `anchor` to compare it to."""
        named = {"ema": self.ema}
        if self.anchor is not None and self.latest is not None:
            named |= {"anchor": self.anchor, "latest": self.latest}
        return named


class ShardedAverages:
    r"""EMA and bias correction of the owned elements of some shards.

    Only the EMA is a recursion, so only the EMA moves at an update; the shadow is formed when somebody reads it:

    .. math::

        EMA_t = EMA + β (θ_t - EMA), \qquad θ'_t = EMA_t + α (θ_t - θ_0)

    An update reads θ_t and EMA from memory once and writes EMA once (`lerp_`), plus one copy of θ_t for the reader.
    Nothing is communicated. From a GPU to buffers on the host, the copy runs beside the training, and `settle` moves
    the EMA.

    Args:
        shards: The parameters to average, by name; each has buffers for its owned range alone.
        device: Where the buffers are.
        correct_bias: Whether θ₀ and θ_t are kept for the bias correction.
    """

    def __init__(self, shards: Mapping[str, Shard], device: torch.device, correct_bias: bool) -> None:
        self.shards = shards
        self.device = torch.empty(0, device=device).device  # with its index, as tensors have it
        self._correct_bias = correct_bias
        sources = {shard.elements().device for shard in self.shards.values()}
        self._stream = SideStream.between(sources, self.device)
        self._pending_weight: float | None = None
        self._scratch: Tensor | None = None
        self._averages = {name: self._allocate(shard) for name, shard in self.shards.items()}

    def snapshot(self) -> None:
        """θ₀ ← θ and EMA ← θ."""
        for name, shard in self.shards.items():
            live, average = shard.owned_elements(), self._averages[name]
            average.ema.copy_(live)
            for buffer in (average.anchor, average.latest):
                if buffer is not None:
                    buffer.copy_(live)

    def update(self, weight: float) -> None:
        """EMA ← EMA + β (θ − EMA), with β = `weight` in [0, 1] rounded once to the dtype of the EMA."""
        self.settle()
        if self._stream is not None:
            with self._stream.copying():
                for name, shard in self.shards.items():
                    latest = self._averages[name].latest
                    assert latest is not None
                    latest.copy_(shard.owned_elements(), non_blocking=True)
            self._pending_weight = weight
            return
        for name, shard in self.shards.items():
            average, theta = self._averages[name], shard.owned_elements()
            if theta.device == self.device:
                self._absorb(average.ema, theta, weight, kept_in=average.latest)
            else:
                assert average.latest is not None
                self._absorb(average.ema, average.latest.copy_(theta), weight)

    def settle(self) -> None:
        """Finish an update whose copy was still under way."""
        if self._stream is None or self._pending_weight is None:
            return
        weight, self._pending_weight = self._pending_weight, None
        self._stream.wait()
        for average in self._averages.values():
            assert average.latest is not None
            self._absorb(average.ema, average.latest, weight)

    def shadow(self, name: str, bias_weight: float, dtype: torch.dtype) -> Tensor:
        """θ′ = EMA + α (θ_t − θ₀) of the owned elements, rounded once to `dtype`.

        Args:
            name: The parameter.
            bias_weight: α of the last update, in [0, 1].
            dtype: What to round to.

        Returns:
            A new tensor of shape `(owned.size,)` on the buffers' device.
        """
        self.settle()
        average = self._averages[name]
        # Without an update since the snapshot α is 0, and the sum would turn a -0.0 into 0.0.
        if average.anchor is None or average.latest is None or bias_weight == 0:
            return average.ema.to(dtype, copy=True)
        moved = average.latest.to(average.ema.dtype) - average.anchor.to(average.ema.dtype)
        return torch.add(average.ema, moved, alpha=bias_weight).to(dtype)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """The buffers themselves: parameter name → `ema`, `anchor`, `latest` → tensor of shape `(owned.size,)`."""
        self.settle()
        return {name: average.tensors() for name, average in self._averages.items()}

    def _absorb(self, ema: Tensor, theta: Tensor, weight: float, kept_in: Tensor | None = None) -> None:
        """Move the EMA towards θ on the same device, and keep a copy of θ on the way if there is a buffer for it."""
        for start in range(0, len(ema), PIECE_ELEMENTS):
            piece = slice(start, start + PIECE_ELEMENTS)
            ema[piece].lerp_(self._converted(theta[piece], ema.dtype), weight)
            if kept_in is not None:
                kept_in[piece].copy_(theta[piece])

    def _converted(self, piece: Tensor, dtype: torch.dtype) -> Tensor:
        """A piece of θ in the dtype of the EMA, until the next one is asked for: no native operation mixes two."""
        if piece.dtype == dtype:
            return piece
        if self._scratch is None:
            longest = max(shard.owned.size for shard in self.shards.values())
            self._scratch = torch.empty(min(longest, PIECE_ELEMENTS), dtype=dtype, device=self.device)
        return self._scratch[: len(piece)].copy_(piece)

    def _allocate(self, shard: Shard) -> Average:
        size, dtype = shard.owned.size, shard.parameter.dtype

        def buffer(dtype: torch.dtype, pinned: bool = False) -> Tensor:
            return torch.empty(size, dtype=dtype, device=self.device, pin_memory=pinned)

        moves = self._correct_bias or shard.elements().device != self.device
        return Average(
            ema=buffer(torch.promote_types(dtype, torch.float32)),
            anchor=buffer(dtype) if self._correct_bias else None,
            latest=buffer(dtype, pinned=self._stream is not None) if moves else None,
        )
