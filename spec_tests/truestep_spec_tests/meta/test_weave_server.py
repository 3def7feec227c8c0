"""The server that stands in for Weave's: it records what a user would see there, and fails in the way that it is told.

The client is the real one. It runs on ranks of a pool, not in the process of the suite: where Weave has been imported,
Weights & Biases starts it along with each of its own runs.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.client import HTTPConnection, RemoteDisconnected
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch.distributed as dist
from truestep_fixtures.isolation import environment
from truestep_fixtures.ranks import RankPool
from truestep_fixtures.weave_records import Evaluation, Prediction
from truestep_fixtures.weave_server import Fault, RecordingServer, Request, forget_client, recording_server

if importlib.util.find_spec("weave") is None:  # `importorskip` would import it
    pytest.skip("weave is not installed", allow_module_level=True)

ROWS = [("1 + 1 =", "2", {"length": 1, "is_right": True}), ("é\n漢 =", "", {"length": 0, "is_right": None})]
"""Prompts, completions and scores."""

SUMMARY = {"avg_length": 0.5, "total_predictions": 2}

NAME = "meta-llama/Llama-3.1-8B"

FAULTS = [Fault("refuse"), Fault("error", status=400), Fault("hang"), Fault("drop")]

# Weave's own limits are made for networks: it would take 93 seconds to give up a server that hangs.
IMPATIENT = {"WEAVE_HTTP_TIMEOUT": "0.1", "WEAVE_RETRY_MAX_ATTEMPTS": "1"}

# ── What clients do ───────────────────────────────────────────────────────────


def run_on_main_process(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args) if dist.get_rank() == 0 else None


def log(name: str, *, trace_scores: bool = False, auto_summarize: bool = False, **settings: Any) -> None:
    """Logs an evaluation, which Weave then sends in the background."""
    import weave

    settings = {"model": {"name": "model"}, "dataset": "dataset", "trace_scores": trace_scores} | settings
    logger = weave.EvaluationLogger(name=name, eval_attributes={"training_step": 3}, **settings)
    for prompt, completion, scores in ROWS:
        prediction = logger.log_prediction(inputs={"prompt": prompt}, output=completion)
        for scorer, score in scores.items():
            prediction.log_score({"name": scorer}, score)
        prediction.finish()
    logger.log_summary(SUMMARY, auto_summarize=auto_summarize)


def use_three_clients(variables: Mapping[str, str]) -> None:
    """Logs evaluations of all kinds to a project, some to another one, and opens the first again."""
    import weave

    with environment(variables):
        client = weave.init("one/project")
        log("with score calls", trace_scores=True)
        log("without score calls")
        log("summary by Weave", auto_summarize=True)
        log("names in dicts", model={"name": NAME}, dataset="data/with space:v1")
        log("names as strings", model=NAME)
        for rows in [2, 1500]:
            table = weave.Table([{"prompt": f"prompt {row}"} for row in range(rows)])
            log(f"{rows} rows", dataset=weave.Dataset(name="dataset", rows=table))
        weave.EvaluationLogger(name="left open", model={"name": "model"}, dataset="dataset")
        failed = weave.EvaluationLogger(name="failed", model={"name": "model"}, dataset="dataset")
        failed.log_prediction(inputs={"prompt": "1 + 1 ="}, output="2")
        failed.fail(ValueError("out of numbers"))
        client.flush()
        forget_client()

        client = weave.init("other/project", settings={"use_calls_complete": False})
        log("with score calls", trace_scores=True)
        client.flush()
        forget_client()

        weave.init("one/project")
        forget_client()


def error_of_init(variables: Mapping[str, str]) -> str:
    """Why a client cannot begin."""
    import weave

    with environment(variables | IMPATIENT), pytest.raises(RuntimeError) as caught:
        weave.init("entity/project")
    return str(caught.value)


def begin(variables: Mapping[str, str]) -> None:
    """Begins with a client, which stays."""
    import weave

    with environment(variables | IMPATIENT):
        weave.init("entity/project")


def log_and_forget() -> None:
    """Logs an evaluation with the client that there is, and does not wait until it has arrived."""
    log("evaluation")
    forget_client()


def begin_and_forget(variables: Mapping[str, str]) -> None:
    begin(variables)
    forget_client()


def log_on_rank(variables: Mapping[str, str]) -> None:
    import weave

    with environment(variables):
        client = weave.init("entity/project")
        log(f"rank {dist.get_rank()}", trace_scores=True)
        client.flush()
        forget_client()


def clients_in_and_after_a_block() -> list[bool]:
    import weave

    with recording_server():
        weave.init("entity/project")
        inside = weave.get_client() is not None
    return [inside, weave.get_client() is not None]


# ── What the server says ──────────────────────────────────────────────────────


def found(server: RecordingServer, name: str, project: str = "one/project") -> Evaluation:
    [evaluation] = [each for each in server.evaluations() if (each.project, each.name) == (project, name)]
    return evaluation


def failed(server: RecordingServer) -> list[Request]:
    return [request for request in server.requests() if request.status != 200]


def wait_until_one_failed(server: RecordingServer) -> None:
    for _ in range(600):
        if failed(server):
            return
        time.sleep(0.02)
    pytest.fail("no request came to the fault")


def listens(server: RecordingServer) -> bool:
    address = urlsplit(server.url)
    try:
        socket.create_connection((address.hostname, address.port), timeout=5).close()
    except ConnectionRefusedError:
        return False
    return True


def status_of(server: RecordingServer, path: str) -> int:
    """That of the answer to a request which is not Weave's."""
    connection = HTTPConnection(urlsplit(server.url).netloc, timeout=30)
    connection.request("GET", path)
    status = connection.getresponse().status
    connection.close()
    return status


