"""Gradients finished where they are made: a residual's gradient added, the activation's slope and the channel sums in
the step that writes dY.

Without this, a gradient of a layer's output is written, read and written again (activation_grad, or the addition of a
residual's gradient), and read once more (channel_sum), before the layer's own gradients read it.
"""

from __future__ import annotations

from collections.abc import Sequence

from .context import scratch_bytes
from .program import Buffer, Region, Step, is_sum, touches
from .storage import ActivationKeep

__all__ = ["fuse_finish"]

_SHAPE = 16  # ints of ConvShape; act, keep, sum and accumulate follow


def _rows_cols(step: Step) -> list[int]:
    """Of the gradient that a step of `_SUMMING` makes."""
    if step.kernel == "activation_grad":
        return step.ints[:2]
    if step.kernel == "layer_norm_grad":
        _, samples, rows, cols = step.ints[:4]
        return [samples * rows, cols]
    n, ih, iw, ic = step.ints[:4]
    return [n * ih * iw, ic]


# Where the kernels that can sum have their operand `sums`, their dX, and their attribute `sum` if they need one.
_SUMMING: dict[str, tuple[int, int, int | None]] = {
    "conv_grad_input": (5, 3, _SHAPE + 2),
    "activation_grad": (3, 2, 4),
    "layer_norm_grad": (8, 4, None),
}
# dQ, dK and dV of attention_grad, the sums of each, and where the integers of their columns begin.
_ATTENTION_GRADIENTS, _ATTENTION_SUMS, _ATTENTION_COLUMNS = range(7, 10), 3, 22


def fuse_finish(steps: Sequence[Step], gradients: set[Buffer | None], threads: int) -> list[Step]:
    """Takes additions into layer_norm_grad, activation_grad into the conv_grad_input that makes its dY, and then
    channel_sum into what makes its dY.

    `gradients` are read by updates that are not among the steps. Buffers written by what is taken in are written
    earlier than before; nothing reads them in between.
    """
    return _fuse_sums(_fuse_slopes(_fuse_addends(list(steps), gradients), gradients), threads)


def _fuse_addends(steps: list[Step], gradients: set[Buffer | None]) -> list[Step]:
    """dX = layer_norm_grad(…); sum = other + dX: legal if nothing else sees dX and `other` is complete before.

    What reads `other` later still finds it: the result is a buffer of its own until steps work in place.
    """
    users = {buffer: [steps[i] for i in indices] for buffer, indices in touches(steps).items()}
    order = {step: i for i, step in enumerate(steps)}
    removed: set[Step] = set()
    for add in steps:
        if not is_sum(add):
            continue
        a, b, total = add.operands
        assert a is not None and b is not None and total is not None
        if a.bytes != total.bytes or b.bytes != total.bytes or users[total][0] is not add:
            continue
        for made, other in ((b, a), (a, b)):
            producer = users[made][0]
            if producer.kernel != "layer_norm_grad" or producer.operands[4] is not made:
                continue
            if producer.operands[7] is not None or users[made] != [producer, add]:
                continue
            if made.region != Region.ARENA or made in gradients:
                continue
            if any(other in s.writes and order[producer] <= order[s] < order[add] for s in users[other]):
                continue
            producer.operands[4], producer.operands[7] = total, other
            users[total][0] = producer
            users[other] = sorted({*users[other], producer} - {add}, key=order.__getitem__)
            removed.add(add)
            break
    return [step for step in steps if step not in removed]


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
                _give_sums(maker, out, dy, threads)
                removed.add(step)
                continue
        for buffer in step.writes:
            last_writer[buffer] = step
    return [step for step in steps if step not in removed]


def _takes_sums(maker: Step, channel_sum: Step) -> bool:
    if maker.kernel == "attention_grad":
        return _attention_takes_sums(maker, channel_sum)
    if maker.kernel not in _SUMMING:
        return False
    sums, dx, _ = _SUMMING[maker.kernel]
    whole = maker.operands[dx] is channel_sum.operands[0] and _rows_cols(maker) == channel_sum.ints
    return whole and maker.operands[sums] is None


def _attention_takes_sums(maker: Step, channel_sum: Step) -> bool:
    """Whether what is summed is all columns of dQ, dK or dV, or of a matrix of nothing but them."""
    n, t, s, heads, kv_heads, d = maker.ints[:6]
    rows, cols = channel_sum.ints
    width = 0
    for index, operand in enumerate(_ATTENTION_GRADIENTS):
        if maker.operands[operand] is not channel_sum.operands[0]:
            continue
        own = (kv_heads if index else heads) * d
        columns = maker.ints[_ATTENTION_COLUMNS + 2 * index :]
        row = columns[0] if columns else own
        if rows != n * (s if index else t) or cols != row or maker.operands[operand + _ATTENTION_SUMS] is not None:
            return False
        width += own
    return width == cols


def _give_sums(maker: Step, out: Buffer | None, dy: Buffer, threads: int) -> None:
    if maker.kernel == "attention_grad":
        for operand in _ATTENTION_GRADIENTS:
            if maker.operands[operand] is dy:
                maker.operands[operand + _ATTENTION_SUMS] = out
        return
    operand, _, attribute = _SUMMING[maker.kernel]
    maker.operands[operand] = out
    if attribute is None:
        return
    maker.ints[attribute] = 1
    size = scratch_bytes(maker.kernel, tuple(maker.ints), tuple(maker.floats), threads)
    maker.operands[-1] = Buffer(f"scratch of {maker.label}", size) if size else None
