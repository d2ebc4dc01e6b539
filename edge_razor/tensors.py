"""Safetensors files read and written one tensor at a time.

The `safetensors` package maps a file to read it (touched pages then count as resident memory) and wants every tensor in
memory to write it. Under a cap on resident memory one tensor at a time is all there is room for; the format is simple:
u64 header length, JSON header (name → dtype, shape, [begin, end] relative to the data), data without holes.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from edge_razor.regular_file import open_regular

__all__ = [
    "TensorFile",
    "TensorSpec",
    "TensorWriter",
    "make_directory",
    "remove_leftovers",
    "replacing",
    "sync_directory",
]

_HEADER_LIMIT = 16 << 20  # bytes, as in the runtime: 100,000 tensors
_MAX_ELEMENTS = 1 << 46  # of a tensor, even if another dimension of it is 0
_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What the header says of a tensor; `begin`, `end` are bytes from the start of the data section."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    begin: int = 0
    end: int = 0


class TensorFile:
    """A safetensors file, or one that lies stored inside a zip, open for reading.

    Attributes:
        tensors: name → spec, in the order of the data.
        metadata: the header's free text entries.
        data_offset: bytes from the start of the safetensors file to its data section.
    """

    def __init__(self, path: Path, start: int = 0, size: int | None = None) -> None:
        """Reads the header; `start`, `size`: where the safetensors data lie in `path` (bytes).

        Raises:
            ValueError: not a whole safetensors file; the message says what is wrong.
            OSError: the file cannot be read.
        """
        self.path = path
        # Unbuffered: no hidden copy of the data. The descriptor lives as long as the object.
        self._file = open_regular(path)
        try:
            size = os.fstat(self._file.fileno()).st_size - start if size is None else size
            self._file.seek(start)
            head = _read_exactly(self._file, 8) if size >= 8 else b""
            length = int.from_bytes(head, "little")
            if len(head) < 8 or not 2 <= length <= min(_HEADER_LIMIT, size - 8):
                raise ValueError("truncated or not a safetensors file")
            self.tensors, self.metadata = _parse_header(_read_exactly(self._file, length), size - 8 - length)
            self.data_offset = 8 + length
            self._data_start = start + self.data_offset
        except BaseException:
            self._file.close()
            raise

    def read(self, name: str) -> np.ndarray:
        """A copy of tensor `name`.

        Raises:
            KeyError: no such tensor.
            ValueError: the file was truncated since it was opened.
        """
        spec = self.tensors[name]
        array = np.empty(spec.shape, spec.dtype)
        self._file.seek(self._data_start + spec.begin)
        _fill(self._file, array.reshape(-1).view(np.uint8).data, name)
        return array

    def parts(self, name: str, buffer: np.ndarray) -> Iterator[np.ndarray]:
        """Tensor `name` part by part, in the file's order.

        Args:
            buffer: uint8 [n], n a multiple of the element's size. What is yielded lies in it, as the tensor's type, and
                holds until the next part is asked for.

        Raises:
            KeyError, ValueError: as `read`.
        """
        spec = self.tensors[name]
        for position in range(spec.begin, spec.end, buffer.size):
            part = buffer[: min(buffer.size, spec.end - position)]
            self._file.seek(self._data_start + position)
            _fill(self._file, part.data, name)
            yield part.view(spec.dtype)

    def header(self) -> bytes:
        """The bytes of the file before its data section.

        Raises:
            ValueError: the file was truncated since it was opened.
        """
        self._file.seek(self._data_start - self.data_offset)
        return _read_exactly(self._file, self.data_offset)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _fill(file: io.FileIO, view: memoryview, name: str) -> None:
    filled = 0
    while filled < len(view):
        count = file.readinto(view[filled:])
        if not count:
            raise ValueError(f"truncated in tensor {name!r}")
        filled += count


def _read_exactly(file: BinaryIO, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        part = file.read(count - len(data))
        if not part:
            raise ValueError("truncated")
        data += part
    return bytes(data)


def _parse_header(text: bytes, data_bytes: int) -> tuple[dict[str, TensorSpec], dict[str, str]]:
    """Checks what the format demands: known dtypes, sizes that match, no holes and no overlaps."""
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise ValueError("header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("header metadata is not a table of texts")
    tensors: dict[str, TensorSpec] = {}
    for name, entry in header.items():
        try:
            dtype = _DTYPES[entry["dtype"]]
            shape = tuple(entry["shape"])
            begin, end = entry["data_offsets"]
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"header entry of tensor {name!r} is damaged or of an unsupported type") from error
        whole = len(shape) <= 32 and all(type(n) is int and n >= 0 for n in (*shape, begin, end))
        if not whole or prod(max(n, 1) for n in shape) > _MAX_ELEMENTS:
            raise ValueError(f"tensor {name!r} has an impossible shape or offset")
        if end - begin != prod(shape) * dtype.itemsize:
            raise ValueError(f"tensor {name!r} does not have the size that its shape needs")
        tensors[name] = TensorSpec(dtype, shape, begin, end)
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)))
    position = 0
    for name, spec in ordered.items():
        if spec.begin != position:
            raise ValueError(f"tensor {name!r} overlaps another or leaves a hole")
        position = spec.end
    if position != data_bytes:
        raise ValueError(f"has {data_bytes} bytes of data where its header needs {position}")
    return ordered, metadata


def _little_endian(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return dtype.newbyteorder("<")


class TensorWriter:
    """Writes a safetensors file whose header is known before its data.

    Attributes:
        specs: name → spec with offsets, in the order in which `write` must be called.
        data_offset: bytes before the data section.
    """

    def __init__(self, file: BinaryIO, tensors: Mapping[str, TensorSpec], metadata: Mapping[str, str] | None = None):
        self.specs: dict[str, TensorSpec] = {}
        position = 0
        for name, spec in tensors.items():
            dtype = _little_endian(spec.dtype)
            if dtype not in _NAMES:
                raise ValueError(f"tensor {name!r}: safetensors has no type for {spec.dtype}")
            end = position + prod(spec.shape) * dtype.itemsize
            self.specs[name] = TensorSpec(dtype, tuple(spec.shape), position, end)
            position = end
        text = self.header(metadata)
        self.data_offset = len(text)
        self._file = file
        self._pending = iter(self.specs.items())
        file.write(text)

    def header(self, metadata: Mapping[str, str] | None = None) -> bytes:
        """The bytes before the data section: length and JSON, padded to a multiple of 8."""
        header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        for name, spec in self.specs.items():
            offsets = [spec.begin, spec.end]
            header[name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": offsets}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def write(self, name: str, array: np.ndarray) -> None:
        """Appends the data of the next tensor in `specs`."""
        spec = self._next(name)
        if array.shape != spec.shape:
            raise ValueError(f"tensor {name!r} is {array.shape} where its header says {spec.shape}")
        data = np.ascontiguousarray(array, dtype=spec.dtype)
        self._file.write(data.reshape(-1).view(np.uint8).data)

    def write_parts(self, name: str, parts: Iterable[np.ndarray]) -> None:
        """Appends the data of the next tensor in `specs`, given as contiguous parts of its type, in its order."""
        spec = self._next(name)
        written = 0
        for part in parts:
            if part.dtype != spec.dtype:
                raise ValueError(f"tensor {name!r} is {part.dtype} where its header says {spec.dtype}")
            self._file.write(part.reshape(-1).view(np.uint8).data)
            written += part.nbytes
        if written != spec.end - spec.begin:
            raise ValueError(f"tensor {name!r} has {written} bytes where its header says {spec.end - spec.begin}")

    def _next(self, name: str) -> TensorSpec:
        expected, spec = next(self._pending, ("", None))
        if name != expected or spec is None:
            raise ValueError(f"tensor {name!r} is not the one that comes next ({expected!r})")
        return spec


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes `path`'s place, durably, when the block ends without an error; until then the old one stays.

    Raises:
        OSError: it cannot be written; names `path`.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_directory(path.parent)
    except OSError as error:
        error.filename, error.filename2 = os.fspath(path), None  # a failed write has no name, a failed rename another
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def remove_leftovers(directory: Path) -> None:
    """Deletes what processes that died in `replacing` left; nobody else may be writing in `directory`."""
    for file in directory.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            file.unlink()


def make_directory(path: Path) -> None:
    """Makes `path` and the directories above it, durably."""
    missing = []
    while not path.is_dir():
        missing.append(path)
        path = path.parent
    for directory in reversed(missing):
        directory.mkdir(exist_ok=True)
        sync_directory(directory.parent)


def sync_directory(path: Path) -> None:
    """Makes renames in directory `path` durable (POSIX; elsewhere a rename already is what the system offers)."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
