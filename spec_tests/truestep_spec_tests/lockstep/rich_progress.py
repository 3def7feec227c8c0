"""The view of a training: what is compared is every part of it, letter by letter, after every event that moves one.

Of a display that has no view, it is the bars.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from transformers import TrainerCallback
from truestep_reference import RichProgressCallback as ReferenceRichProgressCallback

from truestep_spec_tests.lockstep import Comparisons, Look, OnCompared, texts
from truestep_spec_tests.observe import Bars, as_text, view

COUNT = "number of parts"
"""The name under which it is compared how many parts a view has; none where there is no view."""


class ProgressComparator(texts.TextComparator):
    """Compares the bars, and then everything. The main process has both views, others have none.

    Args:
        subject: The callback under test.
        reference: The reference.
        on_compared: See `OnCompared`. A followed trajectory has steps, and neither losses nor an end: what users see
            of it is the bars, until then.
    """

    count = COUNT

    def __init__(
        self, subject: TrainerCallback, reference: ReferenceRichProgressCallback, on_compared: OnCompared | None = None
    ) -> None:
        super().__init__(on_compared)
        self._subject = subject
        self._reference = reference

    def texts(self, args: Any, state: Any) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        shown = view(self._subject, state)
        parts = bars if isinstance(shown, Bars) else everything
        return as_tensors(parts(shown)), as_tensors(parts(self._reference.view))

    def looks(self, live: Mapping[str, Tensor], args: Any, state: Any, control: Any, **kwargs: Any) -> Iterator[Look]:
        yield texts.look(as_tensors(bars(view(self._subject, state))), as_tensors(bars(self._reference.view)))
        yield from super().looks(live, args, state, control, **kwargs)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._compare(args, state, control, **kwargs)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._compare(args, state, control, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._compare(args, state, control, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._on_compared = None
        self._compare(args, state, control, **kwargs)


def lockstep(
    subject: TrainerCallback, reference: ReferenceRichProgressCallback, on_compared: OnCompared | None = None
) -> tuple[list[TrainerCallback], Comparisons]:
    """The callbacks that compare a subject with the reference in one training.

    Args:
        subject: The callback under test.
        reference: The reference.
        on_compared: See `OnCompared`.

    Returns:
        The callbacks for the training, in order, and the results that they fill in.
    """
    comparator = ProgressComparator(subject, reference, on_compared)
    return [subject, reference, comparator], comparator.comparisons


def as_tensors(parts: Mapping[str, str]) -> dict[str, Tensor]:
    """Parts of a view as tensors by name, and their number.

    Args:
        parts: The text of each.
    """
    return texts.as_tensors(parts, COUNT, len(parts))


def bars(view: Any) -> dict[str, str]:
    """The text of both bars.

    Args:
        view: What `truestep_spec_tests.observe.view` sees.
    """
    return {} if view is None else {"training": as_text(view.training), "evaluation": as_text(view.evaluation)}


def everything(view: Any) -> dict[str, str]:
    """The text of each part of a view.

    Args:
        view: What `truestep_spec_tests.observe.view` sees.
    """
    if view is None:
        return {}
    groups = {f"group {number}": as_text(group) for number, group in enumerate(view.groups)}
    return bars(view) | {"epoch": as_text(view.epoch)} | groups
