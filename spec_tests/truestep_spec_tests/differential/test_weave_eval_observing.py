"""A training does not notice that its evaluations go to Weave, and of its ranks one alone does that."""

from collections.abc import Callable
from pathlib import Path

import pytest
from truestep_fixtures import data
from truestep_fixtures.ranks import RankPool

from truestep_spec_tests.differential.cases import skip_the_reference
from truestep_spec_tests.differential.observing import assert_same_states, state_after_training
from truestep_spec_tests.differential.weave_eval_cases import (
    DRAWING,
    Watched,
    evaluating,
    train_watched,
)
from truestep_spec_tests.implementation import Implementation
from truestep_spec_tests.lockstep.weave_eval import PROJECT
from truestep_spec_tests.properties.weave_eval_cases import requires_weave
from truestep_spec_tests.runs import Setup

pytestmark = requires_weave

Ranks = Callable[[int], RankPool]


@pytest.fixture(scope="module", params=[("single", 1), ("ddp", 2), ("zero3", 2)], ids=lambda placement: placement[0])
def setup(implementation: Implementation, request: pytest.FixtureRequest) -> Setup:
    topology, count = request.param
    return evaluating(implementation.name, topology, count, model="gpt2")


@pytest.fixture(scope="module")
def watched(setup: Setup, ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> list[Watched]:
    """What a training with the callback leaves on each rank."""
    found: list[Watched] = ranks(setup.ranks).run(train_watched, setup, tmp_path_factory.mktemp("watched"))
    return found


@pytest.mark.clause("WEAVE-7")
def test_a_training_that_logs_ends_bitwise_like_one_that_does_not(
    setup: Setup, ranks: Ranks, watched: list[Watched], tmp_path: Path
) -> None:
    without = ranks(setup.ranks).run(state_after_training, setup, tmp_path)
    assert all(state["optimizer"] for state in without)
    assert_same_states(without, [of_rank.state for of_rank in watched])


@pytest.mark.clause("WEAVE-1", "WEAVE-6")
def test_each_evaluation_arrives_once_whatever_the_number_of_ranks(watched: list[Watched]) -> None:
    main, *others = watched
    assert [(one.step, one.prompts) for one in main.seen] == [(t, data.prompts()["prompt"]) for t in (2, 4)]
    assert all(of_rank.seen == [] for of_rank in others)


@pytest.mark.clause("WEAVE-6")
def test_scorers_run_on_the_main_process_only_and_there_is_one_client(
    implementation: Implementation, watched: list[Watched]
) -> None:
    main, *others = watched
    assert main.calls == 2 * len(data.prompts()["prompt"])
    assert [set(row.scores) for one in main.seen for row in one.rows] == [{*DRAWING, "count"}] * main.calls
    assert [of_rank.calls for of_rank in others] == [0] * len(others)
    skip_the_reference(implementation, "logs nowhere")
    assert main.projects == {PROJECT: 1}
