"""Rates of this device's kernels, measured once (under a second) and kept in the user's cache directory.

`EDGE_RAZOR_CALIBRATION=off` neither measures nor reads: the usual rates of `cost.py` are used then.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from .cost import (
    CLASSES,
    OVERHEAD,
    Rates,
    attention_probabilities,
    moved_bytes,
    replace_form,
    step_bytes,
    step_multiply_adds,
)
from .program import Buffer, Step
from .storage import Form, keep_count

__all__ = ["cache_directory", "calibrate", "device_rates"]

SWITCH = "EDGE_RAZOR_CALIBRATION"
_VERSION = 3  # of the cache file and of what the rates mean
_REPEATS = 5
_SPARSE, _LESS_SPARSE = 0.95, 0.7


def device_rates(threads: int) -> Rates:
    """Rates for so many threads: from the cache, else measured now and cached, else the usual ones.

    A cache that is damaged or of another device is ignored and written again; one that cannot be written is no error.
    """
    if os.environ.get(SWITCH, "").lower() in ("off", "0", "no"):
        return Rates.default(threads)
    key = _device_key(threads)
    path = cache_directory() / f"rates-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    cached = _read(path, key)
    if cached is not None:
        return Rates(cached, "calibrated")
    rates = calibrate(threads)
    _write(path, {"version": _VERSION, "device": key, "rates": rates})
    return Rates(rates, "calibrated")


def cache_directory() -> Path:
    """Where the user's caches are: `XDG_CACHE_HOME`, or what the system has for it."""
    if "XDG_CACHE_HOME" in os.environ:
        base = Path(os.environ["XDG_CACHE_HOME"])
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    else:
        base = Path.home() / ".cache"
    return base / "edge-razor"


def _device_key(threads: int) -> str:
    from edge_razor import __version__
    from edge_razor.runtime import abi_version, isa

    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            names = [line.partition(":")[2].strip() for line in file if line.lower().startswith("model name")]
        model = names[0] if names else model
    except OSError:
        pass
    return f"{_VERSION} / {model} / {isa()} / {__version__} / {abi_version()} / {threads} threads"


def _read(path: Path, key: str) -> dict[str, float] | None:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        rates = {name: float(data["rates"][name]) for name in CLASSES}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    if data.get("version") != _VERSION or data.get("device") != key:
        return None
    return rates if all(math.isfinite(r) and r > 0 for r in rates.values()) else None


def _write(path: Path, data: dict[str, object]) -> None:
    """Whole or not at all: another process may read it, or write it at the same time."""
    name = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(data, file)
        os.replace(name, path)
    except OSError:
        if name is not None:
            Path(name).unlink(missing_ok=True)


def calibrate(threads: int) -> dict[str, float]:
    """Runs a few kernels of usual sizes and returns units a second for every class of `cost.py`.

    Where a class has two rates, sizes part them that have much to compute for each byte, or little, most on operands
    that are larger than the caches next to a core, as activations are.
    """
    bench = _Bench(threads)
    rates: dict[str, float] = {}
    n = 1 << 19
    add = Step("binary", "", [0, 1, n, 1, 1], [], bench.buffers(4 * n, 4 * n, 4 * n))
    rates["bytes"] = step_bytes(add) / bench.seconds(add)
    for name, convs in _SHAPES.items():
        for kind, make in (("", bench.convolution), ("weight ", lambda conv: bench.weight_gradient(conv, None))):
            points = []
            for conv in convs:
                step = make(conv)
                points.append((float(step_multiply_adds(step)), float(moved_bytes(step)), bench.seconds(step)))
                bench.clear()
            rates[f"{kind}{name}"], rates[f"{kind}{name} bytes"] = _two_rates(points)
    for name, convs in _RAZOR_SHAPES.items():
        points = []
        for conv in convs:
            for sparsity in (_SPARSE, _LESS_SPARSE):
                step = bench.weight_gradient(conv, sparsity)
                dense = step_multiply_adds(replace_form(step, Form.DENSE, 0))
                spent = max(bench.seconds(step) - step_bytes(step) / rates["bytes"], 1e-7)
                points.append((float(step_multiply_adds(step)), dense / 64, spent))
                bench.clear()
        rates[f"razor value {name}"], rates[f"razor block {name}"] = _two_rates(points)
    for kernel in ("attention", "attention_grad"):
        points = []
        for positions, heads, width in ((196, 6, 64), (128, 12, 32)):
            step = bench.attention(kernel, positions, heads, width)
            points.append((step_multiply_adds(step), attention_probabilities(step), bench.seconds(step)))
            bench.clear()
        rates[kernel], rates[f"{kernel} probabilities"] = _two_rates(points)
    points = []
    for sparsity in (_SPARSE, _LESS_SPARSE):
        step = bench.pack(2, 3136, 144, sparsity)
        source = step.operands[0]
        assert source is not None
        points.append((source.bytes, step.ints[1] * step.ints[4], bench.seconds(step)))
        bench.clear()
    rates["pack bytes"], rates["pack values"] = _two_rates(points)
    return {name: float(rates[name]) for name in CLASSES}


