"""Opens files that may come from anyone: a FIFO, terminal or device in the place of a file would hang or never end."""

from __future__ import annotations

import errno
import io
import os
import stat
from pathlib import Path

from edge_razor.units import format_bytes

__all__ = ["open_regular", "read_regular"]


def open_regular(path: str | os.PathLike[str]) -> io.FileIO:
    """Opens a regular file, or a link to one, for reading, unbuffered.

    Raises:
        OSError: it cannot be opened, or is something else.
    """
    # Without O_NONBLOCK opening a FIFO waits for somebody who writes to it; reading a regular file is as without.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "is no regular file", os.fspath(path))
        return io.FileIO(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: Path, limit: int) -> bytes:
    """The contents of a regular file of at most `limit` bytes.

    Raises:
        OSError: it cannot be read, is something else, or larger.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise OSError(errno.EFBIG, f"has {format_bytes(size)}, more than {format_bytes(limit)}", os.fspath(path))
        return file.read(size)
