"""Convolution forward and input gradient, layer by layer, against PyTorch eager (oneDNN) in one process.

    python -m benchmarks.kernels_conv [--batch 8] [--threads 2] [--rounds 15] [--filter dw] [--write]

Layers are the distinct convolutions of MobileNetV2, EfficientNet-Lite0 (224 px) and ResNet-18. PyTorch's time is the
better of its two memory formats. Ours and PyTorch's calls alternate; a figure is the median of the rounds, so compare
the ratios. With one thread the clock is CPU time, so that a busy machine disturbs less. Ours includes scale, shift,
relu and its kept bits; PyTorch's is the bare convolution.
"""

from __future__ import annotations

import argparse
import math
import mmap
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.common import markdown_table, write_result
from edge_razor.runtime import KernelCall, kernel_scratch

HUGE_PAGE = 2 << 20  # bytes


@dataclass(frozen=True)
class Layer:
    name: str
    size: int  # input pixels a side
    ic: int
    oc: int
    k: int = 1
    stride: int = 1
    group: int = 1

    @property
    def out(self) -> int:
        return (self.size + self.stride - 1) // self.stride

    def ints(self, batch: int) -> list[int]:
        """ConvShape of docs/plan-format.md, padding k // 2."""
        pad, k, s = self.k // 2, self.k, self.stride
        head = [batch, self.size, self.size, self.ic, self.out, self.out, self.oc]
        return [*head, k, k, s, s, pad, pad, 1, 1, self.group]

    def flops(self, batch: int) -> int:
        return 2 * batch * self.out**2 * self.oc * self.ic // self.group * self.k**2


def pointwise(size: int, *pairs: tuple[int, int]) -> list[Layer]:
    return [Layer(f"pw {size} {a}-{b}", size, a, b) for a, b in pairs]


def depthwise(k: int, *shapes: tuple[int, int, int]) -> list[Layer]:
    return [Layer(f"dw{k} {size} {c} s{s}", size, c, c, k, s, c) for size, c, s in shapes]


def dense(*shapes: tuple[int, int, int, int, int]) -> list[Layer]:
    return [Layer(f"k{k} {size} {a}-{b} s{s}", size, a, b, k, s) for size, a, b, k, s in shapes]


LAYERS = [
    *dense((224, 3, 32, 3, 2)),
    *pointwise(112, (32, 16), (16, 96)),
    *pointwise(56, (96, 24), (24, 144), (144, 24)),
    *pointwise(28, (144, 32), (32, 192), (192, 32), (144, 40), (40, 240), (240, 40)),
    *pointwise(14, (192, 64), (64, 384), (384, 64), (384, 96), (96, 576), (576, 96)),
    *pointwise(14, (240, 80), (80, 480), (480, 112), (112, 672), (672, 112)),
    *pointwise(7, (576, 160), (160, 960), (960, 160), (960, 320), (320, 1280), (192, 1152), (1152, 192)),
    *depthwise(3, (112, 32, 1), (112, 96, 2), (56, 144, 1), (56, 144, 2), (28, 192, 1), (28, 192, 2), (14, 384, 1)),
    *depthwise(3, (14, 576, 1), (14, 576, 2), (7, 960, 1), (7, 1152, 1), (28, 240, 2)),
    *depthwise(5, (56, 144, 2), (28, 240, 1), (14, 480, 1), (14, 672, 1), (14, 672, 2), (7, 1152, 1)),
    Layer("linear 1280-1000", 1, 1280, 1000),
    *dense((224, 3, 64, 7, 2), (56, 64, 64, 3, 1), (56, 64, 128, 3, 2), (28, 128, 128, 3, 1), (28, 128, 256, 3, 2)),
    *dense((14, 256, 256, 3, 1), (14, 256, 512, 3, 2), (7, 512, 512, 3, 1), (56, 64, 128, 1, 2)),
]


def alternate(calls: list[Callable[[], object]], rounds: int, clock: Callable[[], float]) -> list[float]:
    """Median seconds of each call, taking turns. A round lasts at least about a millisecond."""
    repeat = []
    for call in calls:
        call()
        start = clock()
        call()
        repeat.append(max(1, min(50, math.ceil(1e-3 / max(clock() - start, 1e-6)))))
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for times, call, count in zip(seconds, calls, repeat, strict=True):
            start = clock()
            for _ in range(count):
                call()
            times.append((clock() - start) / count)
    return [statistics.median(times) for times in seconds]


