"""Callbacks for the Hugging Face Trainer that match their written specification at every step.

Importing this package imports torch, transformers and accelerate. DeepSpeed, PEFT and the trackers
are left to the trainings that use them.
"""

from truestep.bema import BEMACallback
from truestep.checkpoint import CheckpointError
from truestep.export import ExportError
from truestep.pairing import PairingError
from truestep.ref_sync import SyncRefModelCallback
from truestep.topology import UnsupportedModelError

__all__ = [
    "BEMACallback",
    "CheckpointError",
    "ExportError",
    "PairingError",
    "SyncRefModelCallback",
    "UnsupportedModelError",
]
