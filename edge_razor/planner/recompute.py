"""Exact recomputation: values that the backward pass reads are made again, right before, instead of being kept.

Checkpoints and segments: Chen, Xu, Zhang, Guestrin, "Training Deep Nets with Sublinear Memory Cost", 2016 (√n segments
of a chain), here on the articulation points of an arbitrary graph and with bytes in place of layer counts. What is
cheap to make again (activations, normalizations, products of two maps) is offered before what holds a matrix product,
as in Jain et al., "Checkmate", MLSys 2020, and in PyTorch's min-cut partitioner.

Repeated steps are the forward steps themselves with the same attributes and step context, so they give the same bits:
BatchNorm is frozen, so no step has a side effect, and a dropout mask is a function of seed, update number, sample and
stream, so it is the same mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from edge_razor.errors import BundleError

from .context import scratch_bytes
from .graph import Graph
from .program import KERNELS, Buffer, Places, Region, Step
from .segments import Forward, Unit
from .storage import PIECEWISE_LINEAR, ActivationKeep

__all__ = ["make_again", "recompute_levels"]

# Forward operators that are not cheap to repeat: their work an element grows with the width of the network.
_PRODUCTS = {"Conv", "Linear", "Attention", "BatchMatMul", "Embedding"}
_SEGMENT_GROWTH = 1.6  # from one granularity of segments to the next, in bytes kept within a segment


def recompute_levels(graph: Graph) -> list[frozenset[str]]:
    """Sets of values to make again instead of keeping them, for `storage.at_place(…, "recompute")`.

    Names are keys of the storage table (what `Pack`, an activation or a pooling keeps), values that the backward pass
    reads as they are, and articulation points that shall not serve as checkpoints. Any subset is executable, too; less
    of a segment is then saved.

    Returns:
        [0] nothing; then, by ascending work and descending memory: what follows from kept values by cheap steps alone
        (activations, LayerNorm, products of maps); then segments between articulation points, of several granularities
        from about √n long ones to every block on its own, without those that need more memory than one before them. The
        last segment of each granularity is kept: its values are read at once.
    """
    forward = Forward(graph)
    levels = [_Level(frozenset(), 0.0, sum(unit.bytes for unit in forward.units.values()))]
    cheap = _cheap(forward)
    cheap_bytes = levels[0].bytes - sum(unit.bytes for unit in cheap.made) + cheap.taken
    names = {name for unit in cheap.made for name in unit.names}
    # A unit that is one of several results of a node repeats it only once; for the order that does not matter.
    work = sum(16 * unit.bytes / 4 for unit in cheap.made)
    levels.append(_Level(frozenset(names), work, cheap_bytes))
    levels += [_segment_level(forward, boundaries, cheap.made) for boundaries in _segmentations(forward)]
    chosen: list[_Level] = []
    for level in sorted(levels, key=lambda level: (level.work, level.bytes)):
        # The figures are about right: what needs as much as a level before, give or take, may still need less.
        if not chosen or level.bytes < 1.1 * min(other.bytes for other in chosen):
            chosen.append(level)
    return list(dict.fromkeys(level.names for level in chosen))


class _Level(NamedTuple):
    """`work` as `Forward.work`; `bytes` are about what a sample needs at the peak."""

    names: frozenset[str]
    work: float
    bytes: float


class _Cheap(NamedTuple):
    """Units to make again, and the bytes of checkpoints that would not be in memory otherwise."""

    made: list[Unit]
    taken: float


def _cheap(forward: Forward) -> _Cheap:
    """What can be made again without a product, from values that stay in memory.

    An articulation point that the backward pass does not read costs memory once it serves as a checkpoint: it must save
    more than that.
    """
    graph, units, points = forward.graph, forward.units, set(forward.points)
    bases: dict[str, frozenset[str]] = {}  # value that is there or can be made again → checkpoints that it takes
    saved: dict[frozenset[str], list[Unit]] = {}
    for node in forward.nodes:
        needed: frozenset[str] | None = frozenset()
        kept = units.get(node.output(1))
        if node.op in ("Conv", "Linear", "Affine") and kept is not None and _is_smooth(node.text("activation", "none")):
            outputs = [node.output(0)]  # the activation of the pre-activation that its gradient keeps
        elif node.op in _PRODUCTS:
            needed, outputs = None, []
        else:
            outputs = [out for out in node.outputs if out]
            for name in map(forward.root, filter(None, node.inputs)):
                if name in forward.from_input and name not in graph.inputs and needed is not None:
                    needed = needed | bases[name] if name in bases else None
        for out in (out for out in node.outputs if out):
            if needed is not None and out in outputs and forward.root(out) == out:
                bases[out] = needed
                if out in units and units[out].position == forward.position[out]:
                    saved.setdefault(needed, []).append(units[out])
            elif out in units:
                bases[out] = frozenset()
            elif out in points:
                bases[out] = frozenset([out])
    cheap: list[Unit] = []
    taken: set[str] = set()
    for needed, made in saved.items():
        if sum(unit.bytes for unit in made) > sum(forward.bytes(name) for name in needed):
            cheap += made
            taken |= needed
    return _Cheap(cheap, sum(forward.bytes(name) for name in taken))


def _is_smooth(activation: str) -> bool:
    return activation not in PIECEWISE_LINEAR and activation != "none"


def _segmentations(forward: Forward) -> list[list[str]]:
    """Choices of articulation points as checkpoints, the fewest first: for each of several limits of the bytes kept
    within a segment, those of the fewest bytes that meet it."""
    points = [p for p in dict.fromkeys(map(forward.root, forward.points)) if p in forward.position]
    if not points:
        return []
    ends = [-1, *(forward.position[p] for p in points), len(forward.nodes)]
    kept = [0.0] * (len(forward.nodes) + 1)  # bytes made before each node
    for unit in forward.units.values():
        kept[unit.position + 1] += unit.bytes
    for index in range(len(forward.nodes)):
        kept[index + 1] += kept[index]
    # Between two points, without what the node of the second makes: its value is the checkpoint.
    inside = [[kept[b] - kept[a + 1] if b > a else 0.0 for b in ends] for a in ends]
    finest = max(inside[i][i + 1] for i in range(len(ends) - 1))
    found: dict[tuple[str, ...], None] = {}
    limit = finest
    while limit < kept[-1]:
        chosen = _fewest_bytes(inside, [forward.bytes(p) for p in points], limit)
        found.setdefault(tuple(points[i] for i in chosen), None)
        limit = max(limit * _SEGMENT_GROWTH, limit + 1)
    return [list(boundaries) for boundaries in reversed(found) if boundaries]


def _fewest_bytes(inside: list[list[float]], sizes: list[float], limit: float) -> list[int]:
    """Indices of the points to hold, so that no segment between two of them keeps more than `limit` bytes and their
    sizes add up to the least: a shortest path from the network's input to the loss."""
    count = len(sizes) + 2  # the input, the points, the loss
    cost = [0.0] + [float("inf")] * (count - 1)
    before = [0] * count
    for end in range(1, count):
        own = sizes[end - 1] if end < count - 1 else 0.0
        for start in range(end - 1, -1, -1):
            if inside[start][end] > limit:
                break
            if cost[start] + own < cost[end]:
                cost[end], before[end] = cost[start] + own, start
    path: list[int] = []
    at = before[count - 1]
    while at:
        path.append(at - 1)
        at = before[at]
    return path[::-1]


