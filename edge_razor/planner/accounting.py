"""What the cap is spent on: the resident memory of the whole training process, item by item."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass

from edge_razor.errors import EdgeRazorError

__all__ = ["BASE_VARIATION", "GROWTH_BYTES", "Accounting", "measure_base"]

# What a process grows by beside the other items, from opening the bundle to the last step: session tables and the plan
# 1.4 MB, numpy.random 2 MB in a process that uses it, allocator slack. Peak less the other items was 1.0 to 1.9 MB in
# the 40 runs of `bench caps`, checkpoints and evaluation included, and 3.9 to 4.0 MB in programs that draw their own
# images, 4.9 MB once beside other work: Linux counts resident pages in batches for each processor, so that what is
# measured at the start and in the end is each a few hundred kB off.
GROWTH_BYTES = 5_500_000
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
