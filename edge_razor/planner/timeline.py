"""What lies where in the arena while one micro-batch passes, read from a plan file: for reports.

Taken from the steps alone, so that it holds for every plan, whoever made it and whatever levers it uses: a step that
writes an operand begins a stay at its address, the last step that reads it before something else is written there ends
the stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from .deserialize import read_steps
from .program import ALIGNMENT, KERNELS, Buffer, Region, Step

__all__ = ["KINDS", "Stay", "Timeline", "read_timeline"]

# What a stay holds. "kept" is made by the forward pass and read by the backward pass; "activations" die in the forward
# pass; what the backward pass makes from them again is "recomputed".
KINDS = ("kept", "activations", "recomputed", "gradients", "scratch")
_LOSSES = frozenset({"cross_entropy", "mse", "bce_logits"})


@dataclass(slots=True)
class Stay:
    """One thing in the arena: `bytes` from `offset`, needed from step `first` to step `last`, both included."""

    name: str
    kind: str
    first: int
    last: int
    offset: int
    bytes: int


class Timeline(NamedTuple):
    """
    Attributes:
        labels: of every training step, in order.
        loss: index of the step that computes the loss; what comes after it is the backward pass.
        stays: ordered by their first step.
        arena_bytes: end of the highest stay, in steps of the alignment.
    """

    labels: list[str]
    loss: int
    stays: list[Stay]
    arena_bytes: int

    def live_bytes(self) -> dict[str, list[int]]:
        """Bytes alive at each step, by kind, in steps of the alignment."""
        change = {kind: [0] * (len(self.labels) + 1) for kind in KINDS}
        for stay in self.stays:
            size = -(-stay.bytes // ALIGNMENT) * ALIGNMENT
            change[stay.kind][stay.first] += size
            change[stay.kind][stay.last + 1] -= size
        live: dict[str, list[int]] = {}
        for kind, steps in change.items():
            total, live[kind] = 0, []
            for delta in steps[:-1]:
                total += delta
                live[kind].append(total)
        return live


def read_timeline(plan: bytes) -> Timeline:
    """The timeline of a plan file's training steps.

    Raises:
        PlanError: no plan file, damaged, or of another version.
    """
    steps = read_steps(plan).train
    loss = next((i for i, step in enumerate(steps) if step.kernel in _LOSSES), len(steps))
    arena = _Arena(loss)
    for index, step in enumerate(steps):
        arena.run(index, step)
    stays = sorted(arena.stays, key=lambda stay: (stay.first, stay.offset))
    for stay in stays:
        if stay.kind == "activations" and stay.first < loss < stay.last:
            stay.kind = "kept"
    end = max((-(-(stay.offset + stay.bytes) // ALIGNMENT) * ALIGNMENT for stay in stays), default=0)
    return Timeline([step.label for step in steps], loss, stays, end)


class _Arena:
    def __init__(self, loss: int) -> None:
        self.loss = loss
        self.stays: list[Stay] = []
        self.present: list[Stay] = []  # what was written and not yet overwritten

    def run(self, index: int, step: Step) -> None:
        reads = {id(b): self._read(index, b) for b in step.reads if b.region == Region.ARENA}
        after_loss = index >= self.loss
        from_gradient = (
            step.kernel in _LOSSES or step.kernel == "fill" or any(s.kind == "gradients" for s in reads.values())
        )
        if after_loss:
            kind = "gradients" if from_gradient else "recomputed"
        else:
            kind = "activations"
        if step.kernel == "spill_read":  # kept in a file until here
            kind = "kept"
        names = KERNELS[step.kernel].names
        scratch = step.scratch
        written: set[tuple[int, int]] = set()  # several results may be columns of one matrix
        for position, operand in enumerate(step.operands):
            if operand is None or operand.region != Region.ARENA:
                continue
            if operand is scratch:
                self._write(index, operand, f"{step.label} scratch", "scratch")
            elif position in KERNELS[step.kernel].writes:
                continued = reads.get(id(operand))
                place = operand.offset, operand.bytes
                if place not in written and (continued is None or continued.kind != kind):
                    written.add(place)
                    self._write(index, operand, f"{step.label} {names[position]}", kind)

    def _read(self, index: int, operand: Buffer) -> Stay:
        """What is read: of one stay a part, or of several, which turns have written, all."""
        end = operand.offset + operand.bytes
        found = [stay for stay in self.present if stay.offset < end and operand.offset < stay.offset + stay.bytes]
        if not found:  # bound before the first step
            found = [Stay("input", "activations", 0, index, operand.offset, operand.bytes)]
            self.stays += found
            self.present += found
        for stay in found:
            stay.last = index
        return found[-1]

    def _write(self, index: int, operand: Buffer, name: str, kind: str) -> None:
        end = operand.offset + operand.bytes
        left: list[Stay] = []
        for stay in self.present:
            if (stay.name, stay.offset, stay.bytes) == (name, operand.offset, operand.bytes) and kind != "scratch":
                stay.last = index  # another turn writes more of it
                return
            if stay.offset < end and operand.offset < stay.offset + stay.bytes:
                if stay.last == index > stay.first:
                    stay.last = index - 1  # the result is written over it in place
            else:
                left.append(stay)
        stay = Stay(name, kind, index, index, operand.offset, operand.bytes)
        self.present = [*left, stay]
        self.stays.append(stay)
