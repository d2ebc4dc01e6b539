"""Peak resident memory of the whole training process, inside a memory cgroup of exactly the cap.

python dev.py bench memory [--cap 128MB]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

from benchmarks.common import Worker, markdown_table, write_result
from benchmarks.models import NAMES, bundle
from device_tests.cgroup import run_confined, unavailable


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", default=["mobilenet_v2", "efficientnet_lite0"], choices=NAMES)
    parser.add_argument("--cap-mb", type=int, default=128)
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    reason, cap, rows = unavailable(), options.cap_mb * 10**6, []
    for model in options.models:
        command = [sys.executable, "-m", "device_tests.train_once", str(bundle(model)), "--mem-budget", str(cap)]
        command += ["--sparsity", "0.95", "--steps", str(options.steps), "--predict"]
        if reason is None:
            confined = run_confined(command, cap)
            status, output = confined.returncode, confined.stdout
            proof = f"finished in a cgroup of {options.cap_mb} MB" if status == 0 else f"killed ({status})"
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
        f"Peak memory of the process: 224×224, batch 8, SGD, all parameters, cap {options.cap_mb} MB",
        "python dev.py bench memory",
        markdown_table(header, rows),
        "torch",
    )


if __name__ == "__main__":
    main()
