"""What holds of the view of any RichProgressCallback, and that it is the reference's, after any events."""

from collections.abc import Iterator
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from transformers import Trainer, TrainerCallback, TrainingArguments
from truestep_fixtures import data, models, topologies
from truestep_reference import RichProgressCallback as ReferenceRichProgressCallback

from truestep_spec_tests import observe
from truestep_spec_tests.implementation import Implementation
from truestep_spec_tests.properties.rich_progress_cases import (
    LENGTHS,
    NAMES,
    VALUES,
    Fired,
    Loader,
    as_json,
    constructed,
    metrics,
    require_view,
    table,
)


@pytest.fixture(scope="module")
def args(tmp_path_factory: pytest.TempPathFactory) -> TrainingArguments:
    return topologies.training_arguments("single", tmp_path_factory.mktemp("out"), max_steps=10)


@pytest.fixture(params=["subject", "reference"])
def display(request: pytest.FixtureRequest, implementation: Implementation) -> Any:
    """A callback that shows its bars at least."""
    is_subject = request.param == "subject"
    display = implementation.RichProgressCallback() if is_subject else ReferenceRichProgressCallback()
    if not observe.shows_bars(display):
        pytest.skip(f"RichProgressCallback of {implementation} has neither a view nor bars")
    return display


@pytest.fixture
def callback(implementation: Implementation, display: Any) -> Any:
    """A callback that has a view."""
    require_view(implementation)
    return display


@pytest.fixture
def fired(args: TrainingArguments, display: Any) -> Iterator[Fired]:
    """Events of the display, whose last one ends a training."""
    events = Fired(args, [display])
    yield events
    events.close()


def bars(fired: Fired, display: Any) -> list[Any]:
    """The training bar and the evaluation bar."""
    view = observe.view(display, fired.state)
    return [view.training, view.evaluation]


IN_A_TRAINING = [
    pytest.param(True, marks=pytest.mark.clause("RICH-2"), id="in a training"),
    pytest.param(False, marks=pytest.mark.clause("RICH-4"), id="outside of one"),
]


# Bars


@pytest.mark.clause("RICH-2")
def test_the_training_bar_begins_at_the_step_of_the_checkpoint_and_moves_with_steps_until_the_end(
    fired: Fired, display: Any
) -> None:
    fired.at(4).begin()
    assert bars(fired, display) == [(4, 10), None]
    fired.at(5).fire("on_step_begin")
    fired.fire("on_log", logs={"loss": 1.0})
    assert bars(fired, display) == [(4, 10), None]
    fired.fire("on_step_end")
    assert bars(fired, display) == [(5, 10), None]
    fired.fire("on_train_end")
    assert bars(fired, display) == [None, None]


@pytest.mark.clause("RICH-2")
@pytest.mark.parametrize(("step", "max_steps", "shown"), [(12, 10, (10, 10)), (7, 0, (7, None)), (7, -1, (7, None))])
def test_the_training_bar_shows_no_more_than_its_total_if_it_has_one(
    fired: Fired, display: Any, step: int, max_steps: int, shown: tuple[int, int | None]
) -> None:
    fired.at(step, max_steps).begin()
    assert [shown, None] == bars(fired, display)
    fired.at(0, max_steps).begin()
    fired.at(step, max_steps).fire("on_step_end")
    assert [shown, None] == bars(fired, display)


@pytest.mark.parametrize("in_training", IN_A_TRAINING)
@pytest.mark.parametrize(("given", "length"), LENGTHS)
def test_the_evaluation_bar_counts_batches_up_to_the_length_of_the_dataloader(
    fired: Fired, display: Any, given: Any, length: int | None, in_training: bool
) -> None:
    if in_training:
        fired.begin()
    loader = Loader(given)
    for number in range(1, 6):
        fired.batch(loader)
        assert (number if length is None else min(number, length), length) == bars(fired, display)[1]


@pytest.mark.clause("RICH-2")
def test_a_batch_of_another_dataloader_starts_the_evaluation_bar_anew(fired: Fired, display: Any) -> None:
    fired.begin()
    one, other = Loader(3), Loader(3)
    shown = []
    for loader in (one, one, other, one, None, None):
        fired.batch(loader)
        shown.append(bars(fired, display)[1])
    assert shown == [(1, 3), (2, 3), (1, 3), (1, 3), (1, None), (2, None)]


