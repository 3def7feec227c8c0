"""Logs evaluations with Weave's client, in a process of its own that reads them from its standard input.

`truestep.weave_process` starts it by its path. It imports nothing of this package, and no PyTorch. Each line that it
reads or writes is JSON. What it reads:

    {"project": …, "sys_path": …, "settings": …, "attributes": …}        first
    {"attributes": …, "predictions": …, "summary": …, …}                 an evaluation; see `log`
    null                                                                 the end

It answers `{"did": …}` for "import", "init" and, after each evaluation, "log", then also with its `url`, and with any
number of "part" before; or `{"failed": …}`, after which it ends.
"""

import asyncio
import importlib
import json
import logging
import os
import queue
import re
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TextIO

PART = 1000
"""After how many predictions it waits until they have been sent."""

SIGN = 1.0
"""How often it says that it goes on, in seconds."""

BETWEEN_BATCHES = 0.05
"""How long the client waits between what it sends, in seconds. By itself it waits a second, also when it flushes."""

FLUSH_OF_A_FAILURE = 3.0
"""How long it tries to have the end of an evaluation that failed arrive, in seconds."""

LINGER = 10.0
"""How long it goes on after the end of its input, which is that of the training's process, in seconds."""


class Errors(logging.Handler):
    """What Weave's client reports instead of raising it: it sends in threads of its own."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.messages: list[str] = []
        self.has_any = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it."""
        self.messages.append(record.getMessage())
        self.has_any.set()


def flush(client: Any, errors: Errors, seconds: float | None = None) -> None:
    """Wait until a client has sent everything.

    When something could not be sent, the client itself would wait minutes for it to come after all.

    Args:
        client: The client.
        errors: What it has reported.
        seconds: How long to wait at most; None: as long as it takes.

    Raises:
        ConnectionError: It has reported an error.
    """
    has_ended = threading.Event()

    def run() -> None:
        client.flush()
        has_ended.set()

    began = time.monotonic()
    threading.Thread(target=run, daemon=True).start()
    while not has_ended.wait(0.01) and not errors.has_any.is_set():
        if seconds is not None and time.monotonic() > began + seconds:
            return
    if errors.messages:
        raise ConnectionError(errors.messages[0])


def accepted(kind: str, name: str) -> str:
    """A name that Weave accepts: it wants a letter or a digit.

    Example:
        >>> accepted("model", "meta-llama/Llama-3.1-8B"), accepted("model", "./")
        ('meta-llama/Llama-3.1-8B', 'model ./')
    """
    return name if re.search(r"[^\W_]", name) else f"{kind} {name}"


async def log(
    weave: Any, evaluation: dict[str, Any], objects: dict[Any, Any], sent: Callable[[], None], sign: Callable[[], None]
) -> str:
    """Log an evaluation.

    Args:
        weave: The module.
        evaluation: `attributes`, `scorers` (names, or None), `trace_scores`, `predictions` (lists of inputs, output and
            scores) and `summary` (or None).
        objects: The dataset and the scorers that were logged before.
        sent: Waits until everything has been sent, and raises what went wrong.
        sign: Says that it goes on.

    Returns:
        Where the evaluation can be seen.
    """
    about = evaluation["attributes"]
    content = about["dataset_name"], [{"prompt": inputs.get("prompt")} for inputs, _, _ in evaluation["predictions"]]
    if objects.get("content") != content:
        name, rows = objects["content"] = content
        objects["dataset"] = weave.Dataset(name=accepted("dataset", name), rows=weave.Table(rows))
    ev = weave.EvaluationLogger(
        name=f"{about['dataset_name']} at step {about['training_step']}",
        # A text would become the name of a class, without most special characters.
        model={"name": accepted("model", about["model_name"])},
        dataset=objects["dataset"],
        eval_attributes=about,
        scorers=evaluation["scorers"],
        trace_scores=evaluation["trace_scores"],
    )
    said = time.monotonic()
    try:
        for number, (inputs, output, scores) in enumerate(evaluation["predictions"], start=1):
            prediction = ev.log_prediction(inputs=inputs, output=output)
            for name, score in scores.items():
                if ("scorer", name) not in objects:
                    objects["scorer", name] = weave.Scorer(name=accepted("scorer", name))
                await prediction.alog_score(objects["scorer", name], score)  # `log_score` runs an event loop for each
                if time.monotonic() > said + SIGN:
                    said = time.monotonic()
                    sign()
            prediction.finish()
            if number % PART == 0:
                sent()
        if evaluation["summary"] is None:
            ev.finish()
        else:
            ev.log_summary(evaluation["summary"], auto_summarize=False)
        sent()
        return str(getattr(ev, "ui_url", ""))
    except BaseException as error:
        ev.finish(exception=error)
        raise
    finally:
        forget(ev)


