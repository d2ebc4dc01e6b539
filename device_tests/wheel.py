"""Builds a wheel for another processor: python3 dev.py wheel --target aarch64 [--out dist].

Needs Debian's g++-aarch64-linux-gnu.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import cmake

from device_tests.toolchain import ROOT, TOOLCHAIN, run, which

TARGETS = ("aarch64",)


def build_wheel(out: Path) -> Path:
    """The wheel, `out`/edge_razor-…-linux_aarch64.whl."""
    options = [f"-DCMAKE_TOOLCHAIN_FILE={TOOLCHAIN}", "-DEDGE_RAZOR_WERROR=ON"]
    if which("ccache"):
        options.append("-DCMAKE_CXX_COMPILER_LAUNCHER=ccache")
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--disable-pip-version-check", "-w", str(out)]
    # The variable that distutils and its heirs take the platform tag from when they cross-compile. pip takes it for its
    # own, too, and would install build tools for that processor: so they are named, and nothing is installed.
    environment = {"CMAKE_ARGS": " ".join(options), "_PYTHON_HOST_PLATFORM": "linux-aarch64"}
    environment |= {"CMAKE_EXECUTABLE": str(Path(cmake.CMAKE_BIN_DIR) / "cmake")}
    environment |= {"CMAKE_MAKE_PROGRAM": which("ninja") or "ninja"}
    before = set(out.glob("*.whl"))
    run(*command, cwd=ROOT, **environment)
    (made,) = set(out.glob("*.whl")) - before or set(out.glob("*aarch64.whl"))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(prog="dev.py wheel")
    parser.add_argument("--target", choices=TARGETS, required=True)
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    options = parser.parse_args()
    if which("aarch64-linux-gnu-g++") is None:
        raise SystemExit("needs a cross-compiler: apt-get install g++-aarch64-linux-gnu")
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        print(build_wheel(options.out))
    except (AssertionError, subprocess.SubprocessError) as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
