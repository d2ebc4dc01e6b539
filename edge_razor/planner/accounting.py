"""What the cap is spent on: the resident memory of the whole training process, item by item."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from math import prod

from edge_razor.errors import EdgeRazorError

from .graph import Graph

__all__ = ["BASE_VARIATION", "GROWTH_BYTES", "Accounting", "blas_bytes", "measure_base"]

# Weight gradients of dense or bf16 operands call OpenBLAS, which packs panels of both operands into a buffer of the
# calling thread and touches what the product needs: a panel of dY with at most so many columns, and one of X with all
# that the thread has, both of at most so many rows (AVX-512; other processors' panels have about as many elements).
# Measured with conv_grad_weight and two threads, RSS after minus before, and (predicted), MB: 768 × 3072 channels 4.9
# (5.0), 3072 × 768 7.4 (7.7), 384 × 1536 3.3 (3.6), 768 × 768 1.9 (3.6), 512 × 512 1.5 (3.1), 4096 × 1000 with 64 rows
# 1.8 (1.9).
BLAS_ROWS = BLAS_COLUMNS = 448
BLAS_BYTES_PER_THREAD = 300_000  # what else it touches: small products, as attention's
# What a process grows by beside the other items, from opening the bundle to the last step: session tables and the plan
# 1.4 MB, numpy.random 2 MB in a process that uses it, allocator slack. Peak less the other items was at most 1.9 MB in
# the 40 runs of `bench caps`, checkpoints and evaluation included.
GROWTH_BYTES = 3_000_000
# By how much the resident sets of two processes that are the same differ after their imports: up to 0.25 MB were seen,
# in and outside of a memory cgroup. A cap that a refusal names must do for the next process, too.
BASE_VARIATION = 500_000

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


def blas_bytes(graph: Graph, batch_size: int, threads: int) -> int:
    """What OpenBLAS's buffers take at the most: those of the largest weight gradient."""
    most = 0
    for node in graph.nodes:
        if node.op == "LinearGradWeight" or (
            node.op == "ConvGradWeight" and node.integers("weight_shape")[2:] == [1, 1]
        ):
            first, second = node.integers("weight_shape")[:2]
            transposed = node.op == "ConvGradWeight" or node.integer("transW", 1)
            oc, ic = (first, second) if transposed else (second, first)
            *batch, _ = graph.shape(node.input(1), node).at(batch_size)
            # Threads share the larger side.
            oc, ic = (oc, -(-ic // threads)) if ic >= oc else (-(-oc // threads), ic)
            most = max(most, min(prod(batch), BLAS_ROWS) * (min(oc, BLAS_COLUMNS) + ic))
    return threads * (BLAS_BYTES_PER_THREAD + 4 * most)


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
