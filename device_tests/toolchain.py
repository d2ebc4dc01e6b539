"""Builds for aarch64 and runs them under an emulator; what is missing makes a test skip with that reason."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOOLCHAIN = ROOT / "runtime/cmake/aarch64-linux-gnu.cmake"
SYSROOT = "/usr/aarch64-linux-gnu"
PACKAGES = "g++-aarch64-linux-gnu qemu-user-static"
# Jetson Nano and TX2; Raspberry Pi 5.
PROCESSORS = ("cortex-a57", "cortex-a76")


def unavailable() -> str | None:
    """Why nothing can be built for aarch64 or run here, or None."""
    missing = [p for p in ("cmake", "ninja", "aarch64-linux-gnu-g++", "qemu-aarch64-static") if not which(p)]
    return f"needs {', '.join(missing)} (Debian: {PACKAGES})" if missing else None


def which(program: str) -> str | None:
    return shutil.which(program, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")


def run(*command: str | Path, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command with the environment's own programs first; fails with its output."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    settings = {**os.environ, "PATH": path, **environment}
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=settings, cwd=cwd)
    assert done.returncode == 0, f"{command[0]} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-4000:]}"
    return done


def emulated(processor: str, program: Path, *arguments: str | Path, check: bool = True) -> str:
    """Standard output of an aarch64 program on that processor."""
    command = ["qemu-aarch64-static", "-L", SYSROOT, "-cpu", processor, str(program), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 or not check, (
        f"{program.name} on {processor} ended with {done.returncode}:\n" + (done.stdout + done.stderr)[-4000:]
    )
    return done.stdout


@functools.cache
def digits_bundle(folder: Path) -> Path:
    """The bundle of examples/embed_c and plans for it: digits.plan at sparsity 0.9, exact.plan at 0."""
    import torch

    import edge_razor

    sys.path.insert(0, str(ROOT / "examples/embed_c"))
    try:
        from network import digits
    finally:
        sys.path.pop(0)
    bundle = folder / "digits.razor"
    edge_razor.export(digits(), (torch.zeros(2, 1, 20, 20),), bundle)
    for name, sparsity in (("digits", 0.9), ("exact", 0.0)):
        made = edge_razor.plan(bundle, mem_budget=None, batch_size=16, sparsity=sparsity, threads=2)
        made.save(folder / f"{name}.plan")
    return bundle
