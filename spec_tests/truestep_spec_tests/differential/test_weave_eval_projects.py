"""Where evaluations go, and what a process that uses Weave itself shares with its training.

That process is a rank of a pool, so that Weave is not imported in the one of the suite.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from truestep_fixtures import topologies, trackers
from truestep_fixtures.ranks import RankPool
from truestep_fixtures.weave_server import forget_client, recording_server

from truestep_spec_tests.differential.cases import error_of, logged_warnings, skip_the_reference
from truestep_spec_tests.differential.weave_eval_cases import evaluating
from truestep_spec_tests.implementation import Implementation
from truestep_spec_tests.properties.weave_eval_cases import Seen, Subject, evaluate_at, requires_weave, seen
from truestep_spec_tests.runs import Setup, Walk

pytestmark = requires_weave

Ranks = Callable[[int], RankPool]

PROMPTS = ("The quick", "Zwölf")


def length(prompt: str, completion: str) -> int:
    return len(completion)


# ── A process without a client ────────────────────────────────────────────────


class Reported(NamedTuple):
    """What a process has come to that uses Weights & Biases, but not Weave.

    Attributes:
        projects: The projects of evaluations: with an explicit one, and with two runs, one of which has an entity.
        has_imported_weave: Whether it has imported Weave after all.
    """

    projects: list[str]
    has_imported_weave: bool


def report(implementation: Implementation, directory: Path) -> Reported:
    with recording_server() as server, trackers.storage(directory / "storage"):
        subject = Subject(implementation, topologies.training_arguments("single", directory, max_steps=20), server)
        found = projects_of(subject, "team/explicit")
        import wandb

        for entity in ("a team", None):
            wandb.init(project="of a run", entity=entity)
            found += projects_of(subject, None)
            wandb.finish()
        return Reported(found, "weave" in sys.modules)


def projects_of(subject: Subject, project: str | None) -> list[str]:
    """Of the evaluations that a training adds."""
    before = len(subject.server.evaluations())
    trainer, callback = subject.begin(PROMPTS, project)
    evaluate_at(trainer, 1)
    trainer.train_end()
    found = seen(callback, subject.server)
    return [one.project for one in (found if hasattr(callback, "evaluations") else found[before:])]


@pytest.fixture(scope="module")
def reported(implementation: Implementation, ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Reported:
    (found,) = ranks(1).run(report, implementation, tmp_path_factory.mktemp("reported"))
    assert isinstance(found, Reported)
    return found


@pytest.mark.clause("WEAVE-2")
def test_without_a_name_the_project_is_that_of_the_run(implementation: Implementation, reported: Reported) -> None:
    # What has no entity is, to Weave's service, of the entity that the user has there by default.
    default = "" if implementation.WeaveCallback.__module__.startswith("truestep_reference") else "entity/"
    assert ["team/explicit", "a team/of a run", f"{default}of a run"] == reported.projects


@pytest.mark.clause("WEAVE-6", "WEAVE-7")
def test_a_training_without_a_client_does_not_import_weave(reported: Reported) -> None:
    assert not reported.has_imported_weave


# ── A process with a client ───────────────────────────────────────────────────


class Used(NamedTuple):
    """What a process has come to that uses Weave itself.

    Attributes:
        own: The evaluation without a project's name.
        other: That with the name of another project.
        projects: How many clients each project was opened by.
        is_still_there: Whether the process has the client that it had.
        traced: How many calls of a function that Weave traces are there, of each of the trainings.
        warnings: Of the first training.
    """

    own: list[Seen]
    other: list[Seen]
    projects: dict[str, int]
    is_still_there: bool
    traced: list[int]
    warnings: list[str]


def weave_scorers(weave: Any) -> dict[str, Any]:
    """Scorers as Weave has them."""
    import pydantic

    class Verdict(pydantic.BaseModel):
        is_good: bool
        why: str
        parts: dict[str, float]

    class Plain(weave.Scorer):  # type: ignore[misc]
        @weave.op
        def score(self, output: str, prompt: str) -> int:
            return len(prompt + output)

    class Async(weave.Scorer):  # type: ignore[misc]
        factor: float = 0.5

        @weave.op
        async def score(self, *, output: str, question: str) -> dict[str, Any]:
            return {"question": self.factor * len(question), "why": "long", "deep": {"er": {"output": len(output)}}}

    class Modelled(weave.Scorer):  # type: ignore[misc]
        @weave.op
        def score(self, output: str) -> Verdict:
            return Verdict(is_good=True, why="short", parts={"first": 0.25})

    class Raising(weave.Scorer):  # type: ignore[misc]
        @weave.op
        def score(self, output: str, prompt: str) -> dict[str, float]:
            if prompt == PROMPTS[0]:
                raise ValueError("no luck")
            return {"luck": float("nan") if prompt == PROMPTS[0] else 1.0}

    class Wordy(weave.Scorer):  # type: ignore[misc]
        @weave.op
        def score(self, output: str) -> dict[str, str]:
            return {"why": "no number"}

    @weave.op
    def judge(prompt: str, completion: str) -> int:
        return 1

    return {
        "plain": Plain(),
        "async": Async(column_map={"question": "prompt"}),
        "modelled": Modelled(name="has another name"),
        "raising": Raising(),
        "wordy": Wordy(),
        "judge": judge,
    }


def scores_of_weave_scorers(prompt: str, completion: str) -> dict[str, float]:
    """What these make of a prediction."""
    return {
        "plain": len(prompt + completion),
        "async.question": 0.5 * len(prompt),
        "async.deep.er.output": len(completion),
        "modelled.is_good": 1,
        "modelled.parts.first": 0.25,
        **({} if prompt == PROMPTS[0] else {"raising.luck": 1.0}),
        "judge": 1,
    }


def use(implementation: Implementation, directory: Path) -> Used:
    """Trains twice in a process that has a client of Weave's."""
    import weave

    with recording_server() as server:
        subject = Subject(implementation, topologies.training_arguments("single", directory, max_steps=20), server)
        client = weave.init("team/existing")
        scorers = weave_scorers(weave)
        found, traced = [], []
        with logged_warnings() as warnings:
            for project, options in ((None, {}), ("team/other", {"trace_scores": True})):
                offered = {name: value for name, value in options.items() if subject.offers(name)}
                trainer, callback = subject.begin(PROMPTS, project, scorers=scorers, **offered)
                evaluate_at(trainer, 1)
                trainer.train_end()
                client.flush()
                found.append(seen(callback, server, project or "team/existing"))
                traced.append(sum("judge" in call["op_name"] for call in server.calls()))
                if project is None:
                    of_first = list(warnings)
        is_still_there = weave.get_client() is client
        forget_client()
        return Used(*found, server.projects(), is_still_there, traced, of_first)