@pytest.mark.parametrize("in_training", IN_A_TRAINING)
@pytest.mark.parametrize("event", ["on_evaluate", "on_predict", "on_train_begin", "on_step_end", "on_train_end"])
def test_the_evaluation_bar_goes_away_with_the_next_event_but_a_log(
    fired: Fired, display: Any, event: str, in_training: bool
) -> None:
    if in_training:
        fired.begin()
    fired.batch(Loader(3))
    for other in ("on_substep_end", "on_save", "on_step_begin", "on_epoch_end"):
        fired.fire(other)
    fired.fire("on_log", logs={})
    assert bars(fired, display)[1] == (1, 3)
    fired.fire(event, **({"metrics": {}} if event in ("on_evaluate", "on_predict") else {}))
    assert bars(fired, display)[1] is None


@pytest.mark.clause("RICH-4")
@pytest.mark.parametrize("event", ["on_step_end", "on_train_end"])
def test_a_step_or_an_end_without_a_training_begins_none(fired: Fired, callback: Any, event: str) -> None:
    fired.at(3, epoch=0.5).fire(event)
    assert as_json(callback.view) == "[null, null, null, []]"


# The epoch


@pytest.mark.clause("RICH-2")
def test_the_epoch_is_that_of_the_last_beginning_step_or_log(fired: Fired, callback: Any) -> None:
    fired.at(0, epoch=0.0).begin()
    assert callback.view.epoch == "0.00/3"
    fired.at(1, epoch=0.125).fire("on_step_end")
    assert callback.view.epoch == "0.12/3"
    fired.at(1, epoch=0.375).batch(Loader(3))
    fired.fire("on_evaluate", metrics={"epoch": 2.0})
    assert callback.view.epoch == "0.12/3"
    fired.fire("on_log", logs={"epoch": 2.0})
    assert callback.view.epoch == "0.38/3"
    fired.at(3, epoch=None).fire("on_step_end")
    assert callback.view.epoch is None
    fired.at(3, epoch=1.0).fire("on_train_end")
    assert callback.view.epoch is None


# The table


@pytest.mark.clause("RICH-1", "RICH-2")
def test_metrics_are_in_groups_those_without_one_first_each_with_its_latest_value(fired: Fired, callback: Any) -> None:
    fired.begin()
    fired.fire("on_log", logs={"b/x": 1, "loss": 2, "a/x": 3, "b/y": 4, "epoch": 0.5, "step": 1})
    fired.fire("on_log", logs={"eval_loss": 5, "a/x": 6, "epoch": 0.5})
    fired.fire("on_evaluate", metrics={"eval_loss": 8, "another": 9, "epoch": 0.5})
    fired.fire("on_predict", metrics={"a/w": 7, "loss": "none", "epoch": 0.5})
    assert table(callback.view) == {
        (None, "loss"): "none",
        (None, "step"): "1",
        (None, "eval_loss"): "5",
        ("b", "x"): "1",
        ("b", "y"): "4",
        ("a", "x"): "6",
        ("a", "w"): "7",
    }
    assert [group for group, _ in callback.view.groups] == [None, "b", "a"]
    assert [name for name, _, _ in callback.view.groups[0][1]] == ["loss", "step", "eval_loss"]


@pytest.mark.clause("RICH-2")
def test_the_table_of_a_training_begins_with_what_has_been_logged_before_its_checkpoint(
    fired: Fired, callback: Any
) -> None:
    fired.fire("on_log", logs={"of another training": 1})
    history = [{"loss": 2.0, "epoch": 0.5, "step": 1}, {"eval_loss": 3.0, "step": 1}, {"loss": 1.0, "step": 2}]
    fired.at(2).begin(*history)
    assert table(callback.view) == {(None, "loss"): "1.000", (None, "eval_loss"): "3.000"}
    ((_, (loss, _)),) = callback.view.groups
    assert loss.trend == [2.0, 1.0]


@pytest.mark.clause("RICH-2")
def test_the_table_of_an_evaluation_outside_of_a_training_begins_empty(fired: Fired, callback: Any) -> None:
    fired.begin()
    fired.fire("on_log", logs={"loss": 1})
    fired.batch(Loader(2))
    assert table(callback.view) == {(None, "loss"): "1"}
    fired.fire("on_train_end")
    fired.fire("on_log", logs={"late": 2})
    assert table(callback.view) == {(None, "loss"): "1", (None, "late"): "2"}
    for number in (3, 4):
        fired.batch(Loader(2))
        assert table(callback.view) == {}
        fired.fire("on_log", logs={"eval_loss": number})
        fired.batch(Loader(2))
        fired.fire("on_predict", metrics={"test_loss": number})
        assert {(None, "eval_loss"): f"{number}", (None, "test_loss"): f"{number}"} == table(callback.view)


