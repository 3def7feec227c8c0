"""Sharded state inside a checkpoint: each rank writes what it owns, any number of ranks reads what it needs.

A directory of state holds one safetensors file per rank and `index.json`, which lists every piece: the file, the
range of elements, and a checksum. The index is written last and renamed into place, so a directory without one is a
torn write and is never read as state. Nothing is pickled.
"""

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from truestep.collectives import agree, exchange, rank, world_size
from truestep.disk import to_disk
from truestep.topology import Extent, Shard
from truestep.trainer_frames import variables_of_trainer

INDEX = "index.json"
FORMAT_VERSION = 1


class CheckpointError(RuntimeError):
    """State in a checkpoint cannot be used; the message names the file."""


def checkpoint_written(args: TrainingArguments, state: TrainerState) -> Path:
    """The directory of the checkpoint that the Trainer has just written."""
    assert args.output_dir is not None
    return Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")


def checkpoint_resumed(args: TrainingArguments, state: TrainerState) -> Path:
    """The directory of the checkpoint that the running training continues from.

    `Trainer.train(resume_from_checkpoint=…)` takes any path, and hands it to no callback. It is a local variable of
    the Trainer's loop that has called us, so it is looked up there: guessing `output_dir/checkpoint-N` would pick up
    another run's state. A loop of one's own is expected to keep its checkpoints there.
    """
    return named_checkpoint() or checkpoint_written(args, state)


def named_checkpoint() -> Path | None:
    """The checkpoint that the Trainer's loop that has called us was told to continue from; None if it was not."""
    for variables in variables_of_trainer():
        path = variables.get("resume_from_checkpoint")
        if isinstance(path, str | os.PathLike):
            return Path(os.path.abspath(path))  # noqa: PTH100 - which resolves "..", and no links
    return None


def save_state(
    directory: Path, shards: Mapping[str, Shard], tensors: Mapping[str, Mapping[str, Tensor]], metadata: dict[str, Any]
) -> None:
    """Write state, as a collective of all ranks.

    Args:
        directory: Where to; made inside the checkpoint if it does not exist. State that it held before is replaced.
        shards: Each parameter's shape and this rank's range.
        tensors: Parameter name → kind → this rank's elements, of shape `(owned.size,)`.
        metadata: What else the state consists of, as JSON.

    Raises:
        CheckpointError: On every rank, if any rank could not write; `directory` then holds no index.
    """
    index = directory / INDEX
    # The main process comes here once it has written the checkpoint, which other ranks need not have waited for.
    agree(lambda: _require_checkpoint(directory.parent) if rank() == 0 else None, CheckpointError)
    agree(lambda: _prepare(directory), CheckpointError)
    file = directory / f"rank-{rank():05d}-of-{world_size():05d}.safetensors"
    pieces = agree(lambda: _write_pieces(file, shards, tensors), CheckpointError)
    everyone = exchange(pieces)
    agree(lambda: _write_index(index, shards, everyone, metadata) if rank() == 0 else None, CheckpointError)


def discard_state(directory: Path) -> None:
    """Remove state that an earlier training has left in a checkpoint that was written again.

    Raises:
        CheckpointError: It cannot be removed.
    """
    try:
        for stale in (directory / INDEX, *directory.glob("rank-*.safetensors")):
            stale.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be written ({error})") from error


