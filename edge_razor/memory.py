"""Resident memory of this process, as the cap counts it, in bytes."""

from __future__ import annotations

import ctypes
import sys

__all__ = ["forget_peak", "give_back_freed_memory", "peak_rss_bytes", "rss_bytes"]

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


def forget_peak() -> None:
    """Lets `peak_rss_bytes` begin anew, where the system can (Linux)."""
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError:
        pass


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
