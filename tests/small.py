"""A small convolutional network, its bundle and data, for tests of what stands around training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from tests.models import Head, conv_bn
from tests.parity import export_model, randomize_norms

IMAGE, CLASSES = (3, 16, 16), 5


def small_model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = conv_bn(3, 16, 3, 2), conv_bn(16, 24, 1, act=nn.ReLU6), conv_bn(24, 24, 3, groups=24), Head(24, CLASSES)
    return randomize_norms(nn.Sequential(*layers), seed)  # type: ignore[return-value]


def small_bundle(path: Path) -> Path:
    return export_model(small_model(), path, IMAGE)


def small_data(samples: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels that a network can learn from."""
    generator = np.random.default_rng(seed)
    y = generator.integers(0, CLASSES, samples)
    patterns = np.random.default_rng(1).standard_normal((CLASSES, *IMAGE))
    x = patterns[y] + generator.standard_normal((samples, *IMAGE))
    return x.astype(np.float32), y


def write_small_data(path: Path, samples: int = 48) -> Path:
    x, y = small_data(samples)
    np.savez(path, x=x, y=y)
    return path
