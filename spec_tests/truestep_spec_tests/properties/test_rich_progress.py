"""The reference's functions of values, trends and events, each by itself."""

import math
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from truestep_reference import rich_progress
from truestep_reference.rich_progress import Bar, Entry, Event, Kind, view_of

from truestep_spec_tests.properties.rich_progress_cases import NAMES, VALUES, Shown, as_json

finite = st.floats(allow_nan=False, allow_infinity=False)
integers = st.integers(-(10**40), 10**40)
numbers = finite | integers

# Numbers


@pytest.mark.clause("RICH-3")
@pytest.mark.parametrize("shown", VALUES, ids=lambda shown: ascii(shown.text))
def test_a_value_is_shown_as_the_clause_says(shown: Shown) -> None:
    held = rich_progress.held(shown.value)
    found = (rich_progress.value_text(held), rich_progress.number_in(held))
    assert repr((shown.text, shown.number)) == repr(found)
    assert type(shown.number) is type(found[1])


@pytest.mark.clause("RICH-3")
@given(number=numbers)
def test_what_is_shown_of_a_number_is_within_half_a_unit_of_its_fourth_digit(number: float | int) -> None:
    unit = Fraction(10) ** (Decimal(number).adjusted() - 3)
    assert abs(Fraction(rich_progress.number_text(number)) - Fraction(number)) <= unit / 2


@pytest.mark.clause("RICH-3")
@given(one=numbers, other=numbers)
def test_a_larger_number_is_not_shown_as_a_smaller_one(one: float | int, other: float | int) -> None:
    smaller, larger = sorted([one, other])
    shown = [Fraction(rich_progress.number_text(number)) for number in (smaller, larger)]
    # An integer shows all of its digits next to a float that shows four.
    assume(type(smaller) is type(larger))
    assert shown[0] <= shown[1]


@pytest.mark.clause("RICH-3")
@given(number=numbers)
def test_a_number_differs_from_its_negative_by_the_sign(number: float | int) -> None:
    assume(number > 0)
    assert f"-{rich_progress.number_text(number)}" == rich_progress.number_text(-number)


@pytest.mark.clause("RICH-3")
@given(number=st.integers(-(10**15) + 1, 10**15 - 1))
def test_a_short_integer_is_written_out(number: int) -> None:
    assert str(number) == rich_progress.number_text(number)


@pytest.mark.clause("RICH-3")
@given(number=st.integers(10**15, 2**53))
def test_a_long_integer_is_shown_as_the_float_of_its_size(number: int) -> None:
    assert rich_progress.number_text(float(number)) == rich_progress.number_text(number)


@pytest.mark.clause("RICH-3")
@given(number=finite)
def test_a_float_has_an_exponent_where_it_is_very_small_or_large_and_four_digits_elsewhere(number: float) -> None:
    text = rich_progress.number_text(number).removeprefix("-")
    mantissa, _, exponent = text.partition("e")
    if exponent:
        assert not -4 <= int(exponent) <= 6
        assert 1 <= Decimal(mantissa) < 10
        assert len(mantissa) <= len("1.234")
        assert "." not in mantissa or not mantissa.endswith("0")
        assert len(exponent) >= len("-05")
    elif text != "0":
        digits = text.replace(".", "").lstrip("0")
        assert len(digits) == 4 if "." in text or len(text) <= 4 else 5 <= len(digits) <= 7


# Texts


@pytest.mark.clause("RICH-3")
@given(text=st.text(st.characters(blacklist_characters="\\")))
def test_a_text_can_be_printed_and_nothing_of_it_is_lost(text: str) -> None:
    shown = rich_progress.printable(text)
    assert shown.isprintable()
    assert text == shown.encode("latin-1", "backslashreplace").decode("unicode_escape")


@pytest.mark.clause("RICH-3")
@given(text=st.text(st.characters().filter(str.isprintable)))
def test_a_text_that_can_be_printed_is_shown_as_it_is(text: str) -> None:
    assert text == rich_progress.printable(text)


# Trends


@pytest.mark.clause("RICH-2")
@given(n=st.integers(1, 2000))
def test_a_trend_is_of_numbers_at_equal_distances_and_the_latest_one(n: int) -> None:
    trend = rich_progress.trend(range(1, n + 1))
    assert 1 <= len(trend) <= 16
    assert trend[-1] == n
    step = trend[0]
    assert step & (step - 1) == 0
    assert trend[:-1] == [step * i for i in range(1, len(trend))]
    assert n - trend[-2] <= step if len(trend) > 1 else n == 1
    assert step == 1 or len(trend) >= 8


@pytest.mark.clause("RICH-2")
@given(n=st.integers(1, 2000))
def test_a_trend_that_goes_on_keeps_its_numbers_or_every_other_one(n: int) -> None:
    before, after = (rich_progress.trend(range(1, end + 1)) for end in (n, n + 1))
    kept = [number for number in before if number % after[0] == 0]
    assert kept == after[: len(kept)]
    assert after[0] in (before[0], 2 * before[0])


# Views

KINDS: list[Kind] = ["train_begin", "step_end", "train_end", "prediction_step", "evaluate", "predict", "log"]
LOADERS = [object(), object()]

