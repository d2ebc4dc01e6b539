"""Spilling: kept tensors that lie in a file between the forward and the backward pass.

An I/O thread writes a tensor straight from the arena while the next steps compute, and reads it back while the steps
before its first reader do. Its memory is planned for both times, so that nothing is copied or allocated: at most one
tensor is being written and two are being read at a time.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import accumulate

from .program import Buffer, Step, touches

__all__ = ["FILE_ALIGNMENT", "spill"]

FILE_ALIGNMENT = 4096  # bytes; of every tensor in the spill file, a page of the file system
# A kernel moves memory at some 8 GB/s, a disk writes and reads some 0.5 GB/s: so many bytes pass through the operands
# of the steps that run while a tensor of one byte is written or read.
OVERLAP = 16


def spill(steps: list[Step], spilled: Collection[Buffer]) -> list[Step]:
    """Adds `spill_write` behind the last forward step that touches each of `spilled`, `spill_read` before the first
    backward step that does, and a `spill_wait` for each: for the write before the backward pass begins or the memory
    is used again, for the read right before its reader.
    """
    touched = touches(steps)
    uses: dict[Buffer, tuple[int, int]] = {}  # last forward step, first backward step
    for buffer in spilled:
        before = [i for i in touched.get(buffer, ()) if not steps[i].backward]
        after = [i for i in touched.get(buffer, ()) if steps[i].backward]
        if before and after:
            uses[buffer] = (before[-1], after[0])
    if not uses:
        return steps
    backward = next(i for i, step in enumerate(steps) if step.backward)
    passed = [0, *accumulate(sum(b.bytes for b in {*step.operands} if b is not None) for step in steps)]
    inserted: list[tuple[tuple[int, int, int, int], Step]] = []
    written: dict[Buffer, int] = {}
    slots: dict[Buffer, tuple[int, int]] = {}  # number and place in the file
    offset = 0
    order = sorted(uses, key=lambda b: uses[b][0])
    for slot, buffer in enumerate(order):
        slots[buffer] = (slot, offset)
        offset += -(-buffer.bytes // FILE_ALIGNMENT) * FILE_ALIGNMENT
        begin = uses[buffer][0] + 1
        end = min(backward, uses[order[slot + 1]][0] + 1 if slot + 1 < len(order) else backward)
        wait = begin
        while wait < end and passed[wait] - passed[begin] < OVERLAP * buffer.bytes:
            wait += 1
        written[buffer] = wait
        inserted.append(((begin, 0, slot, 0), _step("spill_write", buffer, [*slots[buffer]], False)))
        inserted.append(((wait, 0, slot, 1), _step("spill_wait", buffer, [slot], False)))
    back = {buffer: Buffer(f"{buffer.name} read back", buffer.bytes) for buffer in order}
    readers = sorted(uses, key=lambda b: uses[b][1])
    for index, buffer in enumerate(readers):
        reader = uses[buffer][1]
        earliest = max(written[buffer], uses[readers[index - 2]][1] if index > 1 else 0)
        begin = reader
        while begin > earliest and passed[reader] - passed[begin] < OVERLAP * buffer.bytes:
            begin -= 1
        inserted.append(((begin, 1, 0, index), _step("spill_read", back[buffer], [*slots[buffer]], True)))
        inserted.append(((reader, 1, 1, index), _step("spill_wait", back[buffer], [slots[buffer][0]], True)))
    at: dict[int, list[Step]] = {}
    for key, step in sorted(inserted, key=lambda item: item[0]):
        at.setdefault(key[0], []).append(step)
    result: list[Step] = []
    for index, step in enumerate(steps):
        result += at.get(index, ())
        if step.backward:
            step.operands[:] = [back.get(b, b) if b is not None else None for b in step.operands]
        result.append(step)
    return result


def _step(kernel: str, buffer: Buffer, ints: list[int], backward: bool) -> Step:
    return Step(kernel, f"{buffer.name}:{kernel}", ints, [], [buffer], backward)