# ── Tests ─────────────────────────────────────────────────────────────────────

Client = Callable[..., Any]
"""Runs a function on the main process of the pool, and returns its result."""


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(2, timeout=60, grace=1) as pool:
        yield pool


@pytest.fixture(scope="module")
def client(pool: RankPool) -> Client:
    return lambda function, *args: pool.run(run_on_main_process, function, *args)[0]


@pytest.fixture(scope="module")
def used(client: Client) -> Iterator[RecordingServer]:
    """A server that three clients have used."""
    with recording_server() as server:
        client(use_three_clients, server.environment)
        yield server


@pytest.fixture
def server() -> Iterator[RecordingServer]:
    with recording_server() as server:
        yield server


@pytest.mark.parametrize("name", ["with score calls", "without score calls"])
def test_an_evaluation_is_recorded_as_it_was_logged(used: RecordingServer, name: str) -> None:
    evaluation = found(used, name)
    expected = tuple(
        Prediction({"prompt": prompt}, completion, scores, scores if name == "with score calls" else {}, True)
        for prompt, completion, scores in ROWS
    )
    assert expected == evaluation.predictions
    expected_summary = SUMMARY | {"output": SUMMARY}
    assert expected_summary == evaluation.summary
    assert evaluation.attributes == {"training_step": 3}
    assert evaluation.metadata["training_step"] == 3
    assert evaluation.is_finished
    assert evaluation.exception is None


def test_a_summary_that_weave_makes_is_recorded(used: RecordingServer) -> None:
    expected = {"length": {"mean": 0.5}, "is_right": {"true_count": 1, "true_fraction": 1.0}, "output": SUMMARY}
    assert expected == found(used, "summary by Weave").summary


def test_names_are_what_the_client_makes_of_them(used: RecordingServer) -> None:
    evaluation = found(used, "names in dicts")
    assert (evaluation.model["name"], evaluation.model_id) == (NAME, "meta-llama-Llama-3.1-8B")
    assert (evaluation.dataset["name"], evaluation.dataset_id) == ("data/with space:v1", "data-with-space-v1")
    evaluation = found(used, "names as strings")
    assert (evaluation.model["name"], evaluation.model_id) == ("metallamaLlama318B", "metallamaLlama318B")


@pytest.mark.parametrize("rows", [2, 1500], ids=["in one piece", "in chunks"])
def test_a_dataset_has_its_rows(used: RecordingServer, rows: int) -> None:
    expected = [{"prompt": f"prompt {row}"} for row in range(rows)]
    assert expected == found(used, f"{rows} rows").dataset["rows"]


def test_a_table_in_chunks_comes_in_several_requests(used: RecordingServer) -> None:
    assert "/table/create_from_digests" in {request.path for request in used.requests()}


def test_an_evaluation_is_unfinished_until_it_ends(used: RecordingServer) -> None:
    evaluation = found(used, "left open")
    assert not evaluation.is_finished
    assert evaluation.summary is None
    assert evaluation.predictions == ()


def test_an_evaluation_that_was_ended_by_an_exception_has_it(used: RecordingServer) -> None:
    evaluation = found(used, "failed")
    assert evaluation.is_finished
    assert evaluation.exception is not None
    assert "out of numbers" in evaluation.exception
    assert [prediction.output for prediction in evaluation.predictions] == ["2"]


def test_an_evaluation_is_the_same_whatever_way_it_was_sent(used: RecordingServer) -> None:
    assert "/call/upsert_batch" in {request.path for request in used.requests()}
    expected, actual = (found(used, "with score calls", project) for project in ["one/project", "other/project"])
    assert expected.predictions == actual.predictions
    assert expected.summary == actual.summary
    assert expected.attributes == actual.attributes


