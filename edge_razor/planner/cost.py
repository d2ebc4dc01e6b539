"""Seconds that a step is expected to take: what it has to do, divided by rates of this device (`calibrate.py`).

A step costs a fixed overhead, its multiply-adds and its bytes, each at the rate of its class of kernels. That is
coarse: tiles and threads waiting for each other are not in it, nor what earlier steps left in the caches. It is there
to order plans by time, not to promise one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod

from .program import GRADIENT, Buffer, Step
from .storage import Form, Storage

__all__ = [
    "CLASSES",
    "DEFAULT_RATES",
    "Rates",
    "attention_probabilities",
    "moved_bytes",
    "packed_from",
    "program_seconds",
    "shape_class",
    "step_bytes",
    "step_multiply_adds",
    "step_seconds",
]

_WINOGRAD_CHANNELS = 32  # with fewer the runtime takes another way (conv_winograd.cpp)
_CONV_SHAPE = 16  # ints of ConvShape: n, ih, iw, ic, oh, ow, oc, kh, kw, sh, sw, pt, pl, dh, dw, group

# Classes of kernels that have a rate of their own in multiply-adds a second, and what a core of a current laptop or
# server with AVX2 does about (used if the device was never calibrated).
DEFAULT_RATES: Mapping[str, float] = {
    "product": 30e9,  # 1×1 convolution, linear: forward and input gradient
    "winograd": 30e9,  # 3×3 without stride or dilation
    "convolution": 20e9,  # other k×k
    "depthwise": 4e9,
    "weight product": 25e9,  # weight gradient of a dense operand
    "weight winograd": 20e9,
    "weight convolution": 12e9,
    "weight depthwise": 3e9,
    # Bytes of their operands, which such a kernel walks in another order than "bytes" do.
    "product bytes": 12e9,
    "winograd bytes": 12e9,
    "convolution bytes": 12e9,
    "depthwise bytes": 12e9,
    "weight product bytes": 12e9,
    "weight winograd bytes": 12e9,
    "weight convolution bytes": 12e9,
    "weight depthwise bytes": 12e9,
    # Weight gradient of a razor form: multiply-adds with the values kept, and with block means and masks: dense
    # multiply-adds / 64.
    "razor value product": 20e9,
    "razor block product": 3e9,
    "razor value convolution": 15e9,
    "razor block convolution": 3e9,
    "razor value depthwise": 2e9,
    "razor block depthwise": 0.1e9,
    "attention": 20e9,
    "attention_grad": 20e9,
    "attention probabilities": 0.5e9,  # an exponential, and what else is done for each query and key
    "attention_grad probabilities": 0.4e9,
    "pack bytes": 2e9,  # of the float32 operand
    "pack values": 0.5e9,  # that are kept
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
        keep = step.ints[15]
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
    if step.kernel == "embedding":  # of some rows of its table
        n, _, cols = step.ints[:3]
        return 4 * n * (1 + 2 * cols)
    total = sum(buffer.bytes for buffer in (*step.reads, *step.writes))
    if (turn := _turn(step)) is None:
        return total
    operand, count, samples = turn
    packed = step.operands[operand]
    return total if packed is None else total - packed.bytes + packed.bytes * count // samples


def _turn(step: Step) -> tuple[int, int, int] | None:
    """(operand, count, samples) if the step handles `count` of the `samples` samples that a packed operand has."""
    if step.kernel == "pack" and len(step.ints) > 7:
        return 1, step.ints[8], step.ints[1]
    if step.kernel == "conv_grad_weight" and len(step.ints) > GRADIENT and step.ints[_CONV_SHAPE] != Form.DENSE:
        return 0, step.ints[0], step.ints[GRADIENT + 1]
    return None


def step_seconds(step: Step, rates: Rates) -> float:
    """Seconds of one call."""
    rate = rates.rates
    seconds = OVERHEAD
    if step.kernel == "pack":
        size = packed_from(step)
        if step.ints[0] == Form.BF16:
            return seconds + 1.5 * size / rate["bytes"]
        return seconds + size / rate["pack bytes"] + _packed_samples(step) * step.ints[4] / rate["pack values"]
    if step.kernel == "conv_grad_weight":
        dense = replace_form(step, Form.DENSE, 0)
        shape = shape_class(step)
        if step.ints[_CONV_SHAPE] in (Form.DENSE, Form.BF16):
            work, moved = f"weight {shape}", f"weight {shape} bytes"
            return seconds + step_multiply_adds(dense) / rate[work] + moved_bytes(step) / rate[moved]
        shape = "convolution" if shape == "winograd" else shape
        seconds += step_multiply_adds(step) / rate[f"razor value {shape}"] + step_bytes(step) / rate["bytes"]
        return seconds + step_multiply_adds(dense) / 64 / rate[f"razor block {shape}"]
    if step.kernel in ("conv", "conv_grad_input"):
        shape = shape_class(step)
        return seconds + step_multiply_adds(step) / rate[shape] + moved_bytes(step) / rate[f"{shape} bytes"]
    if step.kernel in ("attention", "attention_grad"):
        seconds += attention_probabilities(step) / rate[f"{step.kernel} probabilities"]
        return seconds + step_multiply_adds(step) / rate[step.kernel]
    if step.kernel == "batch_matmul":
        return seconds + step_multiply_adds(step) / rate["product"]
    if step.kernel in ("spill_write", "spill_read"):
        return seconds + step_bytes(step) / SPILL_RATE
    if step.kernel == "spill_wait":
        return seconds
    return seconds + step_bytes(step) / rate["bytes"]


def packed_from(step: Step) -> int:
    """Bytes of what a `pack` packs, which may be a part of its operand."""
    return 4 * _packed_samples(step) * step.ints[2] * step.ints[3]


def _packed_samples(step: Step) -> int:
    turn = _turn(step)
    return step.ints[1] if turn is None else turn[1]


def program_seconds(steps: Iterable[Step], rates: Rates) -> float:
    """Seconds of all steps, one call each."""
    return sum(step_seconds(step, rates) for step in steps)


def attention_probabilities(step: Step) -> int:
    """Pairs of a query and a key, all heads."""
    n, t, s, heads = step.ints[:4]
    return n * heads * t * s


def moved_bytes(step: Step) -> int:
    """`step_bytes`, and the bytes of the patches that a k×k convolution gathers before it multiplies them."""
    if shape_class(step) != "convolution":
        return step_bytes(step)
    n, _, _, ic, oh, ow, _, kh, kw, *_ = step.ints[:_CONV_SHAPE]
    return step_bytes(step) + 4 * n * oh * ow * kh * kw * ic


def shape_class(step: Step) -> str:
    """Class of a convolution or one of its gradients: product, winograd, convolution or depthwise."""
    _, _, _, ic, _, _, oc, kh, kw, sh, sw, _, _, dh, dw, group = step.ints[:_CONV_SHAPE]
    if group > 1 and group == ic:
        return "depthwise"
    if kh * kw == 1:
        return "product"
    plain = (kh, kw, sh, sw, dh, dw, group) == (3, 3, 1, 1, 1, 1, 1)
    return "winograd" if plain and min(ic, oc) >= _WINOGRAD_CHANNELS else "convolution"


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
