"""The networks that are measured, by name, and their bundles (made once, kept in a cache directory)."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import nn

ROOT = Path(__file__).resolve().parent.parent
CONVOLUTIONAL = ("mobilenet_v2", "efficientnet_lite0", "resnet18", "resnet50")
LANGUAGE = {"minilm": "all", "minilm_lora": "lora:r=8,alpha=16,head"}
"""Models of texts (their size is the number of tokens) → what trains."""
NAMES = (*CONVOLUTIONAL, "vit_tiny", "vit_base", *LANGUAGE)


def build(name: str, size: int = 224, classes: int = 1000) -> nn.Module:
    """The network with seeded random weights (EfficientNet-Lite0 and MiniLM: pretrained), eval mode."""
    import torch

    from edge_razor import demo
    from tests import models

    if name in LANGUAGE:
        from benchmarks import minilm

        return minilm.classifier(classes)  # type: ignore[no-any-return]
    torch.manual_seed(0)
    if name == "efficientnet_lite0":
        return demo.digits_model(classes, size)
    return getattr(models, name)(num_classes=classes).eval()


def workload(name: str, batch_size: int, size: int, classes: int) -> tuple[Any, np.ndarray]:
    """Random (inputs, labels) of one batch: images, or a list of token indices and masks."""
    generator = np.random.default_rng(0)
    if name in LANGUAGE:
        ids = generator.integers(0, 30_000, (batch_size, size))
        return [ids, np.ones_like(ids)], generator.integers(0, classes, batch_size)
    images = generator.standard_normal((batch_size, 3, size, size), dtype=np.float32)
    return images, generator.integers(0, classes, batch_size)


def bundle(name: str, size: int = 224, classes: int = 1000) -> Path:
    """Path of the network's bundle; exported in a process of its own unless cached for this source tree."""
    digest = hashlib.sha256()
    sources = (*ROOT.glob("exporters/**/*.py"), ROOT / "tests/models.py", ROOT / "benchmarks/minilm.py", Path(__file__))
    for source in sorted(sources):
        digest.update(source.read_bytes())
    path = (
        Path(tempfile.gettempdir()) / f"edge-razor-bench-{digest.hexdigest()[:12]}" / f"{name}-{size}-{classes}.razor"
    )
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        subprocess.run(
            [sys.executable, "-m", "benchmarks.models", name, str(size), str(classes), str(path)], check=True, cwd=ROOT
        )
    return path


def main() -> None:
    import torch

    import edge_razor

    name, size, classes, path = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    example: Any = (torch.zeros(2, 3, size, size),)
    tokenizer = None
    if name in LANGUAGE:
        from benchmarks import minilm

        example, tokenizer = minilm.example(size), minilm.directory() / "tokenizer.json"
    model, trainable = build(name, size, classes), LANGUAGE.get(name, "all")
    edge_razor.export(model, example, path, trainable=trainable, dropout=False, tokenizer=tokenizer)


if __name__ == "__main__":
    main()
