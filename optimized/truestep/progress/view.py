"""What a progress display shows, as it follows from the events so far."""

from collections.abc import Mapping
from decimal import Decimal
from math import isfinite
from typing import Any, NamedTuple

from transformers import TrainerState

TREND = 15
"""How many earlier numbers a trend has at most, besides the latest."""

MANY_EPOCHS = 10**6
"""A number of epochs that stands for "until `max_steps`"."""


class Bar(NamedTuple):
    """A bar.

    Attributes:
        completed: Steps or batches, at most `total`.
        total: How many there are, or None if that is not known.
    """

    completed: int
    total: int | None


class Metric(NamedTuple):
    """A metric.

    Attributes:
        name: Its name without its group's.
        value: Its latest value as text.
        trend: Numbers that it has had, evenly thinned out, the latest last.
    """

    name: str
    value: str
    trend: list[int | float]


class Group(NamedTuple):
    """Metrics of which the names begin with the same prefix.

    Attributes:
        name: The prefix, or None for metrics without.
        metrics: In the order in which they appeared first.
    """

    name: str | None
    metrics: list[Metric]


class View(NamedTuple):
    """What is shown.

    Attributes:
        training: The training's bar, while it is on.
        epoch: The epoch and the number of epochs, as text.
        evaluation: The bar of an evaluation or a prediction, while one is on.
        groups: The table of metrics: those without a group, then the groups in the order in which they appeared first.
    """

    training: Bar | None
    epoch: str | None
    evaluation: Bar | None
    groups: list[Group]


class Progress:
    """Takes in events, and shows a `View` of them, also to another thread.

    Attributes:
        is_training: Whether a training is on.
        position: The global step, how many steps there are, if that is positive, the epoch, a fraction, and how many
            epochs there are.
        batches: Batches of the evaluation that is on, or None.
        logs: How often the table has changed.
    """

    def __init__(self) -> None:
        self.is_training = False
        self.position: tuple[int, int, float | None, int | None] = (0, 0, None, None)
        self.batches: int | None = None
        self.logs = 0
        self._dataloader: Any = None
        self._length: int | None = None
        self._metrics: dict[str, _Metric] = {}

    def begin(self, state: TrainerState) -> None:
        """A training begins."""
        self.is_training = True
        self.position = state.global_step, state.max_steps, state.epoch, state.num_train_epochs
        self.end_evaluation()
        self.clear()
        for entry in state.log_history:
            self.log({name: value for name, value in entry.items() if name != "step"})

    def end(self) -> None:
        """The training ends."""
        self.is_training = False
        self.end_evaluation()

    def evaluate(self, dataloader: Any) -> None:
        """A batch of an evaluation or a prediction is done."""
        if self.is_new(dataloader):
            if self.batches is None and not self.is_training:
                self.clear()
            self._dataloader, self._length, self.batches = dataloader, _length(dataloader), 0
        self.batches = (self.batches or 0) + 1

    def is_new(self, dataloader: Any) -> bool:
        """Whether a batch of this dataloader begins another evaluation or prediction."""
        return self.batches is None or dataloader is not self._dataloader

    def end_evaluation(self) -> None:
        """The evaluation or prediction ends, if one is on."""
        self._dataloader = self.batches = None

    def clear(self) -> None:
        """The table becomes empty."""
        self._metrics = {}
        self.logs += 1

    def log(self, metrics: Mapping[Any, Any] | None) -> None:
        """Metrics get new values."""
        for name, value in (metrics or {}).items():
            metric = self._metrics.get(name) if type(name) is str else None
            if metric is None:
                shown = printable(str.__str__(name) if isinstance(name, str) else _str(name))
                if shown == "epoch":
                    continue
                metric = self._metrics.setdefault(shown, _Metric())
            metric.add(value)
        self.logs += 1

    @property
    def evaluation(self) -> Bar | None:
        """The bar of the evaluation that is on."""
        batches, length = self.batches, self._length
        if batches is None:
            return None
        return Bar(batches, None) if length is None else Bar(min(batches, length), length)

    @property
    def training(self) -> Bar | None:
        """The bar of the training that is on."""
        step, steps, *_ = self.position
        if not self.is_training:
            return None
        return Bar(min(step, steps), steps) if steps > 0 else Bar(step, None)

    @property
    def view(self) -> View:
        """What is to be shown."""
        text, (_, _, epoch, epochs) = None, self.position
        if self.is_training and epoch is not None:
            text = f"{epoch:.2f}" if epochs is None or epochs >= MANY_EPOCHS else f"{epoch:.2f}/{epochs}"
        return View(self.training, text, self.evaluation, self._groups())

    def _groups(self) -> list[Group]:
        ungrouped = Group(None, [])
        groups: dict[str, Group] = {}
        for name, metric in list(self._metrics.items()):  # at once, as there may be a log meanwhile
            prefix, slash, rest = name.partition("/")
            if prefix and slash:
                groups.setdefault(prefix, Group(prefix, [])).metrics.append(metric.shown(rest))
            else:
                ungrouped.metrics.append(metric.shown(name))
        return [group for group in (ungrouped, *groups.values()) if group.metrics]


class _Metric:
    """The latest value of a metric, and every `stride`-th of its numbers."""

    __slots__ = ("_count", "_latest", "_points", "_stride", "_value")

    def __init__(self) -> None:
        self._value: Any = ""
        self._latest: list[int | float] = []
        self._points: list[int | float] = []
        self._count = 0
        self._stride = 1

    def add(self, value: Any) -> None:
        # In a training nearly every value is a float, and the training waits meanwhile.
        if type(value) is not float:
            value = _held(value)
            if type(value) not in (float, int):
                self._value = value
                return
        self._value = value
        self._count += 1
        if self._count % self._stride:
            self._latest = [value]
            return
        self._latest = []
        self._points.append(value)
        if len(self._points) > TREND:
            self._points = self._points[1::2]
            self._stride *= 2

    def shown(self, name: str) -> Metric:
        return Metric(name, _text(self._value), self._points + self._latest)


def printable(text: str) -> str:
    """Text in which characters that cannot be printed are Python's escapes of them."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def _held(value: Any) -> Any:
    """The float or int that a value is or holds; or else its text, as objects may change."""
    kind = type(value)
    if kind is float or kind is int:
        return value
    if kind is not bool:
        try:
            held = value.item() if value.ndim == 0 else None
        except Exception:  # it is no array, or holds nothing
            held = None
        if isinstance(held, bool | int | float):
            return _held(held)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, int) and kind is not bool:
        return int(value)
    return printable(_str(value))


def _str(value: Any) -> str:
    try:
        return str(value)
    except Exception:
        return f"<{type(value).__name__}>"


def _text(value: Any) -> str:
    if type(value) is float:
        return _text_of_float(value)
    if type(value) is int and abs(value) >= 10**15:
        return _without_zeros(f"{Decimal(value):.3e}")
    return str(value)


def _text_of_float(value: float) -> str:
    if value == 0 or not isfinite(value):
        return str(value) if value else "0"
    text = f"{value:#.4g}"
    _, _, exponent = text.partition("e")
    if not exponent:
        return text.removesuffix(".")
    return f"{value:.0f}" if 4 <= int(exponent) <= 6 else _without_zeros(text)


def _without_zeros(text: str) -> str:
    mantissa, _, exponent = text.partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{exponent}"


def _length(dataloader: Any) -> int | None:
    try:
        return len(dataloader)
    except Exception:  # it has none, or cannot say
        return None
