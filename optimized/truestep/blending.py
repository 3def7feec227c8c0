"""A reference model that moves towards another model, each rank moving the elements that it holds."""

from collections.abc import Mapping

import torch
from torch import Tensor

from truestep.checkpoint import SavedState
from truestep.collectives import agree
from truestep.pairing import Pair, pair
from truestep.topology import Topology, UnsupportedModelError, require_supported_dtypes

# Elements that one pass over two dtypes converts at a time: 2 MiB of float32, which stay in the cache.
PIECE_ELEMENTS = 512 * 1024


def blend(target: Tensor, source: Tensor, weight: float) -> None:
    """Move a target towards a source in place: target ← α·source + (1 − α)·target, rounded once to its dtype.

    For 0 < α < 1 it is evaluated as a linear interpolation in the widest dtype of the two, at least in float32.
    α = 1 copies, so that an infinity or NaN in the target does not remain.

    Args:
        target: Elements to move, of shape `(n,)`.
        source: Elements to move towards, of shape `(n,)`; any dtype and device.
        weight: α in (0, 1].
    """
    if weight == 1:
        target.copy_(source)
    elif (target.dtype, target.device) == (source.dtype, source.device):
        # In a 16-bit dtype torch interpolates in float32, and rounds the result alone.
        target.lerp_(source, weight)
    else:
        wide = torch.promote_types(torch.promote_types(target.dtype, source.dtype), torch.float32)
        for start in range(0, len(target), PIECE_ELEMENTS):
            piece = target[start : start + PIECE_ELEMENTS]
            near = source[start : start + PIECE_ELEMENTS].to(piece.device, wide)
            piece.copy_(piece.to(wide).lerp_(near, weight))


class BlendedReference:
    """A reference model, its pairing with a policy, and the master copy of its weights if there is one.

    Constructing it is collective. The pairing is found once; a sync does no work on names.

    Args:
        policy: The model that is trained.
        reference: The model that follows it.
        master_weights: Whether 16-bit weights of the reference are kept in float32 beside it, and blended there.

    Attributes:
        pairs: What follows what.
        shards: The parameters of the reference that have a partner, by name.

    Raises:
        PairingError: Parameters do not correspond.
        UnsupportedModelError: A parameter has a dtype that cannot be blended.
    """

    def __init__(self, policy: Topology, reference: Topology, master_weights: bool) -> None:
        self._policy = policy
        self._topology = reference
        self.pairs = pair(policy, reference)
        self.shards = {one.reference.name: one.reference for one in self.pairs}
        shards = [shard for one in self.pairs for shard in (one.reference, one.policy)]
        agree(lambda: require_supported_dtypes(shards), UnsupportedModelError)
        self._masters = {
            shard.name: shard.elements().float()
            for shard in self.shards.values()
            if master_weights and shard.parameter.dtype.itemsize < torch.float32.itemsize
        }

    def move(self, weight: float) -> None:
        """Reference ← α·policy + (1 − α)·reference. Collective unless every pair is local.

        Args:
            weight: α in [0, 1]. At 0 nothing is read or written.
        """
        if weight == 0:
            return
        for one in self.pairs:
            self._move(one, weight)
        self._topology.release()

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint needs: parameter name → `reference`, `master` → tensor of shape `(owned.size,)`."""
        kept = {name: {"reference": shard.owned_elements()} for name, shard in self.shards.items()}
        for name, master in self._masters.items():
            shard = self.shards[name]
            kept[name]["master"] = master.narrow(0, shard.owned.start - shard.held.start, shard.owned.size)
        return kept

    def read(self, saved: SavedState, has_masters: bool) -> dict[str, dict[str, Tensor]]:
        """Read what this rank holds of a saved reference; nothing is changed, and nothing communicated.

        Args:
            saved: The state, of these parameters.
            has_masters: Whether it has a master copy.

        Returns:
            As from `tensors`, but of shape `(held.size,)` and on the host.

        Raises:
            CheckpointError: The state is damaged.
        """
        found: dict[str, dict[str, Tensor]] = {}
        for name, shard in self.shards.items():
            kinds = {"reference": shard.parameter.dtype}
            if has_masters and name in self._masters:
                kinds["master"] = self._masters[name].dtype
            found[name] = {kind: torch.empty(shard.held.size, dtype=dtype) for kind, dtype in kinds.items()}
            for kind, values in found[name].items():
                saved.read(name, kind, shard.held, values)
        return found

    def restore(self, found: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Set the reference, and the master copy, to what `read` found. Without one, it begins with the weights."""
        for name, kinds in found.items():
            self.shards[name].overwrite(kinds["reference"])
            if name in self._masters:
                self._masters[name].copy_(kinds.get("master", kinds["reference"]))
        self._topology.release()

    def _move(self, one: Pair, weight: float) -> None:
        elements, source = one.reference.elements(), one.policy_elements(self._policy)
        master = self._masters.get(one.reference.name)
        if master is None:
            blend(elements, source, weight)
        else:
            blend(master, source, weight)
            elements.copy_(master)
        one.reference.commit(elements)
