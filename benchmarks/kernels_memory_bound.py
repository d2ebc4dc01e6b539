"""Memory-bound kernels against torch on two threads: milliseconds and ratio, alternating, medians.

Run: OMP_WAIT_POLICY=passive python benchmarks/kernels_memory_bound.py [--threads 2] [--repeat 15]
Without the variable the threads of torch spin for a while after each of its calls and take the cores from what is
measured next.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from edge_razor.runtime import kernel_run, kernel_scratch

Call = Callable[[], object]
RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def channels_last(x: np.ndarray) -> torch.Tensor:
    """An NCHW view of an NHWC array."""
    return torch.from_numpy(x).permute(0, 3, 1, 2)


def cases(threads: int) -> dict[str, tuple[Call, Call]]:
    """Name → (ours, torch's)."""

    def ours(
        name: str, ints: list[int], floats: list[float], operands: list[np.ndarray | None], **context: float
    ) -> Call:
        return lambda: kernel_run(name, ints, floats, operands, threads=threads, **context)

    n, hw, c = 8, 56, 144
    x, y, out = normal(n, hw, hw, c), normal(n, hw, hw, c), normal(n, hw, hw, c)
    rows, size = n * hw * hw, x.size
    tx, ty, tout = torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(out)
    cl = channels_last(x)
    vector, gate = normal(c), normal(n, 1, 1, c)
    tvector, tgate = torch.from_numpy(vector), torch.from_numpy(gate)
    bits = RNG.integers(0, 256, rows * c // 8).astype(np.uint8)
    nibbles = RNG.integers(0, 256, rows * c // 2).astype(np.uint8)
    sums = normal(c)
    scratch = np.empty(kernel_scratch("channel_sum", [rows, c]), np.uint8)
    pooled, index = normal(n, hw // 2, hw // 2, c), np.zeros((n, hw // 2, hw // 2, c), np.uint8)
    max_ints = [n, hw, hw, c, hw // 2, hw // 2, 3, 3, 2, 2, 1, 1, 1, 1]
    average_ints = [n, hw, hw, c, hw // 2, hw // 2, 2, 2, 2, 2, 0, 0, 0, 0, 0]
    kernel_run("max_pool", max_ints, [], [x, pooled, index])
    leaf = cl.clone(memory_format=torch.channels_last)
    t_pooled, t_index = F.max_pool2d(leaf, 3, 2, 1, return_indices=True)
    means = normal(n, c)
    params = 3_000_000
    w, g, m, v = (normal(params) for _ in range(4))
    tw, tg = torch.nn.Parameter(torch.from_numpy(w.copy())), torch.from_numpy(g)
    tw.grad = tg
    sgd = torch.optim.SGD([tw], 1e-3, momentum=0.9, weight_decay=1e-4, fused=True)
    ta = torch.nn.Parameter(torch.from_numpy(w.copy()))
    ta.grad = tg
    adamw = torch.optim.AdamW([ta], 1e-3, fused=True)
    logits, target = normal(64, 1000), RNG.integers(0, 1000, 64).astype(np.int32)
    dlogits, t_target = np.empty_like(logits), torch.from_numpy(target).long()

    def torch_cross_entropy() -> None:
        z = torch.from_numpy(logits).requires_grad_()
        F.cross_entropy(z, t_target).backward()

    attention = normal(8 * 12, 128, 128)
    probabilities = np.empty_like(attention)
    tokens = normal(8, 512, 6, 64)
    heads = np.empty((8, 6, 512, 64), np.float32)
    shuffled = np.empty((n, 28 * 28, 58, 2), np.float32)
    groups = normal(n, 28 * 28, 2, 58)
    nchw = normal(n, c, hw, hw)
    return {
        "binary add, same shape": (
            ours("binary", [0, 1, size, 1, 1], [], [x, y, out]),
            lambda: torch.add(tx, ty, out=tout),
        ),
        "binary mul, [rows, cols] by [cols]": (
            ours("binary", [2, 2, rows, c, c, 1, 0, 1], [], [x, vector, out]),
            lambda: torch.mul(tx, tvector, out=tout),
        ),
        "binary mul, NHWC by [N,1,1,C]": (
            ours("binary", [2, 3, n, hw * hw, c, hw * hw * c, c, 1, c, 0, 1], [], [x, gate, out]),
            lambda: torch.mul(tx, tgate, out=tout),
        ),
        "affine relu6 + bits": (
            ours("affine", [rows, c, 2, 1], [0, 6], [x, vector, sums, out, bits]),
            lambda: F.relu6(tx * tvector + tvector),
        ),
        "affine silu": (ours("affine", [rows, c, 8, 0], [0, 0], [x, None, None, out, None]), lambda: F.silu(tx)),
        "affine gelu + q4": (
            ours("affine", [rows, c, 9, 2], [0, 0], [x, None, None, out, nibbles]),
            lambda: F.gelu(tx),
        ),
        "activation_grad from bits": (
            ours("activation_grad", [rows, c, 1, 1, 0], [0, 0], [x, bits, out, None, None]),
            lambda: torch.ops.aten.threshold_backward(tx, ty, 0),
        ),
        "activation_grad from q4": (
            ours("activation_grad", [rows, c, 8, 2, 0], [0, 0], [x, nibbles, out, None, None]),
            lambda: torch.ops.aten.silu_backward(tx, ty),
        ),
        "channel_sum": (ours("channel_sum", [rows, c], [], [x, sums, scratch]), lambda: tx.sum((0, 1, 2))),
        "reduce mean over H, W": (
            ours("reduce", [1, 3, n, hw * hw, c, 0, 1, 0], [], [x, means, None]),
            lambda: cl.mean((2, 3)),
        ),
        "broadcast over H, W": (
            ours("broadcast", [3, n, hw * hw, c, c, 0, 1], [1e-3], [means, out]),
            lambda: torch.mul(torch.from_numpy(means)[:, None, None, :].expand(n, hw, hw, c), 1e-3, out=tout),
        ),
        "max_pool 3x3/2": (
            ours("max_pool", max_ints, [], [x, pooled, index]),
            lambda: F.max_pool2d(leaf, 3, 2, 1, return_indices=True),
        ),
        "max_pool_grad 3x3/2": (
            ours("max_pool_grad", max_ints, [], [pooled, index, out]),
            lambda: torch.ops.aten.max_pool2d_with_indices_backward(
                t_pooled, leaf, [3, 3], [2, 2], [1, 1], [1, 1], False, t_index
            ),
        ),
        "average_pool 2x2/2": (
            ours("average_pool", average_ints, [], [x, pooled]),
            lambda: F.avg_pool2d(leaf, 2, 2),
        ),
        "average_pool_grad 2x2/2": (
            ours("average_pool_grad", average_ints, [], [pooled, out]),
            lambda: torch.ops.aten.avg_pool2d_backward(t_pooled, leaf, [2, 2], [2, 2], [0, 0], False, True, None),
        ),
        "copy contiguous": (ours("copy", [1, size, 1, 1, 0, 0], [], [x, out]), lambda: tout.copy_(tx)),
        "copy slice into a concatenation": (
            ours("copy", [2, rows, 72, 144, 1, 144, 1, 0, 72], [], [x, out]),
            lambda: tout.view(rows, c)[:, 72:].copy_(tx.view(rows, c)[:, :72]),
        ),
        "copy NCHW to NHWC": (
            ours("copy", [3, n, hw * hw, c, hw * hw * c, 1, hw * hw, hw * hw * c, c, 1, 0, 0], [], [nchw, out]),
            lambda: tout.copy_(torch.from_numpy(nchw).permute(0, 2, 3, 1)),
        ),
        "copy channel shuffle, 2 groups": (
            ours("copy", [3, n * 784, 58, 2, 116, 1, 58, 116, 2, 1, 0, 0], [], [groups, shuffled]),
            lambda: torch.from_numpy(shuffled).copy_(torch.from_numpy(groups).transpose(2, 3)),
        ),
        "copy tokens to heads": (
            ours(
                "copy", [4, 8, 6, 512, 64, 512 * 384, 64, 384, 1, 512 * 384, 512 * 64, 64, 1, 0, 0], [], [tokens, heads]
            ),
            lambda: torch.from_numpy(heads).copy_(torch.from_numpy(tokens).transpose(1, 2)),
        ),
        "softmax [12288, 128]": (
            ours("softmax", [attention.size // 128, 128, 1], [], [attention, probabilities]),
            lambda: torch.from_numpy(attention).softmax(-1),
        ),
        "softmax_grad [12288, 128]": (
            ours("softmax_grad", [attention.size // 128, 128, 1], [], [attention, probabilities, attention.copy()]),
            lambda: torch.ops.aten._softmax_backward_data(
                torch.from_numpy(attention), torch.from_numpy(probabilities), -1, torch.float32
            ),
        ),
        "dropout": (ours("dropout", [size // n, n, 1], [0.1], [x, out]), lambda: F.dropout(tx, 0.1)),
        "cross_entropy + gradient [64, 1000]": (
            ours("cross_entropy", [64, 1, 1000, -100], [0], [logits, target, dlogits], valid_batch=64, valid_micro=64),
            torch_cross_entropy,
        ),
        "sgd momentum, 3M": (ours("sgd", [params, 0], [0.9, 1e-4], [w, g, m, None], learning_rate=1e-9), sgd.step),
        "adamw, 3M": (
            ours("adamw", [params], [0.9, 0.999, 1e-8, 0.01], [w, g, m, np.abs(v), None], learning_rate=1e-9),
            adamw.step,
        ),
    }


def seconds(call: Call) -> float:
    """Of the second call: the first wakes this side's threads while the other side's may still be spinning."""
    call()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"| kernel | ours, ms | torch, ms | torch / ours |\n|{'---|' * 4}")
    with torch.no_grad():
        table = cases(options.threads)
    for name, (ours, theirs) in table.items():
        with torch.set_grad_enabled("gradient [" in name):
            ours(), theirs()
            pairs = [(seconds(ours), seconds(theirs)) for _ in range(options.repeat)]
        a, b = (statistics.median(column) * 1e3 for column in zip(*pairs, strict=True))
        print(f"| {name} | {a:.3f} | {b:.3f} | {b / a:.2f} |", flush=True)


if __name__ == "__main__":
    main()