def test_calls_have_objects_in_the_place_of_references(used: RecordingServer) -> None:
    [call] = [each for each in used.calls() if each.get("display_name") == "left open"]
    assert call["inputs"]["model"]["name"] == "model"
    assert call["inputs"]["self"]["dataset"]["rows"] == [{"dataset_id": "dataset"}]


def test_clients_are_counted_for_each_project(used: RecordingServer) -> None:
    assert used.projects() == {"one/project": 2, "other/project": 1}


def test_the_server_can_answer_all_that_the_client_asks(used: RecordingServer) -> None:
    assert failed(used) == []


def test_ranks_reach_the_server(pool: RankPool, server: RecordingServer) -> None:
    pool.run(log_on_rank, server.environment)
    for rank in range(2):
        assert len(found(server, f"rank {rank}", "entity/project").predictions) == len(ROWS)
    assert server.projects() == {"entity/project": 2}
    expected = [score for _, _, scores in ROWS for score in scores.values()] * 2
    outputs = [feedback["payload"]["output"] for feedback in server.feedback()]
    assert sorted(map(repr, expected)) == sorted(map(repr, outputs))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.how)
def test_no_client_begins_where_the_server_fails_from_the_start(client: Client, fault: Fault) -> None:
    with recording_server(fault) as server:
        assert "not available" in client(error_of_init, server.environment)
        assert server.projects() == {}
        expected = {"refuse": set(), "error": {400}}.get(fault.how, {None})
        assert expected == {request.status for request in server.requests()}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.how)
def test_a_fault_midway_lasts_until_it_is_ended(client: Client, server: RecordingServer, fault: Fault) -> None:
    client(begin, server.environment)
    begun = len(server.requests())
    server.fail(replace(fault, after=3))
    client(log_and_forget)
    wait_until_one_failed(server)
    assert begun + 3 == len(server.requests()) - len(failed(server))
    assert {request.status for request in failed(server)} == {400 if fault.how == "error" else None}
    assert server.evaluations() == []
    assert listens(server) == (fault.how != "refuse")
    server.fail(None)
    assert status_of(server, "/server_info") == 200


def test_a_fault_is_confined_to_its_paths(server: RecordingServer) -> None:
    server.fail(Fault("error", paths="^/nothing/", status=418))
    assert [status_of(server, path) for path in ["/server_info", "/nothing/here"]] == [200, 418]


def test_what_the_server_does_not_know_is_not_found(server: RecordingServer) -> None:
    assert status_of(server, "/nothing/here") == 404


def test_a_request_that_hangs_is_given_up_when_the_fault_ends(server: RecordingServer) -> None:
    server.fail(Fault("hang"))
    with ThreadPoolExecutor() as threads:
        hanging = threads.submit(status_of, server, "/server_info")
        wait_until_one_failed(server)
        assert not hanging.done()
        server.fail(None)
        with pytest.raises(RemoteDisconnected):
            hanging.result(timeout=30)


def test_answers_come_after_the_delay(client: Client) -> None:
    with recording_server(delay=0.05) as server:
        client(begin_and_forget, server.environment)
        first, second, *_ = server.requests()
    # The client asks for the project once it has the answer to its first request.
    assert second.received - first.received >= 0.05


def test_a_server_in_a_process_of_its_own_records_and_fails_too(client: Client) -> None:
    with recording_server(own_process=True) as server:
        client(begin_and_forget, server.environment)
        assert server.projects() == {"entity/project": 1}
        assert failed(server) == []
        server.fail(Fault("refuse"))
        assert not listens(server)
        server.fail(None)
        assert listens(server)
    assert not listens(server)


def test_the_client_of_a_block_is_forgotten_at_its_end(client: Client) -> None:
    assert client(clients_in_and_after_a_block) == [True, False]


def test_a_process_that_has_forgotten_its_client_ends_at_once(server: RecordingServer) -> None:
    script = (
        "import weave\n"
        "from truestep_fixtures.weave_server import forget_client\n"
        "weave.init('entity/project')\n"
        "logger = weave.EvaluationLogger(name='evaluation', model={'name': 'model'}, dataset='dataset')\n"
        "logger.log_prediction(inputs={'prompt': '1 + 1 ='}, output='2')\n"
        "forget_client()\n"
    )
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    # For the prediction, which is open, Weave would wait for five minutes.
    subprocess.run([sys.executable, "-c", script], check=True, env=variables, timeout=60)
    assert server.projects() == {"entity/project": 1}