@pytest.fixture(scope="module")
def process() -> Iterator[RankPool]:
    """A process that may import Weave."""
    with RankPool(1) as pool:
        yield pool


@pytest.fixture(scope="module")
def used(implementation: Implementation, process: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Used:
    (found,) = process.run(use, implementation, tmp_path_factory.mktemp("used"))
    assert isinstance(found, Used)
    return found


@pytest.mark.clause("WEAVE-2")
def test_without_a_name_the_project_is_that_of_the_client_which_stays(used: Used) -> None:
    (evaluation,) = used.own
    assert evaluation.project == "team/existing"
    assert used.is_still_there


@pytest.mark.clause("WEAVE-2")
def test_a_name_goes_before_the_project_of_the_client(used: Used) -> None:
    (evaluation,) = used.other[-1:]
    assert evaluation.project == "team/other"


@pytest.mark.clause("WEAVE-4", "WEAVE-5")
def test_weaves_scorers_are_called_as_weave_does_and_their_numbers_are_scores(used: Used) -> None:
    (evaluation,) = used.own
    expected = [scores_of_weave_scorers(row.prompt, row.completion) for row in evaluation.rows]
    assert [list(scores.items()) for scores in expected] == [list(row.scores.items()) for row in evaluation.rows]
    means = {f"avg_{name}": [scores[name] for scores in expected if name in scores] for name in expected[1]}
    assert {
        "total_predictions": 2,
        "successful_predictions": 0,
        **{name: sum(scores) / len(scores) for name, scores in means.items()},
    } == evaluation.summary


@pytest.mark.clause("WEAVE-4")
def test_a_weave_scorer_that_gives_no_number_is_warned_of(used: Used) -> None:
    missing = [("raising", PROMPTS[0]), ("wordy", PROMPTS[0]), ("wordy", PROMPTS[1])]
    for (name, prompt), warning in zip(missing, used.warnings, strict=True):
        assert name in warning
        assert prompt in warning


@pytest.mark.clause("WEAVE-4")
def test_weave_traces_no_call_of_a_scorer_unless_asked_to(implementation: Implementation, used: Used) -> None:
    skip_the_reference(implementation, "traces nothing")
    own, both = used.traced
    assert own == 0
    assert both > 0


@pytest.mark.clause("WEAVE-6")
def test_each_training_has_one_client(implementation: Implementation, used: Used) -> None:
    skip_the_reference(implementation, "has none")
    assert used.projects == {"team/existing": 2, "team/other": 1}  # the process has one too


# ── Without a project ─────────────────────────────────────────────────────────


def begin_without_a_project(setup: Setup, directory: Path) -> tuple[str | None, str | None, int]:
    """The errors of a training and of an evaluation outside of one, and the steps that have been taken."""
    arguments = setup.weave_arguments() | {"project_name": None}
    walk = Walk(setup, directory, attach=lambda trainer: [setup.subject(trainer, **arguments)])
    return error_of(walk.begin), error_of(walk.events.evaluate), walk.events.state.global_step


@pytest.mark.clause("WEAVE-2")
@pytest.mark.parametrize(("topology", "count"), [("single", 1), ("ddp", 2)])
def test_without_any_project_every_rank_raises_before_the_first_step(
    implementation: Implementation, ranks: Ranks, tmp_path: Path, topology: str, count: int
) -> None:
    setup = evaluating(implementation.name, topology, count)
    for at_begin, outside, steps in ranks(count).run(begin_without_a_project, setup, tmp_path):
        assert "project_name" in str(at_begin)
        assert "project_name" in str(outside)
        assert steps == 0