@pytest.mark.clause("RICH-2")
@pytest.mark.parametrize(
    ("n", "trend"),
    [
        *((1, [1]), (15, list(range(1, 16))), (16, list(range(2, 17, 2))), (17, [*range(2, 17, 2), 17])),
        *((31, [*range(2, 31, 2), 31]), (32, list(range(4, 33, 4))), (100, [*range(8, 97, 8), 100])),
    ],
)
def test_the_trend_has_numbers_at_equal_distances_and_the_latest_one(
    fired: Fired, callback: Any, n: int, trend: list[int]
) -> None:
    for number in range(1, n + 1):
        fired.fire("on_log", logs={"x": number, "y": "no number", "z": number % 2 == 0})
    ((_, (x, y, z)),) = callback.view.groups
    assert trend == list(x.trend)
    assert [] == list(y.trend) == list(z.trend)


@pytest.mark.clause("RICH-4")
@pytest.mark.parametrize(
    ("event", "given"), [("on_log", "logs"), ("on_evaluate", "metrics"), ("on_predict", "metrics")]
)
def test_an_event_without_metrics_has_none(fired: Fired, callback: Any, event: str, given: str) -> None:
    fired.fire(event, **{given: None})
    assert table(callback.view) == {}


# Names and values


@pytest.mark.clause("RICH-3")
def test_values_are_shown_as_the_clause_says(fired: Fired, callback: Any) -> None:
    for shown in VALUES:
        fired.begin()
        fired.fire("on_log", logs={"x": shown.value})
        ((_, ((_, text, trend),)),) = callback.view.groups
        assert shown.text == text
        assert repr([] if shown.number is None else [shown.number]) == repr(list(trend))


@pytest.mark.clause("RICH-1", "RICH-3")
def test_names_are_shown_as_the_clause_says(fired: Fired, callback: Any) -> None:
    fired.fire("on_log", logs={name: 1 for name, _ in NAMES})
    expected = sorted((group or "", name) for _, (group, name) in NAMES)
    assert expected == sorted((group or "", name) for group, name in table(callback.view))


# Any events


class AnyOrder(RuleBasedStateMachine):
    """Fires events at a subject and the reference, in any order.

    Args:
        implementation: What is tested.
        args: The training arguments.
    """

    steps = st.integers(0, 12)
    totals = st.sampled_from([10, 10, 0, -1, 3])
    epochs = st.sampled_from([None, 0.0, 0.125, 0.75, 1 / 3, 2.999])
    numbers_of_epochs = st.sampled_from([3, 10**6 - 1, 10**6, 2**63 - 1, None])
    loaders = st.integers(0, len(LENGTHS))

    def __init__(self, implementation: Implementation, args: TrainingArguments) -> None:
        super().__init__()
        self.subject, self.reference = implementation.RichProgressCallback(), ReferenceRichProgressCallback()
        self.events = Fired(args, [self.subject, self.reference])
        self.dataloaders = [*(Loader(given) for given, _ in LENGTHS), None]

    @initialize(is_main_process=st.sampled_from([True, True, True, False]))
    def be(self, is_main_process: bool) -> None:
        self.events.state.is_world_process_zero = is_main_process
        self.events.fire("on_log", logs={})

    @rule(step=steps, total=totals, epoch=epochs, epochs=numbers_of_epochs, history=st.lists(metrics, max_size=3))
    def begin(
        self, step: int, total: int, epoch: float | None, epochs: int | None, history: list[dict[str, Any]]
    ) -> None:
        self.events.at(step, total, epoch, epochs).begin(*history)

    @rule(step=steps, total=totals, epoch=epochs, epochs=numbers_of_epochs)
    def end_step(self, step: int, total: int, epoch: float | None, epochs: int | None) -> None:
        self.events.at(step, total, epoch, epochs).fire("on_step_end")

    @rule(metrics=metrics)
    def log(self, metrics: dict[str, Any]) -> None:
        self.events.fire("on_log", logs=metrics)

    @rule(metrics=metrics, times=st.integers(1, 40))
    def log_often(self, metrics: dict[str, Any], times: int) -> None:
        for _ in range(times):
            self.events.fire("on_log", logs=metrics)

    @rule(loader=loaders, times=st.integers(1, 4))
    def go_through_batches(self, loader: int, times: int) -> None:
        for _ in range(times):
            self.events.batch(self.dataloaders[loader])

    @rule(metrics=metrics, event=st.sampled_from(["on_evaluate", "on_predict"]))
    def end_evaluation(self, metrics: dict[str, Any], event: str) -> None:
        self.events.fire(event, metrics=metrics)

    @rule()
    def end(self) -> None:
        self.events.fire("on_train_end")

    @rule(event=st.sampled_from(["on_init_end", "on_epoch_begin", "on_epoch_end", "on_step_begin", "on_save"]))
    def go_on(self, event: str) -> None:
        self.events.fire(event)

    @invariant()
    def views_are_equal(self) -> None:
        assert as_json(self.reference.view) == as_json(self.subject.view)

    @invariant()
    def only_the_main_process_has_a_view_and_no_bar_shows_more_than_its_total(self) -> None:
        view = self.subject.view
        assert self.events.state.is_world_process_zero is (view is not None)
        for bar in () if view is None else (view.training, view.evaluation):
            assert bar is None or bar.total is None or bar.completed <= bar.total

    def teardown(self) -> None:
        self.events.fire("on_train_end")


