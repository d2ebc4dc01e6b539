"""One system under measurement in a process of its own; see ``common.Worker``.

    python -m benchmarks.worker SYSTEM MODEL --batch-size 8 --size 224 [--bundle PATH] [--sparsity 0.95] …

Reads commands from standard input, one a line, and answers each with one line of JSON: ``step`` with seconds and loss,
``profile N`` with the lines of a profile of N steps, ``stop`` with the peak memory. The first line tells the setup. An
answer with ``error`` is the last.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.models import workload

# Imported only in the process that needs it: each has other dependencies.
SYSTEMS = {
    "edge-razor": "ours:edge_razor",
    "onnxruntime": "ours:onnxruntime_inference",
    "onnxruntime-training": "ort_training:make",
    "machine": "machine:make",
    "torch": "pytorch:make",
    "torch-channels-last": "pytorch:make",
    "torch-compile": "pytorch:make",
    "torch-checkpoint": "pytorch:make",
    "torch-back-razor": "pytorch:make",
}


def peak_rss_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("system", choices=SYSTEMS)
    parser.add_argument("model")
    parser.add_argument("--bundle")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sparsity", type=lambda text: text if text == "auto" else float(text), default=0.95)
    parser.add_argument("--prefer", default="balanced")
    parser.add_argument("--razor", default="centered")
    parser.add_argument("--mem-budget")
    parser.add_argument("--optimizer", default="sgd", choices=("sgd", "adamw"))
    return parser.parse_args()


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not get between the answers

    def answer(**figures: Any) -> None:
        answers.write(json.dumps(figures) + "\n")

    try:
        serve(arguments(), answer)
    except Exception as error:
        text = " ".join(str(error).split())
        answer(error=f"{type(error).__name__}: {text}"[:300])
        raise


def serve(options: argparse.Namespace, answer: Any) -> None:
    """Sets the system up and answers commands until ``stop`` or the end of the input."""
    inputs, labels = workload(options.model, options.batch_size, options.size, options.classes)
    module, function = SYSTEMS[options.system].split(":")
    system = getattr(importlib.import_module(f"benchmarks.systems.{module}"), function)(options, inputs, labels)
    answer(**system.setup)
    for line in sys.stdin:
        command, *values = line.split()
        if command == "step":
            start = time.perf_counter()
            loss = system.step()
            answer(seconds=time.perf_counter() - start, loss=loss)
        elif command == "profile":
            answer(lines=system.profile(int(values[0])))
        else:
            peak = peak_rss_bytes()
            answer(peak_rss_bytes=peak, **system.finish())
            return


if __name__ == "__main__":
    main()
