"""Resident memory of this process, as the cap counts it, and the limit that a cgroup sets on it. All in bytes."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

__all__ = ["cgroup_limit_bytes", "give_back_freed_memory", "peak_rss_bytes", "rss_bytes"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGE = 256 * 1024  # bytes


def give_back_freed_memory() -> None:
    """Makes malloc return large blocks to the system as soon as they are freed (glibc; elsewhere nothing to do).

    By default glibc raises both thresholds with every large block that it frees, after which up to twice the largest
    tensor ever copied stays resident.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, _LARGE)
            mallopt(_M_TRIM_THRESHOLD, _LARGE)


def _status_bytes(field: str) -> int | None:
    """A field of /proc/self/status (Linux), or None where there is no such file or field."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:
            for line in status:
                if line.startswith(field + ":"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def rss_bytes() -> int:
    """Resident set of this process now."""
    resident = _status_bytes("VmRSS")
    if resident is None:
        import psutil  # elsewhere than Linux; half a megabyte that Linux does not pay

        resident = int(psutil.Process().memory_info().rss)
    return resident


def peak_rss_bytes() -> int:
    """High-water mark of this process's resident set.

    On Linux VmHWM, which starts anew with each program; getrusage's maximum outlives exec.
    """
    peak = _status_bytes("VmHWM")
    if peak is not None:
        return peak
    import psutil

    info = psutil.Process().memory_info()
    if hasattr(info, "peak_wset"):
        return int(info.peak_wset)
    import resource
    import sys

    maximum = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return maximum if sys.platform == "darwin" else maximum * 1024


def cgroup_limit_bytes() -> int | None:
    """The tightest memory limit of the cgroups (v1 or v2) that this process is in; None if there is none."""
    limits = []
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            root, name = Path("/sys/fs/cgroup"), "memory.max"
        elif "memory" in controllers.split(","):
            root, name = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"
        else:
            continue
        folder = root / group.lstrip("/")
        for directory in (folder, *folder.parents):
            if directory == root.parent:
                break
            try:
                limits.append(int((directory / name).read_text()))
            except (OSError, ValueError):  # no such level here, or "max"
                continue
    # cgroup v1 writes "no limit" as the largest page-aligned signed 64-bit number
    limits = [limit for limit in limits if limit < 2**62]
    return min(limits, default=None)