def torch_calls(layer: Layer, batch: int, backward: bool) -> list[Callable[[], object]]:
    """PyTorch's convolution, or its input gradient, in both memory formats."""
    calls: list[Callable[[], object]] = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(batch, layer.ic, layer.size, layer.size).to(memory_format=memory_format)
        w = torch.randn(layer.oc, layer.ic // layer.group, layer.k, layer.k).to(memory_format=memory_format)
        geometry = ([layer.stride] * 2, [layer.k // 2] * 2, [1, 1], False, [0, 0], layer.group)
        y = torch.ops.aten.convolution(x, w, None, *geometry)
        if backward:
            dy = torch.randn(y.shape).to(memory_format=memory_format)
            mask = [True, False, False]
            op = torch.ops.aten.convolution_backward
            calls.append(lambda dy=dy, x=x, w=w, g=geometry, m=mask, op=op: op(dy, x, w, None, *g, m))
        else:
            calls.append(lambda x=x, w=w, g=geometry: torch.ops.aten.convolution(x, w, None, *g))
    return calls


def aligned(shape: tuple[int, ...], dtype: type = np.float32, rng: np.random.Generator | None = None) -> np.ndarray:
    """An array that starts at a multiple of 64 bytes, in huge pages if there are any, as in the runtime's arena; normal
    values or zeros."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    room = mmap.mmap(-1, size + 2 * HUGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        room.madvise(mmap.MADV_HUGEPAGE)
    data = np.frombuffer(room, np.uint8)  # keeps the mapping
    start = -data.ctypes.data % HUGE_PAGE
    array = data[start : start + size].view(dtype).reshape(shape)
    if rng is not None:
        array[...] = rng.standard_normal(shape, np.float32)
    return array


def our_calls(layer: Layer, batch: int, threads: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """Forward with shift, relu and kept bits; input gradient with the same scale."""
    rng = np.random.default_rng(0)
    ints = layer.ints(batch)
    x = aligned((batch, layer.size, layer.size, layer.ic), rng=rng)
    w = aligned((layer.k, layer.k, layer.ic // layer.group, layer.oc), rng=rng)
    y = aligned((batch, layer.out, layer.out, layer.oc), rng=rng)
    dy = aligned(y.shape, rng=rng)
    scale, shift = aligned((layer.oc,), rng=rng), aligned((layer.oc,), rng=rng)
    kept = aligned((y.size // layer.oc, (layer.oc + 7) // 8), np.uint8)
    dx = aligned(x.shape)

    def scratch(kernel: str, attributes: list[int], floats: list[float]) -> np.ndarray | None:
        size = kernel_scratch(kernel, attributes, floats, threads)
        return aligned((size,), np.uint8) if size else None

    forward, floats, gradient = [*ints, 1, 1], [0.0, 0.0], [*ints, 0, 0, 0, 0]
    forward_operands = [x, w, scale, shift, y, kept, scratch("conv", forward, floats)]
    gradient_operands = [dy, w, scale, dx, None, None, scratch("conv_grad_input", gradient, floats)]
    return (
        KernelCall("conv", forward, floats, forward_operands, threads),
        KernelCall("conv_grad_input", gradient, floats, gradient_operands, threads),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--filter", default="", help="only layers whose name contains this")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/kernels_conv.md")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    clock = time.process_time if args.threads == 1 else time.perf_counter
    rows = []
    totals = [0.0] * 4
    for layer in LAYERS:
        if args.filter not in layer.name:
            continue
        row: list[str] = [layer.name]
        for direction, ours in enumerate(our_calls(layer, args.batch, args.threads)):
            seconds = alternate([ours, *torch_calls(layer, args.batch, direction == 1)], args.rounds, clock)
            mine, theirs = seconds[0], min(seconds[1:])
            totals[2 * direction] += mine
            totals[2 * direction + 1] += theirs
            speed = layer.flops(args.batch) / mine / 1e9
            row += [f"{mine * 1e3:.3f}", f"{theirs * 1e3:.3f}", f"{theirs / mine:.2f}", f"{speed:.0f}"]
        rows.append(row)
        if not args.write:
            print("  ".join(f"{cell:>18}" if i == 0 else f"{cell:>8}" for i, cell in enumerate(row)), flush=True)
    ratios = [float(row[3]) for row in rows], [float(row[7]) for row in rows]
    means = [math.exp(sum(map(math.log, part)) / len(part)) for part in ratios]
    summary = (
        f"Sum over the layers: forward {totals[0] * 1e3:.1f} ms, PyTorch {totals[1] * 1e3:.1f} ms; input gradient "
        f"{totals[2] * 1e3:.1f} ms, PyTorch {totals[3] * 1e3:.1f} ms. Geometric mean of the speed-ups: forward "
        f"{means[0]:.2f}, input gradient {means[1]:.2f}.\n"
    )
    if not args.write:
        print(summary)
        return
    header = ["layer", "forward ms", "PyTorch ms", "speed-up", "GFLOP/s"]
    header += ["input gradient ms", "PyTorch ms", "speed-up", "GFLOP/s"]
    command = f"python -m benchmarks.kernels_conv --batch {args.batch} --threads {args.threads} --write"
    title = f"Convolution kernels, batch {args.batch}, {args.threads} threads"
    note = (
        "Ours: scale, shift, relu and kept bits included. PyTorch: the bare convolution, the better of its two memory "
        "formats. Medians of alternating calls in one process.\n\n"
    )
    write_result("kernels_conv", title, command, note + markdown_table(header, rows) + "\n" + summary, "torch")


if __name__ == "__main__":
    main()
