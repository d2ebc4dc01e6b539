"""Peak resident memory of the whole training process, inside a memory cgroup of exactly the cap.

python dev.py bench memory [--cases mobilenet_v2:128 vit_base:640]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

from benchmarks.common import Worker, markdown_table, write_result
from benchmarks.models import NAMES, bundle
from device_tests.cgroup import run_confined, unavailable

CASES = ("mobilenet_v2:128", "efficientnet_lite0:128", "vit_base:640")


def case(text: str) -> tuple[str, int]:
    """(model, cap in MB) of model:cap."""
    model, _, cap = text.partition(":")
    if model not in NAMES or not cap.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is no model:cap in MB, such as {CASES[0]}; models: {NAMES}")
    return model, int(cap)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", nargs="+", type=case, default=list(map(case, CASES)), help="model:cap in MB")
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    reason, rows = unavailable(), []
    for model, cap_mb in options.cases:
        cap = cap_mb * 10**6
        command = [sys.executable, "-m", "device_tests.train_once", str(bundle(model)), "--mem-budget", str(cap)]
        command += ["--sparsity", "0.95", "--steps", str(options.steps), "--predict"]
        if reason is None:
            confined = run_confined(command, cap)
            status, output = confined.returncode, confined.stdout
            proof = f"finished in a cgroup of {cap_mb} MB" if status == 0 else f"killed ({status})"
        else:
            done = subprocess.run(command, capture_output=True, text=True)
            status, output, proof = done.returncode, done.stdout, reason
        if status:
            rows.append((model, "edge-razor, centered 0.95", "–", "–", "–", "–", proof))
            continue
        result = json.loads(output.splitlines()[-1])
        peak, predicted = result["peak_rss_bytes"], result["predicted_peak_bytes"]
        rows.append(
            (
                model,
                "edge-razor, centered 0.95",
                f"{peak / 1e6:.1f}",
                f"{predicted / 1e6:.1f} ({100 * (predicted / peak - 1):+.1f} %)",
                f"{result['arena_bytes'] / 1e6:.1f}",
                result["micro_batch"],
                proof,
            )
        )
        worker = Worker("torch", model)
        for _ in range(3):
            worker.ask("step")
        rows.append((model, "PyTorch eager", f"{worker.ask('stop')['peak_rss_bytes'] / 1e6:.1f}", "–", "–", 8, "–"))
    header = ("model", "system", "peak RSS, MB", "predicted, MB", "arena, MB", "micro-batch", "proof")
    write_result(
        "memory",
        "Peak memory of the process: 224×224, batch 8, SGD, all parameters",
        "python dev.py bench memory",
        markdown_table(header, rows),
        "torch",
    )


if __name__ == "__main__":
    main()