entries = st.builds(
    lambda name, number: Entry(name, str(number), number), st.sampled_from(["a", "b", "g/a", "g/b"]), st.integers(0, 99)
)
events = st.lists(
    st.builds(
        Event,
        kind=st.sampled_from(KINDS),
        step=st.integers(0, 12),
        max_steps=st.integers(-1, 10),
        epoch=st.none() | st.floats(0, 3),
        epochs=st.sampled_from([None, 3, 10**6]),
        entries=st.lists(entries, max_size=3),
        dataloader=st.sampled_from(LOADERS),
        length=st.sampled_from([None, 0, 2]),
    ),
    max_size=20,
)
event_of = {kind: Event(kind, 5, 10, 1.5, 3, [], LOADERS[0], 2) for kind in KINDS}


@pytest.mark.clause("RICH-2")
@given(before=events, after=events)
def test_what_was_before_the_beginning_of_a_training_is_forgotten(before: list[Event], after: list[Event]) -> None:
    training = [event_of["train_begin"], *after]
    assert as_json(view_of(training)) == as_json(view_of([*before, *training]))


@pytest.mark.clause("RICH-2")
@given(events=events, kind=st.sampled_from(KINDS))
def test_what_an_event_leaves_as_it_was(events: list[Event], kind: Kind) -> None:
    """Without metrics, of those that begin nothing new."""
    before, after = view_of(events), view_of([*events, event_of[kind]])
    is_on = before.training is not None
    if kind not in ("train_begin", "step_end", "train_end"):
        assert before.training == after.training
    if kind not in ("train_begin", "step_end", "train_end", "log"):
        assert before.epoch == after.epoch
    if kind == "log":
        assert before.evaluation == after.evaluation
    elif kind != "prediction_step":
        assert after.evaluation is None
    if kind != "train_begin" and (kind != "prediction_step" or is_on or before.evaluation is not None):
        assert before.groups == after.groups


@pytest.mark.clause("RICH-2")
@given(events=events)
def test_no_bar_shows_more_than_its_total(events: list[Event]) -> None:
    view = view_of(events)
    for bar in (view.training, view.evaluation):
        assert bar is None or bar.total is None or 0 <= bar.completed <= bar.total
    assert view.training is None or view.training.total is None or view.training.total > 0


@pytest.mark.clause("RICH-1", "RICH-2")
@given(events=events)
def test_the_table_has_each_metric_once_in_groups_that_are_not_empty(events: list[Event]) -> None:
    groups = view_of(events).groups
    names = [group.name for group in groups]
    assert None not in names[1:]
    assert len(names) == len(set(names))
    for group in groups:
        assert group.metrics
        assert len(group.metrics) == len({metric.name for metric in group.metrics})


@pytest.mark.clause("RICH-2")
@given(events=events, entry=entries)
def test_the_latest_value_is_shown_and_ends_the_trend(events: list[Event], entry: Entry) -> None:
    before, after = (
        view_of(sequence).groups for sequence in (events, [*events, event_of["log"]._replace(entries=[entry])])
    )
    shown = {(group.name, metric.name): metric for group in after for metric in group.metrics}
    group, _, name = entry.name.rpartition("/")
    metric = shown.pop((group or None, name))
    assert (entry.text, entry.number) == (metric.value, metric.trend[-1])
    others = {(group.name, metric.name): metric for group in before for metric in group.metrics}
    others.pop((group or None, name), None)
    assert others == shown


@pytest.mark.clause("RICH-2")
@given(events=events, batches=st.integers(1, 5), length=st.none() | st.integers(0, 3))
def test_the_evaluation_bar_is_at_the_number_of_batches_up_to_the_length(
    events: list[Event], batches: int, length: int | None
) -> None:
    batch = event_of["prediction_step"]._replace(dataloader=object(), length=length)
    assert (
        Bar(batches if length is None else min(batches, length), length)
        == view_of([*events, *[batch] * batches]).evaluation
    )


@pytest.mark.clause("RICH-1", "RICH-3")
@pytest.mark.parametrize(("name", "shown"), NAMES)
def test_a_name_is_split_at_its_first_slash_unless_nothing_precedes_it(
    name: object, shown: tuple[str | None, str]
) -> None:
    (entry,) = rich_progress.entries_of({name: 0.5})
    (group,) = view_of([event_of["log"]._replace(entries=[entry])]).groups
    assert shown == (group.name, group.metrics[0].name)


@pytest.mark.clause("RICH-2")
@pytest.mark.parametrize(
    ("epoch", "epochs", "text"),
    [
        *((0.75, 3, "0.75/3"), (0, 3, "0.00/3"), (2.999, 3, "3.00/3"), (1.0, 10**6 - 1, "1.00/999999")),
        *(
            (0.75, 10**6, "0.75"),
            (0.75, 2**63 - 1, "0.75"),
            (0.75, None, "0.75"),
            (None, 3, None),
            (math.nan, 3, "nan/3"),
        ),
    ],
)
def test_an_epoch_has_two_decimals_and_is_followed_by_the_number_of_epochs_if_that_is_known(
    epoch: float | None, epochs: int | None, text: str | None
) -> None:
    assert text == view_of([event_of["train_begin"]._replace(epoch=epoch, epochs=epochs)]).epoch