@pytest.mark.clause("RICH-2", "RICH-3", "RICH-4", "RICH-6")
def test_the_view_is_the_references_after_any_events_in_any_order(
    implementation: Implementation, args: TrainingArguments
) -> None:
    require_view(implementation)
    run_state_machine_as_test(lambda: AnyOrder(implementation, args), settings=settings(stateful_step_count=25))


# Real trainings


class Views(TrainerCallback):
    """Compares the views of a subject and of the reference after every event, whatever it is.

    Args:
        subject: The callback under test.

    Attributes:
        subject: It.
        reference: The reference.
        seen: The events, and what there was to see after each.
    """

    def __init__(self, subject: TrainerCallback) -> None:
        self.subject, self.reference = subject, ReferenceRichProgressCallback()
        self.seen: list[tuple[str, Any]] = []

    @property
    def callbacks(self) -> list[TrainerCallback]:
        """What a trainer is given, in this order."""
        return [self.subject, self.reference, self]

    def of(self, event: str) -> list[Any]:
        """What there was to see after each event of a kind."""
        return [view for name, view in self.seen if name == event]

    def _compare(self, event: str, *args: Any, **kwargs: Any) -> None:
        view = self.reference.view
        assert as_json(view) == as_json(self.subject.view), event
        self.seen.append((event, view))


for _event in vars(TrainerCallback):
    if _event.startswith("on_"):
        setattr(Views, _event, partialmethod(Views._compare, _event))


@pytest.fixture
def views(implementation: Implementation) -> Views:
    require_view(implementation)
    return Views(implementation.RichProgressCallback())


def trainer_with(*callbacks: TrainerCallback, output_dir: Path, eval_dataset: Any = None, **settings: Any) -> Trainer:
    """A trainer with callbacks, which logs each of four steps."""
    usual = {"max_steps": 4, "logging_strategy": "steps", "logging_steps": 1}
    return Trainer(
        models.build("qwen2"),
        topologies.training_arguments("single", output_dir, **usual | settings),
        train_dataset=data.language_dataset(24),
        eval_dataset=data.language_dataset(5) if eval_dataset is None else eval_dataset,
        callbacks=list(callbacks),
    )


EVALUATING = {"eval_strategy": "steps", "eval_steps": 2}


@pytest.mark.clause("RICH-2", "RICH-4")
def test_the_view_is_the_references_in_a_training_with_evaluations_and_before_and_after_it(
    views: Views, tmp_path: Path
) -> None:
    trainer = trainer_with(*views.callbacks, output_dir=tmp_path, eval_on_start=True, **EVALUATING)
    trainer.evaluate()
    trainer.train()
    trainer.predict(data.language_dataset(3))
    trainer.evaluate()
    batches = [tuple(view.evaluation) for view in views.of("on_prediction_step")]
    assert batches == [(1, 3), (2, 3), (3, 3)] * 4 + [(1, 2), (2, 2)] + [(1, 3), (2, 3), (3, 3)]
    assert [tuple(view.training) for view in views.of("on_step_end")] == [(step, 4) for step in range(1, 5)]
    assert [view.training is None for view in views.of("on_evaluate")] == [True, False, False, False, True]
    assert {name for _, name in table(views.of("on_predict")[0])} >= {"test_loss"}
    assert "loss" in {name for _, name in table(views.of("on_train_end")[0])}


@pytest.mark.clause("RICH-2")
def test_the_view_is_the_references_when_a_training_is_resumed(
    implementation: Implementation, views: Views, tmp_path: Path
) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, **EVALUATING}
    trainer_with(*views.callbacks, output_dir=tmp_path, **saving).train()
    resumed = Views(implementation.RichProgressCallback())
    trainer = trainer_with(*resumed.callbacks, output_dir=tmp_path, **saving)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    (begin,) = resumed.of("on_train_begin")
    assert begin.training == (2, 4)
    assert {(None, "loss"), (None, "eval_loss")} <= table(begin).keys()
    trends = [
        [metric.trend for metric in one.of("on_train_end")[0].groups[0].metrics if metric.name == "loss"]
        for one in (views, resumed)
    ]
    assert trends[0] == trends[1]


