"""Sizes, start-up and instructions on the device: python3 dev.py bench device. Writes benchmarks/results/device.md.

Instructions are counted by the emulator: its log names every block of translated code with its instructions, and every
execution of a block. A step's are the difference between runs of three updates and of one, with a plan for one thread:
threads that wait for each other would count, too. The plain build is the same source without SIMD
(-march=armv8-a+nosimd), in which every vector operation becomes scalar ones.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import edge_razor
from benchmarks.common import markdown_table, write_result
from device_tests.toolchain import PROCESSORS, ROOT, SYSROOT, TOOLCHAIN, digits_bundle, run, unavailable
from device_tests.wheel import build_wheel
from edge_razor.runtime import library_path


def stripped_bytes(library: Path, strip: str, folder: Path) -> int:
    run(strip, "-o", folder / "stripped.so", library)
    return (folder / "stripped.so").stat().st_size


def build_example(folder: Path, package: Path, toolchain: bool) -> Path:
    extra = [f"-DCMAKE_TOOLCHAIN_FILE={TOOLCHAIN}"] if toolchain else []
    run("cmake", "-S", ROOT / "examples/embed_c", "-B", folder, "-G", "Ninja", f"-Dedge_razor_DIR={package}", *extra)
    run("cmake", "--build", folder)
    return folder / "digits"


def start_up(program: Path, files: list[str], folder: Path) -> tuple[float, float]:
    """(seconds from start to exit with plan and weights opened and 400 images predicted, peak resident bytes)."""
    command = [str(program), "predict", *files, str(folder / "none")]
    seconds = []
    for _ in range(20):
        begin = time.perf_counter()
        run(*command)
        seconds.append(time.perf_counter() - begin)
    code = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL)"
    code += "; print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    # exec'd from a small process: a child's maximum includes that of the process that it was forked from
    peak = int(run(sys.executable, "-S", "-c", code, *command).stdout) * 1024
    return min(seconds), peak


def instructions(program: Path, files: list[str], checkpoint: Path, updates: int) -> int:
    """Instructions that a training of so many updates executes, held-out evaluation included."""
    checkpoint.unlink(missing_ok=True)
    command = ["qemu-aarch64-static", "-L", SYSROOT, "-cpu", PROCESSORS[1], "-d", "nochain,exec,in_asm", "-D",
               "/dev/stderr", str(program), "train", *files, str(checkpoint), str(updates)]  # fmt: skip
    lengths: dict[str, int] = {}
    total, block, count = 0, "", 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if count and line.startswith(("Trace", "IN:")):  # the block that was listed is complete
                lengths[block], count = count, 0
            if line.startswith("Trace"):
                total += lengths[line.split("[", 1)[1].split("/")[1]]
            elif line.startswith("0x"):
                if not count:
                    block = line[2 : line.index(":")].rjust(16, "0")
                count += 1
    return total


def main() -> None:
    reason = unavailable()
    if reason:
        raise SystemExit(reason)
    rows: list[tuple[str, int, int]] = []
    steps: list[tuple[str, int]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        bundle = digits_bundle(folder)
        files = [str(folder / "digits.plan"), str(bundle / "weights.safetensors")]
        wheel = build_wheel(folder)
        run(sys.executable, "-m", "zipfile", "-e", wheel, folder / "site")
        arm = folder / "site/edge_razor/runtime"
        run(sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "-w", folder / "here", cwd=ROOT)
        (own,) = (folder / "here").glob("*.whl")
        for platform, library, strip, made in (
            ("x86-64", library_path(), "strip", own),
            ("aarch64", arm / "libedge_razor.so", "aarch64-linux-gnu-strip", wheel),
        ):
            rows.append((platform, stripped_bytes(library, strip, folder), made.stat().st_size))
        program = build_example(folder / "example", library_path().parent / "cmake", False)
        seconds, peak = start_up(program, files, folder)
        vector = build_example(folder / "arm", arm / "cmake", True)
        plain_build = folder / "plain"
        run("cmake", "-S", ROOT / "runtime", "-B", plain_build, "-G", "Ninja",
            f"-DCMAKE_TOOLCHAIN_FILE={TOOLCHAIN}", "-DCMAKE_CXX_FLAGS=-march=armv8-a+nosimd")  # fmt: skip
        run("cmake", "--build", plain_build, "--target", "edge_razor")
        run("cmake", "--install", plain_build, "--prefix", folder / "plain-prefix")
        plain = build_example(folder / "plain-example", folder / "plain-prefix/lib/cmake/edge_razor", True)
        single = folder / "single.plan"
        edge_razor.plan(bundle, mem_budget=None, batch_size=16, sparsity=0.9, threads=1).save(single)
        files[0] = str(single)
        for name, program in (("NEON", vector), ("plain", plain)):
            few, many = (instructions(program, files, folder / "checkpoint", updates) for updates in (1, 3))
            steps.append((name, (many - few) // 2))
    write(rows, seconds, peak, steps)


def write(rows: list[tuple[str, int, int]], seconds: float, peak: float, steps: list[tuple[str, int]]) -> None:
    sizes = [(name, f"{size:,}", f"{wheel:,}") for name, size, wheel in rows]
    body = (
        markdown_table(("platform", "stripped library, bytes", "wheel, bytes"), sizes)
        + "\nx86-64 carries its kernels three times (SSE2, AVX2, AVX-512), aarch64 once (NEON).\n\n"
        + "The C program of `examples/embed_c`, start to exit, plan and weights opened and 400 images predicted: "
        + f"{seconds * 1e3:.0f} ms (fastest of 20), {peak / 1e6:.1f} MB peak resident.\n\n"
        + markdown_table(
            ("build for aarch64", "instructions a training step"), [(n, f"{count:,}") for n, count in steps]
        )
        + f"\nNEON takes {steps[1][1] / steps[0][1]:.2f} times fewer. A step of `examples/embed_c`, batch 16, "
        + f"sparsity 0.9, one thread, counted under qemu's {PROCESSORS[1]}; plain: the same source with "
        + "`-march=armv8-a+nosimd`.\n"
    )
    write_result("device", "On the device", "python3 dev.py bench device", body)


if __name__ == "__main__":
    main()
