"""One system under measurement in a process of its own; see ``common.Worker``.

    python -m benchmarks.worker SYSTEM MODEL --batch-size 8 --size 224 [--bundle PATH] [--sparsity 0.95] …

SYSTEM is edge-razor, torch (eager), torch-channels-last, or onnxruntime (inference only).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Step = Callable[[], float]


def edge_razor_step(options: argparse.Namespace, images: np.ndarray, labels: np.ndarray) -> tuple[Step, dict[str, Any]]:
    import edge_razor

    trainer = edge_razor.Trainer(
        options.bundle,
        mem_budget=options.mem_budget,
        batch_size=options.batch_size,
        sparsity=options.sparsity,
        razor=options.razor,
        optimizer="sgd",
        momentum=0.0,
        lr=1e-3,
        threads=options.threads,
        seed=0,
    )
    return lambda: trainer.step(images, labels), dict(trainer.plan.summary)


def torch_step(options: argparse.Namespace, images: np.ndarray, labels: np.ndarray) -> tuple[Step, dict[str, Any]]:
    import torch

    from benchmarks.models import build

    torch.set_num_threads(options.threads)
    model = build(options.model, options.size).eval()
    x, y = torch.from_numpy(images), torch.from_numpy(labels)
    if options.system == "torch-channels-last":
        model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step() -> float:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step, {}


def onnxruntime_step(
    options: argparse.Namespace, images: np.ndarray, labels: np.ndarray
) -> tuple[Step, dict[str, Any]]:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = options.threads
    session = onnxruntime.InferenceSession(str(Path(options.bundle) / "inference.onnx"), settings)
    feed = {session.get_inputs()[0].name: images}

    def step() -> float:
        return float(session.run(None, feed)[0][0, 0])

    return step, {}


SYSTEMS = {
    "edge-razor": edge_razor_step,
    "torch": torch_step,
    "torch-channels-last": torch_step,
    "onnxruntime": onnxruntime_step,
}


def peak_rss_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("system", choices=SYSTEMS)
    parser.add_argument("model")
    parser.add_argument("--bundle")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sparsity", type=float, default=0.95)
    parser.add_argument("--razor", default="centered")
    parser.add_argument("--mem-budget")
    options = parser.parse_args()
    generator = np.random.default_rng(0)
    images = generator.standard_normal((options.batch_size, 3, options.size, options.size), dtype=np.float32)
    labels = generator.integers(0, options.classes, options.batch_size)
    step, setup = SYSTEMS[options.system](options, images, labels)
    print(json.dumps(setup), flush=True)
    for line in sys.stdin:
        if line.strip() == "stop":
            break
        start = time.perf_counter()
        loss = step()
        print(json.dumps({"seconds": time.perf_counter() - start, "loss": loss}), flush=True)
    print(json.dumps({"peak_rss_bytes": peak_rss_bytes()}), flush=True)


if __name__ == "__main__":
    main()
