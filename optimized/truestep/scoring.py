"""Scores of completions, by functions of the user's that may do anything."""

import asyncio
import inspect
import logging
import math
import sys
import threading
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from fractions import Fraction
from numbers import Real
from typing import Any

from truestep.arguments import require_integer

logger = logging.getLogger(__name__)

Score = int | float
Scores = dict[str, Score]


class Scoring:
    """Has completions scored.

    Args:
        scorers: By name: functions of a prompt and its completion, which may be `async`, and `weave.Scorer` objects.
        max_workers: How many calls run at a time; with 1, in the thread of the caller.
        is_traced: Whether Weave, if this process uses it, may trace the calls.

    Raises:
        ValueError: A scorer cannot be called, a name is no text, or `max_workers` is no integer of at least 1.
    """

    def __init__(self, scorers: Mapping[str, Any], max_workers: int, *, is_traced: bool) -> None:
        require_integer("max_workers", max_workers, 1)
        if not isinstance(scorers, Mapping):
            raise ValueError(f"scorers={scorers!r:.80}: must be a dict from names to functions")
        for name, scorer in scorers.items():
            if not isinstance(name, str) or not name:
                raise ValueError(f"scorers has the name {name!r}: must be a text")
            if not callable(scorer) and not _is_weave_scorer(scorer):
                raise ValueError(f"scorers[{name!r}]={scorer!r:.80}: neither a function nor a weave.Scorer")
        self._scorers = dict(scorers)
        self._max_workers = max_workers
        self._is_traced = is_traced
        self._loop = _Loop()

    @property
    def names(self) -> list[str]:
        """Those of the scorers."""
        return list(self._scorers)

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[Scores, bool]]:
        """Score completions.

        Args:
            pairs: Prompts and their completions.

        Returns:
            For each pair its scores, in the order of the scorers, and whether every scorer gave one.
        """
        calls = [(name, *pair) for pair in pairs for name in self._scorers]
        results = iter(self._results(calls))
        scored: list[tuple[Scores, bool]] = []
        for prompt, _ in pairs:
            scores: Scores = {}
            is_complete = True
            for name in self._scorers:
                found = self._understood(name, prompt, next(results))
                scores |= found
                is_complete = is_complete and bool(found)
            scored.append((scores, is_complete))
        return scored

    def end(self) -> None:
        """Let go of what `async` scorers run in."""
        self._loop.stop()

    def _results(self, calls: Sequence[tuple[str, str, str]]) -> list[Any]:
        """What the calls return, or the exceptions that they raise, in the order of the calls."""
        if self._max_workers == 1:
            return [self._attempt(*call) for call in calls]
        pool = ThreadPoolExecutor(self._max_workers, thread_name_prefix="truestep-scorer")
        try:
            results = [future.result() for future in [pool.submit(self._attempt, *call) for call in calls]]
        except BaseException:  # Ctrl-C
            pool.shutdown(wait=False, cancel_futures=True)
            self.end()  # threads of the pool may wait for it
            raise
        pool.shutdown()
        return results

    def _attempt(self, name: str, prompt: str, completion: str) -> Any:
        try:
            with self._tracing():
                result = _call(self._scorers[name], prompt, completion)
                return self._loop.run(result) if inspect.isawaitable(result) else result
        except (Exception, SystemExit, asyncio.CancelledError) as error:
            return error

    def _tracing(self) -> AbstractContextManager[Any]:
        weave: Any = sys.modules.get("weave.trace.context.call_context")
        return nullcontext() if self._is_traced or weave is None else weave.tracing_disabled()

    def _understood(self, name: str, prompt: str, result: Any) -> Scores:
        found: Scores = {}
        try:
            if isinstance(result, BaseException):
                fault = f"it raised {_shown(result)}"
            else:
                found = dict(_leaves(name, result)) if _is_weave_scorer(self._scorers[name]) else _leaf(name, result)
                fault = f"it returned {_shown(result)}, no finite number"
        except Exception as error:  # of an object of the user's
            fault = f"it returned something that raises {_shown(error)}"
        if not found:
            logger.warning("scorer %r gave no score for the prompt %.200r: %s", name, prompt, fault)
        return found


