"""`x.npy` + `y.npy`, or an `.npz` with both, read row by row from disk.

The rows are read rather than mapped: pages of a mapped file that were touched count as resident memory of the process,
and a whole epoch touches them all. Arrays in a compressed .npz cannot be read by row and are loaded whole, if they fit.
"""

from __future__ import annotations

import io
import struct
import threading
import tokenize
import zipfile
import zlib
from math import prod
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from edge_razor.data.source import Source
from edge_razor.errors import DataError
from edge_razor.manifest import Manifest
from edge_razor.regular_file import open_regular
from edge_razor.units import format_bytes
from edge_razor.zipped import open_zip, stored_member_start

__all__ = ["ArraySource", "find_arrays"]

_PAIRS = (("x", "y"), ("images", "labels"), ("inputs", "targets"))
_CHECK_ROWS = 65536
_HEADER_LIMIT = 65536  # bytes; numpy takes 10,000
# What numpy and zipfile raise for damaged files: RuntimeError for an encrypted member, TokenError, TypeError and the
# rest from a header that is Python text.
_DAMAGE = (
    OSError, ValueError, EOFError, zipfile.BadZipFile, NotImplementedError, SyntaxError, zlib.error, struct.error,
    OverflowError, RuntimeError, tokenize.TokenError, TypeError, KeyError,
)  # fmt: skip


class ArrayFile(NamedTuple):
    """Where an array is: an .npy file, or member `member` of the .npz at `path`."""

    path: Path
    member: str | None

    def __str__(self) -> str:
        return f"{self.path}:{self.member}" if self.member else str(self.path)


def find_arrays(root: Path) -> tuple[ArrayFile, ArrayFile] | None:
    """The inputs' and targets' files at `root`; None if `root` is no array file and no folder with a pair of them.

    Raises:
        DataError: one of the pair is missing, or an .npz is damaged or names its arrays in another way.
    """
    names = ", ".join(f"{x} and {y}" for x, y in _PAIRS)
    if root.suffix == ".npz" and root.is_file():
        try:
            with open_zip(root) as archive:
                members = set(archive.namelist())
        except _DAMAGE as error:
            raise DataError(f"{root}: is no whole .npz file: {error}") from error
        for x, y in _PAIRS:
            if {f"{x}.npy", f"{y}.npy"} <= members:
                return ArrayFile(root, f"{x}.npy"), ArrayFile(root, f"{y}.npy")
        raise DataError(f"{root}: needs the arrays {names}; has {', '.join(sorted(members)[:6])}")
    if root.suffix == ".npy" and root.is_file():
        for x, y in _PAIRS:
            if root.stem == x and (target := root.with_name(f"{y}.npy")).is_file():
                return ArrayFile(root, None), ArrayFile(target, None)
        raise DataError(f"{root}: needs its targets beside it: {names}, each .npy")
    if root.is_dir():
        for x, y in _PAIRS:
            files = root / f"{x}.npy", root / f"{y}.npy"
            present = [f for f in files if f.is_file()]
            if len(present) == 1:
                raise DataError(f"{present[0]}: the other file of the pair {x}.npy, {y}.npy is missing")
            if present:
                return ArrayFile(files[0], None), ArrayFile(files[1], None)
    return None


