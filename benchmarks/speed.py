"""Seconds a training step against PyTorch eager: same threads, same batch, in turns, medians.

python dev.py bench speed [--models mobilenet_v2 efficientnet_lite0] [--rounds 15] [--threads 2]
"""

from __future__ import annotations

import argparse
from statistics import median

from benchmarks.common import Worker, markdown_table, write_result
from benchmarks.models import NAMES, bundle

CASES = (
    ("edge-razor, centered 0.95", ("edge-razor", "--sparsity", "0.95")),
    ("edge-razor, sparsity 0", ("edge-razor", "--sparsity", "0")),
    ("PyTorch eager", ("torch",)),
    ("PyTorch eager, channels_last", ("torch-channels-last",)),
    ("onnxruntime, inference only", ("onnxruntime",)),
)
WARM_UP = 2


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", default=["mobilenet_v2", "efficientnet_lite0"], choices=NAMES)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    options = parser.parse_args()
    rows = []
    for model in options.models:
        path = bundle(model, options.size)
        common = ("--bundle", str(path), "--threads", str(options.threads), "--size", str(options.size))
        common += ("--batch-size", str(options.batch_size))
        workers = [Worker(system, model, *common, *rest) for _, (system, *rest) in CASES]
        seconds: list[list[float]] = [[] for _ in workers]
        for turn in range(options.rounds + WARM_UP):
            for worker, times in zip(workers, seconds, strict=True):
                answer = worker.ask("step")
                if turn >= WARM_UP:
                    times.append(answer["seconds"])
        peaks = [worker.ask("stop")["peak_rss_bytes"] for worker in workers]
        best_torch = min(median(seconds[2]), median(seconds[3]))
        for (label, _), times, peak in zip(CASES, seconds, peaks, strict=True):
            step = median(times)
            rows.append(
                (
                    model,
                    label,
                    f"{step:.3f}",
                    f"{min(times):.3f}–{max(times):.3f}",
                    f"{options.batch_size / step:.1f}",
                    f"{best_torch / step:.2f}x",
                    f"{peak / 1e6:.0f}",
                )
            )
    header = (
        "model",
        "system",
        "seconds a step (median)",
        "range",
        "images/s",
        "against the better PyTorch",
        "peak RSS, MB",
    )
    write_result(
        "speed",
        f"Training step, {options.size}×{options.size}, batch {options.batch_size}, SGD, {options.threads} threads",
        "python dev.py bench speed",
        markdown_table(header, rows)
        + f"\nIn turns, one step each, {options.rounds} rounds after {WARM_UP} of warm-up.\n",
        "torch",
        "onnxruntime",
    )


if __name__ == "__main__":
    main()
