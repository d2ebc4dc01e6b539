"""Layers with large maps run a few samples at a time: what one makes is still in a cache when the next one reads it.

A run of consecutive steps that treat every sample by itself (convolutions, packing, pooling, their gradients) is a
chain. It is executed for the first samples from its first step to its last, then for the next ones, and so on. Weight
gradients and channel sums add up from turn to turn. What lives inside a chain alone needs memory for one turn's samples
only.

The idea is that of depth-first execution of fused layers (Alwani et al., "Fused-layer CNN accelerators", MICRO 2016),
here over the samples of a batch, where nothing is computed twice, and through the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from .context import scratch_bytes
from .place import Lifetime, lifetimes, live_bytes, place
from .program import ACTIVATION_SUM, ALIGNMENT, KERNELS, SUM, Buffer, Program, Region, Step, aligned, is_sum, touches
from .storage import Form

__all__ = ["Chain", "chains", "take_turns"]

# A map of fewer bytes stays in a cache without turns.
LARGE_BYTES = 8 << 20
# What another turn of a step costs beside its share of the samples, as bytes that could be moved meanwhile: the call,
# and passes over the weights that it packs again and over the sums that it adds to.
CALL_BYTES = 100 << 10
WEIGHT_PASSES = 4
SUM_PASSES = 3
CUT_SHORT = 1.5  # a chain is looked for that begins later, if it could save so many times as much
MOST_SMALL = 8  # members without a large map, one after another, that a chain may hold

_SHAPE = 16  # ints of ConvShape


@dataclass(frozen=True, slots=True)
class _Rule:
    """How a kernel runs on some of the samples.

    roles: of its operands: "s" rows of every sample, one sample after another; "r" a tensor kept in a packed form,
        of which the kernel takes a range of samples; "w" read whole; "+" added up over all samples.
    ints: (step, first sample, count, of how many) → its integers.
    """

    roles: str
    ints: Callable[[Step, int, int, int], list[int]]


def _first_int(step: Step, first: int, count: int, samples: int) -> list[int]:
    return [count, *step.ints[1:]]


def _rows_first(step: Step, first: int, count: int, samples: int) -> list[int]:
    return [step.ints[0] // samples * count, *step.ints[1:]]


def _summed(ints: list[int], attribute: int, first: int) -> list[int]:
    """`ints` with the attribute that tells whether a step sums saying that it adds, after the first turn."""
    if first and ints[attribute]:
        ints[attribute] = 2
    return ints


def _grad_input(step: Step, first: int, count: int, samples: int) -> list[int]:
    return _summed([count, *step.ints[1:]], SUM, first)


def _activation_grad(step: Step, first: int, count: int, samples: int) -> list[int]:
    return _summed(_rows_first(step, first, count, samples), ACTIVATION_SUM, first)


def _channel_sum(step: Step, first: int, count: int, samples: int) -> list[int]:
    return [*_rows_first(step, first, count, samples), int(first > 0)]


def _grad_weight(step: Step, first: int, count: int, samples: int) -> list[int]:
    dense = step.ints[_SHAPE] == Form.DENSE
    held = [count, 0] if dense else [samples, first]
    return [count, *step.ints[1 : _SHAPE + 2], int(first > 0), *held]


def _pack(step: Step, first: int, count: int, samples: int) -> list[int]:
    columns = step.ints[5:7] or [step.ints[3], 0]
    return [*step.ints[:5], *columns, first, count]


def _sum(step: Step, first: int, count: int, samples: int) -> list[int]:
    return [*step.ints[:2], step.ints[2] // samples * count, *step.ints[3:]]


_RULES = {
    "conv": _Rule("swwwsss", _first_int),
    "conv_grad_input": _Rule("swwss+", _grad_input),
    "conv_grad_weight": _Rule("rs+", _grad_weight),
    "pack": _Rule("sr", _pack),
    "affine": _Rule("swwss", _rows_first),
    "activation_grad": _Rule("sss+", _activation_grad),
    "channel_sum": _Rule("s+", _channel_sum),
    "max_pool": _Rule("sss", _first_int),
    "max_pool_grad": _Rule("sss", _first_int),
    "average_pool": _Rule("ss", _first_int),
    "average_pool_grad": _Rule("ss", _first_int),
    "binary": _Rule("sss", _sum),
}


def _roles(step: Step, samples: int) -> dict[Buffer, str] | None:
    """Role of each operand but scratch; None if the step cannot run on some of the samples."""
    rule = _RULES.get(step.kernel)
    if rule is None:
        return None
    if step.kernel == "binary":
        whole = is_sum(step) and step.ints[2] % samples == 0
    elif step.kernel == "pack":
        whole = step.ints[1] == samples
    elif step.kernel in ("affine", "activation_grad", "channel_sum"):
        whole = step.ints[0] % samples == 0
    else:
        whole = step.ints[0] == samples
    if not whole:
        return None
    found: dict[Buffer, str] = {}
    for role, buffer in zip(rule.roles, step.operands, strict=False):
        if buffer is None:
            continue
        if role == "r" and step.kernel == "conv_grad_weight" and step.ints[_SHAPE] == Form.DENSE:
            role = "s"
        sliced = role == "s" and buffer.region == Region.ARENA and buffer.bytes % samples == 0
        if (role == "s" and not sliced) or found.setdefault(buffer, role) != role:
            return None
    return found


@dataclass(slots=True)
class Chain:
    """Steps [first, last] of a program; `members` take turns, the others run before or after all of them."""

    first: int
    last: int
    members: list[int]
    before: list[int] = field(default_factory=list)
    after: list[int] = field(default_factory=list)
    inside: dict[Buffer, tuple[int, int]] = field(default_factory=dict)
    """What lives for one turn only: the first and last of the members that use it, counted within the chain."""
    gain: int = 0  # bytes that are found in a cache, less what the turns cost
    peak: int = 0  # bytes alive while it runs, at the least

    def copy(self) -> Chain:
        lists = [*self.members], [*self.before], [*self.after]
        return Chain(self.first, self.last, *lists, dict(self.inside), self.gain, self.peak)


def take_turns(program: Program, samples: int, threads: int) -> Program:
    """The program with chains of steps unrolled into turns of about `threads` samples, one for each thread.

    Args:
        program: scheduled, steps in place, of `samples` samples; its buffers are not placed yet.
    """
    if samples <= threads:
        return program
    return _Turns(program, samples, threads).run()


def chains(program: Program, samples: int, threads: int) -> list[Chain]:
    """The chains that `take_turns` unrolls, in order."""
    return list(_Turns(program, samples, threads).chains()) if samples > threads else []


class _Turns:
    def __init__(self, program: Program, samples: int, threads: int) -> None:
        self.program, self.samples, self.threads = program, samples, threads
        self.turns = -(-samples // threads)
        self.count = -(-samples // self.turns)  # samples of a turn
        self.steps = program.steps
        self.roles = [_roles(step, samples) for step in self.steps]
        self.reads = [set(step.reads) for step in self.steps]
        self.writes = [set(step.writes) for step in self.steps]
        self.uses = {buffer: len(at) for buffer, at in touches(self.steps).items()}
        self.bound = {*program.inputs, *program.outputs}
        self.scratch: dict[int, int] = {}  # of steps, as `_most_scratch` found
        lives = lifetimes(program)
        self.live = live_bytes(lives)
        self.sizes = np.array([life.size for life in lives], np.int64)
        self.starts = np.array([life.start for life in lives], np.int64)
        self.ends = np.array([life.end for life in lives], np.int64)

    def run(self) -> Program:
        steps: list[Step] = []
        done = 0
        for chain in self.chains():
            steps += self.steps[done : chain.first]
            steps += self._unrolled(chain)
            done = chain.last + 1
        return Program([*steps, *self.steps[done:]], self.program.inputs, self.program.outputs, self.program.places)

    def chains(self) -> Iterator[Chain]:
        index = 0
        while index < len(self.steps):
            found = list(self._chains(index))
            yield from found
            index = found[-1].last + 1 if found else index + 1

    # ---- Finding chains ----

    def _chains(self, start: int) -> Iterator[Chain]:
        """The chain from a step on; if memory cuts it short, the best from a later one of its members, and what may
        come before that."""
        whole, chain = self._chain(start)
        if chain is not None and whole > CUT_SHORT * chain.gain:
            later = [other for member in chain.members[1:] if (other := self._chain(member)[1]) is not None]
            best = max(later, key=lambda other: other.gain, default=chain)
            if best.gain > chain.gain:
                yield from filter(None, [self._chain(start, best.first)[1]])
                chain = best
        if chain is not None:
            yield chain

    def _chain(self, start: int, end: int | None = None) -> tuple[int, Chain | None]:
        """The chain of steps in [start, end) that saves the most, if it saves something and needs no more memory; and
        before it, what the best would save if memory did not matter."""
        most = 0
        best: Chain | None = None
        if self.roles[start] is None:
            return most, best
        for chain in self._longer(start, len(self.steps) if end is None else end):
            most = max(most, chain.gain)
            if chain.gain > (best.gain if best else 0):
                chain.peak = self._peak(chain)
                if chain.peak <= self.live[chain.first : chain.last + 1].max():
                    best = chain.copy()
        return most, best

    def _longer(self, start: int, end: int) -> Iterator[Chain]:
        """Chains of steps in [start, end), each with one member more; the same object every time."""
        chain = Chain(start, start, [start])
        known = dict(self.roles[start] or {})
        if not self._large(known) or not self._separate(start, {}):
            return
        chain.gain = self._gain(known, {})
        small = 0
        used = {buffer: [0] for buffer in known}
        reads, writes = set(self.reads[start]), set(self.writes[start])
        later_reads: set[Buffer] = set()
        later_writes: set[Buffer] = set()
        for index in range(start + 1, end):
            step, roles = self.steps[index], self.roles[index]
            reading, writing = self.reads[index], self.writes[index]
            free = not (writing & later_reads or reading & later_writes or writing & later_writes)
            if roles is not None and free and self._separate(index, known):
                small = 0 if self._large(roles) else small + 1
                if small > MOST_SMALL:
                    return
                chain.gain += self._gain(roles, known)
                known.update(roles)
                for buffer in roles:
                    used.setdefault(buffer, []).append(len(chain.members))
                reads |= reading
                writes |= writing
                chain.members.append(index)
                chain.last = index
                chain.inside = {
                    b: (used[b][0], used[b][-1])
                    for b, role in known.items()
                    if role == "s" and len(used[b]) == self.uses[b] and b not in self.bound
                }
                yield chain
                continue
            if step.kernel.startswith("spill") or (roles is not None and not known.keys().isdisjoint(roles)):
                return
            if free and not (writing & reads or reading & writes or writing & writes):
                chain.before.append(index)
            else:
                chain.after.append(index)
                later_reads |= reading
                later_writes |= writing

    def _separate(self, index: int, known: dict[Buffer, str]) -> bool:
        """Whether a step's samples depend on no other samples through the chain whose operands are `known`."""
        roles = self.roles[index]
        assert roles is not None
        for buffer, role in roles.items():
            if role == "+" and buffer in known or known.get(buffer, role) != role:
                return False
            if role == "w" and buffer in self.writes[index]:
                return False
            if role == "s" and buffer.bytes // self.samples * self.count % ALIGNMENT:
                return False
        return True

    def _gain(self, roles: dict[Buffer, str], known: dict[Buffer, str]) -> int:
        """Bytes of large maps that a member finds in the cache, less what its turns cost."""
        found = sum(b.bytes for b, role in roles.items() if role == "s" and b in known and b.bytes >= LARGE_BYTES)
        cost = CALL_BYTES + sum(WEIGHT_PASSES * b.bytes for b, role in roles.items() if role == "w")
        cost += sum(SUM_PASSES * b.bytes for b, role in roles.items() if role == "+")
        return found - (self.turns - 1) * cost

    def _large(self, roles: dict[Buffer, str]) -> bool:
        return any(role == "s" and buffer.bytes >= LARGE_BYTES for buffer, role in roles.items())

    def _peak(self, chain: Chain) -> int:
        """Bytes alive while the chain runs, at the least."""
        alive = (self.starts <= chain.last) & (self.ends >= chain.first)
        total = int(self.sizes[alive].sum()) - sum(aligned(buffer.bytes) for buffer in chain.inside)
        for index in chain.members:
            if (scratch := self.steps[index].scratch) is not None:
                total -= aligned(scratch.bytes)
        return total + int(live_bytes(self._turn_lives(chain)).max())

    def _turn_lives(self, chain: Chain) -> list[Lifetime]:
        """Within a turn: lifetimes of what is inside, in its order, then of the scratch of the members that have it."""
        lives = [Lifetime(Buffer(b.name, self._turn_bytes(b)), *span) for b, span in chain.inside.items()]
        for position, index in enumerate(chain.members):
            if size := self._most_scratch(index):
                lives.append(Lifetime(Buffer(f"scratch of {self.steps[index].label}", size), position, position))
        return lives

    def _turn_bytes(self, buffer: Buffer) -> int:
        return buffer.bytes // self.samples * self.count

    def _most_scratch(self, index: int) -> int:
        """Bytes of scratch that a step needs in any turn."""
        if index not in self.scratch:
            step = self.steps[index]
            at = _RULES[step.kernel].ints
            needs = [self._scratch_of(step, at(step, first, count, self.samples)) for first, count in self._samples()]
            self.scratch[index] = max(needs)
        return self.scratch[index]

    def _scratch_of(self, step: Step, ints: Sequence[int]) -> int:
        if not KERNELS[step.kernel].scratch:
            return 0
        return scratch_bytes(step.kernel, tuple(ints), tuple(step.floats), self.threads)

    def _samples(self) -> Iterator[tuple[int, int]]:
        """(first sample, count) of each turn."""
        for first in range(0, self.samples, self.count):
            yield first, min(self.count, self.samples - first)

    # ---- Unrolling ----

    def _unrolled(self, chain: Chain) -> list[Step]:
        lives = self._turn_lives(chain)
        own = Buffer(f"turns of {self.steps[chain.first].label}", place(lives))
        inside = {buffer: life.buffer for buffer, life in zip(chain.inside, lives, strict=False)}
        scratch = {life.start: life.buffer for life in lives[len(inside) :]}
        turns: list[Step] = []
        for first, count in self._samples():
            parts: dict[Buffer, Buffer] = {}
            for position, index in enumerate(chain.members):
                step, roles = self.steps[index], self.roles[index]
                assert roles is not None
                for buffer, role in roles.items():
                    if role == "s" and buffer not in parts:
                        each = buffer.bytes // self.samples
                        whole, start = (own, inside[buffer].offset) if buffer in inside else (buffer, first * each)
                        parts[buffer] = Buffer(buffer.name, count * each, whole=whole, start=start)
                ints = _RULES[step.kernel].ints(step, first, count, self.samples)
                operands = [b if b is None else parts.get(b, b) for b in step.operands]
                if KERNELS[step.kernel].scratch:
                    size = self._scratch_of(step, ints)
                    place_of = scratch[position] if size else None
                    operands[-1] = Buffer(place_of.name, size, whole=own, start=place_of.offset) if place_of else None
                turns.append(replace(step, ints=ints, operands=operands))
        return [*(self.steps[i] for i in chain.before), *turns, *(self.steps[i] for i in chain.after)]
