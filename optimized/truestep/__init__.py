"""Callbacks for the Hugging Face Trainer that match their written specification at every step.

Importing this package imports torch, transformers and accelerate. DeepSpeed, PEFT and the trackers
are left to the trainings that use them.
"""

from truestep.bema import BEMACallback
from truestep.ref_sync import SyncRefModelCallback

__all__ = ["BEMACallback", "SyncRefModelCallback"]
