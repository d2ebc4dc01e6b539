"""Checkpoints (docs/checkpoints.md): safetensors files `checkpoint/checkpoint-<update>.safetensors` in a run directory.

A file holds the trainable parameters (torch names, torch layout), the optimizer state (`optimizer/<slot>/<parameter>`)
and, as JSON in the header's metadata, step, data position and settings, and a checksum of each tensor and of the
header. A new checkpoint is a new file, and older ones go only after it is durable: whatever happens, one is whole.
Tensors pass through a buffer of fixed size, both ways.
"""

from __future__ import annotations

import errno
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from edge_razor.errors import CheckpointError, NonFiniteError
from edge_razor.tensors import TensorFile, TensorSpec, TensorWriter, make_directory, remove_leftovers, replacing

__all__ = ["BUFFER_BYTES", "Checkpoint", "checkpoint_files", "write_checkpoint"]

FORMAT_VERSION = 2
BUFFER_BYTES = 1 << 18  # what writing or reading a checkpoint of any size takes; larger is no faster
_FILE = re.compile(r"checkpoint-(\d+)\.safetensors")
_NO_CHECKSUM = "0" * 8


def checkpoint_files(path: str | os.PathLike[str]) -> list[Path]:
    """The checkpoints in a run directory or its `checkpoint` directory, newest first; a file is itself the only one."""
    given = Path(path)
    if given.is_file():
        return [given]
    for directory in (given / "checkpoint", given):
        if files := _numbered(directory):
            return [files[update] for update in sorted(files, reverse=True)]
    return []


def _numbered(directory: Path) -> dict[int, Path]:
    if not directory.is_dir():
        return {}
    matches = ((_FILE.fullmatch(file.name), file) for file in directory.iterdir())
    return {int(match[1]): file for match, file in matches if match is not None and file.is_file()}


def write_checkpoint(
    directory: Path,
    update: int,
    specs: Mapping[str, TensorSpec],
    parts: Callable[[str], Iterable[np.ndarray]],
    state: Mapping[str, Any],
    *,
    keep: int = 1,
    damaged: Iterable[Path] = (),
) -> Path:
    """Writes the checkpoint of an update whole and durable, or leaves what was there; then older ones make room.

    If the disk is full, damaged ones and all but the newest whole one make room at once.

    Args:
        directory: where it goes; made if it is missing. Nobody else may be writing there (`edge_razor.run_lock`).
        update: of which it is; files of later updates, which a run that was taken back left, are removed.
        specs: every tensor of the checkpoint, float32; `parts(name)` gives its elements in order.
        state: JSON-able values that go into the header.
        keep: how many checkpoints stay, this one included, at least 1.
        damaged: files to remove because they are known not to be whole.

    Returns:
        the file.

    Raises:
        NonFiniteError: a tensor holds NaN or infinity; the old checkpoints stay.
        OSError: the disk is full or not writable; the newest old checkpoint stays.
    """
    damaged = set(damaged)
    make_directory(directory)
    remove_leftovers(directory)
    target = directory / f"checkpoint-{update:08}.safetensors"
    try:
        _write(target, specs, parts, state)
    except OSError as error:
        there = _numbered(directory)
        whole = [number for number in sorted(there) if number <= update and there[number] not in damaged]
        # also when this update was saved before: that file is the newest, and stays until it is replaced
        room = [file for number, file in there.items() if number in whole[:-1] or file in damaged]
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not room:
            raise
        for file in room:
            file.unlink()
        _write(target, specs, parts, state)
    damaged.discard(target)  # a whole one has taken its place
    files = _numbered(directory)
    stay = sorted(number for number in files if number <= update and files[number] not in damaged)[-keep:]
    for number, file in files.items():
        if number not in stay:
            with suppress(OSError):  # the next one tries again
                file.unlink()
    return target


def _write(
    target: Path,
    specs: Mapping[str, TensorSpec],
    parts: Callable[[str], Iterable[np.ndarray]],
    state: Mapping[str, Any],
) -> None:
    checksums = dict.fromkeys(specs, _NO_CHECKSUM)

    def checked(name: str) -> Iterator[np.ndarray]:
        checksum = 0
        for part in parts(name):
            # A float64 sum of float32 values cannot overflow, so it is finite exactly if every value is.
            if not np.isfinite(part.sum(dtype=np.float64)):
                raise NonFiniteError(f"{name} holds NaN or infinite values; no checkpoint was written")
            checksum = zlib.crc32(part.data, checksum)
            yield part
        checksums[name] = f"{checksum:08x}"

    def metadata(header_checksum: str) -> dict[str, str]:
        return {
            "format_version": str(FORMAT_VERSION),
            "crc32": header_checksum,
            "checksums": json.dumps(checksums, separators=(",", ":")),
            "state": json.dumps(state),
        }

    with replacing(target) as file:
        writer = TensorWriter(file, specs, metadata(_NO_CHECKSUM))
        for name in specs:
            writer.write_parts(name, checked(name))
        header = writer.header(metadata(_NO_CHECKSUM))
        file.seek(0)
        file.write(writer.header(metadata(f"{zlib.crc32(header):08x}")))  # as long as the first: sums have 8 digits


