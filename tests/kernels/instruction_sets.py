"""Tests again, in a process that is told to use another instruction set than this one's."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from edge_razor.runtime import isa as chosen_isa

__all__ = ["check_under"]

_PROBE = "import edge_razor.runtime as r, numpy as n; r.kernel_run('fill', [2], [0], [n.zeros(2, n.float32)])"


def check_under(isa: str, names: Sequence[str], selected: str = "") -> None:
    """Runs tests/kernels/test_<name>.py under an instruction set, only what `selected` (pytest -k) names; skips if the
    ordinary tests run with it, or this machine has none."""
    environment = {**os.environ, "EDGE_RAZOR_ISA": isa}
    if chosen_isa() == isa or (chosen_isa(), isa) == ("avx512vbmi2", "avx512"):
        # What uses VBMI2, packing and reading kept tensors, is tested without it in test_razor and test_conv_weight.
        pytest.skip("the ordinary tests run with it")
    probe = subprocess.run([sys.executable, "-c", _PROBE], env=environment, capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"this machine has no {isa}: {probe.stderr.strip().splitlines()[-1]}")
    files = [str(Path(__file__).with_name(f"test_{name}.py")) for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    command += ["-k", selected] if selected else []
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]
