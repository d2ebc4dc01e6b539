"""Weight gradient from the razor form, layer by layer, against dense sgemm and PyTorch eager (oneDNN) in one process.

    OMP_WAIT_POLICY=passive OPENBLAS_THREAD_TIMEOUT=4 OPENBLAS_NUM_THREADS=2 \\
        python -m benchmarks.kernels_weight_grad --threads 2 [--batch 8] [--sparsity 0.95] [--form centered]
        [--rounds 9] [--filter dw] [--write]

Layers are those of benchmarks.kernels_conv; the first layers, whose input is never packed, are left out, and the last,
with one row a sample, is kept in bf16, as in a plan. sgemm is numpy's OpenBLAS on dense data that already lies in
columns (im2col is not counted); PyTorch's time is the better of its two memory formats. Calls alternate; a figure is
the median of the rounds, so compare the ratios. With one thread the clock is CPU time, so that a busy machine disturbs
less. PyTorch's and OpenBLAS' threads must sleep when they have nothing to do: by default they spin for a while, on the
cores that whoever has the next turn should have. Pack is what the forward pass pays for the kept form, once for each
activation.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from benchmarks.common import markdown_table, write_result
from benchmarks.kernels_conv import LAYERS, Layer, aligned, alternate
from edge_razor.runtime import KernelCall, kernel_scratch, packed_bytes
from tests.reference.razor import FORMS, keep_count

SLEEPING = {"OMP_WAIT_POLICY": "passive", "OPENBLAS_THREAD_TIMEOUT": "4"}


def torch_calls(layer: Layer, batch: int) -> list[Callable[[], object]]:
    """PyTorch's weight gradient in both memory formats."""
    calls: list[Callable[[], object]] = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(batch, layer.ic, layer.size, layer.size).to(memory_format=memory_format)
        w = torch.randn(layer.oc, layer.ic // layer.group, layer.k, layer.k).to(memory_format=memory_format)
        dy = torch.randn(batch, layer.oc, layer.out, layer.out).to(memory_format=memory_format)
        geometry = ([layer.stride] * 2, [layer.k // 2] * 2, [1, 1], False, [0, 0], layer.group, [False, True, False])
        calls.append(partial(torch.ops.aten.convolution_backward, dy, x, w, None, *geometry))
    return calls


def sgemm_call(layer: Layer, batch: int) -> Callable[[], object] | None:
    """G = Colᵀ·dY by numpy; None for a depthwise convolution, which is no matrix product."""
    if layer.group > 1:
        return None
    rows = batch * layer.out**2
    rng = np.random.default_rng(0)
    columns = aligned((rows, layer.k**2 * layer.ic), rng=rng)
    dy = aligned((rows, layer.oc), rng=rng)
    out = aligned((layer.k**2 * layer.ic, layer.oc))
    return lambda: np.matmul(columns.T, dy, out=out)


def our_calls(
    layer: Layer, batch: int, threads: int, form: int, sparsity: float
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Pack of relu6-like values (centered around 1, a third of them 0), and the weight gradient from what it wrote."""
    rng = np.random.default_rng(0)
    x = aligned((batch, layer.size**2, layer.ic), rng=rng)
    np.clip(x + 0.5, 0, 6, out=x)
    dy = aligned((batch, layer.out**2, layer.oc), rng=rng)
    keep = keep_count(x[0].size, sparsity) if form >= 2 else 0
    kept = [form, batch, layer.size**2, layer.ic, keep]
    packed = aligned((packed_bytes(*kept),), np.uint8) if form else x
    pack_operands = [x, packed, aligned((max(1, kernel_scratch("pack", kept, [], threads)),), np.uint8)] if form else []
    ints = [*layer.ints(batch), form, keep]
    size = kernel_scratch("conv_grad_weight", ints, [], threads)
    g = aligned((layer.k**2, layer.ic // layer.group, layer.oc))
    operands = [packed, dy, g, aligned((size,), np.uint8) if size else None]

    pack = KernelCall("pack", kept, [], pack_operands, threads)
    return pack, KernelCall("conv_grad_weight", ints, [], operands, threads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sparsity", type=float, default=0.95)
    parser.add_argument("--form", choices=["plain", "centered"], default="centered")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--filter", default="", help="only layers whose name contains this")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/kernels_weight_grad.md")
    args = parser.parse_args()
    if os.environ.get("OPENBLAS_NUM_THREADS") != str(args.threads):
        parser.error(f"set OPENBLAS_NUM_THREADS={args.threads}, so that numpy's sgemm has as many threads")
    for name, value in SLEEPING.items():
        if os.environ.get(name) != value:
            parser.error(f"set {name}={value}, so that idle threads of one system take no time from another")
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.threads == 1 else time.perf_counter

    rows: list[list[str]] = []
    totals = [0.0, 0.0, 0.0]
    ratios: dict[str, list[tuple[float, bool]]] = {"sgemm": [], "PyTorch": []}  # and whether it is of a razor form
    for layer in LAYERS:
        if args.filter not in layer.name or layer.ic == 3:
            continue
        form = FORMS["bf16" if layer.size**2 < 8 else args.form]
        pack, ours = our_calls(layer, args.batch, args.threads, form, args.sparsity)
        dense = our_calls(layer, args.batch, args.threads, FORMS["dense"], 0.0)[1]
        pack()
        sgemm = sgemm_call(layer, args.batch)
        calls = [pack, ours, dense, *torch_calls(layer, args.batch), *([sgemm] if sgemm else [])]
        seconds = alternate(calls, args.rounds, clock)
        packing, mine, mine_dense = seconds[:3]
        theirs = min(seconds[3:5])
        totals = [a + b for a, b in zip(totals, (packing, mine, theirs), strict=True)]
        razor = form >= FORMS["plain"]
        ratios["PyTorch"].append((theirs / mine, razor))
        row = [
            layer.name if razor else f"{layer.name} (bf16)",
            *(f"{1e3 * t:.3f}" for t in (packing, mine, mine_dense)),
        ]
        row += [f"{1e3 * seconds[5]:.3f}", f"{seconds[5] / mine:.1f}"] if sgemm else ["–", "–"]
        if sgemm:
            ratios["sgemm"].append((seconds[5] / mine, razor))
        rows.append([*row, f"{1e3 * theirs:.3f}", f"{theirs / mine:.1f}"])
        if not args.write:
            print("  ".join(f"{cell:>18}" if i == 0 else f"{cell:>8}" for i, cell in enumerate(rows[-1])), flush=True)

    def means(every: bool) -> str:
        parts = {name: [r for r, razor in part if razor or every] for name, part in ratios.items()}
        return ", ".join(f"{name} {statistics.geometric_mean(part):.1f}" for name, part in parts.items() if part)

    summary = (
        f"Sum over the layers: pack {1e3 * totals[0]:.1f} ms, weight gradient {1e3 * totals[1]:.1f} ms, PyTorch's "
        f"{1e3 * totals[2]:.1f} ms. Geometric mean of the speed-ups of the razor form against {means(False)}; with "
        f"what is kept in bf16, because it has one row a sample, {means(True)}.\n"
    )
    if not args.write:
        print(summary)
        return
    header = ["layer", "pack ms", f"{args.form} {args.sparsity} ms", "ours, dense ms", "sgemm ms", "speed-up"]
    header += ["PyTorch ms", "speed-up"]
    settings = SLEEPING | {"OPENBLAS_NUM_THREADS": str(args.threads)}
    command = " ".join(f"{name}={value}" for name, value in settings.items())
    command += f" python -m benchmarks.kernels_weight_grad --threads {args.threads} --write"
    title = f"Weight gradient from kept activations, batch {args.batch}, {args.threads} threads"
    note = (
        f"Speed-ups are those of the razor form ({args.form}, sparsity {args.sparsity}), whose packing is the first "
        "column. sgemm: im2col not counted. PyTorch: the better of its two memory formats. Medians of calls in turns "
        "in one process.\n\n"
    )
    write_result("kernels_weight_grad", title, command, note + markdown_table(header, rows) + "\n" + summary, "torch")


if __name__ == "__main__":
    main()
