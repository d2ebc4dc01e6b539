"""Peak resident memory of the whole training process, inside a memory cgroup of exactly the cap.

python dev.py bench memory [--cases mobilenet_v2:128 vit_base:640]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

from benchmarks.common import Worker, markdown_table, write_result
from benchmarks.models import LANGUAGE, NAMES, bundle
from device_tests.cgroup import run_confined, unavailable

CASES = ("mobilenet_v2:128", "efficientnet_lite0:128", "vit_base:640", "minilm:480", "minilm_lora:200")
TOKENS, TEXTS = 128, 16  # of the models of texts, which train with AdamW


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
        text = model in LANGUAGE
        path = bundle(model, TOKENS) if text else bundle(model)
        settings = ["--batch-size", str(TEXTS), "--optimizer", "adamw"] if text else []
        command = [sys.executable, "-m", "device_tests.train_once", str(path), "--mem-budget", str(cap), *settings]
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
        worker = Worker("torch", model, *settings, *(["--size", str(TOKENS)] if text else []))
        for _ in range(3):
            worker.ask("step")
        rows.append(
            (
                model,
                "PyTorch eager, all parameters",
                f"{worker.ask('stop')['peak_rss_bytes'] / 1e6:.1f}",
                "–",
                "–",
                TEXTS if text else 8,
                "–",
            )
        )
    header = ("model", "system", "peak RSS, MB", "predicted, MB", "arena, MB", "micro-batch", "proof")
    write_result(
        "memory",
        "Peak memory of the process: images 224×224, batch 8, SGD; texts of 128 tokens, batch 16, AdamW",
        "python dev.py bench memory",
        markdown_table(header, rows),
        "torch",
    )


if __name__ == "__main__":
    main()