@pytest.mark.clause("RICH-2")
def test_the_view_is_the_references_where_nothing_has_a_length(views: Views, tmp_path: Path) -> None:
    endless, few = (data.language_dataset(rows).to_iterable_dataset() for rows in (24, 5))
    trainer = trainer_with(*views.callbacks, output_dir=tmp_path, eval_dataset=few, **EVALUATING)
    trainer.train_dataset = endless
    trainer.train()
    assert [view.epoch for view in views.of("on_step_end")][-1] is not None
    assert all("/" not in view.epoch for view in views.of("on_step_end"))
    assert {view.evaluation.total for view in views.of("on_prediction_step")} == {None}


@pytest.mark.clause("RICH-4")
def test_the_view_is_the_references_when_one_callback_serves_two_trainers_one_after_the_other(
    views: Views, tmp_path: Path
) -> None:
    for steps in (4, 2):
        trainer_with(*views.callbacks, output_dir=tmp_path, max_steps=steps).train()
    assert [view.training for view in views.of("on_train_begin")] == [(0, 4), (0, 2)]
    assert all(not view.groups for view in views.of("on_train_begin"))


class Evaluates(TrainerCallback):
    """Has another trainer evaluate after each step."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.evaluate()


@pytest.mark.clause("RICH-4")
def test_the_views_are_the_references_when_two_callbacks_serve_two_trainers_at_a_time(
    implementation: Implementation, views: Views, tmp_path: Path
) -> None:
    one, other = views, Views(implementation.RichProgressCallback())
    evaluating = trainer_with(*other.callbacks, output_dir=tmp_path)
    trainer_with(*one.callbacks, Evaluates(evaluating), output_dir=tmp_path).train()
    assert len(one.of("on_step_end")) == len(other.of("on_evaluate")) == 4
    assert not one.of("on_evaluate")
    assert all(view.training is None for _, view in other.seen)


class Raises(TrainerCallback):
    """Ends a training at an event of its second step."""

    def __init__(self, event: str) -> None:
        setattr(self, event, self._end)

    def _end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            raise ZeroDivisionError


@pytest.mark.clause("RICH-2", "RICH-4")
@pytest.mark.parametrize("event", ["on_step_end", "on_prediction_step"])
def test_a_training_that_raised_has_ended_when_an_evaluation_outside_of_it_or_another_training_begins(
    views: Views, tmp_path: Path, event: str
) -> None:
    raises = Raises(event)
    trainer = trainer_with(*views.callbacks, raises, output_dir=tmp_path, **EVALUATING)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    trainer.remove_callback(raises)
    for callback in views.callbacks:
        if isinstance(callback, ReferenceRichProgressCallback):
            callback.on_train_end(trainer.args, trainer.state, trainer.control)
    trainer.evaluate()
    assert views.seen[-1][1].training is None
    assert (None, "loss") not in table(views.seen[-1][1])
    trainer.train()
    assert views.of("on_train_begin")[-1].training == (0, 4)


# Who draws, and the constructor


@pytest.mark.clause("RICH-6")
def test_other_processes_than_the_main_one_have_no_view(fired: Fired, display: Any) -> None:
    fired.state.is_world_process_zero = False
    fired.begin({"loss": 1.0, "step": 1})
    fired.batch(Loader(3))
    fired.fire("on_log", logs={"loss": 1.0})
    assert observe.view(display, fired.state) is None


@pytest.mark.clause("RICH-7")
@pytest.mark.parametrize("given", [{}, {"plain_percent": 0.5, "plain_seconds": 0}, {"plain_percent": 250}])
def test_numbers_in_their_range_are_taken(display: Any, given: dict[str, Any]) -> None:
    assert isinstance(constructed(type(display), **given), TrainerCallback)


@pytest.mark.clause("RICH-7")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("plain_percent", value) for value in (0, 0.0, -1.0, float("nan"), "10", None, True)),
        *(("plain_seconds", value) for value in (-1e-9, -60, float("nan"), "60", None, False)),
    ],
)
def test_other_values_are_an_error_that_names_the_argument_and_its_value(display: Any, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name) as error:
        constructed(type(display), **{name: value})
    assert repr(value) in str(error.value)
