"""The suite's ways of looking at evaluations in Weave."""

from typing import Any

from truestep_spec_tests.lockstep.weave_eval import SCORERS
from truestep_spec_tests.meta.checks.suspect import Suspect
from truestep_spec_tests.meta.faults import weave_eval as faults
from truestep_spec_tests.runs import Setup


def _setup(suspect: Suspect, **changes: Any) -> Setup:
    """Two evaluations in a training."""
    usual = {
        "implementation": suspect.package,
        "callback": "WeaveCallback",
        "model": "gpt2",
        "dtype": "float64",
        "steps": 4,
        "training": {"eval_strategy": "steps", "eval_steps": 2},
        "hyperparameters": {},
        "scorers": list(SCORERS),
    }
    return Setup(**usual | changes)  # type: ignore[arg-type]


# Against the reference


def logs_scores_like_the_reference(suspect: Suspect) -> str | None:
    """Of scorers that fail at times, and with names that are no names of classes."""
    names = {"model_name": "meta-llama/Llama-3.1-8B", "dataset_name": "held-out prompts"}
    return suspect.divergence(_setup(suspect, hyperparameters=names))


# By themselves


def logs_each_evaluation_once_and_ends(suspect: Suspect) -> str | None:
    """On two ranks."""
    return suspect.fault(_setup(suspect, topology="ddp", ranks=2), faults.at_the_end_of_a_training)


def ends_evaluations_without_scores(suspect: Suspect) -> str | None:
    """In a single process."""
    return suspect.fault(_setup(suspect, scorers=None), faults.at_the_end_of_a_training)


def logs_an_evaluation_once_a_step(suspect: Suspect) -> str | None:
    """The same dataset is evaluated twice."""
    return suspect.fault(_setup(suspect), faults.at_a_step_with_two_evaluations)


def logs_what_is_evaluated(suspect: Suspect) -> str | None:
    """A dataset that is not the trainer's."""
    return suspect.fault(_setup(suspect), faults.with_another_dataset)


def requires_a_project(suspect: Suspect) -> str | None:
    """There is none."""
    return suspect.fault(_setup(suspect), faults.without_a_project)


def refuses_empty_names(suspect: Suspect) -> str | None:
    """Of the dataset."""
    return suspect.fault(_setup(suspect), faults.with_a_name_that_is_none)


def leaves_random_numbers_alone(suspect: Suspect) -> str | None:
    """Scorers draw some."""
    return suspect.fault(_setup(suspect), faults.with_scorers_that_draw)


def says_what_is_lost(suspect: Suspect) -> str | None:
    """Weave cannot be reached."""
    return suspect.fault(_setup(suspect), faults.with_a_server_that_is_gone)
