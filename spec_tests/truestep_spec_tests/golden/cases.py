"""What golden files ask: settings, events, scores and prompts, without an answer."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from truestep_spec_tests.golden.files import Json, marked
from truestep_spec_tests.golden.trajectories import STEPS

# Averages and reference models

BEMA: dict[str, tuple[str, dict[str, Any]]] = {
    "the weights of the defaults": ("float32", {"update_freq": 1}),
    "every third step": ("float32", {"update_freq": 3}),
    "a burn-in": ("float32", {"update_freq": 2, "update_after": 3}),
    "a burn-in that does not end": ("float32", {"update_freq": 1, "update_after": STEPS + 1}),
    "a long lag": ("float32", {"update_freq": 1, "lag": 100}),
    "a slow schedule": ("float32", {"update_freq": 1, "multiplier": 0.25}),
    "no average": ("float32", {"update_freq": 1, "ema_power": 0.0}),
    "no correction": ("float32", {"update_freq": 1, "bias_power": 0.0}),
    "a floor": ("float32", {"update_freq": 2, "min_ema_multiplier": 0.8}),
    "weights in bfloat16": ("bfloat16", {"update_freq": 2, "ema_power": 0.75, "bias_power": 0.4, "lag": 3}),
    "weights in float64": ("float64", {"update_freq": 2, "ema_power": 0.75, "bias_power": 0.4, "lag": 3}),
}
"""Of averages: a trajectory and hyperparameters."""

PAIRS = {
    **{dtype: (dtype, dtype) for dtype in ("float32", "bfloat16", "float64")},
    "float32 and bfloat16": ("float32", "bfloat16"),
}
"""Dtypes of a policy and a reference model, by the names of their trajectories."""


def _settings(sync_steps: int, alpha: float) -> dict[str, Any]:
    return {"ref_model_sync_steps": sync_steps, "ref_model_mixup_alpha": alpha}


SYNC: dict[str, tuple[str, dict[str, Any]]] = {
    "every step": ("float32", _settings(1, 0.6)),
    "every third step": ("float32", _settings(3, 0.6)),
    "a small weight": ("float32", _settings(1, 0.01)),
    "copies": ("float32", _settings(3, 1.0)),
    "nothing": ("float32", _settings(1, 0.0)),
    "no sync within the training": ("float32", _settings(STEPS + 1, 0.6)),
    "weights in bfloat16": ("bfloat16", _settings(2, 0.25)),
    "weights in float64": ("float64", _settings(2, 0.25)),
    "a reference in bfloat16": ("float32 and bfloat16", _settings(3, 0.9)),
    "a copy in bfloat16": ("float32 and bfloat16", _settings(3, 1.0)),
    "copies of what is not finite": ("not finite", _settings(2, 1.0)),
    "nothing of what is not finite": ("not finite", _settings(2, 0.0)),
}
"""Of reference models that follow: a trajectory and settings."""

RANKS = (2, 3)
"""World sizes of ZeRO-3."""

RANKS_LOOK_AT = (0, 3, STEPS)
"""The steps at which what ranks hold is written down."""

ON_RANKS: dict[str, dict[str, Any]] = {
    "BEMACallback": {"update_freq": 2, "update_after": 1, "lag": 1},
    "SyncRefModelCallback": _settings(2, 0.6),
}
"""What callbacks are given there."""

# Scores

SCORERS = ("exact match", "größe/len 漢字", "judge.v2")

SCORES: dict[str, list[list[int | float | None]]] = {
    "every scorer gives every prediction a score": [[1, 0.5, 3], [0, 0.25, -2], [1, 0.125, 10]],
    "some scores are missing": [[1, None, 3], [None, 0.25, None], [1, 0.125, None]],
    "a scorer has none": [[1, None, 0.5], [0, None, 0.25]],
    "no scorer has any": [[None, None, None]],
    "sums that round": [[0.1, 1e16, 1e308], [0.2, 1.0, 1e308], [0.3, -1e16, 1e308]],
    "integers beyond float64": [[2**53 + 1, 0, -0.0], [0, 1, -0.0]],
    "one prediction": [[0.1, -0.0, 5e-324]],
}
"""For each prediction the scores of the scorers, in their order; None where there is none."""


# Views


def _event(
    kind: str,
    step: int,
    max_steps: int = 12,
    epochs: int = 3,
    *,
    metrics: Mapping[str, Any] | None = None,
    log_history: Sequence[Mapping[str, Any]] = (),
    **more: Any,
) -> Json:
    if metrics is not None:
        more["metrics"] = list(metrics.items())
    if log_history:
        more["log_history"] = [list(entry.items()) for entry in log_history]
    epoch = step * epochs / max_steps if max_steps > 0 else 0.25 * step
    state = {"global_step": step, "max_steps": max_steps, "epoch": epoch, "num_train_epochs": epochs}
    return {"event": f"on_{kind}", **marked(state | more)}


def _batches(step: int, count: int, name: str, length: int | None) -> list[Json]:
    return [_event("prediction_step", step, dataloader={"name": name, "length": length}) for _ in range(count)]


def _logs(values: Iterable[Any]) -> list[Json]:
    return [_event("log", 0, metrics={"loss": value}) for value in values]


def _history(length: int) -> list[dict[str, float]]:
    return [{"loss": number / 4} for number in range(length)]


NUMBERS: tuple[int | float, ...] = (
    *(0.0, -0.0, 1.0, 2.5, -2.5, 0.1, 123.456, 0.001, 0.0001, 9.999999e-5, 9.999e-5, 1e-5, 1234.5678, 9999.4, 9999.5),
    *(12345.678, 1234567.8, 9999499.9, 9999500.0, 1e7, 2.9979e8, -2.9979e8, 2.0625, 2.1875, 1000.5, 1001.5, 10000.5),
    *(1.0005, 1.0015, 1.5e-10, 1.2345e-9, 1e100, 5e-324, 1.7976931348623157e308, float("inf"), float("-inf")),
    *(float("nan"), 0, 1, -7, 12345678, 10**15 - 1, 10**15, 1234567890123456),
)
"""Numbers that are written in different ways."""

EVENTS: dict[str, list[Json]] = {
    "a training with an evaluation in it": [
        _event("train_begin", 0),
        _event("step_end", 1),
        _event("step_end", 2),
        _event("log", 2, metrics={"loss": 2.5, "rewards/chosen": 0.125, "rewards/rejected": -1, "epoch": 0.5}),
        *_batches(2, 3, "eval", 2),
        _event("log", 2, metrics={"eval_loss": 3.25, "eval/accuracy": 0.75, "epoch": 0.5}),
        _event("evaluate", 2, metrics={"eval_loss": 3.25}),
        _event("step_end", 3),
        _event("log", 3, metrics={"rewards/chosen": 0.25, "learning_rate": 1e-5, "loss": 1.5}),
        _event("train_end", 3),
    ],
    "a training that goes on from a checkpoint": [
        _event("train_begin", 4, log_history=[{"loss": 3.5, "step": 2}, {"loss": 3.0, "norm": 7, "epoch": 1.0}]),
        _event("step_end", 5),
        _event("log", 5, metrics={"loss": 2.75, "step": 9}),
    ],
    "evaluations and predictions without a training": [
        *_batches(0, 2, "one", None),
        _event("log", 0, metrics={"eval_loss": 1.5}),
        _event("evaluate", 0, metrics={"eval_loss": 1.5}),
        *_batches(0, 1, "two", 5),
        *_batches(0, 2, "three", 5),
        _event("predict", 0, metrics={"test_loss": 0.5, "epoch": 1.0}),
        *_batches(0, 1, "four", 1),
    ],
    "an evaluation that the next step takes away": [
        _event("train_begin", 0),
        *_batches(0, 1, "eval", 4),
        _event("step_end", 1),
    ],
    "no total": [_event("train_begin", 0, -1, 1), _event("step_end", 1, -1, 1), _event("train_end", 1, -1, 1)],
    "more steps than the total": [_event("train_begin", 0, 2), _event("step_end", 3, 2)],
    "as many epochs as it takes": [_event("train_begin", 0, epochs=10**6), _event("step_end", 1, epochs=10**6)],
    "a training after one that did not end": [
        _event("train_begin", 0),
        _event("log", 0, metrics={"loss": 1.0}),
        _event("train_begin", 0),
        _event("train_end", 0),
        _event("log", 0, metrics={"later": 1.0}),
    ],
    "numbers": [_event("log", 0, metrics={f"m{i}": value for i, value in enumerate(NUMBERS)})],
    "values that are no numbers": [
        _event(
            "log", 0, metrics={"a": True, "b": None, "c": "text", "d": "[red]", "e": "two\nlines", "f": "\u001b[1m"}
        ),
        _event("log", 0, metrics={"a": 1, "c": 0.5}),
        _event("log", 0, metrics={"a": "again"}),
    ],
    "names": [
        _event("log", 0, metrics={name: i for i, name in enumerate(("/x", "a/", "a/b/c", "[red]/x", "x\ny", "", "//"))})
    ],
    "a trend of 15 numbers and more": [_event("train_begin", 0, log_history=_history(14)), *_logs((7, 8.5))],
    "a trend of 31 numbers and more": [_event("train_begin", 0, log_history=_history(30)), *_logs((7, 8.5, 9))],
}
"""Events in their order."""


# Rows

ROWS = [
    {"prompt": "What is a step?", "topic": "größe", "level": 3, "weight": 0.1, "hard": True, "source": {"at": [1, 2]}},
    {"prompt": "One word", "topic": None, "level": 1, "weight": 2.0, "hard": False, "source": {"at": []}},
    {"prompt": "x" * 90 + "0123456789" * 6, "topic": "", "level": 0, "weight": 0.5, "hard": True, "source": None},
    {"prompt": "Übergröße 猫\n\t", "topic": "", "level": 0, "weight": 0.5, "hard": True, "source": None},
]

TABLES: dict[str, dict[str, Any]] = {
    "every prompt at every second step": {"arguments": {"freq": 2}},
    "the interval is that of evaluations": {"training": {"eval_steps": 3, "max_steps": 7}},
    "the interval is a share of the steps": {"training": {"eval_steps": 0.4, "max_steps": 7}},
    "the interval of the arguments goes first": {
        "arguments": {"freq": 4},
        "training": {"eval_steps": 1, "max_steps": 7},
    },
    "the first prompts": {"arguments": {"freq": 6, "num_prompts": 2}},
    "more prompts than there are": {"arguments": {"freq": 6, "num_prompts": 9}},
    "several datasets": {
        "arguments": {"freq": 6, "num_prompts": 1, "columns": ["level"]},
        "dataset": marked([("easy", ROWS[1:3]), ("hard", ROWS[:1])]),
    },
    "further columns": {"arguments": {"freq": 6, "columns": ["topic", "level", "weight", "hard", "source"]}},
    "columns whose names are taken": {"arguments": {"freq": 6, "num_prompts": 1, "columns": ["prompt", "level"]}},
    "many new tokens": {"arguments": {"freq": 6}, "generation": {"max_new_tokens": 64}},
    "a limit of all tokens": {"arguments": {"freq": 6}, "generation": {"max_length": 20}},
}
"""Tables of completions; what is not said is as in `TABLE`."""

TABLE: dict[str, Any] = {
    "arguments": {},
    "training": {"eval_steps": None, "max_steps": 7},
    "generation": {"max_new_tokens": 2},
    "dataset": marked(ROWS),
}

SEEDS = [(seed, step, prompt) for seed in (0, 42, 2**31) for step in (1, 10, 500) for prompt in (0, 1, 127)]
"""Of what prompts draw: the seed of the training, the step, and the number of the prompt."""
