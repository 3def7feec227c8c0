"""The view of a training's progress: the executable specification.

A view is a function of the events up to now, `view_of`. Each part of it looks through all of them anew. Nothing is
drawn here.
"""

from collections.abc import Mapping, Sequence
from decimal import MAX_EMAX, MIN_EMIN, ROUND_HALF_EVEN, Context, Decimal
from typing import Any, Literal, NamedTuple

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from truestep_reference import arguments

# The view


class Bar(NamedTuple):
    """How far something has come.

    Attributes:
        completed: Steps, or batches.
        total: How many there will be, if that is known.
    """

    completed: int
    total: int | None


class Metric(NamedTuple):
    """A line of the table.

    Attributes:
        name: Its name, without that of its group.
        value: Its latest value, as it is shown.
        trend: Some of the numbers that it has had, in order, and the latest one.
    """

    name: str
    value: str
    trend: list[int | float]


class Group(NamedTuple):
    """Metrics that belong together.

    Attributes:
        name: What precedes the first ``/`` in their names, or None.
        metrics: At least one, in the order in which they appeared first.
    """

    name: str | None
    metrics: list[Metric]


class View(NamedTuple):
    """What there is to see.

    Attributes:
        training: Of the training that is on, in steps.
        epoch: The epoch of that training, and how many there will be.
        evaluation: Of the evaluation or prediction that runs, in batches.
        groups: The table: first the metrics without a group, then groups in the order in which they appeared first.
    """

    training: Bar | None
    epoch: str | None
    evaluation: Bar | None
    groups: list[Group]


# The events


Kind = Literal["train_begin", "step_end", "train_end", "prediction_step", "evaluate", "predict", "log"]


class Entry(NamedTuple):
    """A metric at an event.

    Attributes:
        name: Its whole name, as it is shown.
        text: Its value, as it is shown.
        number: Its value, if that is a number.
    """

    name: str
    text: str
    number: int | float | None


class Event(NamedTuple):
    """What an event tells.

    Attributes:
        kind: Which event it is.
        step: ``state.global_step``.
        max_steps: ``state.max_steps``.
        epoch: ``state.epoch``.
        epochs: ``state.num_train_epochs``.
        entries: The metrics that come with it; with the beginning of a training, those of ``state.log_history``.
        dataloader: Where the batch of a prediction step is from.
        length: The length of that, if it has one.
    """

    kind: Kind
    step: int
    max_steps: int
    epoch: float | None
    epochs: int | None
    entries: list[Entry]
    dataloader: Any
    length: int | None


# From the events to the view


def view_of(events: Sequence[Event]) -> View:
    """What there is to see after some events.

    Args:
        events: All of them, in order.

    Returns:
        The view.
    """
    return View(training_bar(events), epoch_text(events), evaluation_bar(events), table(events))


def current_training(events: Sequence[Event]) -> Sequence[Event]:
    """The events of the training that is on, from its beginning on.

    Args:
        events: All of them.

    Returns:
        The last of them, none outside of a training.
    """
    begin = last_index(events, "train_begin")
    return () if begin is None or last_index(events[begin:], "train_end") is not None else events[begin:]


def training_bar(events: Sequence[Event]) -> Bar | None:
    """The bar of the training that is on: it is where its beginning or its last step was.

    Args:
        events: All of them.

    Returns:
        The bar, None outside of a training.
    """
    moves = [event for event in current_training(events) if event.kind in ("train_begin", "step_end")]
    if not moves:
        return None
    step, max_steps = moves[-1].step, moves[-1].max_steps
    return Bar(min(step, max_steps), max_steps) if max_steps > 0 else Bar(step, None)


def epoch_text(events: Sequence[Event]) -> str | None:
    """The epoch as of the last beginning, step or log of the training that is on.

    Args:
        events: All of them.

    Returns:
        ``0.75/3``, or ``0.75`` where the number of epochs says nothing. None outside of a training.
    """
    telling = [event for event in current_training(events) if event.kind in ("train_begin", "step_end", "log")]
    if not telling or telling[-1].epoch is None:
        return None
    epoch, epochs = telling[-1].epoch, telling[-1].epochs
    return f"{epoch:.2f}" if epochs is None or epochs >= 10**6 else f"{epoch:.2f}/{epochs}"


