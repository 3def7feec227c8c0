"""A live display of a training in the terminal."""

import math
import time
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from truestep.arguments import require_real
from truestep.progress.place import take_place
from truestep.progress.view import Progress, View
from truestep.sampling import random_states_kept
from truestep.trainer_frames import variables_of_trainer

if TYPE_CHECKING:
    from truestep.progress.lines import Lines
    from truestep.progress.live import Live
    from truestep.progress.session import Session


class RichProgressCallback(TrainerCallback, ExportableState):
    """Show how far a training has come, in the terminal, in a notebook or in a log.

    On a terminal there is one live display: a bar for the training, one for an evaluation or prediction while one runs,
    and a table of the latest metrics with their trends. It takes the place of the Trainer's own bars and log lines, is
    drawn only when something has changed, and what the program prints or logs appears above it. At the end a summary
    stays. In a notebook the cell shows the same; a pipe or a log file gets a plain line now and then.

    A number is shown with four significant digits, whatever its size. In a trend, the lowest and the highest of the
    numbers that a metric has had are the lowest and the highest block.

    Args:
        plain_percent: Where there is no terminal: a line whenever so much of the training's steps is done.
        plain_seconds: Where there is no terminal: a line whenever so many seconds have passed since the last one.

    Attributes:
        view: What is shown, on the main process; None on others.

    Raises:
        ImportError: At construction: rich is not installed.
        ValueError: At construction: an argument is out of its range.

    Example:
        >>> from truestep import RichProgressCallback
        >>> trainer.add_callback(RichProgressCallback())  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """

    def __init__(self, *, plain_percent: float = 10.0, plain_seconds: float = 60.0) -> None:
        if find_spec("rich") is None:
            raise ImportError("RichProgressCallback draws with rich, which is not installed: pip install rich")
        require_real("plain_percent", plain_percent, math.inf)
        require_real("plain_seconds", plain_seconds, math.inf)
        if plain_percent == 0:
            raise ValueError(f"plain_percent={plain_percent!r}: must be above 0")
        self.plain_percent = plain_percent
        self.plain_seconds = plain_seconds
        self._progress = Progress()
        self._is_main = True
        self._session: Session | None = None
        self._outlet: Live | Lines | None = None
        self._lines: Lines | None = None

    @property
    def view(self) -> View | None:
        """What is shown, on the main process; None on others."""
        return self._progress.view if self._is_main else None

    def state(self) -> dict[str, Any]:
        """The arguments, for checkpoints."""
        take_place(self)  # the Trainer asks before it begins a training
        return {"args": {"plain_percent": self.plain_percent, "plain_seconds": self.plain_seconds}, "attributes": {}}

    # Events of the Trainer

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take the place of the Trainer's own progress callback."""
        take_place(self)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin to show a training, at the step from which it goes on."""
        take_place(self)
        if self._session is not None:  # of a training that raised
            self._session.end()
        self._is_main = state.is_world_process_zero
        if self._is_main:
            self._progress.begin(state)
            self._open(args)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the training's bar."""
        self._is_main = is_main = state.is_world_process_zero
        if is_main:
            progress = self._progress
            progress.position = state.global_step, state.max_steps, state.epoch, state.num_train_epochs
            if progress.batches is not None:
                progress.end_evaluation()
            if self._lines is not None and not control.should_log:  # then a line can have the log of this step
                self._lines.step()

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the bar of the evaluation or prediction."""
        self._is_main = is_main = state.is_world_process_zero
        dataloader = kwargs.get("eval_dataloader")
        if is_main:
            if self._session is None or self._progress.is_new(dataloader):
                self._begin_evaluation(args)
            self._progress.evaluate(dataloader)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put metrics into the table."""
        self._is_main = is_main = state.is_world_process_zero
        if is_main:
            if self._session is None:
                take_place(self)
            self._progress.position = *self._progress.position[:2], state.epoch, state.num_train_epochs
            self._log(kwargs.get("logs"))

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take the evaluation's bar away; its metrics have been logged."""
        self._end_evaluation(args, state)

    def on_predict(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> None:
        """Put a prediction's metrics into the table, and take its bar away."""
        if state.is_world_process_zero:
            self._log(metrics)
        self._end_evaluation(args, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave a summary."""
        self._is_main = state.is_world_process_zero
        if self._is_main:
            self._close()
            self._progress.end()

    # Parts

    def _log(self, metrics: Mapping[Any, Any] | None) -> None:
        session, lines = self._session, self._lines
        self._progress.log(metrics)
        if session is not None:
            session.logged = time.monotonic()
        if lines is not None:
            lines.log(metrics)

    def _begin_evaluation(self, args: TrainingArguments) -> None:
        if self._session is not None and self._session.is_over:
            self._session.end()
        if self._session is None:
            take_place(self)
            if self._progress.is_training:  # it has raised
                self._progress.end()
            self._open(args)
        assert self._session is not None
        for variables in variables_of_trainer():
            if "description" in variables and "metric_key_prefix" in variables:
                prefix = variables["metric_key_prefix"]
                self._session.evaluation = "prediction" if variables["description"] == "Prediction" else "evaluation"
                self._session.part = "" if prefix in ("eval", "test") else prefix
                break

    def _end_evaluation(self, args: TrainingArguments, state: TrainerState) -> None:
        self._is_main = is_main = state.is_world_process_zero
        if is_main:
            self._progress.end_evaluation()
            if self._session is None:  # nothing was evaluated
                self._begin_evaluation(args)
            if not self._progress.is_training:
                self._close()
            elif self._lines is not None:
                self._lines.evaluation()

    def _open(self, args: TrainingArguments) -> None:
        with random_states_kept():  # the first import of rich draws
            from truestep.progress.lines import Lines
            from truestep.progress.live import CHANGES
            from truestep.progress.outlet import outlet
            from truestep.progress.session import Session
        session = self._session = Session(self._progress, args.device, self._close)
        lines = Lines(self._progress, self.plain_percent, self.plain_seconds)
        with CHANGES:
            self._outlet = outlet(lines)
            self._lines = lines if self._outlet is lines else None
            self._outlet.add(session)

    def _close(self) -> None:
        session, outlet = self._session, self._outlet
        self._session = self._outlet = self._lines = None
        if session is not None and outlet is not None:
            outlet.remove(session, session.draw_summary)