class Checkpoint:
    """An opened and verified checkpoint: the newest that is whole.

    Attributes:
        path: its file.
        state: what `write_checkpoint` was given.
        tensors: name → spec.
        damaged: newer files that are not whole → what is wrong.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Opens and verifies the newest whole checkpoint of a run directory (or checkpoint directory, or a file).

        Raises:
            CheckpointError: missing, of a newer format version, or none is whole; then the newest one's error.
        """
        self.damaged: dict[Path, str] = {}
        error: CheckpointError | None = None
        for file in checkpoint_files(path):
            try:
                self._open(file)
                return
            except CheckpointError as found:
                self.damaged[file] = str(found)
                error = error or found
        if error is None:
            raise CheckpointError(f"{path}: there is no checkpoint; give the run directory that 'train --out' wrote")
        raise error

    def _open(self, path: Path) -> None:
        self.path = path
        try:
            self._file = TensorFile(path)
        except ValueError as error:
            raise CheckpointError(f"{path}: is damaged: {error}") from error
        except OSError as error:
            raise CheckpointError(f"{path}: {error}") from error
        try:
            metadata = self._file.metadata
            version = metadata.get("format_version", "")
            if not version.isdecimal():
                raise CheckpointError(f"{path}: is no edge-razor checkpoint")
            if int(version) != FORMAT_VERSION:
                remedy = "upgrade it" if int(version) > FORMAT_VERSION else "use the edge-razor that wrote it"
                raise CheckpointError(
                    f"{path}: has format version {version}, this edge-razor reads {FORMAT_VERSION}; {remedy}"
                )
            self._verify_header(metadata.get("crc32", ""))
            checksums = json.loads(metadata.get("checksums", ""))
            self.state: dict[str, Any] = json.loads(metadata.get("state", ""))
            if not isinstance(self.state, dict) or not isinstance(checksums, dict):
                raise ValueError("state or checksums are no table")
            for name in self._file.tensors:
                self._verify(name, checksums.get(name))
        except (ValueError, OSError, RecursionError) as error:
            self._file.close()
            raise CheckpointError(f"{path}: is damaged: {error}") from error
        except CheckpointError:
            self._file.close()
            raise
        self.tensors = self._file.tensors

    def read(self, name: str) -> np.ndarray:
        """A copy of one tensor.

        Raises:
            CheckpointError: there is no such tensor, or the file was altered since it was opened.
        """
        with self._errors(name):
            return self._file.read(name)

    def spec(self, name: str) -> TensorSpec:
        """
        Raises:
            CheckpointError: there is no such tensor.
        """
        with self._errors(name):
            return self.tensors[name]

    def parts(self, name: str) -> Iterator[np.ndarray]:
        """One tensor part by part, float32; each holds until the next is asked for.

        Raises:
            CheckpointError: as `read`.
        """
        with self._errors(name):
            yield from self._file.parts(name, np.empty(BUFFER_BYTES, np.uint8))

    @contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        if name not in self.tensors:
            raise CheckpointError(f"{self.path}: has no tensor {name!r}; it belongs to another model")
        try:
            yield
        except (ValueError, OSError) as error:
            raise CheckpointError(f"{self.path}: {error}") from error

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _verify_header(self, stated: str) -> None:
        header = self._file.header()
        # the checksum was taken with zeros in its own place
        field = b'"crc32":"%s"'
        zeroed = header.replace(field % stated.encode(), field % _NO_CHECKSUM.encode(), 1)
        if len(stated) != 8 or f"{zlib.crc32(zeroed):08x}" != stated:
            raise ValueError("its header does not match its checksum")

    def _verify(self, name: str, stated: object) -> None:
        checksum = 0
        for part in self._file.parts(name, np.empty(BUFFER_BYTES, np.uint8)):
            if part.dtype != np.float32:
                raise ValueError(f"tensor {name!r} is {part.dtype}, not float32")
            checksum = zlib.crc32(part.data, checksum)
        if f"{checksum:08x}" != stated:
            raise ValueError(f"tensor {name!r} does not match its checksum")
