"""The table of completions on disk: one JSON object a line, appended to, never written again."""

import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from truestep.disk import to_disk

logger = logging.getLogger(__name__)

Cell = str | int | float | bool | None
Row = Mapping[str, Cell]


def read_rows(path: Path, after: int = 0) -> Iterator[dict[str, Any]]:
    r"""The rows of a table file, also of one that another process is writing to.

    A line ends at "\n" and nowhere else: text may have U+2028 and its like. What is no JSON object with a step, such
    as a line that is not written to its end yet, is passed over.

    Args:
        path: The file.
        after: Rows of steps up to this one are left out.

    Raises:
        OSError: The file cannot be read.
    """
    with path.open("rb") as file:
        for row, _ in _rows_and_ends(file):
            if row["step"] > after:
                yield row


class CompletionsFile:
    """The table of one training, which only grows; steps only grow in it.

    Args:
        path: The file; `name.jsonl`. Directories above it are made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pending: list[Row] = []
        self._torn_at: int | None = None
        self._unbegun: tuple[int, Path | None] | None = None

    def begin(self, step: int, earlier: Path | None = None) -> None:
        """Have the table as it was after a step: what a training begins with.

        Args:
            step: 0 begins anew: a file that is there gets another name, `name.1.jsonl` or the next free number.
                Otherwise the step of the checkpoint. Rows of later steps are cut off, as is a line that was torn.
            earlier: The file of the training that the checkpoint is from, where that is another one. Its rows up to
                the step are copied, unless the file has them already.

        Raises:
            OSError: The file cannot be read or written. The next `append` tries again.
        """
        self._unbegun = (step, earlier)
        self._pending = [row for row in self._pending if _step(row) <= step]
        self._torn_at = None
        self._begin(step, earlier)

    def append(self, rows: Sequence[Row]) -> None:
        """Write rows, and those that could not be written before. They are on disk when this returns.

        Raises:
            OSError: They cannot be written. They are kept, and no part of them is left in the file.
        """
        self._pending.extend(rows)
        if self._unbegun is not None:
            self._begin(*self._unbegun)
        if not self._pending:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not self.path.exists()
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            if self._torn_at is not None:
                os.ftruncate(descriptor, self._torn_at)
            self._torn_at = os.fstat(descriptor).st_size
            try:
                _write(descriptor, b"".join(map(_line, self._pending)))
                os.fsync(descriptor)
            except BaseException:
                with suppress(OSError):  # the next call tries again
                    os.ftruncate(descriptor, self._torn_at)
                    self._torn_at = None
                raise
        finally:
            os.close(descriptor)
        self._torn_at = None
        self._pending = []
        if is_new:
            to_disk(self.path.parent)

    def rows(self, after: int = 0) -> Iterator[dict[str, Any]]:
        """All rows of later steps than `after`, in order, with those that could not be written yet."""
        # What lies there before a `begin` that failed is not this training's.
        if self._unbegun is None and self.path.is_file():
            yield from read_rows(self.path, after)
        yield from (dict(row) for row in self._pending if _step(row) > after)

    def _begin(self, step: int, earlier: Path | None) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if step == 0:
            self._set_aside()
        else:
            if earlier is not None and earlier.is_file() and not _is_same(earlier, self.path):
                self._take_over(earlier, step)
            if self.path.is_file():
                _cut(self.path, _end_of(self.path, step))
        self._unbegun = None

    def _set_aside(self) -> None:
        """Give a file that is there another name, without writing over one."""
        if not self.path.exists():
            return
        number = 1
        while (other := self.path.with_suffix(f".{number}{self.path.suffix}")).exists():
            number += 1
        self.path.rename(other)
        to_disk(self.path.parent)
        logger.info("%s holds the table that was in %s", other, self.path)

    def _take_over(self, earlier: Path, step: int) -> None:
        """Begin with the rows of another file.

        A training that was killed before its first checkpoint is resumed from the other's again: then they are here,
        and rows of later steps follow. A table with other rows is of another training, and is kept aside.
        """
        end = _end_of(earlier, step)
        if self.path.exists() and _is_prefix(earlier, end, self.path, _end_of(self.path, step)):
            return
        self._set_aside()
        copy = self.path.with_name(f"{self.path.name}.tmp")
        shutil.copyfile(earlier, copy)
        _cut(copy, end)
        copy.replace(self.path)
        to_disk(self.path.parent)


def _rows_and_ends(file: IO[bytes]) -> Iterator[tuple[dict[str, Any], int]]:
    """Whole rows, each with the byte at which its line ends. Iterating over a binary file splits at newlines only."""
    end = 0
    for line in file:
        end += len(line)
        if not line.endswith(b"\n"):
            return
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            yield row, end


def _end_of(path: Path, step: int) -> int:
    """The byte at which the rows up to a step end."""
    last = 0
    with path.open("rb") as file:
        for row, end in _rows_and_ends(file):
            if row["step"] > step:
                break
            last = end
    return last


def _step(row: Row) -> int:
    step = row["step"]
    assert isinstance(step, int)
    return step


def _is_same(one: Path, other: Path) -> bool:
    return other.exists() and one.samefile(other)


def _is_prefix(one: Path, one_end: int, other: Path, other_end: int) -> bool:
    """Whether two files are equal up to where their rows end."""
    if one_end != other_end:
        return False
    with one.open("rb") as first, other.open("rb") as second:
        return all(
            first.read(size) == second.read(size)
            for size in (min(1 << 20, one_end - start) for start in range(0, one_end, 1 << 20))
        )


def _line(row: Row) -> bytes:
    # Text is written as it is, except for half of a surrogate pair. UTF-8 has no bytes for that; the escape `\udXXX`,
    # which takes its place, JSON reads as the same.
    return (json.dumps(dict(row), ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def _write(descriptor: int, contents: bytes) -> None:
    """Write all of it: a disk that gets full takes a part."""
    rest = memoryview(contents)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _cut(path: Path, end: int) -> None:
    if path.stat().st_size > end:
        os.truncate(path, end)
    to_disk(path)


def columns_of(rows: Iterable[Row]) -> list[str]:
    """The columns of rows, in the order in which they come up."""
    return list(dict.fromkeys(column for row in rows for column in row))
