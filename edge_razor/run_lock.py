"""One process at a time in a run directory: an advisory lock (flock) on its file `.lock`.

The system releases it when the process ends, however it ends, so a dead process's lock is no obstacle.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edge_razor.errors import RunLockedError

try:
    import fcntl
except ImportError:  # not POSIX: nothing is locked
    fcntl = None  # type: ignore[assignment]

__all__ = ["run_lock"]

_NAME = ".lock"
# File systems without locks (some network and FUSE mounts): training goes on without.
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

_held: dict[str, int] = {}  # directory → thread that holds it; a second flock in one process would wait for the first
_guard = threading.Lock()


@contextmanager
def run_lock(directory: Path) -> Iterator[None]:
    """Holds a run directory, which exists, for this thread; the thread may take it again while it holds it.

    Raises:
        RunLockedError: another process, or another thread of this one, holds it.
        OSError: the directory is not writable.
    """
    key = os.path.realpath(directory)
    me = threading.get_ident()
    with _guard:
        owner = _held.get(key)
        if owner is not None and owner != me:
            raise RunLockedError(_message(directory, f"thread {owner} of this process"))
        if owner is None:
            descriptor = _acquire(directory)
            _held[key] = me
    if owner is not None:
        yield
        return
    try:
        yield
    finally:
        with _guard:
            del _held[key]
        if descriptor is not None:
            os.close(descriptor)  # releases it


def _acquire(directory: Path) -> int | None:
    """Descriptor of the locked file; None where nothing can be locked."""
    if fcntl is None:
        return None
    file = directory / _NAME
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            os.close(descriptor)
            return None
        holder = ""
        with contextlib.suppress(OSError):
            holder = os.read(descriptor, 32).decode("ascii", "replace").strip()
        os.close(descriptor)
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise RunLockedError(_message(directory, f"process {holder}" if holder else "another process")) from None
        raise
    with contextlib.suppress(OSError):  # who holds it is for people alone; a full disk must not matter here
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
    return descriptor


def _message(directory: Path, holder: str) -> str:
    return f"{directory}: {holder} is training in it; wait until it ends, stop it, or choose another --out"
