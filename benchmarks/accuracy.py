"""Accuracy on real data: EfficientNet-Lite0 (ImageNet weights) fine-tuned on Fashion-MNIST, ours against PyTorch.

    python dev.py bench accuracy [--seeds 3] [--gradients-only]

64×64, 4,000 training and 3,000 test images, 2 epochs, batch 16, Adam 1e-4 with a cosine schedule, BatchNorm statistics
frozen. The same seed gives every system the same new head and the same order of images. Finished runs are kept in
``results/accuracy.jsonl``, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.classification import THREADS, bundle_for, cosine_steps, table, train_edge_razor, train_torch
from benchmarks.common import fashion_mnist, markdown_table, write_result
from benchmarks.seeds import command_line, seeded_runs

SIZE, TRAIN, TEST, EPOCHS, BATCH, LEARNING_RATE, CLASSES = 64, 4000, 3000, 2, 16, 1e-4, 10
MEAN = np.array((0.485, 0.456, 0.406), np.float32)
STD = np.array((0.229, 0.224, 0.225), np.float32)
CASES = {
    "PyTorch, dense": ("torch", 0.0, ""),
    "edge-razor, 0": ("edge-razor", 0.0, "centered"),
    "edge-razor, plain 0.90": ("edge-razor", 0.9, "plain"),
    "edge-razor, plain 0.97": ("edge-razor", 0.97, "plain"),
    "edge-razor, centered 0.90": ("edge-razor", 0.9, "centered"),
    "edge-razor, centered 0.97": ("edge-razor", 0.97, "centered"),
    "edge-razor, centered 0.99": ("edge-razor", 0.99, "centered"),
}


def normalized(images: np.ndarray) -> np.ndarray:
    """uint8 NHWC → float32 NCHW with ImageNet's mean and deviation."""
    return np.ascontiguousarray(((images.astype(np.float32) / 255 - MEAN) / STD).transpose(0, 3, 1, 2))


def model_for(seed: int) -> Any:
    """EfficientNet-Lite0 with ImageNet weights and a head drawn from ``seed``."""
    import torch

    from edge_razor import demo

    model = demo.digits_model(CLASSES, SIZE)
    torch.manual_seed(seed)
    model._fc.reset_parameters()
    return model.eval()


def export_for(seed: int, path: Path) -> None:
    import torch

    import edge_razor

    edge_razor.export(model_for(seed), (torch.zeros(2, 3, SIZE, SIZE),), path, dropout=False)


def gradient(bundle: Path, sparsity: float, form: str) -> dict[str, np.ndarray]:
    """Weight gradients (convolution and linear) of one batch: an SGD step with learning rate 1."""
    import edge_razor

    trainer = edge_razor.Trainer(
        bundle, batch_size=BATCH, sparsity=sparsity, razor=form, optimizer="sgd", momentum=0.0, lr=1.0, threads=THREADS
    )
    before = trainer.state_dict()
    images, labels = fashion_mnist("train", BATCH, SIZE)
    trainer.step(normalized(images), labels)
    after = trainer.state_dict()
    return {name: before[name] - after[name] for name in trainer.trainable if before[name].ndim > 1}


def gradient_errors(bundle: Path) -> dict[str, float]:
    exact = gradient(bundle, 0.0, "centered")
    norm = math.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in exact.values()))
    errors = {}
    for form in ("plain", "centered"):
        for sparsity in (0.9, 0.95, 0.97, 0.99):
            other = gradient(bundle, sparsity, form)
            square = sum(float(((other[n] - exact[n]).astype(np.float64) ** 2).sum()) for n in exact)
            errors[f"{form} {sparsity:.2f}"] = math.sqrt(square) / norm
    return errors


def one(case: str, seed: int) -> None:
    system, sparsity, form = CASES[case]
    images, labels = fashion_mnist("train", TRAIN, SIZE)
    test_images, test_labels = fashion_mnist("t10k", TEST, SIZE)
    train, test = ([normalized(images)], labels), ([normalized(test_images)], test_labels)
    steps = cosine_steps(seed, TRAIN, EPOCHS, BATCH, LEARNING_RATE)
    if system == "torch":
        result = train_torch(model_for(seed), train, test, steps)
    else:
        result = train_edge_razor(bundle_for("accuracy", str(seed)), train, test, steps, sparsity, form)
    print(json.dumps({"case": case, "seed": seed, **result}))


def main() -> None:
    parser = command_line(CASES, "SEED", "PATH")
    parser.add_argument("--gradients-only", action="store_true")
    options = parser.parse_args()
    if options.export:
        return export_for(int(options.export[0]), Path(options.export[1]))
    if options.one:
        return one(options.one[0], int(options.one[1]))
    runs = seeded_runs("accuracy", options.cases, 0 if options.gradients_only else options.seeds)
    errors = gradient_errors(bundle_for("accuracy", "0"))
    body = table(runs, CASES)
    body += "\nGradient error, ‖compressed − exact‖ / ‖exact‖ over all weight gradients of one batch:\n\n"
    body += markdown_table(("form", "error"), [(name, f"{error:.3f}") for name, error in errors.items()])
    title = "Accuracy: EfficientNet-Lite0 → Fashion-MNIST, 64×64, 4,000 images, 2 epochs, Adam 1e-4 cosine"
    write_result("accuracy", title, "python dev.py bench accuracy", body, "torch")


if __name__ == "__main__":
    main()
