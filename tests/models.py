"""The families that must export and train, as compact torch definitions.

Architectures follow the papers; names of modules are free. ``width`` scales channels, so that tests are fast. All of
them can be traced by torch.fx, which the reference model needs. Weights are torch's default initialization: seed torch
for the same ones.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def scaled(channels: float, width: float = 1.0, divisor: int = 8) -> int:
    """``channels``·``width`` rounded to a multiple of ``divisor``, as MobileNet does (never more than 10 % less)."""
    value = max(divisor, int(channels * width + divisor / 2) // divisor * divisor)
    return value + divisor if value < 0.9 * channels * width else value


def conv_bn(
    inputs: int,
    outputs: int,
    kernel: int = 1,
    stride: int = 1,
    groups: int = 1,
    act: type[nn.Module] | None = nn.ReLU,
) -> nn.Sequential:
    """Convolution without bias, BatchNorm, activation."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), *([act()] if act else []))


class Head(nn.Module):
    """Mean over positions, dropout, classifier."""

    def __init__(self, features: int, num_classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.dropout(x.mean((2, 3))))


class Residual(nn.Module):
    """act(body(x) + shortcut(x))."""

    def __init__(self, body: nn.Module, shortcut: nn.Module | None = None, act: nn.Module | None = None) -> None:
        super().__init__()
        self.body = body
        self.shortcut = shortcut or nn.Identity()
        self.act = act or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.body(x) + self.shortcut(x))


class SqueezeExcite(nn.Module):
    """x · gate(W2 relu(W1 mean(x)))."""

    def __init__(self, channels: int, squeezed: int, gate: type[nn.Module] = nn.Sigmoid) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.reduce = nn.Conv2d(channels, squeezed, 1)
        self.act = nn.ReLU()
        self.expand = nn.Conv2d(squeezed, channels, 1)
        self.gate = gate()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.expand(self.act(self.reduce(self.pool(x)))))


# ResNet (arXiv 1512.03385)


def _resnet(depths: tuple[int, ...], bottleneck: bool, num_classes: int, width: float) -> nn.Sequential:
    channels = scaled(64, width)
    layers: list[nn.Module] = [conv_bn(3, channels, 7, 2), nn.MaxPool2d(3, 2, 1)]
    expansion = 4 if bottleneck else 1
    for stage, depth in enumerate(depths):
        inner = scaled(64 * 2**stage, width)
        outer = inner * expansion
        for block in range(depth):
            stride = 2 if stage and not block else 1
            if bottleneck:
                body = nn.Sequential(
                    conv_bn(channels, inner), conv_bn(inner, inner, 3, stride), conv_bn(inner, outer, act=None)
                )
            else:
                body = nn.Sequential(conv_bn(channels, inner, 3, stride), conv_bn(inner, outer, 3, act=None))
            changes = stride != 1 or channels != outer
            shortcut = conv_bn(channels, outer, 1, stride, act=None) if changes else None
            layers.append(Residual(body, shortcut, nn.ReLU()))
            channels = outer
    return nn.Sequential(*layers, Head(channels, num_classes))


def resnet18(num_classes: int = 1000, width: float = 1.0) -> nn.Sequential:
    return _resnet((2, 2, 2, 2), False, num_classes, width)


def resnet50(num_classes: int = 1000, width: float = 1.0) -> nn.Sequential:
    return _resnet((3, 4, 6, 3), True, num_classes, width)


# MobileNetV2 (arXiv 1801.04381)


def mobilenet_v2(num_classes: int = 1000, width: float = 1.0) -> nn.Sequential:
    channels = scaled(32, width)
    layers: list[nn.Module] = [conv_bn(3, channels, 3, 2, act=nn.ReLU6)]
    stages = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    for expansion, base, depth, first_stride in stages:
        outer = scaled(base, width)
        for block in range(depth):
            stride = first_stride if block == 0 else 1
            inner = channels * expansion
            parts = [conv_bn(channels, inner, act=nn.ReLU6)] if expansion != 1 else []
            parts += [conv_bn(inner, inner, 3, stride, inner, nn.ReLU6), conv_bn(inner, outer, act=None)]
            body = nn.Sequential(*parts)
            layers.append(Residual(body) if stride == 1 and channels == outer else body)
            channels = outer
    last = scaled(1280, max(1.0, width)) if width >= 1.0 else scaled(1280, width)
    return nn.Sequential(*layers, conv_bn(channels, last, act=nn.ReLU6), Head(last, num_classes, 0.2))


# MobileNetV3-Small (arXiv 1905.02244): squeeze-and-excite with hard sigmoid, hard swish


