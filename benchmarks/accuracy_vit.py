"""Accuracy of a transfer inside Fashion-MNIST: ViT-Tiny pretrained on five of its classes learns the other five.

    python dev.py bench accuracy_vit [--seeds 3]

ViT-Tiny as in the suite (192 channels, 12 layers, 3 heads), but for images as they are, 28×28, in patches of 7×7: 17
tokens instead of the 197 of 224×224 in patches of 16×16, so that a run takes two minutes on one core.
Pretraining, in PyTorch: classes 0–4, all 30,000 images, 8 epochs, batch 64, AdamW 5e-4. Then everything trains on
classes 5–9 with a new head: 2,000 training and 3,000 test images, 6 epochs, batch 16, AdamW 2e-4. Both with a cosine
schedule and without weight decay. The same seed gives every system the same new head and the same order of images.
Finished runs are kept in ``results/accuracy_vit.jsonl``, so an interrupted run goes on where it stopped; the pretrained
weights in the temporary directory.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import accuracy
from benchmarks.classification import Data, bundle_for, cosine_steps, table, train_edge_razor, train_torch
from benchmarks.common import fashion_mnist, write_result
from benchmarks.seeds import command_line, seeded_runs

SIZE, PATCH, CLASSES = 28, 7, 5
OLD, NEW = range(CLASSES), range(CLASSES, 2 * CLASSES)
PRETRAIN, EPOCHS, TRAIN, TEST = 30_000, 8, 2000, 3000
CASES = accuracy.CASES


def data(split: str, count: int, classes: range) -> Data:
    """``count`` images of some neighbouring classes, and which of these classes they are."""
    images, labels = fashion_mnist(split, count, SIZE, classes=classes)
    return [accuracy.normalized(images)], labels - classes.start


def vit_tiny() -> Any:
    from tests.models import VisionTransformer

    return VisionTransformer(CLASSES, image=SIZE, patch=PATCH)


def pretrained() -> tuple[dict[str, Any], str]:
    """State dict after training on the old classes, and its test accuracy there in %."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    path = Path(tempfile.gettempdir()) / f"edge-razor-accuracy_vit-{PRETRAIN}x{EPOCHS}.safetensors"
    if not path.exists():
        torch.manual_seed(0)
        model = vit_tiny()
        steps = cosine_steps(0, PRETRAIN, EPOCHS, batch=64, rate=5e-4)
        result = train_torch(model, data("train", PRETRAIN, OLD), data("t10k", TEST, OLD), steps)
        unfinished = path.with_suffix(".unfinished")
        save_file(model.state_dict(), unfinished, {"accuracy": f"{result['accuracy']:.1f}"})
        unfinished.rename(path)
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()["accuracy"]


def model_for(seed: int) -> Any:
    """The pretrained model with a head drawn from ``seed``."""
    import torch

    model = vit_tiny()
    model.load_state_dict(pretrained()[0])
    torch.manual_seed(seed)
    model.head.reset_parameters()
    return model.eval()


def one(case: str, seed: int) -> None:
    system, sparsity, form = CASES[case]
    train, test = data("train", TRAIN, NEW), data("t10k", TEST, NEW)
    steps = cosine_steps(seed, TRAIN, epochs=6, batch=16, rate=2e-4)
    if system == "torch":
        result = train_torch(model_for(seed), train, test, steps)
    else:
        result = train_edge_razor(bundle_for("accuracy_vit", str(seed)), train, test, steps, sparsity, form)
    print(json.dumps({"case": case, "seed": seed, **result}))


def main() -> None:
    options = command_line(CASES, "SEED", "PATH").parse_args()
    if options.export:
        import torch

        import edge_razor

        seed, path = options.export
        edge_razor.export(model_for(int(seed)), (torch.zeros(2, 3, SIZE, SIZE),), path, dropout=False)
        return
    if options.one:
        return one(options.one[0], int(options.one[1]))
    before = pretrained()[1]
    runs = seeded_runs("accuracy_vit", options.cases, options.seeds)
    body = table(runs, CASES) + f"\nPretraining on classes 0–4 reaches {before} % on {TEST:,} test images of these.\n"
    title = "Accuracy: ViT-Tiny (28×28, patch 7), classes 0–4 of Fashion-MNIST → 5–9, 2,000 images, 6 epochs"
    write_result("accuracy_vit", title, "python dev.py bench accuracy_vit", body, "torch")


if __name__ == "__main__":
    main()
