"""Seconds that a step is expected to take: what it has to do, divided by rates of this device (`calibrate.py`).

A step costs a fixed overhead, its multiply-adds and its bytes, each at the rate of its class of kernels. That is
coarse: caches, tiles and threads waiting for each other are not in it. It is there to order plans by time, not to
promise one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod

from .program import Buffer, Step
from .storage import Form, Storage

__all__ = ["CLASSES", "DEFAULT_RATES", "Rates", "program_seconds", "step_bytes", "step_multiply_adds", "step_seconds"]

_CONV_SHAPE = 16  # ints of ConvShape: n, ih, iw, ic, oh, ow, oc, kh, kw, sh, sw, pt, pl, dh, dw, group

# Classes of kernels that have a rate of their own in multiply-adds a second, and what a core of a current laptop or
# server with AVX2 does about (used if the device was never calibrated).
DEFAULT_RATES: Mapping[str, float] = {
    "product": 30e9,  # 1×1 convolution, linear: forward and input gradient
    "convolution": 20e9,  # k×k
    "depthwise": 4e9,
    "weight product": 25e9,  # weight gradient of a dense operand
    "weight convolution": 12e9,
    "weight depthwise": 3e9,
    # Weight gradient of a razor form: multiply-adds with the values kept, and with block means and masks: dense
    # multiply-adds / 64.
    "razor value product": 20e9,
    "razor block product": 3e9,
    "razor value convolution": 15e9,
    "razor block convolution": 3e9,
    "razor value depthwise": 2e9,
    "razor block depthwise": 0.1e9,
    "attention": 12e9,
    "attention_grad": 10e9,
    "pack bytes": 2e9,  # of the float32 operand
    "bytes": 6e9,  # of everything else
}
CLASSES = tuple(DEFAULT_RATES)
SPILL_RATE = 0.5e9  # bytes a second of a disk; what runs meanwhile is not taken off
OVERHEAD = 3e-6  # seconds a step: dispatch to threads that spin, and the first cache misses


@dataclass(frozen=True, slots=True)
class Rates:
    """Units a second of each of `CLASSES`, for all threads together. `source` says where they come from."""

    rates: Mapping[str, float]
    source: str = "default"

    @staticmethod
    def default(threads: int) -> Rates:
        return Rates({name: rate * threads for name, rate in DEFAULT_RATES.items()})


def step_multiply_adds(step: Step) -> int:
    """Multiply-adds of one call."""
    if step.kernel == "batch_matmul":
        batch, m, k, p = step.ints[:4]
        return batch * m * k * p
    if step.kernel in ("attention", "attention_grad"):
        n, t, s, heads, _, d = step.ints[:6]
        if step.kernel == "attention":
            return 2 * n * heads * t * s * d
        keep = step.ints[-1]
        return 4 * n * heads * t * keep * d if keep else 5 * n * heads * t * s * d  # QKᵀ again among the five
    if not step.kernel.startswith("conv"):
        return 0
    n, ih, iw, ic, oh, ow, oc, kh, kw, *_, group = step.ints[:_CONV_SHAPE]
    dense = n * oh * ow * oc * kh * kw * (ic // group)
    if step.kernel != "conv_grad_weight":
        return dense
    form, keep = step.ints[_CONV_SHAPE : _CONV_SHAPE + 2]
    return dense if form in (Form.DENSE, Form.BF16) else dense * keep // (ih * iw * ic)


def step_bytes(step: Step) -> int:
    """Bytes that one call reads and writes, scratch left out."""
    if step.kernel == "copy":  # of a part of its operands
        rank = step.ints[0]
        return 2 * 4 * prod(step.ints[1 : 1 + rank])
    return sum(buffer.bytes for buffer in (*step.reads, *step.writes))


def step_seconds(step: Step, rates: Rates) -> float:
    """Seconds of one call."""
    rate = rates.rates
    seconds = OVERHEAD
    if step.kernel == "pack":
        source = step.operands[0]
        assert source is not None
        if step.ints[0] == Form.BF16:
            return seconds + 1.5 * source.bytes / rate["bytes"]
        return seconds + source.bytes / rate["pack bytes"]
    if step.kernel == "conv_grad_weight":
        dense = replace_form(step, Form.DENSE, 0)
        if step.ints[_CONV_SHAPE] in (Form.DENSE, Form.BF16):
            return seconds + step_multiply_adds(dense) / rate[f"weight {_shape_class(step)}"]
        shape = _shape_class(step)
        seconds += step_multiply_adds(step) / rate[f"razor value {shape}"]
        return seconds + step_multiply_adds(dense) / 64 / rate[f"razor block {shape}"]
    if step.kernel in ("conv", "conv_grad_input"):
        return seconds + step_multiply_adds(step) / rate[_shape_class(step)] + step_bytes(step) / (4 * rate["bytes"])
    if step.kernel in ("attention", "attention_grad"):
        return seconds + step_multiply_adds(step) / rate[step.kernel]
    if step.kernel == "batch_matmul":
        return seconds + step_multiply_adds(step) / rate["product"]
    if step.kernel in ("spill_write", "spill_read"):
        return seconds + step_bytes(step) / SPILL_RATE
    if step.kernel == "spill_wait":
        return seconds
    return seconds + step_bytes(step) / rate["bytes"]


def program_seconds(steps: Iterable[Step], rates: Rates) -> float:
    """Seconds of all steps, one call each."""
    return sum(step_seconds(step, rates) for step in steps)


def _shape_class(step: Step) -> str:
    ic, kh, kw, group = step.ints[3], step.ints[7], step.ints[8], step.ints[15]
    if group > 1 and group == ic:
        return "depthwise"
    return "product" if kh * kw == 1 else "convolution"


def replace_form(step: Step, form: int, keep: int) -> Step:
    """The step with its kept operand in another form; None of its buffers changes."""
    ints = list(step.ints)
    if step.kernel == "conv_grad_weight":
        ints[_CONV_SHAPE : _CONV_SHAPE + 2] = [form, keep]
    elif step.kernel in ("mul_grad", "layer_norm_grad"):
        ints[0], ints[4] = form, keep
    return replace(step, ints=ints)


def as_kept(step: Step, kept: Buffer, storage: Storage, replacement: Buffer) -> Step:
    """`step` with operand `kept` replaced by `replacement`, which is stored as `storage` says."""
    changed = replace_form(step, int(storage.form or 0), storage.keep)
    return replace(changed, operands=[replacement if o is kept else o for o in step.operands])
