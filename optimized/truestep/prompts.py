"""The prompts of an evaluation dataset, and how a tokenizer sees them."""

import copy
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from numbers import Integral, Real
from typing import Any

from truestep.arguments import require_integer
from truestep.completions_file import Cell

PROMPT = "prompt"
OWN_COLUMNS = ("step", PROMPT, "completion")
DATASET = "dataset"
"""The column that says which of several datasets a prompt is from."""


@dataclass(frozen=True)
class PromptRow:
    """A prompt as its dataset has it.

    Attributes:
        prompt: A string, or a conversation: a list of messages.
        cells: The further cells of the rows of this prompt.
    """

    prompt: str | list[dict[str, Any]]
    cells: dict[str, Cell]


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model sees it.

    Attributes:
        index: Its number among all prompts, from 0.
        text: The text that rows show.
        tokens: Its token ids, at least one.
        cells: The further cells of its rows.
    """

    index: int
    text: str
    tokens: tuple[int, ...]
    cells: dict[str, Cell]


def read_prompts(
    dataset: Any, num_prompts: int | None, columns: Sequence[str] = (), name: str = "trainer.eval_dataset"
) -> list[PromptRow]:
    """Take the prompts out of an evaluation dataset.

    Args:
        dataset: A `Dataset`, another iterable of rows, or a dict of such.
        num_prompts: How many are taken from the beginning of each dataset; None: all.
        columns: Further columns whose cells go along.
        name: What errors call the dataset.

    Returns:
        The prompts in the order of the dataset, or datasets; at least one, and fewer than asked for where there are
        no more.

    Raises:
        ValueError: There is no dataset, a column is missing or a prompt is something else, there are no rows, or
            `num_prompts` is no integer of at least 1.
    """
    if num_prompts is not None:
        require_integer("num_prompts", num_prompts, 1)
    if dataset is None:
        raise ValueError(f"{name} is None: give the trainer an evaluation dataset with a column 'prompt'")
    if not isinstance(dataset, Mapping):
        return _read(dataset, name, num_prompts, _titles(columns, OWN_COLUMNS), {})
    titles = _titles(columns, (*OWN_COLUMNS, DATASET))
    rows = []
    for key, part in dataset.items():
        rows += _read(part, f"{name}[{key!r}]", num_prompts, titles, {DATASET: str(key)})
    if not rows:
        raise ValueError(f"{name} is a dict without datasets")
    return rows


class Encoder:
    """Encodes prompts and decodes completions as a trainer's tokenizer does, and leaves that tokenizer alone.

    Args:
        processing_class: The tokenizer, or a processor that has one.

    Raises:
        ValueError: There is no tokenizer.
    """

    def __init__(self, processing_class: Any) -> None:
        if processing_class is None:
            raise ValueError("trainer.processing_class is None: give the trainer the tokenizer of its model")
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        if not callable(tokenizer) or not hasattr(tokenizer, "decode"):
            raise ValueError(
                f"trainer.processing_class={type(processing_class).__name__}: neither a tokenizer, nor a processor "
                "that has one"
            )
        # A call leaves settings of truncation and padding behind, which would be saved with the next checkpoint.
        self._tokenizer = copy.deepcopy(tokenizer)
        self._template_of = processing_class if getattr(processing_class, "chat_template", None) else self._tokenizer

    @property
    def tokenizer(self) -> Any:
        """A copy of the tokenizer."""
        return self._tokenizer

    @property
    def longest(self) -> int | None:
        """The tokenizer's own limit of tokens in a text, if it has one."""
        length = getattr(self._tokenizer, "model_max_length", None)
        return length if length is not None and length < 1e9 else None  # it has 1e30 where it has none

    def require_template(self, rows: Iterable[PromptRow]) -> None:
        """Check that conversations among some prompts can be rendered.

        Raises:
            ValueError: They cannot.
        """
        if any(not isinstance(row.prompt, str) for row in rows) and not getattr(
            self._template_of, "chat_template", None
        ):
            raise ValueError(
                "trainer.eval_dataset has conversations as prompts, and trainer.processing_class no chat_template: "
                "set one, or render the prompts"
            )

    def encode(self, row: PromptRow, index: int, room: int | None, *, keeps_end: bool) -> Prompt:
        """Encode one prompt.

        Args:
            row: The prompt.
            index: Its number.
            room: How many tokens it may have; None: any number.
            keeps_end: Whether it may end with the end-of-sequence token that the tokenizer adds.

        Raises:
            ValueError: It has no tokens, and the tokenizer none to begin with.
        """
        text = row.prompt if isinstance(row.prompt, str) else self._render(row.prompt)
        tokens = self._tokens(text, is_rendered=text is not row.prompt, keeps_end=keeps_end)
        if room is not None and len(tokens) > room:
            left_out = len(tokens) - room
            tokens = tokens[left_out:]
            text = f"[{left_out} tokens left out] {self._tokenizer.decode(tokens)}"
        return Prompt(index, text, tuple(tokens), row.cells)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of generated tokens, without special ones."""
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def _render(self, conversation: list[dict[str, Any]]) -> str:
        goes_on = conversation[-1]["role"] == "assistant"
        text: str = self._template_of.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=not goes_on, continue_final_message=goes_on
        )
        return text

    def _tokens(self, text: str, *, is_rendered: bool, keeps_end: bool) -> list[int]:
        tokenizer = self._tokenizer
        own: list[int] = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        tokens = own if is_rendered else list(tokenizer(text, verbose=False)["input_ids"])
        first, last = tokenizer.bos_token_id, tokenizer.eos_token_id
        # Only what the tokenizer has added is taken away: a text may have such tokens itself, also several.
        if first is not None and own[:1] == [first] and tokens[: len(own) + 1] == [first, *own]:
            tokens = tokens[1:]
        if not keeps_end and last is not None and len(tokens) > len(own) and tokens[-len(own) - 1 :] == [*own, last]:
            tokens = tokens[:-1]
        if not tokens:
            start = last if first is None else first
            if start is None:
                raise ValueError(
                    f"a prompt has no tokens ({text!r}), and the tokenizer neither a beginning- nor an end-of-sequence "
                    "token to begin with"
                )
            tokens = [start]
        return tokens


def _read(
    dataset: Any, name: str, num_prompts: int | None, titles: Mapping[str, str], cells: dict[str, Cell]
) -> list[PromptRow]:
    rows = [
        PromptRow(
            _prompt(row, f"{name}, row {number}"),
            cells | {title: _cell(_value(row, column, name)) for column, title in titles.items()},
        )
        for number, row in enumerate(_rows(dataset, name, num_prompts, [PROMPT, *titles]))
    ]
    if not rows:
        raise ValueError(f"{name} has no rows: it needs at least one prompt")
    return rows


def _rows(dataset: Any, name: str, number: int | None, columns: Sequence[str]) -> Iterable[Any]:
    present = getattr(dataset, "column_names", None)
    if hasattr(dataset, "with_format"):
        if getattr(dataset, "format", {}).get("type") == "custom":  # a transform, which may make the columns
            present = None
        else:
            dataset = dataset.with_format(None)  # prompts and cells are no arrays or tensors
    if isinstance(present, list):  # an IterableDataset of datasets need not know its columns
        for column in columns:
            if column not in present:
                raise ValueError(f"{name} has no column {column!r}, only {', '.join(map(repr, present)) or 'none'}")
        dataset = dataset.select_columns(list(dict.fromkeys(columns)))  # to decode no images for nothing
    if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
        size = len(dataset) if number is None else min(number, len(dataset))
        return (dataset[index] for index in range(size))
    try:
        return islice(iter(dataset), number)
    except TypeError as error:
        raise ValueError(f"{name}={type(dataset).__name__}: neither a dataset nor an iterable of rows") from error


def _value(row: Any, column: str, name: str) -> Any:
    if not isinstance(row, Mapping) or column not in row:
        found = ", ".join(map(repr, row)) if isinstance(row, Mapping) else f"rows of type {type(row).__name__}"
        raise ValueError(f"{name} has no column {column!r}, only {found or 'none'}")
    return row[column]


def _prompt(row: Any, name: str) -> str | list[dict[str, Any]]:
    prompt = _value(row, PROMPT, name)
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list | tuple) and prompt and all(_is_message(message) for message in prompt):
        # Arrow fills in None for what only other messages have.
        return [{key: value for key, value in message.items() if value is not None} for message in prompt]
    raise ValueError(
        f"{name}: its prompt is {prompt!r:.80}, neither a string nor a list of messages with 'role' and 'content'"
    )


def _is_message(value: object) -> bool:
    return isinstance(value, Mapping) and value.get("role") is not None and "content" in value


def _titles(columns: Sequence[str], taken: Sequence[str]) -> dict[str, str]:
    """What further columns are called in the table."""
    if isinstance(columns, str):
        raise ValueError(f"columns={columns!r}: must be a sequence of names, such as ({columns!r},)")
    titles: dict[str, str] = {}
    for column in dict.fromkeys(columns):
        title = column
        while title in taken or title in titles.values():
            title = f"eval_{title}"
        titles[column] = title
    return titles


def _cell(value: Any) -> Cell:
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()  # of NumPy or PyTorch
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else str(value)  # JSON has no other numbers
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError):
        return str(value)