class _Rows:
    """An array read row by row. `loaded_bytes` is what it holds in memory."""

    def __init__(self, source: ArrayFile, limit: int | None) -> None:
        self.source = source
        self._lock = threading.Lock()
        self._file: io.FileIO | None = None
        self._loaded: np.ndarray | None = None
        self.loaded_bytes = 0
        try:
            if source.member is None:
                self._open_stored(0, source.path.stat().st_size)
            else:
                self._open_member(source.member, limit)
        except _DAMAGE as error:
            raise DataError(f"{source}: is no whole array file: {error}") from error
        if not self.shape or not self.shape[0]:
            raise DataError(f"{source}: holds no samples")

    def _open_member(self, member: str, limit: int | None) -> None:
        with open_zip(self.source.path) as archive:
            info = archive.getinfo(member)
            if info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 1:
                self._open_stored(stored_member_start(self.source.path, info), info.file_size)
                return
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError("it is compressed in another way than numpy's")  # others may want gigabytes to unpack
            if limit is not None and info.file_size > limit:
                raise DataError(
                    f"{self.source}: is compressed and unpacks to {format_bytes(info.file_size)}, more than the cap; "
                    "save it with np.savez, or as .npy, to have it read row by row"
                )
            with archive.open(info) as stream:
                self._read_header(stream)  # type: ignore[arg-type]
                if self.row_bytes * self.shape[0] > info.file_size:
                    raise ValueError("its size does not match its shape")
                self._loaded = np.empty(self.shape, self.dtype)
                view = self._loaded.reshape(-1).view(np.uint8).data
                position = 0
                while position < len(view) and (part := stream.read(min(1 << 20, len(view) - position))):
                    view[position : position + len(part)] = part
                    position += len(part)
                if position < len(view) or stream.read(1):
                    raise ValueError("its size does not match its shape")
        self.loaded_bytes = self._loaded.nbytes

    def _open_stored(self, start: int, size: int) -> None:
        self._file = open_regular(self.source.path)
        self._file.seek(start)
        self._read_header(self._file)
        self._start = self._file.tell()
        if self._start + self.row_bytes * self.shape[0] != start + size:
            raise ValueError("its size does not match its shape")

    def _read_header(self, file: BinaryIO) -> None:
        version = np.lib.format.read_magic(file)
        short = version == (1, 0)
        size = file.read(2 if short else 4)
        if int.from_bytes(size, "little") > _HEADER_LIMIT:  # numpy would make room for it first
            raise ValueError("its header is too long")
        header = io.BytesIO(size + file.read(int.from_bytes(size, "little")))
        read = np.lib.format.read_array_header_1_0 if short else np.lib.format.read_array_header_2_0
        shape, fortran, self.dtype = read(header)
        self.shape: tuple[int, ...] = tuple(shape)
        if self.dtype.hasobject or self.dtype.kind not in "fiub":
            raise ValueError(f"type {self.dtype} is not numeric")
        if fortran and len(self.shape) > 1:
            raise ValueError("it is in Fortran order; save np.ascontiguousarray of it")
        if not self.shape:
            raise ValueError("it is a single number")
        if any(type(n) is not int or not 0 <= n < 2**48 for n in self.shape):
            raise ValueError("its shape is impossible")
        self.row_bytes = self.dtype.itemsize * prod(self.shape[1:])

    def read(self, first: int, count: int = 1) -> np.ndarray:
        """Rows `first` … `first + count` − 1: a copy or a read-only view, [count, *row shape]."""
        if self._loaded is not None:
            return self._loaded[first : first + count]
        assert self._file is not None
        rows = np.empty((count, *self.shape[1:]), self.dtype)
        view = rows.reshape(-1).view(np.uint8).data
        with self._lock:
            self._file.seek(self._start + first * self.row_bytes)
            filled = 0
            while filled < len(view):
                part = self._file.readinto(view[filled:])
                if not part:
                    raise DataError(f"{self.source}: was truncated while it was read")
                filled += part
        return rows

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class ArraySource(Source):
    """Inputs and targets from a pair of arrays with one row a sample."""

    def __init__(
        self, inputs: ArrayFile, targets: ArrayFile, manifest: Manifest, memory_limit: int | None = None
    ) -> None:
        """Opens both and checks shapes, types and the range of every label.

        Raises:
            DataError: damaged, or not fitting the model.
        """
        super().__init__()
        self._x, self._y = _Rows(inputs, memory_limit), _Rows(targets, memory_limit)
        if self._x.shape[0] != self._y.shape[0]:
            raise DataError(f"{inputs} has {self._x.shape[0]} rows, {targets} {self._y.shape[0]}")
        spec = manifest.inputs[0]
        pixels = self._x.dtype == np.uint8
        if self._x.dtype.kind != "f" and not pixels:
            raise DataError(f"{inputs}: has type {self._x.dtype}; inputs must be float32 or uint8 pixels")
        row = self._x.shape[1:]
        shapes = [spec.shape, *([spec.runtime_shape] if pixels else [])]
        matching = [s for s in shapes if s == row] or [s for s in shapes if tuple(d for d in s if d > 1) == row]
        if not matching:
            hint = "; transpose it to channels-first" if row == spec.runtime_shape else ""
            raise DataError(f"{inputs}: rows have shape {list(row)}, the model needs {list(spec.shape)}{hint}")
        self.input_shape, self.input_dtype = matching[0], np.dtype(np.uint8 if pixels else np.float32)
        self.target_shape = manifest.target_shape
        self.target_dtype = np.dtype(np.int32 if manifest.class_count is not None else np.float32)
        self._check_targets(targets, manifest)
        self.work_bytes = self._x.loaded_bytes + self._y.loaded_bytes + self._x.row_bytes + self._y.row_bytes

    def __len__(self) -> int:
        return self._x.shape[0]

    def read(self, index: int, inputs: np.ndarray, targets: np.ndarray, random: int | None) -> bool:
        """See `Source.read`. Arrays are taken as they are: augmentation is for image folders."""
        inputs[...] = self._x.read(index)[0].reshape(self.input_shape)
        targets[...] = self._y.read(index)[0].reshape(self.target_shape)
        if self.input_dtype.kind == "f" and not np.isfinite(inputs.sum(dtype=np.float64)):
            raise DataError(f"{self._x.source}: row {index} holds NaN or infinity; clean the data")
        return True

    def _check_targets(self, targets: ArrayFile, manifest: Manifest) -> None:
        row = self._y.shape[1:]
        if row != self.target_shape and not (self.target_shape == () and row == (1,)):
            raise DataError(f"{targets}: rows have shape {list(row)}, {manifest.loss} needs {list(self.target_shape)}")
        classes = manifest.class_count
        if classes is not None and self._y.dtype.kind not in "iu":
            raise DataError(f"{targets}: has type {self._y.dtype}; class labels must be whole numbers")
        for first in range(0, len(self), _CHECK_ROWS):
            block = self._y.read(first, min(_CHECK_ROWS, len(self) - first))
            wrong = ~np.isfinite(block) if classes is None else (block < 0) | (block >= classes)
            if wrong.any():
                index = int(np.argmax(wrong.reshape(len(block), -1).any(axis=1)))
                value = block[wrong].flat[0]
                limit = "finite" if classes is None else f"0 to {classes - 1}"
                raise DataError(f"{targets}: row {first + index} holds {value}; targets must be {limit}")

    def close(self) -> None:
        self._x.close()
        self._y.close()
