"""The place of the Trainer's own progress callbacks."""

import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.trainer_callback import CallbackHandler

from truestep.trainer_frames import methods_of

_EVENTS = (
    "on_train_begin",
    "on_step_end",
    "on_prediction_step",
    "on_evaluate",
    "on_predict",
    "on_log",
    "on_train_end",
)

_BARS = ("training_bar", "prediction_bar", "training_tracker")


def take_place(callback: TrainerCallback) -> None:
    """Silence the Trainer's own callbacks that show progress, wherever the callback is that is being called.

    They stay where they are, and are themselves again when the next training or evaluation begins without a callback
    like this one.
    """
    for handler in _handlers():
        if callback in handler.callbacks:
            for own in handler.callbacks:
                if type(own) in _kinds() and "on_log" not in vars(own):
                    _Silence(own, handler, type(callback))


class _Silence:
    """Answers for a callback as long as there is one of another kind beside it."""

    def __init__(self, own: TrainerCallback, handler: CallbackHandler, kind: type[TrainerCallback]) -> None:
        self._own = own
        self._handler = handler
        self._kind = kind
        self._is_training = False
        for name in _BARS:  # what it has begun, if it was called first
            bar = vars(own).get(name)
            if bar is not None:
                bar.leave = False
                bar.close()
                setattr(own, name, None)
        for event in _EVENTS:
            setattr(own, event, partial(self._answer, event))

    def _answer(self, event: str, *args: Any, **kwargs: Any) -> Any:
        is_replaced = any(isinstance(callback, self._kind) for callback in self._handler.callbacks)
        # Itself again in the middle of a training, it would not know that there is one.
        if is_replaced or (self._is_training and event != "on_train_begin"):
            self._is_training = event != "on_train_end" and (self._is_training or event == "on_train_begin")
            return None
        for name in _EVENTS:
            delattr(self._own, name)
        return getattr(self._own, event)(*args, **kwargs)


def _kinds() -> list[type[TrainerCallback]]:
    notebook = sys.modules.get("transformers.utils.notebook")  # which needs IPython
    return [ProgressCallback, PrinterCallback, *([notebook.NotebookProgressCallback] if notebook else [])]


def _handlers() -> Iterator[CallbackHandler]:
    """Handlers that are calling callbacks, and those of Trainers that are at work."""
    from transformers import Trainer  # here, as it imports datasets and pandas

    for _, variables in methods_of(Trainer, CallbackHandler):
        handler = getattr(variables["self"], "callback_handler", variables["self"])
        if isinstance(handler, CallbackHandler):  # a Trainer that is being made has none yet
            yield handler
