"""The executable specification: slow, whole tensors, float64, one formula a line.

Nothing here is meant to train large models. It is meant to be read beside the paper, and to be compared with.
"""

from truestep_reference.bema import BEMACallback
from truestep_reference.log_completions import LogCompletionsCallback
from truestep_reference.ref_sync import SyncRefModelCallback
from truestep_reference.rich_progress import RichProgressCallback
from truestep_reference.weave_eval import WeaveCallback

__all__ = [
    "BEMACallback",
    "LogCompletionsCallback",
    "RichProgressCallback",
    "SyncRefModelCallback",
    "WeaveCallback",
]
