"""Scores: what counts as a number, what scorers are called with, and what a summary says."""

import asyncio
import inspect
import logging
import math
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from fractions import Fraction
from numbers import Real
from typing import Any

from truestep_reference import arguments

logger = logging.getLogger(__name__)

Scores = dict[str, float | int]


def score(value: Any) -> float | int | None:
    """The number that a scorer's result is.

    Args:
        value: Anything.

    Returns:
        A finite number; True and False count as 1 and 0, and a scalar of NumPy or PyTorch as what it holds. None for
        everything else, also for an integer that no float64 comes near.

    Example:
        >>> score(0.5), score(3), score(True), score("3"), score(float("nan")), score(10**400)
        (0.5, 3, 1, None, None, None)
    """
    is_scalar = hasattr(value, "item") and getattr(value, "shape", None) == ()
    number = value.item() if is_scalar else value
    if isinstance(number, int):  # True and False too
        number = int(number)
    elif isinstance(number, float) or (is_scalar and isinstance(number, Real)):
        number = float(number)
    else:
        return None
    try:
        return number if math.isfinite(number) else None
    except OverflowError:
        return None


def flattened(name: str, value: Any) -> Scores:
    """The scores in a result of a ``weave.Scorer``.

    Args:
        name: The scorer's name.
        value: A number, or a dict or Pydantic model with numbers, at any depth.

    Returns:
        The numbers by their names; what is none is left out.

    Example:
        >>> flattened("judge", {"fluent": True, "why": "short", "length": {"words": 3}})
        {'judge.fluent': 1, 'judge.length.words': 3}
        >>> flattened("judge", 0.5)
        {'judge': 0.5}
    """
    if hasattr(value, "model_dump"):
        value = value.model_dump()
    if isinstance(value, Mapping):
        return {key: number for part in value for key, number in flattened(f"{name}.{part}", value[part]).items()}
    number = score(value)
    return {} if number is None else {name: number}


def mean(scores: Sequence[float | int]) -> float:
    """The arithmetic mean of float64 values, exact and then rounded once.

    Args:
        scores: Finite numbers, at least one, which are taken as float64.

    Returns:
        Σ s / n.

    Example:
        >>> mean([0.1] * 10), sum([0.1] * 10) / 10
        (0.1, 0.09999999999999999)
    """
    return float(sum(Fraction(float(one)) for one in scores) / len(scores))


def summary(scorers: Sequence[str], of_predictions: Sequence[Mapping[str, Scores]]) -> dict[str, float | int]:
    """Sums up the scores of an evaluation.

    Args:
        scorers: The names of all scorers.
        of_predictions: For each prediction, the scores that each scorer gave, by the scorer's name.

    Returns:
        ``total_predictions``; ``successful_predictions``, those to which every scorer gave a score; and the mean
        ``avg_{name}`` of each score's name.

    Example:
        >>> summary(["a", "b"], [{"a": {"a": 1}, "b": {"b.x": 2, "b.y": 0.5}}, {"a": {"a": 2}, "b": {}}])
        {'total_predictions': 2, 'successful_predictions': 1, 'avg_a': 1.5, 'avg_b.x': 2.0, 'avg_b.y': 0.5}
    """
    by_name: dict[str, list[float | int]] = {}
    for scorer in scorers:
        for of_prediction in of_predictions:
            for name, number in of_prediction[scorer].items():
                by_name.setdefault(name, []).append(number)
    return {
        "total_predictions": len(of_predictions),
        "successful_predictions": sum(
            all(of_prediction[scorer] for scorer in scorers) for of_prediction in of_predictions
        ),
        **{f"avg_{name}": mean(numbers) for name, numbers in by_name.items()},
    }


