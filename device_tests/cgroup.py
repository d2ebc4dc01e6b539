"""Runs a command inside a memory cgroup of an exact size with swap off, on cgroup v1 and v2."""

from __future__ import annotations

import os
import subprocess
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

V1 = Path("/sys/fs/cgroup/memory")
V2 = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Confined:
    """Outcome of a confined run: exit status (negative: killed by that signal), output, the group's peak in bytes."""

    returncode: int
    stdout: str
    stderr: str
    peak_bytes: int
    oom_kills: int


def unavailable() -> str | None:
    """Why a memory cgroup cannot be made here, or None if it can."""
    try:
        with memory_cgroup(64 << 20):
            return None
    except OSError as error:
        return f"memory cgroups cannot be made here ({error}); run as root on a machine with the memory controller"


@contextmanager
def memory_cgroup(limit_bytes: int) -> Iterator[Path]:
    """A fresh cgroup that may hold ``limit_bytes`` of memory and no swap; removed at the end."""
    name = f"edge-razor-{uuid.uuid4().hex[:12]}"
    v2 = (V2 / "cgroup.controllers").exists()
    if v2:
        if "memory" not in (V2 / "cgroup.controllers").read_text().split():
            raise OSError("the unified hierarchy has no memory controller")
        (V2 / "cgroup.subtree_control").write_text("+memory")
        group = V2 / name
    elif V1.is_dir():
        group = V1 / name
    else:
        raise OSError("no memory controller is mounted")
    group.mkdir()
    try:
        if v2:
            (group / "memory.max").write_text(str(limit_bytes))
            if (group / "memory.swap.max").exists():
                (group / "memory.swap.max").write_text("0")
        else:
            (group / "memory.limit_in_bytes").write_text(str(limit_bytes))
            (group / "memory.swappiness").write_text("0")
            if (group / "memory.memsw.limit_in_bytes").exists():
                (group / "memory.memsw.limit_in_bytes").write_text(str(limit_bytes))
        yield group
    finally:
        deadline = time.monotonic() + 5
        while True:
            try:
                group.rmdir()
                break
            except OSError:  # the kernel may take a moment to release a group whose last process has just ended
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)


def _counter(path: Path, key: str) -> int:
    for line in path.read_text().splitlines():
        name, _, value = line.partition(" ")
        if name == key:
            return int(value)
    return 0


def run_confined(
    command: Sequence[str], limit_bytes: int, timeout: float = 600, environment: dict[str, str] | None = None
) -> Confined:
    """Runs ``command`` in a fresh memory cgroup of exactly ``limit_bytes``, swap off."""
    with memory_cgroup(limit_bytes) as group:
        v2 = (group / "memory.max").exists()

        def join() -> None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=timeout,
            preexec_fn=join,
            env={**os.environ, **(environment or {})},
        )
        if v2:
            peak_file = group / "memory.peak"
            peak = int(peak_file.read_text()) if peak_file.exists() else 0
            kills = _counter(group / "memory.events", "oom_kill")
        else:
            peak = int((group / "memory.max_usage_in_bytes").read_text())
            kills = _counter(group / "memory.oom_control", "oom_kill")
        return Confined(done.returncode, done.stdout, done.stderr, peak, kills)