def _segment_level(forward: Forward, boundaries: Sequence[str], cheap: Sequence[Unit]) -> _Level:
    """Everything up to the last of `boundaries` is made again from them, and what is cheap after it."""
    ends = [-1, *(forward.position[p] for p in boundaries)]
    held = set(boundaries)
    names: set[str] = set()
    largest = 0.0
    for start, end in pairwise(ends):
        inside = [unit for unit in forward.units.values() if start < unit.position < end]
        names.update(name for unit in inside for name in unit.names)
        names.update(p for p in forward.points if start < forward.position[p] < end and forward.root(p) not in held)
        largest = max(largest, sum(unit.bytes for unit in inside))
    rest = sum(unit.bytes for unit in forward.units.values() if unit.position > ends[-1])
    for unit in cheap:
        if unit.position > ends[-1]:
            names |= unit.names
            rest -= unit.bytes
    work = sum(forward.work(node) for node in forward.nodes[: ends[-1]])
    return _Level(frozenset(names), work, sum(map(forward.bytes, boundaries)) + max(largest, rest))


def make_again(steps: list[Step], inputs: Sequence[Buffer], places: Places, threads: int) -> list[Step]:
    """Repeats forward steps before the first backward step that reads what `places.again` lists.

    A repetition starts from what is exact and there: parameters, `inputs`, `places.checkpoints`, and whatever the
    backward pass reads that is not made again itself. What it makes serves all later readers.
    """
    if not places.again:
        return steps
    return _Repetition(steps, inputs, places, threads).run()