def scored(scorers: Mapping[str, Any], prompt: str, completion: str) -> dict[str, Scores]:
    """Has every scorer judge a prediction, one after the other; with a warning for each that gives no number.

    Args:
        scorers: Functions of a prompt and a completion, plain or async, and ``weave.Scorer`` objects, by name.
        prompt: The text of the prompt.
        completion: What the model made of it.

    Returns:
        For each scorer the scores that it gave, by their names.
    """
    found: dict[str, Scores] = {}
    for name, scorer in scorers.items():
        try:
            found[name] = _scores_of(name, scorer, prompt, completion)
        except (Exception, SystemExit) as error:
            found[name] = {}
            logger.warning(f"scorer {name!r} gave no score for the prompt {prompt!r}: {shown(error)}")
    return found


def shown(value: Any) -> str:
    """A value as Python shows it, or its type if it cannot be shown.

    Args:
        value: Anything.

    Returns:
        Text, not too long.

    Example:
        >>> shown("score"), shown([0] * 100)[-3:]
        ("'score'", ', 0')
    """
    try:
        return f"{value!r:.80}"
    except Exception:
        return type(value).__name__


def arguments_of(scorer: Any, prompt: str, completion: str) -> dict[str, Any]:
    """What the ``score`` of a ``weave.Scorer`` is called with, as Weave does.

    Args:
        scorer: The object.
        prompt: The text of the prompt, for the argument ``prompt`` and those that ``column_map`` says are this column.
            Where any arguments are taken, and there is no such map, it is also in ``inputs``, the whole row.
        completion: The text of the completion, for the argument ``output``.

    Returns:
        The arguments by name.
    """
    takes = inspect.signature(scorer.score).parameters
    takes_any = any(parameter.kind == inspect.Parameter.VAR_KEYWORD for parameter in takes.values())
    found: dict[str, Any] = {"output": completion}
    if scorer.column_map is not None:
        found |= {name: prompt for name, column in scorer.column_map.items() if column == "prompt"}
    elif takes_any:
        found |= {"prompt": prompt, "inputs": {"prompt": prompt}}
    if "prompt" in takes:
        found["prompt"] = prompt
    return found


def require_scorers(scorers: Any) -> dict[str, Any]:
    """Checks the argument ``scorers``.

    Args:
        scorers: What was given for it.

    Returns:
        The scorers by name; none for None.

    Raises:
        ValueError: It is no mapping from names to functions and ``weave.Scorer`` objects.
    """
    if scorers is None:
        return {}
    if not isinstance(scorers, Mapping):
        raise ValueError(f"scorers must be a dict from names to functions, got {scorers!r:.80}")
    for name, scorer in scorers.items():
        arguments.name("a name in scorers", name)
        if not callable(scorer) and not _is_weave_scorer(scorer):
            raise ValueError(f"scorers[{name!r}] must be a function or a weave.Scorer, got {scorer!r:.80}")
    return dict(scorers)


def _scores_of(name: str, scorer: Any, prompt: str, completion: str) -> Scores:
    is_weave_scorer = _is_weave_scorer(scorer)
    with _untraced():
        if is_weave_scorer:
            result = scorer.score(**arguments_of(scorer, prompt, completion))
        else:
            result = scorer(prompt, completion)
        if inspect.isawaitable(result):
            result, error = asyncio.run(_awaited(result))
            if error is not None:
                raise error
    number = score(result)
    found = flattened(name, result) if is_weave_scorer else {} if number is None else {name: number}
    if not found:
        raise ValueError(f"{shown(result)} is no finite number")
    return found


async def _awaited(result: Awaitable[Any]) -> tuple[Any, BaseException | None]:
    """What comes of it, or the error: asyncio is not to be left by one that ends programs or that cannot be shown."""
    try:
        return await result, None
    except (Exception, SystemExit) as error:
        return None, error


def _is_weave_scorer(scorer: Any) -> bool:
    """Weave has been imported by whoever has made one."""
    return "weave" in sys.modules and isinstance(scorer, sys.modules["weave"].Scorer)


def _untraced() -> AbstractContextManager[None]:
    """Has Weave record no calls, should its client be at work in this process."""
    if "weave" not in sys.modules:
        return nullcontext()
    disabled: Callable[[], AbstractContextManager[None]]
    disabled = sys.modules["weave.trace.context.call_context"].tracing_disabled
    return disabled()
