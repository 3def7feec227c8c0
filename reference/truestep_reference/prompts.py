"""Prompts: where they come from, what they are as tokens, and what rows have besides."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from numbers import Integral, Real
from typing import Any, NamedTuple

Cell = str | int | float | bool | None
Row = dict[str, Cell]


class Prompt(NamedTuple):
    """A prompt that was read.

    Attributes:
        content: A string, or a conversation: a list of messages.
        cells: What its rows have besides step, prompt and completion.
    """

    content: str | list[dict[str, Any]]
    cells: Row


def read(name: str, dataset: Any, num_prompts: int | None, columns: Sequence[str]) -> list[Prompt]:
    """Takes the prompts of an evaluation dataset, in its order.

    Args:
        name: What errors call the dataset.
        dataset: A ``Dataset``, an ``IterableDataset``, another iterable of rows, or a dict of these.
        num_prompts: How many to take, of each if there are several; None for all.
        columns: Further columns that rows of the table have.

    Returns:
        The prompts, fewer than asked for where there are fewer.

    Raises:
        ValueError: There is no dataset, no row, no such column, or something else than a prompt.

    Example:
        >>> read("mine", [{"prompt": "a", "difficulty": 3}, {"prompt": "b"}], 1, ["difficulty"])
        [Prompt(content='a', cells={'difficulty': 3})]
        >>> read("mine", {"dev": [{"prompt": "a"}]}, None, [])
        [Prompt(content='a', cells={'dataset': 'dev'})]
    """
    if isinstance(columns, str):
        raise ValueError(f"columns must be a list of names, got the string {columns!r}")
    if dataset is None:
        raise ValueError(f"{name} is None: completions are of an evaluation dataset's prompts")
    if not isinstance(dataset, Mapping):
        return _read_one(name, dataset, num_prompts, named(columns, ["step", "prompt", "completion"]))
    if not dataset:
        raise ValueError(f"{name} is {dataset!r}: it must have at least one dataset")
    names = named(columns, ["step", "prompt", "completion", "dataset"])
    found = []
    for key, part in dataset.items():
        for prompt in _read_one(f"{name}[{key!r}]", part, num_prompts, names):
            found.append(Prompt(prompt.content, {"dataset": str(key), **prompt.cells}))
    return found


def named(columns: Iterable[str], taken: Sequence[str]) -> dict[str, str]:
    """Gives columns of a dataset their names in the table.

    Args:
        columns: Their names in the dataset.
        taken: The names of the table's own columns.

    Returns:
        Name in the dataset to name in the table.

    Example:
        >>> named(["topic", "step", "eval_step"], ["step", "prompt", "completion"])
        {'topic': 'topic', 'step': 'eval_step', 'eval_step': 'eval_eval_step'}
    """
    names: dict[str, str] = {}
    for column in dict.fromkeys(columns):
        name = column
        while name in taken or name in names.values():
            name = f"eval_{name}"
        names[column] = name
    return names


def cell(value: Any) -> Cell:
    """Shows a value of a dataset in a table.

    Args:
        value: Anything.

    Returns:
        A string, number, truth value or None itself; else its JSON; else its ``str``. Numbers that JSON lacks, infinite
        ones and NaN, are shown by ``str`` as well.

    Example:
        >>> cell(3), cell(None), cell({"ä": [1]}), cell({1, 1}), cell(float("nan"))
        (3, None, '{"ä": [1]}', '{1}', 'nan')
    """
    if hasattr(value, "item") and getattr(value, "shape", None) == ():  # a scalar of NumPy or PyTorch
        value = value.item()
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real) and math.isfinite(value):
        return float(value)
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError):
        return str(value)


def rendered(content: str | list[dict[str, Any]], tokenizer: Any, chat_template: str | None = None) -> str:
    """Turns a prompt into text.

    Args:
        content: A string, which is text already, or a conversation.
        tokenizer: What renders conversations.
        chat_template: A template instead of its own.

    Returns:
        The text.
    """
    if isinstance(content, str):
        return content
    goes_on = content[-1]["role"] == "assistant"
    text: str = tokenizer.apply_chat_template(
        content,
        chat_template=chat_template,
        tokenize=False,
        add_generation_prompt=not goes_on,
        continue_final_message=goes_on,
    )
    return text


def encode(text: str, tokenizer: Any, *, is_rendered: bool, is_encoder_decoder: bool) -> list[int]:
    """Turns a prompt's text into tokens.

    Args:
        text: The text.
        tokenizer: The tokenizer.
        is_rendered: Whether a chat template made it. It has brought the special tokens that it wants.
        is_encoder_decoder: Whether the model is one, which reads to the end of a sequence.

    Returns:
        The token ids, at least one.

    Raises:
        ValueError: There are none, and the tokenizer has no token for the beginning or end of a sequence.
    """
    of_text = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    tokens = of_text if is_rendered else list(tokenizer(text)["input_ids"])
    beginning, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    if beginning is not None and len(tokens) > len(of_text) and tokens[:2] == [beginning] * 2:
        tokens = tokens[1:]
    if end is not None and not is_encoder_decoder and _trailing(end, tokens) > _trailing(end, of_text):
        tokens = tokens[:-1]
    if not tokens:
        tokens = [beginning if beginning is not None else end]
    if tokens == [None]:
        raise ValueError(
            f"the prompt {text!r} has no tokens, and the tokenizer has neither a bos_token nor an eos_token to begin "
            "with"
        )
    return tokens


def cut(text: str, tokens: list[int], room: float, tokenizer: Any) -> tuple[str, list[int]]:
    """Shortens a prompt that leaves no room for new tokens, from the left.

    Args:
        text: Its text.
        tokens: Its token ids.
        room: How many it may have.
        tokenizer: The tokenizer.

    Returns:
        Text and token ids; the text says how many are left out.
    """
    left_out = len(tokens) - int(min(room, len(tokens)))
    if left_out == 0:
        return text, tokens
    return f"[{left_out} tokens left out] {tokenizer.decode(tokens[left_out:])}", tokens[left_out:]


def _read_one(name: str, dataset: Any, num_prompts: int | None, names: Mapping[str, str]) -> list[Prompt]:
    dataset = _plain(dataset)
    if hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"):  # of which not all can be iterated over
        count = len(dataset) if num_prompts is None else min(num_prompts, len(dataset))
        rows = [dataset[number] for number in range(count)]
    elif isinstance(dataset, Iterable):
        rows = list(islice(dataset, num_prompts))
    else:
        raise ValueError(f"{name} is a {type(dataset).__name__}: it must be a dataset or another iterable of rows")
    if not rows:
        raise ValueError(f"{name} has no rows: it must have at least one prompt")
    return [_read_row(f"row {number} of {name}", row, names) for number, row in enumerate(rows)]


def _read_row(name: str, row: Any, names: Mapping[str, str]) -> Prompt:
    if not isinstance(row, Mapping):
        raise ValueError(f"{name} is {row!r:.80}: it must be a dict with a column 'prompt'")
    for column in ("prompt", *names):
        if column not in row:
            raise ValueError(f"{name} has no column {column!r}, only {list(row)}")
    content = row["prompt"]
    if not isinstance(content, str):
        if not _is_conversation(content):
            raise ValueError(f"{name} has the prompt {content!r:.80}: it must be a string or a list of messages")
        # A dataset gives every message the keys of all others, with None for what was not there.
        content = [{key: value for key, value in message.items() if value is not None} for message in content]
    return Prompt(content, {title: cell(row[column]) for column, title in names.items()})


def _is_conversation(content: Any) -> bool:
    return (
        isinstance(content, list | tuple)
        and len(content) > 0
        and all(isinstance(message, Mapping) and {"role", "content"} <= message.keys() for message in content)
        and all(message["role"] is not None for message in content)
    )


def _plain(dataset: Any) -> Any:
    """A dataset whose rows hold Python's own types. One whose rows a transform makes is left as it is."""
    if not hasattr(dataset, "with_format") or (hasattr(dataset, "format") and dataset.format["type"] == "custom"):
        return dataset
    return dataset.with_format(None)


def _trailing(token: int, tokens: list[int]) -> int:
    """How often a token stands at the end."""
    count = 0
    while count < len(tokens) and tokens[-1 - count] == token:
        count += 1
    return count
