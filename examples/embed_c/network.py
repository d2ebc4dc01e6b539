"""The network that the C program fine-tunes; only the workstation needs this file, and PyTorch."""

from __future__ import annotations

import torch
from torch import nn


def digits() -> nn.Module:
    """Images [n, 1, 20, 20] → scores [n, 10]: three convolutions, the second of them depthwise, and a linear layer."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(12, 12, 3, padding=1, groups=12),
        nn.ReLU6(),
        nn.Conv2d(12, 24, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24 * 5 * 5, 10),
    )