def mobilenet_v3_small(num_classes: int = 1000, width: float = 1.0) -> nn.Sequential:
    channels = scaled(16, width)
    layers: list[nn.Module] = [conv_bn(3, channels, 3, 2, act=nn.Hardswish)]
    rows: tuple[tuple[int, float, float, bool, type[nn.Module], int], ...] = (
        (3, 16, 16, True, nn.ReLU, 2),
        (3, 72, 24, False, nn.ReLU, 2),
        (3, 88, 24, False, nn.ReLU, 1),
        (5, 96, 40, True, nn.Hardswish, 2),
        (5, 240, 40, True, nn.Hardswish, 1),
        (5, 240, 40, True, nn.Hardswish, 1),
        (5, 120, 48, True, nn.Hardswish, 1),
        (5, 144, 48, True, nn.Hardswish, 1),
        (5, 288, 96, True, nn.Hardswish, 2),
        (5, 576, 96, True, nn.Hardswish, 1),
        (5, 576, 96, True, nn.Hardswish, 1),
    )
    for kernel, expanded, base, excite, act, stride in rows:
        inner, outer = scaled(expanded, width), scaled(base, width)
        parts: list[nn.Module] = [conv_bn(channels, inner, act=act)] if inner != channels else []
        parts.append(conv_bn(inner, inner, kernel, stride, inner, act))
        if excite:
            parts.append(SqueezeExcite(inner, scaled(inner / 4), nn.Hardsigmoid))
        body = nn.Sequential(*parts, conv_bn(inner, outer, act=None))
        layers.append(Residual(body) if stride == 1 and channels == outer else body)
        channels = outer
    last, hidden = scaled(576, width), scaled(1024, width)
    classifier = (nn.Linear(last, hidden), nn.Hardswish(), nn.Dropout(0.2), nn.Linear(hidden, num_classes))
    layers += [conv_bn(channels, last, act=nn.Hardswish), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, *classifier)


# EfficientNet-Lite0: EfficientNet-B0 (arXiv 1905.11946) without squeeze-and-excite, ReLU6, TensorFlow's SAME padding


def same_conv_bn(channels: int, outputs: int, kernel: int, stride: int, groups: int = 1) -> nn.Sequential:
    """Stride 2 on an even size pads (kernel − 2) in all, the odd one at the end: an asymmetric pad before the
    convolution."""
    total = kernel - stride
    before = total // 2
    pad = nn.ZeroPad2d((before, total - before, before, total - before))
    conv = nn.Conv2d(channels, outputs, kernel, stride, groups=groups, bias=False)
    return nn.Sequential(pad, conv, nn.BatchNorm2d(outputs), nn.ReLU6())


def efficientnet_lite0(num_classes: int = 1000, width: float = 1.0) -> nn.Sequential:
    """For input sizes that are multiples of 32."""
    channels = scaled(32, width)
    layers: list[nn.Module] = [same_conv_bn(3, channels, 3, 2)]
    stages = (
        (1, 3, 1, 16, 1),
        (6, 3, 2, 24, 2),
        (6, 5, 2, 40, 2),
        (6, 3, 3, 80, 2),
        (6, 5, 3, 112, 1),
        (6, 5, 4, 192, 2),
        (6, 3, 1, 320, 1),
    )
    for expansion, kernel, depth, base, first_stride in stages:
        outer = scaled(base, width)
        for block in range(depth):
            stride = first_stride if block == 0 else 1
            inner = channels * expansion
            parts = [conv_bn(channels, inner, act=nn.ReLU6)] if expansion != 1 else []
            parts += [same_conv_bn(inner, inner, kernel, stride, inner), conv_bn(inner, outer, act=None)]
            body = nn.Sequential(*parts)
            layers.append(Residual(body) if stride == 1 and channels == outer else body)
            channels = outer
    last = scaled(1280, width)
    return nn.Sequential(*layers, conv_bn(channels, last, act=nn.ReLU6), Head(last, num_classes, 0.2))


# SqueezeNet 1.1 (arXiv 1602.07360): convolutions with bias, concatenation, pooling with ceil_mode