class SavedState:
    """State that `save_state` wrote, read piece by piece.

    Args:
        directory: The directory of the state.

    Attributes:
        index: The file that describes it.
        metadata: What was saved beside the tensors.
        parameters: Dtype and shape of each parameter, by name.

    Raises:
        CheckpointError: The index cannot be read, or was written in another format.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.index = directory / INDEX
        self._files: dict[Path, Any] = {}
        try:
            index = json.loads(self.index.read_text(encoding="utf-8"))
            version = index["format_version"]
            self.metadata: dict[str, Any] = index["metadata"]
            self.parameters = {name: (entry["dtype"], entry["shape"]) for name, entry in index["parameters"].items()}
            self._pieces = {name: entry["pieces"] for name, entry in index["parameters"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{self.index}: not a readable index ({error!r}); {self.advice}") from error
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{self.index}: format version {version!r}, this version reads {FORMAT_VERSION}; {self.advice}"
            )

    @classmethod
    def exists(cls, directory: Path) -> bool:
        """Whether `directory` holds state that was written to its end."""
        return (directory / INDEX).is_file()

    @property
    def advice(self) -> str:
        """What to do about state that cannot be used."""
        return f"restore it, or delete {self.directory} to start afresh at this step"

    def require_metadata(self, expected: Mapping[str, Any]) -> None:
        """Check what was saved beside the tensors.

        Raises:
            CheckpointError: It has another value for one of these keys.
        """
        for what, value in expected.items():
            if self.metadata.get(what) != value:
                raise CheckpointError(
                    f"{self.index}: it was saved with {what} {self.metadata.get(what)!r}, "
                    f"this training has {value!r}; {self.advice}"
                )

    def require_parameters(self, shards: Mapping[str, Shard]) -> None:
        """Check that the state is of these parameters.

        Raises:
            CheckpointError: Parameters are missing, unknown, or of another dtype or shape.
        """
        expected = {name: _described(shard) for name, shard in shards.items()}
        for name in [*expected, *self.parameters]:
            saved, wanted = self.parameters.get(name), expected.get(name)
            if saved != wanted:
                raise CheckpointError(
                    f"{self.index}: parameter {name!r} is {saved or 'absent'} there and {wanted or 'absent'} "
                    f"in this training; {self.advice}"
                )

    def read(self, name: str, kind: str, extent: Extent, destination: Tensor) -> None:
        """Fill a tensor with saved elements, from whichever files have them. No communication.

        Args:
            name: The parameter.
            kind: Which of its tensors.
            extent: The range of elements.
            destination: A tensor of shape `(extent.size,)` and the saved dtype, written to.

        Raises:
            CheckpointError: A file is missing or damaged, or elements or a kind are not in the state.
        """
        filled = torch.zeros(extent.size, dtype=torch.bool)
        for piece in self._pieces[name]:
            start, stop = max(piece["start"], extent.start), min(piece["stop"], extent.stop)
            if start < stop:
                values = self._read_piece(piece, name, kind, destination.dtype)
                mine = slice(start - extent.start, stop - extent.start)
                destination[mine] = values[start - piece["start"] : stop - piece["start"]]
                filled[mine] = True
        if not filled.all():
            raise CheckpointError(
                f"{self.index}: elements of {kind!r} of parameter {name!r} are missing; {self.advice}"
            )

    def _read_piece(self, piece: dict[str, Any], name: str, kind: str, dtype: torch.dtype) -> Tensor:
        path = self.directory / piece["file"]
        try:
            if path not in self._files:
                self._files[path] = safe_open(path, framework="pt")
            values: Tensor = self._files[path].get_tensor(_key(kind, name))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{path}: cannot read {kind!r} of parameter {name!r} ({error}); {self.advice}"
            ) from error
        if values.shape != (piece["stop"] - piece["start"],) or values.dtype != dtype:
            raise CheckpointError(
                f"{path}: {kind!r} of parameter {name!r} is {values.dtype} of shape {tuple(values.shape)}, expected "
                f"{dtype} of shape {(piece['stop'] - piece['start'],)}; {self.advice}"
            )
        if _checksum(values) != piece["crc32"].get(kind):
            raise CheckpointError(f"{path}: {kind!r} of parameter {name!r} has another checksum; {self.advice}")
        return values


def _require_checkpoint(directory: Path) -> None:
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: there is no checkpoint to add state to")


def _prepare(directory: Path) -> None:
    try:
        directory.mkdir(exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be written ({error})") from error
    discard_state(directory)


def _write_pieces(
    file: Path, shards: Mapping[str, Shard], tensors: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, dict[str, Any]]:
    """Write this rank's file, and describe its pieces as the index does."""
    contents: dict[str, Tensor] = {}
    pieces: dict[str, dict[str, Any]] = {}
    for name, kinds in tensors.items():
        owned = shards[name].owned
        if owned.size == 0:
            continue
        on_host = {kind: tensor.cpu() for kind, tensor in kinds.items()}
        contents |= {_key(kind, name): tensor for kind, tensor in on_host.items()}
        pieces[name] = {
            "file": file.name,
            "start": owned.start,
            "stop": owned.stop,
            "dtype": {kind: _name(tensor.dtype) for kind, tensor in on_host.items()},
            "crc32": {kind: _checksum(tensor) for kind, tensor in on_host.items()},
        }
    try:
        save_file(contents, file)
        to_disk(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: cannot be written ({error})") from error
    return pieces


def _write_index(
    index: Path, shards: Mapping[str, Shard], everyone: list[dict[str, dict[str, Any]]], metadata: dict[str, Any]
) -> None:
    parameters = {}
    for name, shard in shards.items():
        dtype, shape = _described(shard)
        pieces = [of_rank[name] for of_rank in everyone if name in of_rank]
        parameters[name] = {"dtype": dtype, "shape": shape, "pieces": pieces}
    contents = {"format_version": FORMAT_VERSION, "metadata": metadata, "parameters": parameters}
    temporary = index.with_suffix(".tmp")
    try:
        temporary.write_text(json.dumps(contents, indent=1), encoding="utf-8")
        to_disk(temporary)
        temporary.replace(index)
        to_disk(index.parent)
    except OSError as error:
        raise CheckpointError(f"{index}: cannot be written ({error})") from error


def _key(kind: str, name: str) -> str:
    return f"{kind}/{name}"


def _described(shard: Shard) -> tuple[str, list[int]]:
    """A parameter's dtype and shape as the index has them."""
    return _name(shard.parameter.dtype), list(shard.shape)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _checksum(values: Tensor) -> int:
    return zlib.crc32(values.contiguous().view(torch.uint8).numpy().data)
