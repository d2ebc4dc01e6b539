"""One short training in a process of its own, as an app would do it; prints one JSON line with the memory it took.

python -m device_tests.train_once MODEL.razor --mem-budget 128MB --batch-size 8 --sparsity 0.95 --steps 5
"""

from __future__ import annotations

import argparse
import json
import time
from statistics import median
from typing import Any

import numpy as np


def peak_rss_bytes() -> int:
    """High-water mark of this process's resident set, bytes (VmHWM)."""
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle")
    parser.add_argument("--mem-budget")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--sparsity", default="auto")
    parser.add_argument("--razor", default="centered")
    parser.add_argument("--frozen-weights", default="fp32")
    parser.add_argument("--optimizer", default="sgd")
    parser.add_argument("--momentum", type=float, default=0.0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--vocabulary", type=int, default=1000, help="token indices are below this")
    parser.add_argument("--predict", action="store_true", help="also run an evaluation pass")
    options = parser.parse_args()

    import edge_razor

    settings: dict[str, Any] = {"optimizer": options.optimizer, "lr": 1e-3}
    if options.optimizer == "sgd":
        settings["momentum"] = options.momentum
    trainer = edge_razor.Trainer(
        options.bundle,
        mem_budget=options.mem_budget,
        batch_size=options.batch_size,
        sparsity=options.sparsity if options.sparsity == "auto" else float(options.sparsity),
        razor=options.razor,
        frozen_weights=options.frozen_weights,
        threads=options.threads,
        seed=0,
        **settings,
    )
    generator = np.random.default_rng(0)
    inputs: Any = []
    for spec in trainer.bundle.manifest.inputs:
        shape = (options.batch_size, *spec.shape)
        if spec.indices:
            inputs.append(generator.integers(0, options.vocabulary, shape))
        elif spec.dtype == "float32":
            inputs.append(generator.standard_normal(shape, dtype=np.float32))
        else:
            inputs.append(np.ones(shape, np.int64))
    inputs = inputs if len(inputs) > 1 else inputs[0]
    labels = generator.integers(0, options.classes, options.batch_size)
    losses, seconds = [], []
    for _ in range(options.steps):
        start = time.perf_counter()
        losses.append(trainer.step(inputs, labels))
        seconds.append(time.perf_counter() - start)
    if options.predict:
        trainer.predict(inputs)
    summary = trainer.plan.summary
    print(
        json.dumps(
            {
                "losses": losses,
                "seconds_a_step": median(seconds[1:] or seconds),
                "fastest_step": min(seconds),
                "peak_rss_bytes": peak_rss_bytes(),
                "predicted_peak_bytes": summary["predicted_peak_bytes"],
                "arena_bytes": summary["arena_bytes"],
                "micro_batch": summary["micro_batch"],
                "sparsity": summary["sparsity"],
                "items": summary.get("items"),
            }
        )
    )


if __name__ == "__main__":
    main()
