"""The cap that `--mem-budget auto` stands for: what this process may have now, less a margin, and why.

What the process may have is what it holds already plus what is free: the system's available memory, or what the
tightest memory cgroup (v1 or v2) above the process leaves, whichever is less.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from edge_razor.memory import rss_bytes
from edge_razor.units import format_bytes, parse_bytes

__all__ = ["AUTO", "Budget", "auto_budget", "resolve_budget"]

AUTO = "auto"
MARGIN = 0.1  # of what is free: other processes grow, too
SHARED_MARGIN = 0.2  # where the GPU's allocations come out of the same memory
LEAST_MARGIN = 16_000_000  # bytes


class Budget(NamedTuple):
    """A cap in bytes (None: no cap), and for `auto` a sentence that says what it was made from."""

    bytes: int | None
    why: str | None = None


def resolve_budget(amount: int | str | None) -> Budget:
    """The cap that bytes, "128MB", "auto" or None (no cap) stand for.

    Raises:
        UsageError: not an amount.
    """
    if amount is None:
        return Budget(None)
    if isinstance(amount, str) and amount.strip().lower() == AUTO:
        return auto_budget()
    return Budget(parse_bytes(amount))


def auto_budget(root: Path = Path("/"), held: int | None = None) -> Budget:
    """What this process may have now, less a margin.

    Args:
        root: where proc, sys and etc are (tests look elsewhere).
        held: resident bytes of this process; None: as they are.
    """
    held = rss_bytes() if held is None else held
    limits = [("free on the device", _available(root)), *_cgroup_headroom(root, held)]
    what, free = min(limits, key=lambda limit: limit[1])
    shared = _is_jetson(root)
    margin = max(LEAST_MARGIN, int(free * (SHARED_MARGIN if shared else MARGIN)))
    cap = max(held + free - margin, 1)
    because = "; the GPU shares this memory, so the margin is larger" if shared else ""
    return Budget(
        cap,
        f"{format_bytes(cap)} = {format_bytes(free)} {what} + {format_bytes(held)} that this process holds"
        f" − {format_bytes(margin)} margin{because}",
    )


def _available(root: Path) -> int:
    """Memory that can be had without swapping: MemAvailable of Linux, psutil's estimate elsewhere."""
    try:
        for line in (root / "proc/meminfo").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    import psutil  # on Linux half a megabyte that the cap does not have to pay

    return int(psutil.virtual_memory().available)


def _cgroup_headroom(root: Path, held: int) -> Iterator[tuple[str, int]]:
    """(what it is, bytes left) for every memory cgroup with a limit that this process is in.

    File pages that were not used lately count in a group's usage, but the kernel drops them before it refuses memory.
    Library pages that another group has paid for count in this process's resident memory (`held`) alone; a cap above
    the group's limit would be of no use all the same.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            mount = root / "sys/fs/cgroup"
            names = ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            mount = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        folder = mount / group.lstrip("/")
        for directory in (folder, *folder.parents):
            if directory == mount.parent:
                break
            left = _left(directory, held, *names)
            if left is not None:
                yield f"left in the memory cgroup {'/' + str(directory.relative_to(mount)).strip('.')}", left


def _left(directory: Path, held: int, limit_file: str, usage_file: str, reclaimable: str) -> int | None:
    """Bytes left in one cgroup; None if it has no limit, or is not there (its mount may begin further down)."""
    try:
        limit = int((directory / limit_file).read_text())
        if limit >= 2**62:  # how cgroup v1 writes that there is none
            return None
        usage = int((directory / usage_file).read_text())
        for line in (directory / "memory.stat").read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == reclaimable:
                usage -= int(value)
    except (OSError, ValueError):
        return None
    return max(limit - max(usage, held), 0)


def _is_jetson(root: Path) -> bool:
    """NVIDIA's Jetson boards, whose CPU and GPU share one memory."""
    if (root / "etc/nv_tegra_release").exists():
        return True
    try:
        model = (root / "proc/device-tree/model").read_bytes().lower()
    except OSError:
        return False
    return b"jetson" in model or b"tegra" in model
