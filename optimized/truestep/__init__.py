"""Callbacks for the Hugging Face Trainer that match their written specification at every step.

Importing this package imports torch, transformers and accelerate. DeepSpeed, PEFT and the trackers are imported
when a training that uses them begins.
"""

from truestep.bema import BEMACallback

__all__ = ["BEMACallback"]