class Fire(nn.Module):
    def __init__(self, channels: int, squeezed: int, expanded: int) -> None:
        super().__init__()
        self.squeeze = nn.Sequential(nn.Conv2d(channels, squeezed, 1), nn.ReLU())
        self.expand1 = nn.Sequential(nn.Conv2d(squeezed, expanded, 1), nn.ReLU())
        self.expand3 = nn.Sequential(nn.Conv2d(squeezed, expanded, 3, padding=1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze(x)
        return torch.cat([self.expand1(x), self.expand3(x)], 1)


def squeezenet(num_classes: int = 1000, width: float = 1.0) -> nn.Sequential:
    channels = scaled(64, width)
    layers: list[nn.Module] = [nn.Conv2d(3, channels, 3, 2), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True)]
    for squeezed, expanded, pooled in (
        (16, 64, False),
        (16, 64, True),
        (32, 128, False),
        (32, 128, True),
        (48, 192, False),
        (48, 192, False),
        (64, 256, False),
        (64, 256, False),
    ):
        wide = scaled(expanded, width)
        layers.append(Fire(channels, scaled(squeezed, width), wide))
        channels = 2 * wide
        if pooled:
            layers.append(nn.MaxPool2d(3, 2, ceil_mode=True))
    classifier = (nn.Dropout(0.5), nn.Conv2d(channels, num_classes, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*layers, *classifier)


# DenseNet (arXiv 1608.06993): BatchNorm before its convolution


def norm_act_conv(channels: int, outputs: int, kernel: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(channels, outputs, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(), conv)


class DenseLayer(nn.Module):
    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.body = nn.Sequential(norm_act_conv(channels, 4 * growth), norm_act_conv(4 * growth, growth, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.body(x)], 1)


def densenet(
    num_classes: int = 1000, width: float = 1.0, growth: int = 12, depths: tuple[int, ...] = (4, 4, 4)
) -> nn.Sequential:
    """A DenseNet-BC with few layers."""
    channels, growth = scaled(2 * growth, width), max(4, int(growth * width))
    layers: list[nn.Module] = [conv_bn(3, channels, 7, 2), nn.MaxPool2d(3, 2, 1)]
    for stage, depth in enumerate(depths):
        if stage:
            layers += [norm_act_conv(channels, channels // 2), nn.AvgPool2d(2)]
            channels //= 2
        for _ in range(depth):
            layers.append(DenseLayer(channels, growth))
            channels += growth
    return nn.Sequential(*layers, nn.BatchNorm2d(channels), nn.ReLU(), Head(channels, num_classes))


# ShuffleNetV2 (arXiv 1807.11164): channel split and shuffle


def shuffle(x: Tensor, groups: int = 2) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


class ShuffleUnit(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.body = nn.Sequential(conv_bn(half, half), conv_bn(half, half, 3, 1, half, None), conv_bn(half, half))

    def forward(self, x: Tensor) -> Tensor:
        kept, changed = x.chunk(2, 1)
        return shuffle(torch.cat([kept, self.body(changed)], 1))


class ShuffleDown(nn.Module):
    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        half = outputs // 2
        self.left = nn.Sequential(conv_bn(channels, channels, 3, 2, channels, None), conv_bn(channels, half))
        self.right = nn.Sequential(conv_bn(channels, half), conv_bn(half, half, 3, 2, half, None), conv_bn(half, half))

    def forward(self, x: Tensor) -> Tensor:
        return shuffle(torch.cat([self.left(x), self.right(x)], 1))


def shufflenet_v2(num_classes: int = 1000, width: float = 1.0) -> nn.Sequential:
    channels = 24
    layers: list[nn.Module] = [conv_bn(3, channels, 3, 2), nn.MaxPool2d(3, 2, 1)]
    for base, depth in ((116, 4), (232, 8), (464, 4)):
        outer = scaled(base, width, 4)
        layers += [ShuffleDown(channels, outer), *(ShuffleUnit(outer) for _ in range(depth - 1))]
        channels = outer
    last = scaled(1024, width)
    return nn.Sequential(*layers, conv_bn(channels, last), Head(last, num_classes))


# RegNetY (arXiv 2003.13678): grouped 3×3 convolutions, squeeze-and-excite inside the block


def regnet(num_classes: int = 1000, width: float = 1.0, group_width: int = 8) -> nn.Sequential:
    """RegNetY-200MF."""
    channels = 32
    layers: list[nn.Module] = [conv_bn(3, channels, 3, 2)]
    for base, depth in ((24, 1), (56, 1), (152, 4), (368, 7)):
        outer = scaled(base, width, group_width)
        for block in range(depth):
            stride = 2 if block == 0 else 1
            body = nn.Sequential(
                conv_bn(channels, outer),
                conv_bn(outer, outer, 3, stride, outer // group_width),
                SqueezeExcite(outer, max(4, channels // 4)),
                conv_bn(outer, outer, act=None),
            )
            changes = stride != 1 or channels != outer
            layers.append(Residual(body, conv_bn(channels, outer, 1, stride, act=None) if changes else None, nn.ReLU()))
            channels = outer
    return nn.Sequential(*layers, Head(channels, num_classes))


# ConvNeXt's block (arXiv 2201.03545) with BatchNorm in the place of LayerNorm


class ConvNeXtBlock(nn.Module):
    """7×7 depthwise, norm, expand, GELU, project, layer scale. ``linear``: the pointwise parts are Linear on permuted
    data, as published."""

    def __init__(self, channels: int, linear: bool) -> None:
        super().__init__()
        self.linear = linear
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.BatchNorm2d(channels)
        self.expand = nn.Linear(channels, 4 * channels) if linear else nn.Conv2d(channels, 4 * channels, 1)
        self.act = nn.GELU()
        self.project = nn.Linear(4 * channels, channels) if linear else nn.Conv2d(4 * channels, channels, 1)
        self.scale = nn.Parameter(torch.full((channels,) if linear else (channels, 1, 1), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x))
        if self.linear:
            y = y.permute(0, 2, 3, 1)
        y = self.scale * self.project(self.act(self.expand(y)))
        if self.linear:
            y = y.permute(0, 3, 1, 2)
        return x + y


def convnext(num_classes: int = 1000, width: float = 1.0, linear: bool = False) -> nn.Sequential:
    """ConvNeXt-Femto's widths, one or two blocks a stage."""
    channels = scaled(48, width)
    layers: list[nn.Module] = [nn.Conv2d(3, channels, 4, 4), nn.BatchNorm2d(channels)]
    for stage, depth in enumerate((1, 1, 2, 1)):
        if stage:
            layers += [nn.BatchNorm2d(channels), nn.Conv2d(channels, 2 * channels, 2, 2)]
            channels *= 2
        layers += [ConvNeXtBlock(channels, linear) for _ in range(depth)]
    return nn.Sequential(*layers, Head(channels, num_classes))


def mlp(num_classes: int = 1000, width: float = 1.0, features: int = 3 * 64 * 64) -> nn.Sequential:
    """For inputs of ``features`` numbers a sample in any shape."""
    hidden = scaled(256, width)
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(features, hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.Tanh(),
        nn.Linear(hidden, num_classes),
    )


class Attention(nn.Module):
    """Multi-head self-attention with one projection for Q, K and V. ``eager``: written out, with a matrix of
    probabilities, as older code does."""

    def __init__(self, channels: int, heads: int, eager: bool) -> None:
        super().__init__()
        self.heads, self.eager = heads, eager
        self.qkv = nn.Linear(channels, 3 * channels)
        self.project = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        if self.eager:
            p = ((q @ k.transpose(-2, -1)) / (c // self.heads) ** 0.5).softmax(-1)
            y = p @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        return self.project(y.transpose(1, 2).reshape(n, t, c))


class TransformerBlock(nn.Module):
    """Pre-norm: attention, then a two-layer perceptron, each added to its input."""

    def __init__(self, channels: int, heads: int, eager: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, 1e-6)
        self.attention = Attention(channels, heads, eager)
        self.norm2 = nn.LayerNorm(channels, 1e-6)
        self.mlp = nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """ViT with a class token and learned positions."""

    def __init__(
        self,
        num_classes: int = 1000,
        channels: int = 192,
        heads: int = 3,
        depth: int = 12,
        image: int = 224,
        patch: int = 16,
        eager: bool = False,
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, channels, patch, patch)
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, channels))
        self.positions = nn.Parameter(0.02 * torch.randn(1, (image // patch) ** 2 + 1, channels))
        self.blocks = nn.Sequential(*(TransformerBlock(channels, heads, eager) for _ in range(depth)))
        self.norm = nn.LayerNorm(channels, 1e-6)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


def vit_tiny(num_classes: int = 1000) -> VisionTransformer:
    return VisionTransformer(num_classes)


def vit_base(num_classes: int = 1000) -> VisionTransformer:
    """ViT-B/16."""
    return VisionTransformer(num_classes, channels=768, heads=12)


FAMILIES: dict[str, Callable[..., nn.Module]] = {
    "resnet18": partial(resnet18, width=0.25),
    "resnet50": partial(resnet50, width=0.25),
    "mobilenet_v2": partial(mobilenet_v2, width=0.5),
    "mobilenet_v3_small": partial(mobilenet_v3_small, width=0.5),
    "efficientnet_lite0": partial(efficientnet_lite0, width=0.5),
    "squeezenet": partial(squeezenet, width=0.5),
    "densenet": densenet,
    "shufflenet_v2": partial(shufflenet_v2, width=0.5),
    "regnet": partial(regnet, width=0.5),
    "convnext": partial(convnext, width=0.5),
    "mlp": partial(mlp, width=0.25),
    "vit": partial(VisionTransformer, channels=48, depth=2, image=64, patch=8),
}
"""Family → constructor(num_classes) of a size for tests, input 3×64×64."""