def evaluation_bar(events: Sequence[Event]) -> Bar | None:
    """The bar of the evaluation or prediction that runs: the batches of one dataloader.

    Args:
        events: All of them.

    Returns:
        The bar, None where nothing runs.
    """
    batches: list[Event] = []
    for event in events:
        if event.kind == "prediction_step":
            if batches and batches[0].dataloader is not event.dataloader:
                batches = []
            batches.append(event)
        elif event.kind != "log":
            batches = []
    if not batches:
        return None
    length = batches[0].length
    return Bar(len(batches) if length is None else min(len(batches), length), length)


def begins_table(events: Sequence[Event]) -> bool:
    """Whether a new table begins with the last event: a training does, an evaluation or prediction outside of one too.

    Args:
        events: Some first events, at least one.

    Returns:
        Whether earlier metrics are gone.
    """
    *before, last = events
    if last.kind == "prediction_step":
        return not current_training(before) and evaluation_bar(before) is None
    return last.kind == "train_begin"


def table(events: Sequence[Event]) -> list[Group]:
    """The metrics since the table began.

    Args:
        events: All of them.

    Returns:
        The groups.
    """
    begin = max((i for i in range(len(events)) if begins_table(events[: i + 1])), default=0)
    entries = [entry for event in events[begin:] for entry in event.entries]
    names = list(dict.fromkeys(entry.name for entry in entries))
    groups = dict.fromkeys([None, *(group_of(name) for name in names)])
    found = [Group(group, [metric(name, entries) for name in names if group_of(name) == group]) for group in groups]
    return [group for group in found if group.metrics]


def metric(name: str, entries: Sequence[Entry]) -> Metric:
    """A line of the table.

    Args:
        name: The whole name of a metric.
        entries: Everything in the table, in order.

    Returns:
        The metric, with its latest value.
    """
    own = [entry for entry in entries if entry.name == name]
    group = group_of(name)
    short = name if group is None else name.removeprefix(f"{group}/")
    return Metric(short, own[-1].text, trend([entry.number for entry in own if entry.number is not None]))


def group_of(name: str) -> str | None:
    """The group of a metric.

    Args:
        name: The whole name of the metric.

    Returns:
        What precedes the first ``/``, if anything does.

    Example:
        >>> group_of("rewards/accuracy/mean"), group_of("loss"), group_of("/loss")
        ('rewards', None, None)
    """
    group, slash, _ = name.partition("/")
    return group if group and slash else None


def trend(numbers: Sequence[int | float]) -> list[int | float]:
    """Every s-th of n numbers and the latest one, with s the smallest power of two that has ⌊n / s⌋ ≤ 15.

    Args:
        numbers: All of them, in order.

    Returns:
        At most 16 of them.

    Example:
        >>> trend(range(1, 16)) == list(range(1, 16))
        True
        >>> trend(range(1, 20))
        [2, 4, 6, 8, 10, 12, 14, 16, 18, 19]
    """
    n, s = len(numbers), 1
    while n // s > 15:
        s = 2 * s
    return [number for i, number in enumerate(numbers, start=1) if i % s == 0 or i == n]


def last_index(events: Sequence[Event], kind: Kind) -> int | None:
    """Where the last event of a kind is.

    Args:
        events: In order.
        kind: The kind.

    Returns:
        Its index, None if there is none.
    """
    return max((i for i, event in enumerate(events) if event.kind == kind), default=None)


# Names and values


def entries_of(metrics: Mapping[Any, Any] | None, *, without: Sequence[str] = ("epoch",)) -> list[Entry]:
    """Metrics as they are shown.

    Args:
        metrics: Values by name, or None: there are none.
        without: Names of what is no metric.

    Returns:
        The metrics, in their order.
    """
    found = []
    for name, value in ({} if metrics is None else metrics).items():
        shown = printable(name if isinstance(name, str) else text_of(name))
        if shown not in without:
            found.append(Entry(shown, value_text(held(value)), number_in(held(value))))
    return found


def held(value: Any) -> Any:
    """What a scalar of NumPy or PyTorch, or an array of dimension 0, holds.

    Args:
        value: Anything.

    Returns:
        That, or the value itself where it is something else.
    """
    try:
        return value.item() if value.shape == () else value
    except Exception:
        return value


