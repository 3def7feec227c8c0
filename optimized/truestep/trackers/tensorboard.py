"""TensorBoard: a Markdown table for each step."""

import itertools
import json
import re
from collections.abc import Sequence
from typing import Any

from truestep.completions_file import Cell, Row

# What Markdown or HTML would take for markup, control characters, and halves of surrogate pairs, which UTF-8 has no
# bytes for. A number in the place of a character has no meaning to either.
_MARKUP = re.compile(r"[\\`*_\[\]<>&|~\x00-\x1f\x7f\ud800-\udfff]")
_BLANKS = re.compile(r"^ +| +$|(?<= ) +")


class TensorBoardTracker:
    """The table as texts, each with the rows of one step, in the event file that the Trainer's callback writes.

    Args:
        trainer: Its `TensorBoardCallback` has the writer.
    """

    def __init__(self, trainer: Any) -> None:
        self.memory: Any = None
        self._trainer = trainer

    def run(self) -> str:
        """The directory of the event files."""
        writer = self._writer()
        return str(
            writer.get_logdir() if hasattr(writer, "get_logdir") else writer.logdir
        )  # PyTorch's, or tensorboardX's

    def log(self, table: str, columns: Sequence[str], rows: Sequence[Row]) -> None:
        """Add a text for each step."""
        writer = self._writer()
        for step, group in itertools.groupby(rows, key=lambda row: row["step"]):
            writer.add_text(table, _markdown(columns, list(group)), global_step=step)
        writer.flush()

    def _writer(self) -> Any:
        for callback in self._trainer.callback_handler.callbacks:
            if getattr(callback, "tb_writer", None) is not None:
                return callback.tb_writer
        raise RuntimeError("no callback of the trainer has a SummaryWriter (`tb_writer`)")


def _markdown(columns: Sequence[str], rows: Sequence[Row]) -> str:
    lines = [
        [_literal(column) for column in columns],
        ["---"] * len(columns),
        *([_cell(row.get(column)) for column in columns] for row in rows),
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(cell: Cell) -> str:
    """A cell from which the value can be had again: JSON where it is no text, and text never looks like that."""
    if not isinstance(cell, str):
        return json.dumps(cell)
    text = _literal(cell)
    try:
        json.loads(text)
    except ValueError:
        return text
    return f"&#{ord(text[0])};{text[1:]}"


def _literal(text: str) -> str:
    """Markdown that shows text as it is: its line breaks, and blanks where Markdown or HTML would drop them, too."""
    text = _MARKUP.sub(lambda found: "<br>" if found[0] == "\n" else f"&#{ord(found[0])};", text)
    return _BLANKS.sub(lambda found: "&nbsp;" * len(found[0]), text)