def forget(evaluation: Any) -> None:
    """Have Weave let go of an evaluation that has ended. It keeps each with all its predictions, for the end."""
    with suppress(AttributeError, ImportError, ValueError):
        importlib.import_module("weave.evaluation.eval_imperative")._active_evaluation_loggers.remove(evaluation)


def hurry(client: Any) -> None:
    """Have a client send without waiting for more. It has no setting for that; in this process it slows nobody down."""
    server = client.server
    while hasattr(server, "_next_trace_server"):
        server = server._next_trace_server
    for processor in (server.call_processor, server.feedback_processor):
        processor.min_batch_interval = BETWEEN_BATCHES


def reuse_operations() -> None:
    """Have scores of one name share an operation. Weave makes one for each score, and sends it, though they are alike.

    What such an operation returns is not in it, but in a context variable.
    """
    eval_imperative: Any = importlib.import_module("weave.evaluation.eval_imperative")
    make, made = eval_imperative.op, dict[str, Any]()

    def op(*, name: str, **settings: Any) -> Callable[[Any], Any]:
        def decorate(function: Any) -> Any:
            if function.__name__ != "score_method":
                return make(name=name, **settings)(function)
            if name not in made:
                made[name] = make(name=name, **settings)(function)
            return made[name]

        return decorate

    eval_imperative.op = op


def read(lines: TextIO) -> "queue.Queue[str | None]":
    """Read lines in the background, and end the process some time after the last one: nobody waits for it any more."""
    found: queue.Queue[str | None] = queue.Queue()

    def run() -> None:
        for line in lines:
            found.put(line)
        found.put(None)
        time.sleep(LINGER)
        os._exit(1)

    threading.Thread(target=run, daemon=True).start()
    return found


def main() -> None:
    """Log what comes, until the input ends."""
    # What libraries print is no answer, and what they ask for, such as a key, is not to be read from evaluations.
    lines, answers = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    evaluations = read(lines)

    def answer(**content: Any) -> None:
        with suppress(OSError):  # nobody may be there any more
            print(json.dumps(content), file=answers, flush=True)

    greeting = json.loads(evaluations.get() or "")
    sys.path[:] = greeting["sys_path"]
    client: Any = None
    try:
        import weave

        answer(did="import")
        client = weave.init(greeting["project"], settings=greeting["settings"], attributes=greeting["attributes"])
        with suppress(AttributeError, ImportError):  # private names, without which it takes longer
            hurry(client)
            reuse_operations()
        errors, objects = Errors(), dict[Any, Any]()
        logging.getLogger("weave").addHandler(errors)  # Weave takes away those that were there before
        answer(did="init")

        def sent() -> None:
            flush(client, errors)
            answer(did="part")

        while (evaluation := json.loads(evaluations.get() or "null")) is not None:
            if evaluation["run"] is not None:
                run, step = evaluation["run"]
                client.set_wandb_run_context(run_id=run, step=step)
            url = asyncio.run(log(weave, evaluation, objects, sent, lambda: answer(did="part")))
            answer(did="log", url=url)
    except Exception as error:
        if client is not None:
            flush(client, Errors(), FLUSH_OF_A_FAILURE)
        answer(failed=f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    if hasattr(os, "nice"):
        os.nice(10)  # the training goes first
    try:
        main()
    finally:
        # Everything has been sent or given up. Weave would wait minutes for what was given up.
        os._exit(0)
