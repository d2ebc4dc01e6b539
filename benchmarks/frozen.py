"""Frozen weights in the bundle's file, in bf16 and in int8: memory in a cgroup, and time of a step, in turns.

python dev.py bench frozen
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

from benchmarks.common import markdown_table, write_result
from benchmarks.models import bundle
from device_tests.cgroup import run_confined, unavailable

TOKENS, TEXTS = 128, 16
CAPS_MB = {"fp32": 240, "bf16": 200, "int8": 170}  # all 16 texts at a time fit
SMALL_CAPS_MB = {"fp32": 200, "bf16": 155, "int8": 130}  # 8 at a time


def train(weights: str, cap_mb: int, steps: int, reason: str | None) -> dict[str, Any]:
    """Figures of one training process in a cgroup of the cap (without one where `reason` says why there is none)."""
    cap = cap_mb * 10**6
    command = [sys.executable, "-m", "device_tests.train_once", str(bundle("minilm_lora", TOKENS)), "--predict"]
    command += ["--mem-budget", str(cap), "--batch-size", str(TEXTS), "--optimizer", "adamw", "--sparsity", "0.95"]
    command += ["--steps", str(steps), "--vocabulary", "30000", "--frozen-weights", weights]
    if reason is None:
        done = run_confined(command, cap)
        status, output, error = done.returncode, done.stdout, done.stderr
    else:
        run = subprocess.run(command, capture_output=True, text=True)
        status, output, error = run.returncode, run.stdout, run.stderr
    if status:
        raise SystemExit(f"{weights}, {cap_mb} MB: status {status}\n{error[-2000:]}")
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3, help="of one process for each form, in turns")
    options = parser.parse_args()
    reason, rows = unavailable(), []
    seconds: dict[str, list[float]] = {}
    figures: dict[str, dict[str, Any]] = {}
    for _ in range(options.rounds):
        for weights, cap in CAPS_MB.items():
            figures[weights] = train(weights, cap, options.steps, reason)
            seconds.setdefault(weights, []).append(figures[weights]["fastest_step"])
    for weights, cap in (*CAPS_MB.items(), *SMALL_CAPS_MB.items()):
        small = cap == SMALL_CAPS_MB[weights]
        result = train(weights, cap, 2, reason) if small else figures[weights]
        fastest = min(seconds[weights])
        rows.append(
            (
                weights,
                result["micro_batch"],
                f"{result['peak_rss_bytes'] / 1e6:.1f}",
                f"{result['predicted_peak_bytes'] / 1e6:.1f}",
                f"{result['items']['frozen weights in the file'] / 1e6:.1f}",
                f"{result['items']['parameters'] / 1e6:.1f}",
                "–" if small else f"{fastest:.3f}",
                "–" if small else f"{fastest / min(seconds['fp32']):.2f}",
                reason or f"finished in a cgroup of {cap} MB",
            )
        )
    header = ("frozen weights", "texts at a time", "peak RSS, MB", "predicted, MB", "in the file, MB", "parameters, MB")
    write_result(
        "frozen",
        "MiniLM-L6 with LoRA r=8: 16 texts of 128 tokens, AdamW, centered 0.95",
        "python dev.py bench frozen",
        markdown_table((*header, "fastest step, s", "over fp32", "proof"), rows),
    )


if __name__ == "__main__":
    main()
