"""The suite's ways of looking at completions and their table."""

from typing import Any

from truestep_spec_tests.differential.log_completions_cases import SAMPLING, completing, prompts_read
from truestep_spec_tests.meta.checks.suspect import Suspect, difference
from truestep_spec_tests.meta.faults import log_completions as faults
from truestep_spec_tests.runs import Setup, walked

SMALL_BATCHES = {"batch_tokens": 40}


def _setup(suspect: Suspect, topology: str = "single", ranks: int = 1, **changes: Any) -> Setup:
    return completing(suspect.package, topology, ranks, **({"model": "gpt2", "steps": 6} | changes))


# Against the reference, at every step of a trajectory


def completes_like_the_reference(suspect: Suspect) -> str | None:
    """Prompts of all lengths, greedily."""
    return suspect.divergence(_setup(suspect))


def completes_uneven_prompts_like_the_reference(suspect: Suspect) -> str | None:
    """One of them is longer than the window."""
    return suspect.divergence(_setup(suspect, prompts="uneven"))


def completes_several_datasets_like_the_reference(suspect: Suspect) -> str | None:
    """Some of the prompts of each."""
    return suspect.divergence(_setup(suspect, prompts="two", hyperparameters={"num_prompts": 2}))


def carries_columns_like_the_reference(suspect: Suspect) -> str | None:
    """One has the name of a column of the table."""
    return suspect.divergence(_setup(suspect, hyperparameters={"columns": ("prompt", "source", "weight")}))


def samples_like_the_reference(suspect: Suspect) -> str | None:
    """Prompts in a batch."""
    return suspect.divergence(_setup(suspect, generation=SAMPLING))


def heeds_what_was_said_like_the_reference(suspect: Suspect) -> str | None:
    """No token comes twice, and padding must not be taken for one that has come."""
    return suspect.divergence(_setup(suspect, generation={"max_new_tokens": 6, "no_repeat_ngram_size": 1}))


def ends_like_the_reference(suspect: Suspect) -> str | None:
    """The end is a token that is no special one, and rows of a batch get there at different times."""
    return suspect.divergence(_setup(suspect, generation={"max_new_tokens": 6, "eos_token_id": [14, 79, 83, 85, 67]}))


def shows_no_special_tokens(suspect: Suspect) -> str | None:
    """With a tokenizer that has letters among them."""
    return suspect.fault(_setup(suspect), faults.with_letters_as_special_tokens)


# Over ranks


def splits_prompts_over_ranks(suspect: Suspect) -> str | None:
    """Each is read once, on one of two ranks."""
    setup = _setup(suspect, "ddp", 2)
    read = suspect.run(setup, prompts_read)
    return None if sum(read) == suspect.run(_setup(suspect), prompts_read)[0] else f"prompts read by ranks: {read}"


def completes_in_order_on_every_rank(suspect: Suspect) -> str | None:
    """Several batches over two ranks, on which sharded weights are whole meanwhile, beside one process."""
    return _difference_between_ranks(suspect, SMALL_BATCHES | {"gather": True})


def completes_together(suspect: Suspect) -> str | None:
    """One prompt on two ranks that go through the forwards together."""
    return _difference_between_ranks(suspect, {"gather": False, "num_prompts": 1})


def _difference_between_ranks(suspect: Suspect, options: dict[str, Any]) -> str | None:
    setup = _setup(suspect)
    alone = suspect.run(setup.on(hyperparameters=setup.hyperparameters | options), walked)[0]
    sharded = setup.on(topology="zero3", ranks=2, hyperparameters=setup.hyperparameters | options)
    return difference(suspect.run(sharded, walked), alone)


# When, and with what


def logs_once_a_step(suspect: Suspect) -> str | None:
    """The event comes twice."""
    return suspect.fault(_setup(suspect), faults.at_a_step_that_ends_twice)


def refuses_to_guess_an_interval(suspect: Suspect) -> str | None:
    """Neither `freq` nor `eval_steps` is given."""
    return suspect.fault(_setup(suspect), faults.without_an_interval)


def says_that_prompts_are_missing(suspect: Suspect) -> str | None:
    """More are asked for than there are."""
    return suspect.fault(_setup(suspect), faults.without_enough_prompts)


def begins_once(suspect: Suspect) -> str | None:
    """With a tokenizer that adds a beginning-of-sequence token."""
    return suspect.fault(_setup(suspect), faults.with_a_second_beginning)


def has_the_constructor_of_the_documentation(suspect: Suspect) -> str | None:
    """Names, order and defaults."""
    return suspect.fault(_setup(suspect), faults.in_the_constructor)


# What the training notices


def leaves_everything_as_it_was(suspect: Suspect) -> str | None:
    """Model, tokenizer and random numbers."""
    return suspect.fault(_setup(suspect, generation=SAMPLING), faults.in_what_it_leaves)


def generates_in_eval_mode(suspect: Suspect) -> str | None:
    """All modules."""
    return suspect.fault(_setup(suspect), faults.in_the_modes_of_modules)


# Where rows go


def gives_a_tracker_each_row_once(suspect: Suspect) -> str | None:
    """Trackio."""
    return suspect.fault(_setup(suspect), faults.in_a_trackers_rows)


def takes_no_step_of_a_run(suspect: Suspect) -> str | None:
    """Weights & Biases."""
    return suspect.fault(_setup(suspect), faults.in_the_steps_of_a_run)


def goes_on_without_a_tracker(suspect: Suspect) -> str | None:
    """There is no run."""
    return suspect.fault(_setup(suspect), faults.with_a_tracker_that_is_not_there)


def resumes_the_table(suspect: Suspect) -> str | None:
    """Killed two steps after a checkpoint."""
    return suspect.fault(_setup(suspect), faults.after_a_kill)


def cuts_a_torn_line(suspect: Suspect) -> str | None:
    """Killed in the middle of a row."""
    return suspect.fault(_setup(suspect), faults.after_a_torn_line)


def keeps_the_table_of_an_earlier_training(suspect: Suspect) -> str | None:
    """In the same directory."""
    return suspect.fault(_setup(suspect), faults.in_an_output_directory_that_was_used)
