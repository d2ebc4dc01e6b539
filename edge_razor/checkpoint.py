"""Checkpoints: one safetensors file, `checkpoint/checkpoint.safetensors` in the run directory.

It holds the trainable parameters (torch names, torch layout), the optimizer state (`optimizer/<slot>/<parameter>`) and,
as JSON in the header's metadata, step, data position, seed and hyperparameters. One file, because one rename then
replaces all of it: a crash leaves the old checkpoint or the new one, never a mixture. Tensors pass one at a time.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edge_razor.errors import CheckpointError, NonFiniteError
from edge_razor.tensors import TensorFile, TensorSpec, TensorWriter, replacing

__all__ = ["Checkpoint", "checkpoint_file", "write_checkpoint"]

FORMAT_VERSION = 1
_CHUNK = 1 << 20
_NO_CHECKSUM = "0" * 64


def checkpoint_file(path: str | os.PathLike[str]) -> Path:
    """The checkpoint's file, given the run directory, its `checkpoint` directory, or the file itself."""
    given = Path(path)
    for candidate in (given / "checkpoint" / "checkpoint.safetensors", given / "checkpoint.safetensors"):
        if candidate.is_file():
            return candidate
    return given if given.is_file() else given / "checkpoint" / "checkpoint.safetensors"


class _Digest:
    """A binary file that hashes what is written to it."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.sha256 = hashlib.sha256()

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        return self.file.write(data)


def write_checkpoint(
    file_path: Path, specs: Mapping[str, TensorSpec], read: Callable[[str], np.ndarray], state: Mapping[str, Any]
) -> None:
    """Writes `file_path` whole and durable, or leaves what was there.

    Args:
        file_path: the file; its directory is made if it is missing.
        specs: every tensor of the checkpoint; `read(name)` gives its value when its turn comes.
        state: JSON-able values that go into the header.

    Raises:
        NonFiniteError: a tensor holds NaN or infinity; the old checkpoint stays.
        OSError: the disk is full or not writable; the old checkpoint stays.
    """
    file_path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"format_version": str(FORMAT_VERSION), "sha256": _NO_CHECKSUM, "state": json.dumps(state)}
    with replacing(file_path) as file:
        digest = _Digest(file)
        writer = TensorWriter(digest, specs, metadata)  # type: ignore[arg-type]
        for name in specs:
            array = read(name)
            if not np.isfinite(array.sum(dtype=np.float64)):
                raise NonFiniteError(f"{name} holds NaN or infinite values; the checkpoint was not replaced")
            writer.write(name, array)
            del array  # before the next one is read: the plan counts one
        file.flush()
        position = _placeholder(file_path, file, writer.data_offset)
        file.seek(position)
        file.write(digest.sha256.hexdigest().encode())


def _placeholder(file_path: Path, file: Any, header_bytes: int) -> int:
    """Byte position of the checksum's zeros in the header that was just written."""
    with open(file.name, "rb") as written:
        header = written.read(header_bytes)
    return header.index(b'"sha256":"' + _NO_CHECKSUM.encode()) + len(b'"sha256":"')


class Checkpoint:
    """An opened and verified checkpoint.

    Attributes:
        path: its file.
        state: what `write_checkpoint` was given.
        tensors: name → spec.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Opens and verifies the checkpoint of a run directory (or a checkpoint directory or file).

        Raises:
            CheckpointError: missing, truncated, altered, or of a newer format version.
        """
        self.path = checkpoint_file(path)
        if not self.path.is_file():
            raise CheckpointError(f"{path}: there is no checkpoint; give the run directory that 'train --out' wrote")
        try:
            self._file = TensorFile(self.path)
        except (ValueError, OSError) as error:
            raise CheckpointError(f"{self.path}: {error}") from error
        try:
            metadata = self._file.metadata
            version = metadata.get("format_version", "")
            if not version.isdecimal():
                raise CheckpointError(f"{self.path}: is no edge-razor checkpoint")
            if int(version) > FORMAT_VERSION:
                raise CheckpointError(
                    f"{self.path}: format version {version} is newer than this edge-razor reads; upgrade it"
                )
            self._verify(metadata.get("sha256", ""))
            self.state: dict[str, Any] = json.loads(metadata.get("state", ""))
            if not isinstance(self.state, dict):
                raise ValueError("state is no table")
        except (ValueError, OSError) as error:
            self._file.close()
            raise CheckpointError(f"{self.path}: is damaged: {error}") from error
        except CheckpointError:
            self._file.close()
            raise
        self.tensors = self._file.tensors

    def read(self, name: str) -> np.ndarray:
        """A copy of one tensor."""
        try:
            return self._file.read(name)
        except KeyError:
            raise CheckpointError(f"{self.path}: has no tensor {name!r}; it belongs to another model") from None
        except (ValueError, OSError) as error:
            raise CheckpointError(f"{self.path}: {error}") from error

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _verify(self, stated: str) -> None:
        digest = hashlib.sha256()
        with open(self.path, "rb") as file:
            head = file.read(self._file.data_offset)
            # the checksum was taken with zeros in its own place
            digest.update(head.replace(stated.encode(), _NO_CHECKSUM.encode(), 1) if len(stated) == 64 else head)
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        if digest.hexdigest() != stated:
            raise CheckpointError(f"{self.path}: does not match its checksum; it is damaged")
