"""An independent check of a scheduled and placed program: it simulates memory byte range by byte range.

It knows nothing of lifetimes: every buffer's bytes carry the identity of their last writer, and a step that reads a
buffer must find exactly what that buffer's own writers left there.
"""

from __future__ import annotations

from edge_razor.planner.program import ALIGNMENT, KERNELS, UPDATES, Buffer, Program, Region, Step

# Written operands that may share memory with a read operand, as docs/plan-format.md's table says.
MAY_ALIAS = {
    "conv": {(4, 6)},
    "affine": {(3, 0)},
    "activation_grad": {(2, 0)},
    "scale_columns": {(2, 0)},
    "binary": {(2, 0), (2, 1)},
    "neg": {(1, 0)},
    "softmax": {(1, 0)},
    "layer_norm_grad": {(4, 1), (4, 7)},
    "softmax_grad": {(2, 0)},
    "rotary": {(3, 0)},
    "dropout": {(1, 0)},
    "cross_entropy": {(2, 0)},
    "mse": {(2, 0)},
    "bce_logits": {(2, 0)},
}
# Written operands that may be columns of one matrix: where their integers (row, column) are, and those of their width.
# Sums lie as one row of the gradient that they are of.
_COLUMNS = ((22, (3, 5)), (24, (4, 5)), (26, (4, 5)))
COLUMNS = {"attention_grad": {first + i: places for first in (7, 10) for i, places in enumerate(_COLUMNS)}}


class Memory:
    """Who owns which arena bytes: disjoint ranges, each with the buffer that last wrote it."""

    def __init__(self) -> None:
        self.ranges: list[tuple[int, int, Buffer]] = []

    def write(self, buffer: Buffer) -> None:
        start, end = buffer.offset, buffer.offset + buffer.bytes
        cut: list[tuple[int, int, Buffer]] = []
        for low, high, owner in self.ranges:
            if low < start < high:
                cut.append((low, start, owner))
            if low < end < high:
                cut.append((end, high, owner))
            if high <= start or low >= end:
                cut.append((low, high, owner))
        self.ranges = [*cut, (start, end, buffer)]

    def holds(self, buffer: Buffer) -> bool:
        start, end = buffer.offset, buffer.offset + buffer.bytes
        covered = sum(
            min(high, end) - max(low, start)
            for low, high, owner in self.ranges
            if _same(owner, buffer) and low < end and high > start
        )
        return covered == buffer.bytes


def _same(owner: Buffer, buffer: Buffer) -> bool:
    """Whether the bytes that lie at one place of both are the same value's: of one buffer, or of it and samples of it.

    What a turn has for itself bears another name than the memory that it lies in, and belongs to that turn alone.
    """
    whole = owner.whole or owner
    return owner is buffer or (whole is (buffer.whole or buffer) and owner.name == buffer.name == whole.name)


def _overlap(a: Buffer, b: Buffer) -> bool:
    return a.region == b.region and a.offset < b.offset + b.bytes and b.offset < a.offset + a.bytes


def _columns_apart(step: Step, i: int, j: int) -> bool:
    """Whether operands `i` and `j`, which are one buffer, are different columns of rows of the same length."""
    known = COLUMNS.get(step.kernel, {})
    if i not in known or j not in known:
        return False
    rows, taken = set(), []
    for at, factors in (known[i], known[j]):
        rows.add(step.ints[at])
        first = step.ints[at + 1]
        taken.append(range(first, first + step.ints[factors[0]] * step.ints[factors[1]]))
    return len(rows) == 1 and not set(taken[0]) & set(taken[1])


def verify(program: Program, arena_bytes: int) -> None:
    """Raises AssertionError at the first step that would read or overwrite wrong bytes."""
    memory = Memory()
    for bound in program.inputs:
        assert bound.offset >= 0
        memory.write(bound)
    for position, step in enumerate(program.steps):
        where = f"step {position} {step.label} ({step.kernel})"
        signature = KERNELS[step.kernel]
        assert len(step.operands) == signature.operands + signature.scratch, where
        for index, buffer in enumerate(step.operands):
            if buffer is None:
                assert index in signature.optional or index == signature.operands, f"{where}: operand {index} missing"
                continue
            aligned = buffer.region == Region.MAPPED or buffer.offset % ALIGNMENT == 0
            assert buffer.offset >= 0 and aligned and buffer.bytes > 0, where
            assert buffer.region != Region.MAPPED or index not in signature.writes, f"{where}: writes a mapped file"
            if buffer.region == Region.ARENA:
                assert buffer.offset + buffer.bytes <= arena_bytes, f"{where}: {buffer.name} ends outside the arena"
        for read in step.reads:
            if read.region == Region.ARENA:
                assert memory.holds(read), f"{where}: reads {read.name}, which was overwritten or never written"
        for i, a in enumerate(step.operands):
            for j, b in enumerate(step.operands):
                if i >= j or a is None or b is None or not _overlap(a, b):
                    continue
                written = signature.writes | ({signature.operands} if signature.scratch else set())
                if i in written or j in written:
                    pairs = MAY_ALIAS.get(step.kernel, set())
                    allowed = (i, j) in pairs or (j, i) in pairs or _columns_apart(step, i, j)
                    assert a is b and allowed, f"{where}: {a.name} and {b.name} overlap"
        if step.scratch is not None:
            memory.write(step.scratch)
        for result in step.writes:
            if result.region == Region.ARENA:
                memory.write(result)
    for output in program.outputs:
        assert memory.holds(output), f"output {output.name} does not survive"