def summarize(scored: Sequence[tuple[Scores, bool]]) -> dict[str, Score]:
    """The summary of what `Scoring.score` returned.

    Returns:
        `total_predictions`; `successful_predictions`, those with a score of every scorer; and `avg_<scorer>`, the mean
        in float64 of the scores that there are, rounded once.

    Example:
        >>> summarize([({"length": 3}, True), ({"length": 4}, True), ({}, False)])
        {'total_predictions': 3, 'successful_predictions': 2, 'avg_length': 3.5}
    """
    by_name: dict[str, list[float]] = {}
    for scores, _ in scored:
        for name, score in scores.items():
            by_name.setdefault(name, []).append(float(score))
    return {
        "total_predictions": len(scored),
        "successful_predictions": sum(is_complete for _, is_complete in scored),
    } | {
        # A sum of floats would be rounded at every addition, and could overflow where the mean does not.
        f"avg_{name}": float(sum(map(Fraction, scores)) / len(scores))
        for name, scores in by_name.items()
    }


class _Loop:
    """An event loop in a thread of its own, one for all trainings: clients of services are bound to theirs."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def run(self, awaitable: Awaitable[Any]) -> Any:
        """Wait for something, in any thread."""

        async def awaited() -> Any:
            try:
                return await awaitable
            except (SystemExit, KeyboardInterrupt) as error:  # which would end the loop
                return error

        with _starting:
            self._loop = self._loop or asyncio.new_event_loop()
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._loop.run_forever, name="truestep-async-scorers", daemon=True
                )
                self._thread.start()
        future: Future[Any] = asyncio.run_coroutine_threadsafe(awaited(), self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def stop(self) -> None:
        """End what runs, and the thread."""
        if self._loop is None or self._thread is None:
            return
        with suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(_cancel_others(), self._loop).result(timeout=1.0)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._thread = None


_starting = threading.Lock()


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


def _is_weave_scorer(scorer: Any) -> bool:
    weave = sys.modules.get("weave")  # who has such a scorer has imported it
    return weave is not None and isinstance(scorer, weave.Scorer)


def _call(scorer: Any, prompt: str, completion: str) -> Any:
    if not _is_weave_scorer(scorer):
        return scorer(prompt, completion)
    from weave.flow.scorer import prepare_scorer_op_args

    _, arguments = prepare_scorer_op_args(scorer, {"prompt": prompt}, completion)
    return scorer.score(**arguments)


def _number(value: Any) -> Score | None:
    """A finite number, or None for anything else."""
    is_scalar = getattr(value, "shape", None) == () and hasattr(value, "item")  # of NumPy or PyTorch
    number = value.item() if is_scalar else value
    if not isinstance(number, Real if is_scalar else int | float):
        return None
    try:
        is_finite = math.isfinite(number)
    except OverflowError:  # an integer that no float is large enough for
        return None
    if not is_finite:
        return None
    return int(number) if isinstance(number, int) else float(number)


def _leaf(name: str, result: Any) -> Scores:
    number = _number(result)
    return {} if number is None else {name: number}


def _leaves(name: str, result: Any) -> Iterator[tuple[str, Score]]:
    """The numbers in the result of a Weave scorer, which may be nested."""
    if hasattr(result, "model_dump"):  # of Pydantic
        result = result.model_dump()
    if isinstance(result, Mapping):
        for key, value in result.items():
            yield from _leaves(f"{name}.{key}", value)
    else:
        yield from _leaf(name, result).items()


def _shown(value: object) -> str:
    try:
        return f"{value!r:.200}"
    except Exception:  # it is the user's
        return type(value).__name__
