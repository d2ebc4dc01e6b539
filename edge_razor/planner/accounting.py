"""What the cap is spent on: the resident memory of the whole training process, item by item."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass

from edge_razor.errors import EdgeRazorError

__all__ = ["BLAS_BYTES_PER_THREAD", "GROWTH_BYTES", "Accounting", "measure_base"]

# Only weight gradients of dense or bf16 operands call OpenBLAS, which packs panels of both operands into one buffer a
# calling thread and touches what the product needs. Measured with conv_grad_weight, RSS after minus before, less the
# result: 0.5 MB for 64 × 64 channels, 1.7 MB for 512 × 512, 1.2 MB for two threads on 4096 × 1000 (AVX-512).
BLAS_BYTES_PER_THREAD = 1_750_000
# What a process grows by beside the other items, from opening the bundle to the last step: session tables and the plan
# 1.4 MB, numpy.random 2 MB, allocator slack. Measured with MobileNetV2 at 224 × 224, batch 8: peak less the other
# items was 3.7 to 4.0 MB, steps and evaluation included.
GROWTH_BYTES = 4_000_000

# The imports and the loaded native library of a process that trains, and nothing else.
_BASE_PROGRAM = """
import edge_razor, edge_razor.runtime, edge_razor.trainer, psutil
edge_razor.runtime.abi_version()
print(psutil.Process().memory_info().rss)
"""


@dataclass(frozen=True, slots=True)
class Accounting:
    """Bytes of each item; `items` is in the order in which they are reported."""

    process: int
    blas: int
    growth: int
    data: int
    parameters: int
    mapped: int
    optimizer_state: int
    accumulators: int
    arena: int

    @property
    def items(self) -> dict[str, int]:
        return {
            "Python and libraries": self.process,
            "BLAS buffers": self.blas,
            "growth while training": self.growth,
            "data pipeline": self.data,
            "parameters": self.parameters,
            "frozen weights in the file": self.mapped,
            "optimizer state": self.optimizer_state,
            "gradient accumulators": self.accumulators,
            "arena": self.arena,
        }

    @property
    def total(self) -> int:
        """The predicted peak resident set."""
        return sum(self.items.values())


def measure_base() -> int:
    """Resident bytes of a fresh process after the trainer's imports, before it opens a session.

    Raises:
        EdgeRazorError: the process could not be started or failed.
    """
    result = subprocess.run(
        [sys.executable, "-c", _BASE_PROGRAM], capture_output=True, text=True, env=os.environ, check=False
    )
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or [f"exit status {result.returncode}"])[-1]
        raise EdgeRazorError(f"cannot measure the training process's memory: {reason}")
    return int(result.stdout)
