"""How the suite looks at what an implementation shows, which is all that it asks of one."""

import copy
import inspect
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback
from truestep_fixtures.events import Events


def shows_dtypes(callback: TrainerCallback) -> bool:
    """Whether the callback shows its shadow in a dtype of one's choice."""
    method = getattr(callback, "shadow_state_dict", None)
    return method is not None and "dtype" in inspect.signature(method).parameters


def shadow(callback: TrainerCallback, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The shadow that a callback shows on request. Collective.

    Args:
        callback: It has `shadow_state_dict()`.
        dtype: The dtype to show it in, if `shows_dtypes`; that of the model by default.

    Returns:
        Name → whole tensor, of everything in the model's state dict.
    """
    state_dict: dict[str, Tensor] = callback.shadow_state_dict(*([] if dtype is None else [dtype]))
    return state_dict


def shadow_at_event(callback: TrainerCallback, args: Any, state: Any, control: Any, **kwargs: Any) -> dict[str, Tensor]:
    """The shadow at a moment of a training, in the model's dtype. Collective.

    A callback that has no `shadow_state_dict()` is told that the training ends here, with another `output_dir`, and
    what it saves is its shadow.
    """
    if hasattr(callback, "shadow_state_dict"):
        return shadow(callback)
    contents: list[dict[str, Tensor] | None] = [None]
    with tempfile.TemporaryDirectory() as directory:
        elsewhere = copy.copy(args)
        elsewhere.output_dir = directory
        callback.on_train_end(elsewhere, state, control, **kwargs)
        if state.is_world_process_zero:
            contents = [{}]
            for file in sorted(Path(directory, "bema").glob("*.safetensors")):
                contents[0] |= load_file(file)
        if dist.is_initialized():
            dist.broadcast_object_list(contents, src=0)
    return contents[0] or {}


def shadow_now(callback: TrainerCallback, events: Events) -> dict[str, Tensor]:
    """The same after an event that a test has fired. Collective."""
    return shadow_at_event(
        callback,
        events.args,
        events.state,
        events.control,
        model=events.model,
        processing_class=events.processing_class,
    )


def completions(callback: TrainerCallback, args: Any, state: Any) -> list[str]:
    """The table of completions at a moment of a training, as users see it. Collective.

    It is the file of the first such callback in a training. Where there is no file, it is what the callback has as
    `table`: rows, or their values.

    Returns:
        Each row as the text of a JSON object; a line of the file that is none, as it is. The same on every rank.
    """
    contents: list[list[str]] = [[]]
    if state.is_world_process_zero:
        file = Path(str(args.output_dir), "completions.jsonl")
        if file.exists():
            contents[0] = [_normalized(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]
        else:
            contents[0] = [as_text(_row(values)) for values in getattr(callback, "table", [])]
    if dist.is_initialized():
        dist.broadcast_object_list(contents, src=0)
    return contents[0]


class Bar(NamedTuple):
    """A bar as rich draws it, which is never beyond its end."""

    completed: int
    total: int | None


class Bars(NamedTuple):
    """What is seen of a display that has no `view`."""

    training: Bar | None
    evaluation: Bar | None


BARS = ("training_bar", "evaluation_bar")
"""Where a display without a `view`, such as TRL's, has its bars: `rich.progress.Progress`, or None."""


def shows_bars(callback: TrainerCallback) -> bool:
    """Whether a display shows its bars at least."""
    return hasattr(callback, "view") or all(hasattr(callback, name) for name in BARS)


def view(callback: TrainerCallback, state: Any) -> Any:
    """What a callback shows of a training's progress: its `view`, or else its `Bars`; None where it shows nothing."""
    if hasattr(callback, "view"):
        return callback.view
    if not shows_bars(callback):
        return None
    bars = Bars(*(_bar(getattr(callback, name)) for name in BARS))
    return bars if state.is_world_process_zero or any(bars) else None


def as_text(row: Any) -> str:
    """A row of a table, or a part of a view, as the text that it is compared by."""
    return json.dumps(row, ensure_ascii=False, default=str)


def _bar(progress: Any) -> Bar | None:
    """The latest bar of a `Progress`."""
    if progress is None or not progress.tasks:
        return None
    completed, total = progress.tasks[-1].completed, progress.tasks[-1].total
    return Bar(int(completed), None) if total is None else Bar(int(min(completed, total)), int(total))


def _normalized(line: str) -> str:
    try:
        return as_text(json.loads(line, parse_constant=_refuse))
    except ValueError:
        return line


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON, whatever Python reads")


def _row(values: Any) -> Any:
    """A row of the table that TRL's callback has: values without names, the step as text."""
    if isinstance(values, dict):
        return values
    step, *others = values
    return dict(zip(("step", "prompt", "completion"), (int(step), *others), strict=True))


class Watcher(TrainerCallback):
    """Looks at something after each event that can move it.

    Args:
        look: Called with an event's arguments; returns what it sees, by name.

    Attributes:
        shown: What it saw after the last event.
    """

    def __init__(self, look: Callable[..., dict[str, Tensor]]) -> None:
        self.shown: dict[str, Tensor] = {}
        self._look = look

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.shown = self._look(args, state, control, **kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.shown = self._look(args, state, control, **kwargs)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.shown = self._look(args, state, control, **kwargs)
