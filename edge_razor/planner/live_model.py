"""Live bytes at every step of a scheduled program, harm and seconds, as linear functions of how each value is kept.

One program is lowered with every value in its smallest form. Another choice for a value changes bytes from where the
value is packed to its last reader; dense, the value itself stays alive from its last use in the forward pass to there.
The rest of the schedule is taken to stay as it is. It nearly does: what is left (another order of a layer's two
gradients, a step that could no longer work in place) shows when the chosen table is lowered, and `search.py` corrects
the limit by it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .context import scratch_bytes
from .cost import Rates, as_kept, packed_from, program_seconds, step_seconds
from .place import lifetimes, live_bytes
from .program import Buffer, Program, Region, Step, aligned, touches
from .schedule import share_buffers
from .storage import Choice, Form, KeptValue, Storage
from .turns import Chain, chains

__all__ = ["Column", "LiveModel"]

# Kernels with one kept operand, whose scratch and time depend on its form.
_FORM_READERS = {"conv_grad_weight", "mul_grad", "layer_norm_grad"}


@dataclass(frozen=True, slots=True)
class Column:
    """One choice for one value: what it adds to the harm and to the seconds of a micro-batch."""

    value: str
    choice: Choice
    harm: float
    seconds: float


class LiveModel:
    """`base + matrix[:, chosen columns].sum(1)` are the live bytes of the rows; a row is a step or several alike.

    Attributes:
        columns: all choices; those of one value follow each other, exact first.
        groups: (first, end) columns of each value. Exactly one column of a group is chosen.
        matrix: int64 [rows, columns], bytes. base: int64 [rows], bytes.
        seconds: of a micro-batch without the columns' own.
    """

    def __init__(
        self,
        ordered: Program,
        values: Mapping[str, KeptValue],
        choices: Mapping[str, Sequence[Choice]],
        rates: Rates,
        samples: int,
        threads: int,
        harm: Callable[[str, Choice], float],
    ) -> None:
        """
        Args:
            samples: of the program, a micro-batch.
            ordered: the program with every value in its smallest form; `share_buffers` is yet to run, and does here.
            choices: of the values that are to be chosen; values that the program does not keep are left out.
        """
        steps = ordered.steps
        touched = touches(steps)
        named = {buffer.name: buffer for buffer in touched if buffer.region == Region.ARENA}
        before = [tuple(step.operands) for step in steps]
        shared = share_buffers(ordered)
        roots = {
            old: new
            for step, operands in zip(shared.steps, before, strict=True)
            for old, new in zip(operands, step.operands, strict=True)
            if old is not None and new is not None
        }
        successors: dict[tuple[Buffer, int], Buffer] = {}  # (shared memory, step) → what begins there, over a dying one
        for buffer, at in touched.items():
            successors[roots[buffer], at[0]] = buffer
        live = live_bytes(lifetimes(shared))
        turns = chains(shared, samples, threads)
        inside = {buffer: chain for chain in turns for buffer in chain.inside}
        for chain in turns:
            live[chain.first : chain.last + 1] = chain.peak
        self.columns: list[Column] = []
        self.groups: list[tuple[int, int]] = []
        spans: list[list[tuple[int, int, int]]] = []
        base = live.copy()
        self.seconds = program_seconds(steps, rates)
        for name, options in choices.items():
            kept = named.get(name)
            if kept is None or len(touched[kept]) < 2:
                continue
            first, last = touched[kept][0], touched[kept][-1]
            maker, value = steps[first], values[name]
            readers = [i for i in touched[kept][1:] if steps[i].kernel in _FORM_READERS]
            held = [(first, last, aligned(kept.bytes))]
            if maker.kernel == "pack":
                held += [(i, i, aligned(s.bytes)) for i in (first, *readers) if (s := steps[i].scratch)]
            for start, end, size in _through_turns(held, turns):
                base[start : end + 1] -= size
            makers = [maker] if maker.kernel == "pack" else []
            spent = sum(step_seconds(s, rates) for s in (*makers, *(steps[i] for i in readers)))
            self.seconds -= spent
            begin = len(self.columns)
            for choice in options:
                storage = value.storage(choice)
                alone: list[tuple[int, int, int]] = []
                seconds = 0.0
                if maker.kernel != "pack":  # an activation's slope: written once, read once
                    alone.append((first, last, aligned(storage.bytes)))
                    seconds = 2 * storage.bytes / rates.rates["bytes"] + spent
                else:
                    source = before[first][0]
                    assert source is not None
                    if storage.form == Form.DENSE:
                        replacement = source
                        alone += _stays(source, packed_from(maker), touched, roots, successors, last)
                        if alone and (turn := inside.get(roots[source])) is not None:  # no longer for a turn alone
                            alone[0] = (turn.first, *alone[0][1:])
                    else:
                        replacement = Buffer(name, storage.bytes)
                        packing = _pack(maker, storage)
                        alone.append((first, last, aligned(storage.bytes)))
                        alone += _scratch(packing, first, threads)
                        seconds += step_seconds(packing, rates)
                    for index in readers:
                        reader = as_kept(steps[index], kept, storage, replacement)
                        alone += _scratch(reader, index, threads)
                        seconds += step_seconds(reader, rates)
                self.columns.append(Column(name, choice, harm(name, choice), seconds))
                spans.append(_through_turns(alone, turns))
            self.groups.append((begin, len(self.columns)))
        full = np.zeros((len(base) + 1, len(spans)), np.int64)
        for column, pieces in enumerate(spans):
            for start, end, size in pieces:
                full[start, column] += size
                full[end + 1, column] -= size
        matrix = np.cumsum(full, axis=0)[:-1]
        self.base, self.matrix = _needed_rows(base, matrix)
        self.harm = np.array([c.harm for c in self.columns])
        self.column_seconds = np.array([c.seconds for c in self.columns])

    def index(self, choices: Mapping[str, Choice]) -> np.ndarray:
        """The column of each value as `choices` say; values that they leave out take the last, smallest one."""
        found = []
        for begin, end in self.groups:
            wanted = choices.get(self.columns[begin].value)
            at = [i for i in range(begin, end) if self.columns[i].choice == wanted]
            found.append(at[0] if at else end - 1)
        return np.array(found, np.int64)

    def chosen(self, index: Sequence[int] | np.ndarray) -> dict[str, Choice]:
        return {self.columns[i].value: self.columns[i].choice for i in index}

    def live(self, index: np.ndarray) -> np.ndarray:
        """Live bytes of every row, int64."""
        return self.base + self.matrix[:, index].sum(axis=1)

    def peak(self, index: np.ndarray) -> int:
        return int(self.live(index).max())


def _through_turns(spans: Sequence[tuple[int, int, int]], turns: Sequence[Chain]) -> list[tuple[int, int, int]]:
    """(first step, last step, bytes) of what is alive in one turn of a chain at least: it is in all of them. What lives
    for a single step of a chain is scratch, which its turns share."""
    widened = []
    for start, end, size in spans:
        first, last = (next((c for c in turns if c.first <= i <= c.last), None) for i in (start, end))
        if start < end or first is None:
            widened.append((first.first if first else start, last.last if last else end, size))
    return widened


def _stays(
    source: Buffer,
    size: int,
    touched: Mapping[Buffer, list[int]],
    roots: Mapping[Buffer, Buffer],
    successors: Mapping[tuple[Buffer, int], Buffer],
    last: int,
) -> list[tuple[int, int, int]]:
    """(first step, last step, bytes) that `size` bytes of `source` take beyond what the shared program holds anyway, if
    they are read until `last`. Of columns of a wider matrix each part takes its own."""
    if source.region != Region.ARENA:
        return []
    end = touched[source][-1]
    successor = successors.get((roots[source], end))
    overwritten = successor is not None and successor is not source
    start = end if overwritten else end + 1
    return [(start, last, aligned(size))] if start <= last else []


def _pack(step: Step, storage: Storage) -> Step:
    ints = [int(storage.form or 0), storage.samples, storage.rows, storage.cols, storage.keep, *step.ints[5:]]
    return Step("pack", step.label, ints, [], step.operands[:1])


def _scratch(step: Step, index: int, threads: int) -> list[tuple[int, int, int]]:
    size = scratch_bytes(step.kernel, tuple(step.ints), tuple(step.floats), threads)
    return [(index, index, aligned(size))] if size else []


def _needed_rows(base: np.ndarray, matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows that no other row follows from: one with at least the same base and coefficients holds them down, too.

    What is left are the steps near local maxima.
    """
    order = np.lexsort((-base, -matrix.sum(axis=1)))
    kept: list[int] = []
    for row in order.tolist():
        rivals = [r for r in kept if base[r] >= base[row]]
        if not rivals or not (matrix[rivals] >= matrix[row]).all(axis=1).any():
            kept.append(row)
    kept.sort()
    return base[kept], matrix[kept]
