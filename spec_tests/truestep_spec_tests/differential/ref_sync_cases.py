"""The runs that the differential tests of the reference model's sync have in common."""

from typing import Any

from truestep_spec_tests.runs import Setup

CALLBACK = "SyncRefModelCallback"


def syncing(
    implementation: str, topology: str = "single", ranks: int = 1, *, every: int = 2, alpha: float = 0.3, **changes: Any
) -> Setup:
    """A run in which a reference model follows the policy.

    Args:
        implementation: See `Implementation`.
        topology: Of the policy, and of the reference model where `ref_model` does not say otherwise.
        ranks: Number of ranks.
        every: `ref_model_sync_steps`.
        alpha: `ref_model_mixup_alpha`.
        changes: Other attributes of `Setup`.
    """
    settings = {"ref_model_sync_steps": every, "ref_model_mixup_alpha": alpha}
    training = settings | changes.pop("training", {})
    setup = Setup(implementation, topology, ranks, callback=CALLBACK, hyperparameters={}, training=training)
    return setup.on(**changes)
