"""Which parameter of one model corresponds to which of another: by name, never by position."""

from typing import NamedTuple

from torch import Tensor, nn

from truestep.collectives import agree, exchange
from truestep.export import has_adapter
from truestep.topology import Shard, Topology

# How PEFT names what it has wrapped: the whole model; and within it a layer under an adapter, a module that is trained
# beside one, an embedding of which some rows are trained.
_WRAPPED_MODEL = "base_model.model."
_WRAPPED_MODULES = ("base_layer", "original_module", "token_adapter")


class PairingError(ValueError):
    """Parameters of policy and reference do not correspond; the message names one."""


class Pair(NamedTuple):
    """A parameter of the reference and the one of the policy that it follows.

    Attributes:
        reference: The reference's parameter as this rank sees it.
        policy: The policy's.
        is_local: Whether each rank holds, of the policy, all the elements that it holds of the reference, so that
            nothing has to be communicated. The same on every rank.
    """

    reference: Shard
    policy: Shard
    is_local: bool

    def policy_elements(self, policy: Topology) -> Tensor:
        """The policy's live elements of the range that this rank holds of the reference.

        Collective unless `is_local`: the whole parameter is then assembled, and is gone with what is returned.
        """
        held = self.reference.held
        if self.is_local:
            return self.policy.elements().narrow(0, held.start - self.policy.held.start, held.size)
        return policy.whole(self.policy.name).view(-1)[held.start : held.stop]


def pair(policy: Topology, reference: Topology) -> list[Pair]:
    """Find the partner of each parameter of the reference.

    A parameter that both models share is the policy already and is left out. If only one model
    carries adapters of PEFT, the names of base weights are compared as they were before it was wrapped.

    Args:
        policy: The model that is trained.
        reference: The model that follows it.

    Returns:
        The pairs, in the order of the reference's parameters. Collective.

    Raises:
        PairingError: On every rank, if a parameter of the reference has no partner, several, or one of another shape.
    """
    partners = agree(lambda: _partners(policy, reference), PairingError)
    covered = [_covers(partner.held, shard.held) for shard, partner in partners]
    everywhere = [all(of_rank[index] for of_rank in exchange(covered)) for index in range(len(partners))]
    return [Pair(shard, partner, local) for (shard, partner), local in zip(partners, everywhere, strict=True)]


def is_adapter_left_out(policy: nn.Module, reference: nn.Module) -> bool:
    """Whether the policy carries adapters that the reference has not, so that only base weights are paired."""
    return has_adapter(policy) and not has_adapter(reference)


def _partners(policy: Topology, reference: Topology) -> list[tuple[Shard, Shard]]:
    wrapped = has_adapter(policy.model) != has_adapter(reference.model)
    candidates = {_base_name(name) if wrapped else name: shard for name, shard in policy.names().items()}
    partners: dict[str, dict[int, Shard]] = {name: {} for name in reference.shards}
    for name, shard in reference.names().items():
        partner = candidates.get(_base_name(name) if wrapped else name)
        if partner is not None:
            partners[shard.name][id(partner)] = partner
    chosen = [(reference.shards[name], _only(name, list(found.values()))) for name, found in partners.items()]
    for shard, partner in chosen:
        if shard.shape != partner.shape:
            raise PairingError(
                f"reference parameter {shard.name!r} has shape {tuple(shard.shape)}, the policy's has "
                f"{tuple(partner.shape)}: the reference must have the architecture of the policy"
            )
    return [(shard, partner) for shard, partner in chosen if not _is_shared(shard, partner)]


def _only(name: str, found: list[Shard]) -> Shard:
    if not found:
        raise PairingError(
            f"reference parameter {name!r} has no partner: the policy has no parameter of that name; the reference "
            "must have the architecture of the policy"
        )
    if len(found) > 1:
        raise PairingError(
            f"reference parameter {name!r} is tied under names that are different parameters of the policy, "
            f"{', '.join(repr(shard.name) for shard in found)}: tie them in both models or in neither"
        )
    return found[0]


def _is_shared(one: Shard, other: Shard) -> bool:
    """Whether two parameters are one object, or one memory (as of layers that `create_reference_model` shares)."""
    if one.parameter is other.parameter:
        return True
    if not (one.is_replicated and other.is_replicated and one.numel > 0):
        return False
    ours, theirs = ((shard.parameter.data_ptr(), shard.parameter.stride()) for shard in (one, other))
    return ours == theirs


def _base_name(name: str) -> str:
    """The name that a base weight had before PEFT wrapped its model."""
    path = name.removeprefix(_WRAPPED_MODEL).split(".")
    return ".".join(part for part in path if part not in _WRAPPED_MODULES)


def _covers(outer: tuple[int, int], inner: tuple[int, int]) -> bool:
    return inner[0] == inner[1] or (outer[0] <= inner[0] and inner[1] <= outer[1])
