"""edge-razor, and stock onnxruntime's inference of the same bundle."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.systems.system import System


def edge_razor(options: argparse.Namespace, inputs: Any, labels: np.ndarray) -> System:
    import edge_razor
    from edge_razor.profile import by_kernel, profile_lines

    trainer = edge_razor.Trainer(
        options.bundle,
        mem_budget=options.mem_budget,
        batch_size=options.batch_size,
        sparsity=options.sparsity,
        razor=options.razor,
        prefer=options.prefer,
        optimizer=options.optimizer,
        momentum=0.0,
        lr=1e-3,
        threads=options.threads,
        seed=0,
    )

    def profile(steps: int) -> list[dict[str, Any]]:
        trainer.profile(True)
        for _ in range(steps):
            trainer.step(inputs, labels)
        lines = by_kernel(profile_lines(trainer.plan.binary, trainer.profile_entries()))
        trainer.profile(False)
        return [asdict(line) for line in lines]

    summary = dict(trainer.plan.summary)
    kept = sum(row["bytes"] for row in summary.pop("kept"))
    summary.pop("trainable")
    return System(lambda: trainer.step(inputs, labels), {**summary, "kept_bytes": kept}, profile=profile)


def onnxruntime_inference(options: argparse.Namespace, inputs: Any, labels: np.ndarray) -> System:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = options.threads
    session = onnxruntime.InferenceSession(str(Path(options.bundle) / "inference.onnx"), settings)
    arrays = inputs if isinstance(inputs, list) else [inputs]
    feed = {port.name: array for port, array in zip(session.get_inputs(), arrays, strict=True)}
    return System(lambda: float(session.run(None, feed)[0][0, 0]))
