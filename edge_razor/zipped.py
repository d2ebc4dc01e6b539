"""Zips from others: opened with a bound on their directory; and where the bytes of a stored member lie.

Stored members (not compressed) can be read in place.
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edge_razor.regular_file import open_regular

__all__ = ["open_zip", "stored_member_start"]

_READ_LIMIT = 1 << 18  # bytes at once: a directory of 2,000 members; as Python objects it takes ten times its size


class _Limited(io.RawIOBase):
    """A file that gives only so much at once: `zipfile` reads a zip's directory whole, however long it is."""

    def __init__(self, file: io.BufferedIOBase) -> None:
        self._limited = file

    def read(self, size: int = -1) -> bytes:
        data = self._limited.read(_READ_LIMIT + 1 if size < 0 else min(size, _READ_LIMIT + 1))
        if len(data) > _READ_LIMIT:
            raise zipfile.BadZipFile("its directory is too long")
        return data

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._limited.seek(offset, whence)

    def tell(self) -> int:
        return self._limited.tell()

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True


@contextmanager
def open_zip(path: Path) -> Iterator[zipfile.ZipFile]:
    """A zip whose directory is not too long, for reading.

    Raises:
        OSError: it cannot be opened, or is no regular file.
        zipfile.BadZipFile, NotImplementedError, EOFError, ValueError, OverflowError, struct.error: it is no whole zip.
    """
    with io.BufferedReader(open_regular(path)) as file, zipfile.ZipFile(_Limited(file)) as archive:
        yield archive


def stored_member_start(path: Path, info: zipfile.ZipInfo) -> int:
    """Byte position in the zip of the member's data.

    The local header in front of it has name and extra fields of its own lengths, so the directory cannot tell.

    Raises:
        zipfile.BadZipFile: there is no local header where the directory says, or the data reach past the end.
    """
    with open_regular(path) as file:
        size = file.seek(0, 2)
        if not 0 <= info.header_offset <= size:
            raise zipfile.BadZipFile(f"no local header for {info.filename}")
        file.seek(info.header_offset)
        header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise zipfile.BadZipFile(f"no local header for {info.filename}")
    name_bytes, extra_bytes = struct.unpack("<26xHH", header)
    start = info.header_offset + 30 + name_bytes + extra_bytes
    if start + info.compress_size > size:
        raise zipfile.BadZipFile(f"{info.filename} reaches past the end of the file")
    return start
