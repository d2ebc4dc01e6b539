#!/usr/bin/env python3
"""Sets up an environment beside this file and runs a task in it. Needs Python 3.10 or newer, a C++17 compiler, no root.

python3 dev.py demo       the main job on real data (EfficientNet-Lite0, 160 MB cap), beside PyTorch
python3 dev.py test       all tests (arguments go to pytest)
python3 dev.py check      lint, formatting, types
python3 dev.py sanitize   native tests and kernel tests under the address and undefined-behaviour sanitizers
python3 dev.py wheel      a wheel for another processor: --target aarch64 [--out dist]
python3 dev.py bench NAME one of benchmarks/ (arguments follow)
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
EXTRAS = {"demo": "demo", "test": "test", "check": "test", "sanitize": "test", "wheel": "test", "bench": "test"}
# What a change of makes an installed environment stale: everything that is copied or compiled into it.
SOURCES = ("pyproject.toml", "constraints.txt", "edge_razor", "exporters", "runtime")


def run(*command: str | Path, **environment: str) -> None:
    status = subprocess.run([str(part) for part in command], cwd=ROOT, env={**os.environ, **environment}).returncode
    if status:
        raise SystemExit(status)


def fingerprint(extra: str) -> str:
    digest = hashlib.sha256(extra.encode())
    for source in SOURCES:
        path = ROOT / source
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            if file.is_file() and file.suffix != ".pyc" and not file.parent.is_symlink():
                digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def environment(extra: str) -> Path:
    """Makes .venv hold this tree with one extra; returns its bin directory."""
    home = ROOT / ".venv"
    bin_directory = home / ("Scripts" if os.name == "nt" else "bin")
    stamp = home / f"edge-razor-{extra}"
    wanted = fingerprint(extra)
    if stamp.exists() and stamp.read_text() == wanted:
        return bin_directory
    if not bin_directory.exists():
        print("creating .venv", flush=True)
        venv.create(home, with_pip=True)
    print(f"installing edge-razor with the extra '{extra}' (the first time this downloads PyTorch)", flush=True)
    run(bin_directory / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
        "-c", "constraints.txt", "-e", f".[{extra}]")  # fmt: skip
    for old in home.glob("edge-razor-*"):
        old.unlink()
    stamp.write_text(wanted)
    return bin_directory


def link_sources() -> None:
    """Git-ignored links that let mypy see the folders which an installation puts inside the package."""
    for link, target in (("edge_razor/exporters", "../exporters"), ("edge_razor/runtime", "../runtime/python")):
        if not (ROOT / link).is_symlink():
            (ROOT / link).symlink_to(target)


def main() -> None:
    task, *arguments = sys.argv[1:] or ["--help"]
    if task not in EXTRAS:
        print(__doc__)
        raise SystemExit(0 if task in ("-h", "--help") else 2)
    bin_directory = environment(EXTRAS[task])
    python = bin_directory / "python"
    if task == "demo":
        run(bin_directory / "edge-razor", "demo", *arguments)
    elif task == "test":
        run(python, "-m", "pytest", "-n", "auto", "--dist", "worksteal", "tests", "device_tests", *arguments)
    elif task == "check":
        run(python, "-m", "ruff", "check", ".")
        run(python, "-m", "ruff", "format", "--check", ".")
        sources = sorted(str(f) for f in (ROOT / "runtime").rglob("*") if f.suffix in (".cpp", ".h"))
        run(bin_directory / "clang-format", "--dry-run", "--Werror", *sources)
        link_sources()
        run(python, "-m", "mypy")
    elif task == "sanitize":
        run("bash", "runtime/tests/sanitize.sh", PYTHON=str(python))
    elif task == "wheel":
        run(python, "-m", "device_tests.wheel", *arguments)
    elif task == "bench":
        if not arguments:
            files = (ROOT / "benchmarks").glob("*.py")
            names = sorted(f.stem for f in files if "def main(" in f.read_text() and f.stem not in ("worker", "models"))
            raise SystemExit("bench needs a name: " + ", ".join(names))
        run(python, "-m", f"benchmarks.{arguments[0]}", *arguments[1:])


if __name__ == "__main__":
    main()