def _two_rates(points: list[tuple[float, float, float]]) -> tuple[float, float]:
    """Units a second of two kinds of work, from steps: (units of the one, units of the other, seconds of both).

    Least squares of the relative errors. Where noise or a bottleneck that both share leaves nothing for one kind, it
    gets a twentieth of the time.
    """
    shares = np.array([[first / seconds, second / seconds] for first, second, seconds in points])
    costs = np.linalg.lstsq(shares, np.ones(len(points)), rcond=None)[0]  # seconds a unit
    for kind in (0, 1):
        least = 0.05 / shares[:, kind].max()
        if costs[kind] < least:
            costs[kind] = least
            other = shares[:, 1 - kind]
            costs[1 - kind] = other @ (1 - least * shares[:, kind]) / (other @ other)
            break
    return float(1 / costs[0]), float(1 / costs[1])


def _conv(n: int, size: int, ic: int, oc: int, kernel: int, group: int = 1, stride: int = 1) -> list[int]:
    pad, out = kernel // 2, -(-size // stride)
    return [n, size, size, ic, out, out, oc, kernel, kernel, stride, stride, pad, pad, 1, 1, group]


# For each class of `cost.py` convolutions with much to compute for each byte, and with little.
_SHAPES = {
    "product": [_conv(2, 16, 384, 1536, 1), _conv(2, 112, 16, 96, 1), _conv(2, 56, 144, 24, 1)],
    "winograd": [_conv(2, 28, 128, 128, 3), _conv(2, 56, 64, 64, 3)],
    "convolution": [_conv(2, 28, 128, 256, 3, stride=2), _conv(2, 224, 3, 32, 3, stride=2)],
    "depthwise": [_conv(2, 14, 384, 384, 3, 384), _conv(2, 56, 144, 144, 3, 144), _conv(2, 112, 32, 32, 3, 32)],
}
_RAZOR_SHAPES = {
    "product": [_conv(1, 56, 96, 96, 1), _conv(1, 16, 384, 384, 1)],
    "convolution": [_conv(1, 28, 64, 64, 3)],
    "depthwise": [_conv(2, 56, 96, 96, 3, 96)],
}


class _Bench:
    """Steps over memory of their own, and the time that they take."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.random = np.random.default_rng(0)
        self.arrays: dict[Buffer, np.ndarray] = {}

    def buffers(self, *sizes: int) -> list[Buffer | None]:
        """Buffers of float32 noise."""
        made: list[Buffer | None] = []
        for size in sizes:
            buffer = Buffer("", size)
            self.arrays[buffer] = self.random.standard_normal(size // 4, dtype=np.float32)
            made.append(buffer)
        return made

    def clear(self) -> None:
        """Forgets all buffers: a cap holds for this process, too."""
        self.arrays.clear()

    def attention(self, kernel: str, positions: int, heads: int, width: int) -> Step:
        """Two samples; probabilities are not kept, and gradients not summed: no values of them, and no operands."""
        sizes, size = [2, positions, positions, heads, heads, width, 0, 0, 0], 4 * 2 * positions * heads * width
        given = self.buffers(*[size] * (4 if kernel == "attention" else 7))
        ints = [*sizes, 0] if kernel == "attention" else [*sizes, *[0] * 7]
        sums = [None] * (0 if kernel == "attention" else 3)
        return Step(kernel, "", ints, [0.125, 0.0], [*given[:3], None, None, given[3], None, *given[4:], *sums])

    def convolution(self, conv: list[int]) -> Step:
        n, ih, iw, ic, oh, ow, oc, kh, kw, *_, group = conv
        x, w, y = self.buffers(4 * n * ih * iw * ic, 4 * kh * kw * ic // group * oc, 4 * n * oh * ow * oc)
        return Step("conv", "", [*conv, 0, 0], [0.0, 0.0], [x, w, None, None, y, None])

    def pack(self, samples: int, rows: int, cols: int, sparsity: float) -> Step:
        from edge_razor.runtime import packed_bytes

        keep = keep_count(rows * cols, sparsity)
        size = packed_bytes(Form.RAZOR_CENTERED, samples, rows, cols, keep)
        (x,) = self.buffers(4 * samples * rows * cols)
        out = Buffer("", size)
        self.arrays[out] = np.zeros(size, np.uint8)
        return Step("pack", "", [int(Form.RAZOR_CENTERED), samples, rows, cols, keep], [], [x, out])

    def weight_gradient(self, conv: list[int], sparsity: float | None) -> Step:
        """From a dense operand, or one in razor form."""
        n, ih, iw, ic, oh, ow, oc, kh, kw, *_, group = conv
        dy, g = self.buffers(4 * n * oh * ow * oc, 4 * kh * kw * ic // group * oc)
        if sparsity is None:
            (x,) = self.buffers(4 * n * ih * iw * ic)
            return Step("conv_grad_weight", "", [*conv, 0, 0], [], [x, dy, g])
        packing = self.pack(n, ih * iw, ic, sparsity)
        self.seconds(packing, 1)
        return Step(
            "conv_grad_weight", "", [*conv, int(Form.RAZOR_CENTERED), packing.ints[4]], [], [packing.operands[1], dy, g]
        )

    def seconds(self, step: Step, repeats: int = _REPEATS) -> float:
        """Shortest of several runs, less what every step costs."""
        from edge_razor.runtime import kernel_run, kernel_scratch

        operands: list[np.ndarray | None] = [None if b is None else self.arrays[b] for b in step.operands]
        if step.kernel != "binary":
            size = kernel_scratch(step.kernel, step.ints, step.floats, self.threads)
            operands.append(np.zeros(size, np.uint8) if size else None)
        times = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            kernel_run(step.kernel, step.ints, step.floats, operands, self.threads)
            times.append(time.perf_counter() - start)
        return max(min(times) - OVERHEAD, 1e-7)
