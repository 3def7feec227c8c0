"""Callbacks for the Hugging Face Trainer that match their written specification at every step.

A name is imported when it is first used, together with torch, transformers and accelerate. DeepSpeed, PEFT and the
trackers are left to the trainings that use them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from truestep.bema import BEMACallback
    from truestep.checkpoint import CheckpointError
    from truestep.drop_in import patch_trl
    from truestep.export import ExportError
    from truestep.log_completions import LogCompletionsCallback
    from truestep.pairing import PairingError
    from truestep.ref_sync import SyncRefModelCallback
    from truestep.rich_progress import RichProgressCallback
    from truestep.topology import UnsupportedModelError
    from truestep.weave_eval import WeaveCallback

__all__ = [
    "BEMACallback",
    "CheckpointError",
    "ExportError",
    "LogCompletionsCallback",
    "PairingError",
    "RichProgressCallback",
    "SyncRefModelCallback",
    "UnsupportedModelError",
    "WeaveCallback",
    "patch_trl",
]

_MODULES = {
    "BEMACallback": "bema",
    "CheckpointError": "checkpoint",
    "ExportError": "export",
    "LogCompletionsCallback": "log_completions",
    "PairingError": "pairing",
    "RichProgressCallback": "rich_progress",
    "SyncRefModelCallback": "ref_sync",
    "UnsupportedModelError": "topology",
    "WeaveCallback": "weave_eval",
    "patch_trl": "drop_in",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
