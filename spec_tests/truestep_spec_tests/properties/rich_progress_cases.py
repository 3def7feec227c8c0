"""What the tests of progress displays have in common: values and how they are shown, and events without a training."""

import enum
import json
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import nn
from transformers import TrainerCallback, TrainingArguments
from truestep_fixtures.events import Events

from truestep_spec_tests.implementation import Implementation
from truestep_spec_tests.options import require

# Values


class Shown(NamedTuple):
    """A value, and what is shown of it.

    Attributes:
        value: It.
        text: How it is shown.
        number: What it adds to a trend, if anything.
    """

    value: Any
    text: str
    number: int | float | None = None


class Unprintable:
    """Something that cannot even be shown."""

    def __str__(self) -> str:
        raise RuntimeError("cannot be shown")


class Unreadable:
    """Something that looks like a scalar and has no value."""

    shape = ()

    def item(self) -> float:
        raise RuntimeError("has no value")

    def __str__(self) -> str:
        return "unreadable"


class Evasive:
    """Something that does not even say what attributes it has."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError if name.startswith("_") else RuntimeError

    def __str__(self) -> str:
        return "evasive"


class Grade(enum.IntEnum):
    """A number that has a name."""

    GOOD = 3


class Temperature(float):
    """A number that is a float, and more."""

    def __str__(self) -> str:
        return f"{self:.1f} °C"


FLOATS = [
    *((0.0, "0"), (-0.0, "0"), (1.0, "1.000"), (2.5, "2.500"), (-2.5, "-2.500"), (0.1, "0.1000"), (123.456, "123.5")),
    # From where there is no exponent, to where there is one again.
    *((0.001, "0.001000"), (0.0001, "0.0001000"), (9.999999e-5, "0.0001000"), (9.999e-5, "9.999e-05"), (1e-5, "1e-05")),
    *((1234.5678, "1235"), (9999.4, "9999"), (9999.5, "10000"), (12345.678, "12346"), (1234567.8, "1234568")),
    *((9999499.9, "9999500"), (9999500.0, "1e+07"), (1e7, "1e+07"), (2.9979e8, "2.998e+08"), (-2.9979e8, "-2.998e+08")),
    # Half to even, and what is no half, as it is a little less or more.
    *((2.0625, "2.062"), (2.1875, "2.188"), (1000.5, "1000"), (1001.5, "1002"), (10000.5, "10000"), (10001.5, "10002")),
    *((1.0005, "1.000"), (1.0015, "1.002"), (1.5e-10, "1.5e-10"), (1.2345e-9, "1.235e-09"), (1e100, "1e+100")),
    *((5e-324, "4.941e-324"), (1.7976931348623157e308, "1.798e+308"), (math.inf, "inf"), (-math.inf, "-inf")),
]
"""Numbers with four digits, and how they are shown."""

INTEGERS = [
    *((0, "0"), (1, "1"), (-7, "-7"), (12345678, "12345678"), (10**15 - 1, "9" * 15), (1 - 10**15, f"-{'9' * 15}")),
    *((10**15, "1e+15"), (-(10**15), "-1e+15"), (1234567890123456, "1.235e+15"), (10**400, "1e+400")),
    *((9999 * 10**400, "9.999e+403"), (99995 * 10**400, "1e+405"), (10005 * 10**400, "1e+404")),
]
"""Numbers without a point, and how they are shown."""

NUMBERS = [
    *(Shown(value, text, value) for value, text in FLOATS),
    *(Shown(value, text, value) for value, text in INTEGERS),
    *(Shown(math.nan, "nan", math.nan), Shown(Grade.GOOD, "3", 3), Shown(Temperature(36.6), "36.60", 36.6)),
    *(Shown(np.float64(0.1), "0.1000", 0.1), Shown(np.float32(0.1), "0.1000", 0.10000000149011612)),
    *(Shown(np.float16(0.1), "0.09998", 0.0999755859375), Shown(np.int8(-7), "-7", -7)),
    *(Shown(np.uint64(2**64 - 1), "1.845e+19", 2**64 - 1), Shown(np.array(2.5), "2.500", 2.5)),
    *(Shown(np.array(3), "3", 3), Shown(torch.tensor(3), "3", 3), Shown(torch.tensor(math.inf), "inf", math.inf)),
    *(Shown(torch.tensor(0.1), "0.1000", 0.10000000149011612), Shown(torch.zeros((), requires_grad=True), "0", 0.0)),
    *(Shown(torch.tensor(0.1, dtype=torch.bfloat16), "0.1001", 0.10009765625), Shown(np.array(-0.5), "-0.5000", -0.5)),
]
"""Values that are numbers."""

OTHERS = [
    *(Shown(True, "True"), Shown(False, "False"), Shown(np.bool_(True), "True"), Shown(torch.tensor(False), "False")),
    *(
        Shown(None, "None"),
        Shown("0.5", "0.5"),
        Shown("", ""),
        Shown("größe 漢字 🙂", "größe 漢字 🙂"),
        Shown([1], "[1]"),
    ),
    *(Shown("[red]", "[red]"), Shown("[/red]", "[/red]"), Shown(r"\[red]", r"\[red]"), Shown(":smile:", ":smile:")),
    *(Shown("two\nlines", r"two\nlines"), Shown("\x1b[31mred", r"\x1b[31mred"), Shown("a\tb\r", r"a\tb\r")),
    *(Shown("\x00\x7f", r"\x00\x7f"), Shown("\u202eleft", r"\u202eleft"), Shown("\ud800", r"\ud800")),
    *(Shown(Unprintable(), "<Unprintable>"), Shown(Unreadable(), "unreadable"), Shown(Evasive(), "evasive")),
    *(Shown(np.array([2.5]), "[2.5]"), Shown(torch.tensor([1, 2]), "tensor([1, 2])"), Shown(np.str_("text"), "text")),
]
"""Values that are no numbers."""

VALUES = [*NUMBERS, *OTHERS]

NAMES: list[tuple[Any, tuple[str | None, str]]] = [
    *(("loss", (None, "loss")), ("eval_loss", (None, "eval_loss")), ("step", (None, "step")), ("", (None, ""))),
    *(("rewards/mean", ("rewards", "mean")), ("rewards/std", ("rewards", "std")), ("a/b/c", ("a", "b/c"))),
    *(("a/", ("a", "")), ("/loss", (None, "/loss")), ("//", (None, "//")), ("[red]/x", ("[red]", "x"))),
    *(("[/foo]", ("[", "foo]")), ("x\ny/\x1b", (r"x\ny", r"\x1b")), (7, (None, "7")), (None, (None, "None"))),
]
"""Names of metrics, and the groups and names that are shown."""

names = st.sampled_from(["epoch", *(name for name, _ in NAMES)]) | st.text("a/[]\n", max_size=4)
values = st.sampled_from([one.value for one in VALUES]) | st.floats() | st.integers(-(10**18), 10**18)
metrics = st.dictionaries(names, values, max_size=5)

# Dataloaders


class Loader:
    """A dataloader as far as it is seen.

    Args:
        length: What it gives as its length, which need not be the number of its batches, nor a length at all.
    """

    def __init__(self, length: Any = None) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length  # type: ignore[no-any-return]


LENGTHS = [(0, 0), (1, 1), (3, 3), (7, 7), (None, None), (-1, None), (10**30, None)]
"""What dataloaders give as their lengths, and the lengths that these are."""

# Events


class Fired(Events):
    """The events of trainings, in any order.

    Args:
        args: The training arguments.
        callbacks: What sees the events.
    """

    def __init__(self, args: TrainingArguments, callbacks: Iterable[TrainerCallback]) -> None:
        super().__init__(nn.Linear(1, 1), args, list(callbacks))

    def at(self, step: int, max_steps: int = 10, epoch: float | None = None, epochs: Any = 3) -> "Fired":
        """Changes the state."""
        state = self.state
        state.global_step, state.max_steps, state.epoch, state.num_train_epochs = step, max_steps, epoch, epochs
        return self

    def begin(self, *history: dict[str, Any]) -> None:
        """Begins a training that has logged something before."""
        self.state.log_history = list(history)
        self.fire("on_train_begin")

    def batch(self, dataloader: Any) -> None:
        """A batch has been evaluated or predicted."""
        self.callback_handler.eval_dataloader = dataloader
        self.fire("on_prediction_step")


def require_view(implementation: Implementation) -> None:
    """Skips the test if the display has no view, which TRL's documentation does not ask for.

    An implementation that offers it is held to everything that is beyond that documentation, also to the words and
    the layout of what it shows.
    """
    if not hasattr(implementation.RichProgressCallback, "view"):
        pytest.skip(f"RichProgressCallback of {implementation} has no view, and words of its own")


def constructed(display: type[TrainerCallback], **options: Any) -> TrainerCallback:
    """A new callback; skips the test if the constructor lacks an option, of which TRL's documentation has none."""
    require(display, options)
    return display(**options)


def as_json(view: Any) -> str:
    """A view as views are compared: tuples are lists, and NaN equals NaN."""
    return json.dumps(view)


def table(view: Any) -> dict[tuple[str | None, str], str]:
    """The values in a view's table, by group and name, in their order."""
    return {(group, name): value for group, metrics in view.groups for name, value, _ in metrics}
