"""What the machine can do at best: the two rates that the floor of a training step is made of."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np

from benchmarks.systems.system import System

SGEMM = 2048  # rows, columns and depth: 16 MB each, large enough that packing does not count
STREAM_BYTES = 256 << 20  # of each of the two streams: far larger than any L3


def best_of(calls: list[Callable[[], object]], repeats: int) -> float:
    """Seconds of the fastest call of all."""
    best = float("inf")
    for _ in range(repeats):
        for call in calls:
            start = time.perf_counter()
            call()
            best = min(best, time.perf_counter() - start)
    return best


def make(options: argparse.Namespace, images: np.ndarray, labels: np.ndarray) -> System:
    """A "step" measures both rates once; `finish` returns the highest seen of each.

    multiply_adds_per_second: of the faster of numpy's OpenBLAS and torch on square float32 matrices. bytes_per_second:
    read plus written, of the faster of a copy and an update in place (which does not read what it only writes).
    """
    import threadpoolctl
    import torch

    torch.set_num_threads(options.threads)
    threadpoolctl.threadpool_limits(options.threads, user_api="blas")
    a, b = (np.random.default_rng(i).standard_normal((SGEMM, SGEMM), dtype=np.float32) for i in range(2))
    ta, tb = torch.from_numpy(a), torch.from_numpy(b)
    c, tc = np.empty_like(a), torch.empty_like(ta)
    source, target = (torch.zeros(STREAM_BYTES // 4) for _ in range(2))
    rates = {"multiply_adds_per_second": 0.0, "bytes_per_second": 0.0}

    def step() -> float:
        products = [lambda: np.matmul(a, b, out=c), lambda: torch.mm(ta, tb, out=tc)]
        streams = [lambda: target.copy_(source), lambda: target.add_(1.0)]
        for name, amount, calls in (
            ("multiply_adds_per_second", SGEMM**3, products),
            ("bytes_per_second", 2 * STREAM_BYTES, streams),
        ):
            rates[name] = max(rates[name], amount / best_of(calls, 2))
        return 0.0

    return System(step, finish=lambda: rates)
