"""Loading the library, single kernel calls, and what loading costs."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from edge_razor import runtime
from edge_razor.errors import NonFiniteError, UsageError
from edge_razor.runtime import KernelCall, kernel_run, kernel_scratch, packed_bytes, unpack


def child(code: str, **environment: str) -> str:
    """Output of a Python child process; stderr is shown if it fails."""
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_abi_version_and_isa() -> None:
    assert runtime.abi_version() == 1
    assert runtime.isa() in ("avx512vbmi2", "avx512", "avx2", "portable")


def test_isa_can_be_lowered_and_a_wrong_name_is_an_error() -> None:
    run = "from edge_razor.runtime import isa, kernel_scratch; kernel_scratch('neg', [1]); print(isa())"
    assert child(run, EDGE_RAZOR_ISA="portable") == "portable"
    wrong = (
        "from edge_razor.runtime import kernel_scratch\n"
        "try: kernel_scratch('neg', [1])\nexcept Exception as e: print(type(e).__name__, e)"
    )
    assert child(wrong, EDGE_RAZOR_ISA="mmx").startswith("UsageError EDGE_RAZOR_ISA=mmx: this machine and build have")


def test_missing_library_names_the_remedy() -> None:
    code = "from edge_razor.runtime import isa\ntry: isa()\nexcept Exception as e: print(type(e).__name__, e)"
    assert "EdgeRazorError the native library cannot be loaded" in child(code, EDGE_RAZOR_LIBRARY="/nonexistent.so")


def test_loading_starts_no_thread_and_takes_little() -> None:
    code = (
        "import numpy, psutil; from edge_razor.runtime import isa; p = psutil.Process()\n"
        "threads, memory = p.num_threads(), p.memory_info().rss\n"
        "isa(); print(p.num_threads() - threads, p.memory_info().rss - memory)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    threads, memory = done.stdout.split()
    assert threads == "0"
    limit = 64e6 if "libasan" in os.environ.get("LD_PRELOAD", "") else 3e6  # shadow memory of the sanitizer
    assert int(memory) < limit, f"loading the library took {int(memory) / 1e6:.1f} MB"


def test_kernel_run_returns_the_context_and_writes_in_place() -> None:
    x, y = np.arange(5, dtype=np.float32), np.zeros(5, np.float32)
    context = kernel_run("neg", [5], [], [x, y], update=7, valid_batch=3)
    np.testing.assert_array_equal(y, -x)
    assert (context.update, context.valid_batch, context.loss) == (7, 3, 0.0)


def test_a_prepared_call_runs_again_on_what_its_arrays_hold() -> None:
    x, y = np.arange(5, dtype=np.float32), np.zeros(5, np.float32)
    call = KernelCall("neg", [5], [], [x, y], update=7)
    for factor in (1, 3):
        x[:] = factor * np.arange(5)
        call()
        np.testing.assert_array_equal(y, -x)
    assert (call.context.update, call.context.loss) == (7, 0.0)
    with pytest.raises(UsageError, match="operand 1 is not C-contiguous"):
        KernelCall("neg", [2], [], [x, x[::2]])


@pytest.mark.parametrize("threads", [1, 2, 3, 4, 1])
def test_thread_counts(threads: int) -> None:
    x = np.arange(100_003, dtype=np.float32)
    y = np.zeros_like(x)
    for _ in range(20):
        y[:] = 0
        kernel_run("neg", [x.size], [], [x, y], threads)
        np.testing.assert_array_equal(y, -x)


def test_wrong_calls_are_usage_errors() -> None:
    x = np.zeros(4, np.float32)
    with pytest.raises(UsageError, match="no kernel 'nope'"):
        kernel_run("nope", [], [], [])
    with pytest.raises(UsageError, match="threads must be 1 to 64, not 0"):
        kernel_run("neg", [4], [], [x, x], 0)
    with pytest.raises(UsageError, match="neg: "):
        kernel_run("neg", [5], [], [x, x])
    with pytest.raises(UsageError, match="operand 1 is not C-contiguous"):
        kernel_run("neg", [2], [], [x, x[::2]])
    with pytest.raises(UsageError, match="operand 0 is not aligned to 8 bytes"):
        kernel_run("neg", [2], [], [x[1:3], x[2:]])
    x2 = np.zeros(4096, np.float32)
    with pytest.raises(UsageError, match="scratch overlaps operand 0"):
        kernel_run("channel_sum", [4, 4], [], [x2[:16], x, x2])
    with pytest.raises(UsageError, match="attributes are not valid"):
        kernel_scratch("channel_sum", [])


def test_kernel_that_meets_nan_raises() -> None:
    x = np.full((1, 64, 16), np.nan, np.float32)
    out = np.zeros(packed_bytes(3, 1, 64, 16, 100), np.uint8)
    ints = [3, 1, 64, 16, 100]
    scratch = np.zeros(kernel_scratch("pack", ints), np.uint8)
    with pytest.raises(NonFiniteError):
        kernel_run("pack", ints, [], [x, out, scratch if scratch.size else None])


def test_unpack_checks_its_arguments() -> None:
    with pytest.raises(UsageError):
        packed_bytes(4, 1, 1, 1, 0)
    with pytest.raises(UsageError):
        packed_bytes(2, 1, 1, 1, -1)
    with pytest.raises(UsageError):
        unpack(0, 1, 2, 2, 0, np.zeros(15, np.uint8))
