"""What the Trainer is doing but tells no callback: local variables of those of its methods that have called us."""

import inspect
import sys
import threading
from collections.abc import Iterator, Mapping
from types import CodeType, FrameType
from typing import Any

_CAN_PAUSE = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


class Call:
    """The call of a Trainer's method that has led to us: the outermost one, such as `train`.

    It can be asked later whether it is still running. No event tells a callback that a training has raised.
    """

    def __init__(self) -> None:
        methods = [(frame, variables["self"]) for frame, variables in _methods_of_trainer()]
        own = [frame for frame, trainer in methods if trainer is methods[0][1]]
        # A frame that is kept would keep what its variables hold, such as the model.
        self._identity: tuple[int, CodeType] | None = (id(own[-1]), own[-1].f_code) if own else None
        self._thread = threading.get_ident()

    @property
    def is_running(self) -> bool:
        """Whether it is running, as far as can be told: what no Trainer has called is taken to run on."""
        frame: FrameType | None = sys._current_frames().get(self._thread)
        last = None
        while frame is not None and self._identity is not None:
            if (id(frame), frame.f_code) == self._identity:
                return True
            last, frame = frame, frame.f_back
        # What the thread does meanwhile can end the walk too soon: a generator that has yielded has no caller.
        return self._identity is None or (last is not None and bool(last.f_code.co_flags & _CAN_PAUSE))


def methods_of(*kinds: type) -> Iterator[tuple[FrameType, dict[str, Any]]]:
    """The running methods of objects of some kinds in the stack of calls, and their variables, the innermost first."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_varnames[:1] == ("self",):
            found = frame.f_locals
            variables = dict(found)
            if isinstance(variables.get("self"), kinds):
                if isinstance(found, dict):
                    # Before Python 3.13 the frame would keep it until it returns, and with it a batch's logits, say.
                    # Only of these methods: it is also what `locals()` has given to a function that called it.
                    found.clear()
                yield frame, variables
        frame = frame.f_back


def variables_of_trainer() -> Iterator[Mapping[str, Any]]:
    """The local variables of each method of a Trainer in the stack of calls, the innermost first."""
    return (variables for _, variables in _methods_of_trainer())


def is_outside_of_training() -> bool:
    """Whether a Trainer has called us that does not train just now. A loop of one's own does not look like that."""
    of_methods = list(variables_of_trainer())
    return bool(of_methods) and not any("resume_from_checkpoint" in variables for variables in of_methods)


def _methods_of_trainer() -> Iterator[tuple[FrameType, dict[str, Any]]]:
    from transformers import Trainer  # here, as it imports datasets and pandas

    return methods_of(Trainer)
