"""Thread safety of the C ABI, under the thread sanitizer where the compiler has one."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from device_tests.toolchain import ROOT, run, which
from tests.runtime.plan_writer import encode, linear_plan

MISSING = [program for program in ("cmake", "ninja", "c++") if not which(program)]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")


def sanitizer_works(folder: Path) -> bool:
    """Some kernels place memory where the sanitizer's runtime cannot live."""
    (folder / "probe.cpp").write_text("int main() { return 0; }\n")
    built = subprocess.run(["c++", "-fsanitize=thread", "probe.cpp", "-o", "probe"], cwd=folder, capture_output=True)
    return built.returncode == 0 and subprocess.run([folder / "probe"], capture_output=True).returncode == 0


def test_sessions_in_several_threads_do_not_race(tmp_path: Path) -> None:
    if not sanitizer_works(tmp_path):
        pytest.skip("needs a compiler and a kernel that run the thread sanitizer")
    build = tmp_path / "build"
    options = ["-DEDGE_RAZOR_SANITIZE_THREADS=ON", "-DEDGE_RAZOR_BASELINE_ONLY=ON"]
    run("cmake", "-S", ROOT / "runtime", "-B", build, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=None", *options)
    run("cmake", "--build", build, "--target", "thread_test")
    plan = tmp_path / "momentum.plan"
    plan.write_bytes(encode(linear_plan(threads=2, momentum=0.9, pixels=(3, 5), outputs=17)))
    done = run(build / "thread_test", plan, TSAN_OPTIONS="halt_on_error=1")
    assert done.stdout == "threads: no race, the same bits\n"
