"""Gradients finished where they are made: the activation's slope and the channel sums in the step that writes dY.

Without this, a gradient of a convolution's output is written, read and written again (activation_grad), and read once
more (channel_sum), before the layer's own gradients read it.
"""

from __future__ import annotations

from collections.abc import Sequence

from .context import scratch_bytes
from .program import Buffer, Region, Step, touches
from .storage import ActivationKeep

__all__ = ["fuse_finish"]

_SHAPE = 16  # ints of ConvShape; act, keep, sum and accumulate follow


def _rows_cols(step: Step) -> list[int]:
    """Of the gradient that a conv_grad_input or activation_grad makes."""
    if step.kernel == "activation_grad":
        return step.ints[:2]
    n, ih, iw, ic = step.ints[:4]
    return [n * ih * iw, ic]


# Where the kernels that can sum have their attribute `sum`, their operand `sums` and their dX.
_SUMMING = {"conv_grad_input": (_SHAPE + 2, 5, 3), "activation_grad": (4, 3, 2)}


def fuse_finish(steps: Sequence[Step], gradients: set[Buffer | None], threads: int) -> list[Step]:
    """Takes activation_grad into the conv_grad_input that makes its dY, then channel_sum into what makes its dY.

    `gradients` are read by updates that are not among the steps. Buffers written by what is taken in are written
    earlier than before; nothing reads them in between.
    """
    return _fuse_sums(_fuse_slopes(list(steps), gradients), threads)


def _fuse_slopes(steps: list[Step], gradients: set[Buffer | None]) -> list[Step]:
    """dX = conv_grad_input(…); dZ = activation_grad(dX): legal if nothing else sees dX after it is made.

    What read the buffer before (a gradient that conv_grad_input adds to) has seen the values it had then.
    """
    users = {buffer: [steps[i] for i in indices] for buffer, indices in touches(steps).items()}
    order = {step: i for i, step in enumerate(steps)}
    removed: set[Step] = set()
    for act in steps:
        if act.kernel != "activation_grad" or act.ints[3] not in (ActivationKeep.BITS, ActivationKeep.Q4):
            continue
        made, kept, out, _ = act.operands[:4]
        assert made is not None and kept is not None and out is not None
        known = users[made]
        if known[-1] is not act or len(known) < 2 or made.region != Region.ARENA or made in gradients:
            continue
        producer = known[-2]
        if producer.kernel != "conv_grad_input" or producer.operands[3] is not made or producer.operands[4] is not None:
            continue
        if _rows_cols(producer) != act.ints[:2] or out in gradients or out.bytes != made.bytes:
            continue
        if any(kept in s.writes and order[s] > order[producer] for s in users[kept]):
            continue
        producer.operands[4] = kept
        producer.ints[_SHAPE : _SHAPE + 2] = act.ints[2:4]
        producer.floats[:] = act.floats
        for user in users[out]:
            user.operands[:] = [made if o is out else o for o in user.operands]
        users[made] = [*known[:-1], *(u for u in users.pop(out) if u is not act)]
        users[kept] = sorted({*users[kept], producer} - {act}, key=order.__getitem__)
        removed.add(act)
    return [step for step in steps if step not in removed]


def _fuse_sums(steps: list[Step], threads: int) -> list[Step]:
    """A channel_sum moves into the last step that wrote its dY, if that step can sum and does not sum yet."""
    last_writer: dict[Buffer, Step] = {}
    removed: set[Step] = set()
    for step in steps:
        if step.kernel == "channel_sum":
            dy, out = step.operands[:2]
            assert dy is not None
            maker = last_writer.get(dy)
            if maker is not None and _takes_sums(maker, step):
                _give_sums(maker, out, threads)
                removed.add(step)
                continue
        for buffer in step.writes:
            last_writer[buffer] = step
    return [step for step in steps if step not in removed]


def _takes_sums(maker: Step, channel_sum: Step) -> bool:
    if maker.kernel not in _SUMMING:
        return False
    attribute, _, dx = _SUMMING[maker.kernel]
    whole = maker.operands[dx] is channel_sum.operands[0] and _rows_cols(maker) == channel_sum.ints
    return whole and not maker.ints[attribute]


def _give_sums(maker: Step, out: Buffer | None, threads: int) -> None:
    attribute, operand, _ = _SUMMING[maker.kernel]
    maker.ints[attribute], maker.operands[operand] = 1, out
    size = scratch_bytes(maker.kernel, tuple(maker.ints), tuple(maker.floats), threads)
    maker.operands[-1] = Buffer(f"scratch of {maker.label}", size) if size else None