def number_in(value: Any) -> int | float | None:
    """The number that a value is.

    Args:
        value: Anything but a scalar that holds it.

    Returns:
        The number, None where it is none. True and False are none.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return int(value) if isinstance(value, int) else float(value)


def value_text(value: Any) -> str:
    r"""A value as it is shown.

    Args:
        value: Anything but a scalar that holds it.

    Returns:
        Text that can be printed.

    Example:
        >>> value_text(1e-5), value_text(True), value_text("[red]"), value_text("two\nlines")
        ('1e-05', 'True', '[red]', 'two\\nlines')
    """
    number = number_in(value)
    return printable(text_of(value)) if number is None else number_text(number)


def number_text(number: int | float) -> str:
    """A number as it is shown.

    Args:
        number: Any number.

    Returns:
        A short integer as it is; other numbers with four significant digits, or all digits before the point.

    Example:
        >>> number_text(1234567890), number_text(2.5), number_text(12345.678), number_text(2.9979e8)
        ('1234567890', '2.500', '12346', '2.998e+08')
    """
    if isinstance(number, int) and abs(number) < 10**15:
        return str(number)
    exact = Decimal(number)
    if not exact.is_finite():
        return str(number)
    if exact.is_zero():
        return "0"
    rounded = Context(prec=4, rounding=ROUND_HALF_EVEN, Emin=MIN_EMIN, Emax=MAX_EMAX).plus(exact)
    e = rounded.adjusted()
    if -4 <= e <= 3:
        return f"{rounded:.{3 - e}f}"
    if 4 <= e <= 6:
        return f"{exact.to_integral_value(ROUND_HALF_EVEN):f}"
    return f"{rounded.scaleb(-e).normalize():f}e{e:+03d}"


def text_of(value: Any) -> str:
    """What ``str`` gives.

    Args:
        value: Anything.

    Returns:
        The text, or the name of the class in angle brackets where ``str`` raises.
    """
    try:
        return str(value)
    except Exception:
        return f"<{type(value).__name__}>"


def printable(text: str) -> str:
    """A text with the codes of what cannot be printed.

    Args:
        text: Any text.

    Returns:
        The same where all of it can be printed.
    """
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def length_of(dataloader: Any) -> int | None:
    """How many batches a dataloader says that it has.

    Args:
        dataloader: Anything, or None.

    Returns:
        Its length, if it has one.
    """
    try:
        return len(dataloader)
    except Exception:
        return None


# The callback


class RichProgressCallback(TrainerCallback):
    """Keeps the events of trainings, evaluations and predictions, and shows the view that they determine.

    No event tells that a training has raised, so here it goes on until another one begins, unless whoever knows of it
    fires ``on_train_end``.

    Args:
        plain_percent: How much of a training's steps lies between two plain lines, which are not written here.
        plain_seconds: How many seconds lie between two plain lines.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(self, *, plain_percent: float = 10.0, plain_seconds: float = 60.0) -> None:
        if arguments.real("plain_percent", plain_percent) == 0:
            raise ValueError(f"plain_percent must be a number above 0, got {plain_percent!r}")
        arguments.real("plain_seconds", plain_seconds)
        self._events: list[Event] = []
        self._is_main_process = True

    @property
    def view(self) -> View | None:
        """The view on the main process, None on others."""
        return view_of(self._events) if self._is_main_process else None

    # The trainer's events

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A training begins, or goes on from a checkpoint."""
        history = [entries_of(logs, without=("step", "epoch")) for logs in state.log_history]
        self._record("train_begin", state, [entry for entries in history for entry in entries])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A step has been taken."""
        self._record("step_end", state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The training has ended."""
        self._record("train_end", state)

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """A batch has been evaluated or predicted."""
        self._record("prediction_step", state, dataloader=eval_dataloader)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """An evaluation has ended; its metrics have been logged."""
        self._record("evaluate", state)

    def on_predict(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """A prediction has ended."""
        self._record("predict", state, entries_of(metrics))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Metrics are logged."""
        self._record("log", state, entries_of(logs))

    def _record(self, kind: Kind, state: TrainerState, entries: Sequence[Entry] = (), dataloader: Any = None) -> None:
        self._is_main_process = state.is_world_process_zero
        if self._is_main_process:
            facts = (state.global_step, state.max_steps, state.epoch, state.num_train_epochs)
            self._events.append(Event(kind, *facts, list(entries), dataloader, length_of(dataloader)))
