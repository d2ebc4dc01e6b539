"""The example C program, built outside of the tree with find_package(edge_razor): trains, resumes, stops, predicts."""

from __future__ import annotations

import platform
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from device_tests.toolchain import ROOT, digits_bundle, run, which
from edge_razor.runtime import Session, library_path

MISSING = [program for program in ("cmake", "ninja", "cc") if not which(program)]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with digits.plan and digits.razor."""
    folder = tmp_path_factory.mktemp("digits")
    digits_bundle(folder)
    return folder


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("embed_c")
    package = library_path().parent / "cmake"
    if not package.is_dir():  # EDGE_RAZOR_LIBRARY is in a build directory
        run("cmake", "--install", library_path().parent, "--prefix", folder / "installed")
        package = folder / "installed/lib/cmake/edge_razor"
    source = ROOT / "examples/embed_c"
    run("cmake", "-S", source, "-B", folder / "build", "-G", "Ninja", f"-Dedge_razor_DIR={package}",
        "-DCMAKE_C_FLAGS=-Werror")  # fmt: skip
    run("cmake", "--build", folder / "build")
    return folder / "build/digits"


def test_the_program_in_the_header_compiles_and_links(tmp_path: Path) -> None:
    """What a reader has who has only the header."""
    text = (ROOT / "runtime/include/edge_razor.h").read_text().split(" * Conventions")[0]
    lines = [line[5:] if line.startswith(" *   ") else "" for line in text.splitlines()]
    source = tmp_path / "flowers.c"
    source.write_text("\n".join(lines[lines.index("#include <errno.h>") :]))
    library = library_path().parent
    run("cc", "-std=c11", "-Wall", "-Wextra", "-Werror", "-pedantic", f"-I{ROOT}/runtime/include", source,
        f"-L{library}", "-ledge_razor", f"-Wl,-rpath,{library}", "-o", tmp_path / "flowers")  # fmt: skip
    done = subprocess.run([tmp_path / "flowers"], cwd=tmp_path)
    assert done.returncode == 1  # there is no flowers.plan


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="aarch64: test_aarch64.py")
@pytest.mark.skipif(which("strip") is None, reason="needs strip")
def test_the_library_with_the_kernels_of_three_instruction_sets_is_small(tmp_path: Path) -> None:
    """Bytes of a release build, stripped."""
    run("strip", "-o", tmp_path / "stripped.so", library_path())
    assert (tmp_path / "stripped.so").stat().st_size <= 1_500_000


def digits(program: Path, files: Path, command: str, checkpoint: Path, *arguments: str | Path) -> str:
    weights = files / "digits.razor/weights.safetensors"
    return run(program, command, files / "digits.plan", weights, checkpoint, *arguments).stdout


def test_it_learns_and_a_resumed_run_ends_at_the_same_bits(program: Path, files: Path, tmp_path: Path) -> None:
    whole = digits(program, files, "train", tmp_path / "whole", "400")
    assert "resumed" not in whole
    assert float(whole.split("accuracy")[1]) > 0.9
    digits(program, files, "train", tmp_path / "parts", "170")
    again = digits(program, files, "train", tmp_path / "parts", "400")
    assert "resumed after update 170" in again
    assert again.splitlines()[-1] == whole.splitlines()[-1]
    for name in ("whole", "parts"):
        digits(program, files, "weights", tmp_path / name, tmp_path / f"{name}.safetensors")
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "parts").read_bytes()
    assert (tmp_path / "whole.safetensors").read_bytes() == (tmp_path / "parts.safetensors").read_bytes()
    assert digits(program, files, "eval", tmp_path / "whole") == whole.splitlines()[-1] + "\n"
    predicted, expected = digits(program, files, "predict", tmp_path / "whole").splitlines()
    assert sum(a == b for a, b in zip(predicted.split()[1:], expected.split()[1:], strict=True)) >= 7

    with Session((files / "digits.plan").read_bytes()) as session:  # Python reads what C wrote
        assert session.load_checkpoint(tmp_path / "whole") == (400, b"")
        for name, value in safetensors.numpy.load_file(tmp_path / "whole.safetensors").items():
            np.testing.assert_array_equal(session.read_parameter(name), value)


def test_a_signal_ends_it_at_a_step_with_a_checkpoint(program: Path, files: Path, tmp_path: Path) -> None:
    weights = files / "digits.razor/weights.safetensors"
    command = [program, "train", files / "digits.plan", weights, tmp_path / "c", "100000000"]
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("update 50 loss")
        process.send_signal(signal.SIGTERM)
        last = process.communicate()[0].splitlines()[-1]
    assert process.returncode == 128 + signal.SIGTERM
    assert last.startswith("stopped by signal 15 after update ")
    update = int(last.split()[-1])
    again = digits(program, files, "train", tmp_path / "c", str(update + 1))
    assert f"resumed after update {update}" in again


def test_wrong_files_are_errors_of_one_line(program: Path, files: Path, tmp_path: Path) -> None:
    digits(program, files, "train", tmp_path / "c", "3")
    checkpoint = bytearray((tmp_path / "c").read_bytes())
    checkpoint[-5] ^= 1
    (tmp_path / "longer").write_bytes((tmp_path / "c").read_bytes() + b"x")
    (tmp_path / "c").write_bytes(checkpoint)
    plan, weights = files / "digits.plan", files / "digits.razor/weights.safetensors"
    for command, says in (
        (("eval", plan, weights, tmp_path / "c"), "does not match its checksum"),
        (("eval", plan, weights, tmp_path / "longer"), "/longer is damaged: it holds another number of bytes"),
        (("eval", weights, weights, tmp_path / "c"), "not a plan file"),
        (("eval", plan, plan, tmp_path / "c"), "not a safetensors file"),
        (("eval", tmp_path / "none", weights, tmp_path / "c"), "No such file"),
        (("dance", plan, weights, tmp_path / "none"), "no command 'dance'"),
    ):
        done = subprocess.run([program, *map(str, command)], capture_output=True, text=True)
        assert done.returncode in (1, 2) and says in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
