"""Constructors are those that the specification shows."""

import inspect
from typing import Any

import pytest
from transformers import TrainerCallback
from truestep_reference import BEMACallback as ReferenceBEMACallback
from truestep_reference import LogCompletionsCallback as ReferenceLogCompletionsCallback
from truestep_reference import RichProgressCallback as ReferenceRichProgressCallback
from truestep_reference import SyncRefModelCallback as ReferenceSyncRefModelCallback
from truestep_reference import WeaveCallback as ReferenceWeaveCallback

from truestep_spec_tests.implementation import Implementation
from truestep_spec_tests.meta.specification import constructor

BEMA_ARGUMENTS = {
    "update_freq": 3,
    "ema_power": 0.25,
    "bias_power": 0.75,
    "lag": 5,
    "update_after": 7,
    "multiplier": 2.0,
    "min_ema_multiplier": 0.125,
    "device": "cpu:0",
}


@pytest.fixture(params=["subject", "reference"])
def bema(request: pytest.FixtureRequest, implementation: Implementation) -> type[Any]:
    return implementation.BEMACallback if request.param == "subject" else ReferenceBEMACallback


@pytest.fixture(params=["subject", "reference"])
def ref_sync(request: pytest.FixtureRequest, implementation: Implementation) -> type[Any]:
    return implementation.SyncRefModelCallback if request.param == "subject" else ReferenceSyncRefModelCallback


@pytest.fixture(params=["subject", "reference"])
def log_completions(request: pytest.FixtureRequest, implementation: Implementation) -> type[Any]:
    return implementation.LogCompletionsCallback if request.param == "subject" else ReferenceLogCompletionsCallback


@pytest.fixture(params=["subject", "reference"])
def weave_eval(request: pytest.FixtureRequest, implementation: Implementation) -> type[Any]:
    return implementation.WeaveCallback if request.param == "subject" else ReferenceWeaveCallback


@pytest.fixture(params=["subject", "reference"])
def rich_progress(request: pytest.FixtureRequest, implementation: Implementation) -> type[Any]:
    return implementation.RichProgressCallback if request.param == "subject" else ReferenceRichProgressCallback


def parameters(callback: type[Any]) -> list[tuple[str, Any]]:
    """Names and defaults; that a parameter can be given by position is part of where it stands."""
    shown = inspect.signature(callback).parameters.values()
    assert {parameter.kind for parameter in shown} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}
    return [(parameter.name, parameter.default) for parameter in shown]


@pytest.mark.clause("BEMA-20")
def test_the_constructor_has_the_documented_names_order_and_defaults(bema: type[Any]) -> None:
    documented = [(parameter.name, parameter.default) for parameter in constructor("BEMACallback")]
    assert len(documented) == 8
    assert parameters(bema) == documented


@pytest.mark.clause("BEMA-20")
def test_defaults_have_the_documented_types(bema: type[Any]) -> None:
    documented = [(parameter.name, type(parameter.default)) for parameter in constructor("BEMACallback")]
    assert [(name, type(default)) for name, default in parameters(bema)] == documented


@pytest.mark.clause("BEMA-20")
def test_arguments_can_be_given_by_position_or_by_name(bema: type[Any]) -> None:
    assert list(BEMA_ARGUMENTS) == [parameter.name for parameter in constructor("BEMACallback")]
    bema(**BEMA_ARGUMENTS)
    bema(*BEMA_ARGUMENTS.values())


@pytest.mark.clause("BEMA-20")
def test_it_is_a_trainer_callback(bema: type[Any]) -> None:
    assert issubclass(bema, TrainerCallback)
    assert isinstance(bema(), TrainerCallback)


