"""The networks that are measured, by name, and their bundles (made once, kept in a cache directory)."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

ROOT = Path(__file__).resolve().parent.parent
CONVOLUTIONAL = ("mobilenet_v2", "efficientnet_lite0", "resnet18", "resnet50")
NAMES = (*CONVOLUTIONAL, "vit_tiny", "vit_base")


def build(name: str, size: int = 224, classes: int = 1000) -> nn.Module:
    """The network with seeded random weights (EfficientNet-Lite0: ImageNet's), eval mode."""
    import torch

    from edge_razor import demo
    from tests import models

    torch.manual_seed(0)
    if name == "efficientnet_lite0":
        return demo.digits_model(classes, size)
    return getattr(models, name)(num_classes=classes).eval()


def bundle(name: str, size: int = 224, classes: int = 1000) -> Path:
    """Path of the network's bundle; exported in a process of its own unless cached for this source tree."""
    digest = hashlib.sha256()
    for source in sorted([*ROOT.glob("exporters/**/*.py"), *ROOT.glob("tests/models.py"), Path(__file__)]):
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
    edge_razor.export(build(name, size, classes), (torch.zeros(2, 3, size, size),), path, dropout=False)


if __name__ == "__main__":
    main()