class _Repetition:
    def __init__(self, steps: list[Step], inputs: Sequence[Buffer], places: Places, threads: int) -> None:
        self.steps, self.threads = steps, threads
        self.again = places.again
        self.writers: dict[Buffer, list[Step]] = {}
        self.order = {step: index for index, step in enumerate(steps)}
        read_before: set[Buffer] = set()
        read_after: set[Buffer] = set()
        for step in steps:
            (read_after if step.backward else read_before).update(step.reads)
            if not step.backward:
                for buffer in step.writes:
                    self.writers.setdefault(buffer, []).append(step)
        self.read_before = read_before
        self.there = set(inputs) | places.checkpoints | ((read_after & self.writers.keys()) - self.again)
        # Result of an activation → its pre-activation, where that stays in memory.
        self.before_activation: dict[Buffer, tuple[Step, Buffer]] = {}
        for step in steps:
            if (
                not step.backward
                and step.kernel in _KEEPING
                and step.ints[_KEEP_INT[step.kernel]] == ActivationKeep.DENSE
            ):
                y, kept = step.operands[_KEEPING[step.kernel] - 1], step.operands[_KEEPING[step.kernel]]
                if y is not None and kept is not None and kept in self.there:
                    self.before_activation[y] = (step, kept)
        self.made: dict[Buffer, Buffer] = {}

    def run(self) -> list[Step]:
        result: list[Step] = []
        for step in self.steps:
            if step.backward:
                for buffer in step.reads:
                    if buffer in self.again and buffer not in self.made:
                        result += self._make(buffer)
                step.operands[:] = [self.made.get(b, b) if b is not None else None for b in step.operands]
            result.append(step)
        for step in self.steps:
            if not step.backward:
                unread = {b for b in step.writes if b in self.again and b not in self.read_before}
                if unread:
                    _leave_out(step, unread)
                    self._measure(step)
        return result

    def _make(self, wanted: Buffer) -> list[Step]:
        """The steps that make `wanted` again, in forward order."""
        chosen: set[Step] = set()
        activated: set[Step] = set()
        seen: set[Buffer] = set()
        stack = [wanted]
        while stack:
            buffer = stack.pop()
            if buffer in seen or buffer in self.made or buffer in self.there or buffer.region != Region.ARENA:
                continue
            seen.add(buffer)
            if buffer in self.before_activation:
                activated.add(self.before_activation[buffer][0])
                continue
            if buffer not in self.writers:
                raise BundleError(f"training graph: no forward node makes what {buffer.name!r} is needed from")
            for step in self.writers[buffer]:
                chosen.add(step)
                stack += step.reads
        activated -= chosen
        steps = sorted(chosen | activated, key=self.order.__getitem__)
        return [self._activation(step) if step in activated else self._repeat(step) for step in steps]

    def _again(self, buffer: Buffer) -> Buffer:
        return self.made.setdefault(buffer, Buffer(f"{buffer.name} again", buffer.bytes))

    def _repeat(self, step: Step) -> Step:
        signature = KERNELS[step.kernel]
        operands: list[Buffer | None] = []
        for index, buffer in enumerate(step.operands[: signature.operands]):
            if buffer is None:
                operands.append(None)
            elif index not in signature.writes:
                operands.append(self.made.get(buffer, buffer))
            elif buffer in self.there:  # needed by the kernel alone
                operands.append(Buffer(f"unused {buffer.name}", buffer.bytes))
            else:
                operands.append(self._again(buffer))
        repeated = Step(step.kernel, f"{step.label} again", list(step.ints), list(step.floats), operands, True)
        optional = {i for i in signature.optional & signature.writes if step.operands[i] in self.there}
        _leave_out(repeated, {b for i in optional if (b := operands[i]) is not None})
        if signature.scratch:
            repeated.operands.append(None)
            self._measure(repeated)
        return repeated

    def _activation(self, step: Step) -> Step:
        """Y = act(pre-activation): what the fused step did after its product."""
        y = step.operands[_KEEPING[step.kernel] - 1]
        assert y is not None
        _, kept = self.before_activation[y]
        n, _, _, _, oh, ow, oc = step.ints[:7] if step.kernel == "conv" else (step.ints[0], 0, 0, 0, 1, 1, step.ints[1])
        operands = [kept, None, None, self._again(y), None]
        ints = [n * oh * ow, oc, step.ints[_KEEP_INT[step.kernel] - 1], ActivationKeep.NOTHING]
        return Step("affine", f"{step.label} again", [int(i) for i in ints], list(step.floats), operands, True)

    def _measure(self, step: Step) -> None:
        """Gives a step the scratch that its attributes need."""
        if KERNELS[step.kernel].scratch:
            size = scratch_bytes(step.kernel, tuple(step.ints), tuple(step.floats), self.threads)
            step.operands[-1] = Buffer(f"scratch of {step.label}", size) if size else None


# Operand with what an activation keeps, after its result; the last attribute says how.
_KEEPING = {"conv": 5, "affine": 4}
_KEEP_INT = {"conv": 17, "affine": 3}  # the integer that says in what form


def _leave_out(step: Step, unread: set[Buffer]) -> None:
    """Removes optional results that nothing reads."""
    signature = KERNELS[step.kernel]
    for index in signature.optional & signature.writes:
        if step.operands[index] in unread:
            step.operands[index] = None
            if _KEEPING.get(step.kernel) == index:
                step.ints[_KEEP_INT[step.kernel]] = ActivationKeep.NOTHING