@pytest.mark.clause("SYNC-10")
def test_the_sync_takes_the_documented_arguments_by_position_or_name_and_others_by_name_only(
    ref_sync: type[Any],
) -> None:
    documented = [parameter.name for parameter in constructor("SyncRefModelCallback")]
    assert documented == ["ref_model", "accelerator"]
    shown = inspect.signature(ref_sync).parameters.values()
    others = [parameter for parameter in shown if parameter.kind == inspect.Parameter.KEYWORD_ONLY]
    assert documented == [parameter.name for parameter in shown if parameter not in others]
    assert all(parameter.default is not inspect.Parameter.empty for parameter in others)
    for callback in (ref_sync(None, None), ref_sync(ref_model=None, accelerator=None)):
        assert isinstance(callback, TrainerCallback)


@pytest.mark.clause("SYNC-11", "SYNC-12")
def test_the_options_of_the_sync_have_the_specified_defaults() -> None:
    defaults = inspect.signature(ReferenceSyncRefModelCallback).parameters
    assert {name: defaults[name].default for name in ("master_weights", "save_reference")} == {
        "master_weights": False,
        "save_reference": True,
    }


def assert_as_documented(callback: type[Any], name: str) -> None:
    """The documented arguments, by position or name, and others by name only, with defaults."""
    documented = [(parameter.name, parameter.default) for parameter in constructor(name)]
    shown = inspect.signature(callback).parameters.values()
    others = [parameter for parameter in shown if parameter.kind == inspect.Parameter.KEYWORD_ONLY]
    by_position = [parameter for parameter in shown if parameter not in others]
    assert documented == [(parameter.name, parameter.default) for parameter in by_position]
    assert {parameter.kind for parameter in by_position} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}
    assert all(parameter.default is not inspect.Parameter.empty for parameter in others)


@pytest.mark.clause("LOGC-9")
def test_completions_take_the_documented_arguments_by_position_or_name_and_others_by_name_only(
    log_completions: type[Any],
) -> None:
    documented = [parameter.name for parameter in constructor("LogCompletionsCallback")]
    assert documented == ["trainer", "generation_config", "num_prompts", "freq"]
    assert_as_documented(log_completions, "LogCompletionsCallback")


@pytest.mark.clause("LOGC-9")
def test_completions_are_logged_by_a_trainer_callback(log_completions: type[Any]) -> None:
    assert issubclass(log_completions, TrainerCallback)


@pytest.mark.clause("LOGC-11")
def test_there_are_no_further_columns_unless_they_are_asked_for() -> None:
    assert inspect.signature(ReferenceLogCompletionsCallback).parameters["columns"].default == ()


@pytest.mark.clause("WEAVE-8")
def test_evaluations_take_the_documented_arguments_by_position_or_name_and_others_by_name_only(
    weave_eval: type[Any],
) -> None:
    documented = [parameter.name for parameter in constructor("WeaveCallback")]
    assert documented[:3] == ["trainer", "project_name", "scorers"]
    assert documented[3:] == ["generation_config", "num_prompts", "dataset_name", "model_name"]
    assert_as_documented(weave_eval, "WeaveCallback")


@pytest.mark.clause("WEAVE-8")
def test_evaluations_are_logged_by_a_trainer_callback(weave_eval: type[Any]) -> None:
    assert issubclass(weave_eval, TrainerCallback)


@pytest.mark.clause("RICH-7")
def test_the_display_takes_arguments_by_name_only_with_the_specified_defaults(rich_progress: type[Any]) -> None:
    assert constructor("RichProgressCallback") == []
    shown = inspect.signature(rich_progress).parameters.values()
    assert {parameter.kind for parameter in shown} <= {inspect.Parameter.KEYWORD_ONLY}
    specified = {"plain_percent": 10.0, "plain_seconds": 60.0}
    # They are beyond TRL's documentation, whose constructor takes nothing.
    assert {parameter.name: parameter.default for parameter in shown} in (specified, {})


@pytest.mark.clause("RICH-7")
def test_progress_is_shown_by_a_trainer_callback(rich_progress: type[Any]) -> None:
    assert issubclass(rich_progress, TrainerCallback)