def meaning(steps: list[Step], inputs: list[Buffer]) -> dict[str, object]:
    """What each update step is given, as an expression over inputs and parameters: update label → expression.

    Two orders of the same steps mean the same if the expressions are equal. Adding into an existing gradient is the
    same as a later addition.
    """
    content: dict[Buffer, object] = {buffer: buffer.name for buffer in inputs}
    updates: dict[str, object] = {}
    for step in steps:
        signature = KERNELS[step.kernel]
        ints = list(step.ints)
        given = tuple(
            None if b is None else content.get(b, b.name if b.region in (Region.PARAMS, Region.MAPPED) else None)
            for i, b in enumerate(step.operands[: signature.operands])
            if i not in signature.writes or step.kernel in UPDATES and i == 0
        )
        if step.kernel in FINISHING:
            _finished_gradient(step, given, content)
            continue
        if step.kernel == "conv" and given[-1] is not None:
            _finished_sum(step, given, content)
            continue
        # A sum may be part of the step that makes its terms, and an activation of the one that makes its argument, so
        # both are known by those alone.
        label = "" if step.kernel in ("channel_sum", "affine") else step.label
        result: object = hash((step.kernel, label, tuple(ints), tuple(step.floats), given))
        if step.kernel == "binary" and ints[:2] == [0, 1] and 0 not in ints[3:5]:
            result = _sum(*given)
        for index, buffer in enumerate(step.operands[: signature.operands]):
            if buffer is None or index not in signature.writes:
                continue
            if step.kernel == "copy":
                content[buffer] = hash((content.get(buffer), result))
            elif step.kernel == "binary":
                content[buffer] = result
            else:
                content[buffer] = hash((result, index))
        if step.kernel in UPDATES:
            updates[step.label] = given
    return updates


FINISHING = ("conv_grad_input", "activation_grad", "layer_norm_grad", "attention_grad")


def _finished_gradient(step: Step, given: tuple[object, ...], content: dict[Buffer, object]) -> None:
    """Addition, activation and channel sums in a step mean the same as in steps of their own."""
    if step.kernel in ("layer_norm_grad", "attention_grad"):
        _finished_transformer_gradient(step, given, content)
        return
    if step.kernel == "conv_grad_input":
        dy, weight, scale, kept = given
        shape, (act, keep, sums, accumulate) = step.ints[:16], step.ints[16:20]
        dx, out = step.operands[3], step.operands[5]
        rows, cols = shape[0] * shape[1] * shape[2], shape[3]
        assert dx is not None
        value: object = hash((step.kernel, step.label, tuple(shape), (dy, weight, scale)))
        if accumulate:
            value = _sum(content[dx], value)
    else:
        value, kept = given
        rows, cols, act, keep, sums = step.ints
        dx, out = step.operands[2], step.operands[3]
        assert dx is not None and keep
    assert bool(keep) == (kept is not None) and bool(sums) == (out is not None)
    if keep:
        value = hash(("activation_grad", rows, cols, act, keep, tuple(step.floats), value, kept))
    content[dx] = value
    if out is not None:
        content[out] = _channel_sum(rows, cols, value)


def _finished_transformer_gradient(step: Step, given: tuple[object, ...], content: dict[Buffer, object]) -> None:
    ints, operands = step.ints, step.operands
    norm = step.kernel == "layer_norm_grad"
    addend = given[4] if norm else None
    made = hash((step.kernel, step.label, tuple(ints), tuple(step.floats), given[:4] if norm else given))
    outputs = (4, 5, 6) if norm else (7, 8, 9)
    for index in outputs:
        if (buffer := operands[index]) is not None:
            content[buffer] = hash((made, index))
    if norm and operands[7] is not None:
        assert operands[4] is not None and addend is not None
        content[operands[4]] = _sum(addend, content[operands[4]])
    if norm:
        sizes = {8: (operands[4], ints[1] * ints[2], ints[3])}
    else:
        n, t, s, heads, kv_heads, d = ints[:6]
        widths, rows = (heads * d, kv_heads * d, kv_heads * d), (n * t, n * s, n * s)
        row = ints[22::2] or widths
        sizes = {10 + i: (operands[7 + i], rows[i], row[i]) for i in range(3)}
    for index, (gradient, count, cols) in sizes.items():
        if (out := operands[index]) is not None:
            assert gradient is not None
            content[out] = _channel_sum(count, cols, content[gradient])


def _channel_sum(rows: int, cols: int, value: object) -> object:
    """As `meaning` has it for a step of its own."""
    return hash((hash(("channel_sum", "", (rows, cols), (), (value,))), 1))


def _finished_sum(step: Step, given: tuple[object, ...], content: dict[Buffer, object]) -> None:
    """A convolution, an addition and an activation in one step mean the same as in steps of their own."""
    shape, (act, keep), form = step.ints[:16], step.ints[16:18], step.ints[18:]
    y, kept = step.operands[4:6]
    assert y is not None and bool(keep) == (kept is not None)
    product = hash((step.kernel, step.label, (*shape, 0, 0, *form), (0.0, 0.0), (*given[:-1], None)))
    value: object = _sum(hash((product, 4)), given[-1])
    if act:
        rows, cols = shape[0] * shape[4] * shape[5], shape[6]
        result = hash(("affine", "", (rows, cols, act, keep), tuple(step.floats), (value, None, None)))
        value = hash((result, 3))
        if kept is not None:
            content[kept] = hash((result, 4))
    content[y] = value


def _sum(*terms: object) -> object:
    """A sum that does not depend on the order of its terms."""
    flat: list[object] = []
    for term in terms:
        flat.extend(term[1:] if isinstance(term, tuple) and term[0] == "sum" else [term])
    return ("sum", *sorted(flat, key=repr))
