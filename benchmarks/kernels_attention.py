"""Attention's two backward passes: probabilities made again from Q, K and V, or the largest of each query kept.

    python -m benchmarks.kernels_attention [--threads 1] [--samples 2] [--rounds 9] [--write]

Recomputation keeps Q, K and V in bf16. The other keeps them in the razor form (centered) at the same sparsity as the
probabilities. Forward is attention and the packing of what it keeps. Calls alternate; a figure is the median of the
rounds, so compare the ratios. With one thread the clock is CPU time, so that a busy machine disturbs less.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np

from benchmarks.common import markdown_table, write_result
from benchmarks.kernels_conv import aligned, alternate
from edge_razor.runtime import kernel_run, kernel_scratch, packed_bytes
from tests.reference.razor import FORMS, keep_count

# Positions, heads, columns of a head, causal: MiniLM, ViT-B/16, BERT at its longest, GPT-2 at its longest.
SIZES = ((128, 12, 32, False), (197, 12, 64, False), (512, 12, 64, False), (1024, 12, 64, True))
SPARSITIES = (0.9, 0.97)


def scratch(name: str, ints: list[int], floats: list[float], threads: int) -> np.ndarray:
    return aligned((max(64, kernel_scratch(name, ints, floats, threads)),), np.uint8)


def calls(
    size: tuple[int, int, int, bool], samples: int, threads: int, sparsity: float | None
) -> tuple[Callable[[], None], Callable[[], None], int]:
    """Forward and backward call, and the bytes kept between them; sparsity None recomputes."""
    t, heads, d, causal = size
    rng, width = np.random.default_rng(0), heads * d
    q, k, v, dy = (aligned((samples, t, width), rng=rng) for _ in range(4))
    y, *gradients = (aligned((samples, t, width)) for _ in range(4))
    form = FORMS["bf16" if sparsity is None else "centered"]
    values = 0 if sparsity is None else keep_count(t * width, sparsity)
    keep = 0 if sparsity is None else keep_count(t, sparsity)
    sizes = [form, samples, t, width, values]
    packed = [aligned((packed_bytes(*sizes),), np.uint8) for _ in range(3)]
    rows = aligned((packed_bytes(4, samples * heads, t, t, keep),), np.uint8) if keep else None
    ints, floats = [samples, t, t, heads, heads, d, int(causal), 0, 0], [d**-0.5, 0.0]
    backward = [*ints, form, form, form, *[values] * 3, keep]
    spaces = [
        scratch("pack", sizes, [], threads),
        scratch("attention", [*ints, keep], floats, threads),
        scratch("attention_grad", backward, floats, threads),
    ]

    def run_forward() -> None:
        for x, out in zip((q, k, v), packed, strict=True):
            kernel_run("pack", sizes, [], [x, out, spaces[0]], threads)
        kernel_run("attention", [*ints, keep], floats, [q, k, v, None, None, y, rows, spaces[1]], threads)

    def run_backward() -> None:
        operands = [*packed, None, None, dy, rows, *gradients, None, None, None, spaces[2]]
        kernel_run("attention_grad", backward, floats, operands, threads)

    run_forward()
    return run_forward, run_backward, sum(x.nbytes for x in packed) + (0 if rows is None else rows.nbytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/kernels_attention.md")
    args = parser.parse_args()
    clock = time.process_time if args.threads == 1 else time.perf_counter
    table: list[tuple[str, ...]] = []
    for size in SIZES:
        made = [calls(size, args.samples, args.threads, sparsity) for sparsity in (None, *SPARSITIES)]
        seconds = alternate([call for forward, backward, _ in made for call in (forward, backward)], args.rounds, clock)
        t, heads, d, causal = size
        name = f"{t} × {heads} × {d}" + (", causal" if causal else "")
        whole = seconds[0] + seconds[1]
        for index, label in enumerate(("recompute", *(f"probabilities {s}" for s in SPARSITIES))):
            forward, backward = seconds[2 * index : 2 * index + 2]
            kept = made[index][2]
            row = (name, label, f"{kept / args.samples / 1e3:.0f}", f"{made[0][2] / kept:.2f}")
            row += tuple(f"{1e3 * x:.2f}" for x in (forward, backward))
            table.append((*row, f"{seconds[1] / backward:.2f}", f"{whole / (forward + backward):.2f}"))
            print("  ".join(f"{cell:>20}" for cell in table[-1]), flush=True)
    if args.write:
        header = ("positions × heads × columns", "backward pass", "kept kB a sample", "times less")
        header += ("forward ms", "backward ms", "backward faster", "both faster")
        title = f"Attention: recomputation against kept probabilities, {args.samples} samples, {args.threads} threads"
        command = f"python -m benchmarks.kernels_attention --threads {args.threads} --samples {args.samples} --write"
        assert __doc__ is not None
        body = __doc__.split("\n\n")[2] + "\n\n" + markdown_table(header, table)
        write_result("kernels_attention", title, command, body)


if __name__ == "__main__":
    main()
