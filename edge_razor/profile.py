"""What each step of a plan takes and does: seconds as measured, multiply-adds and bytes as the plan says.

Multiply-adds are those that a convolution, matrix product or attention needs by its definition, taps in the padding
and keys behind a mask included, whichever algorithm does them; a weight gradient from a razor form counts the share of
values that is kept. Other kernels count none. Bytes are those of the operands: each is read or written once, both if it
is updated, scratch left out. So GFLOP/s and GB/s say how fast a kernel does what it is for, not what its caches see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from edge_razor.errors import PlanError
from edge_razor.planner.cost import step_bytes, step_multiply_adds
from edge_razor.planner.deserialize import read_steps

__all__ = ["Line", "by_kernel", "profile_lines", "slowest", "step_bytes", "step_multiply_adds", "table_cells"]


class Entry(Protocol):
    """A measured step: `edge_razor.runtime.session.StepTime`."""

    @property
    def kernel(self) -> str: ...
    @property
    def label(self) -> str: ...
    @property
    def phase(self) -> str: ...
    @property
    def calls(self) -> int: ...
    @property
    def seconds(self) -> float: ...


@dataclass(frozen=True, slots=True)
class Line:
    """One step with all its turns, or all of a kernel's, over all calls: seconds, multiply-adds and bytes are sums."""

    phase: str
    kernel: str
    label: str
    calls: int
    seconds: float
    multiply_adds: int
    bytes: int


def profile_lines(plan: bytes, entries: Sequence[Entry]) -> list[Line]:
    """One line for each kernel and label that ran, in plan order: a step that takes turns is one.

    Args:
        plan: the plan file that was executed.
        entries: `Trainer.profile_entries()`, one for each step of the plan.

    Raises:
        PlanError: the entries are not those of this plan.
    """
    steps = [step for program in read_steps(plan) for step in program]
    if [(s.kernel, s.label) for s in steps] != [(e.kernel, e.label) for e in entries]:
        raise PlanError("the profile belongs to another plan")
    lines = [
        Line(e.phase, e.kernel, e.label, e.calls, e.seconds, e.calls * step_multiply_adds(s), e.calls * step_bytes(s))
        for e, s in zip(entries, steps, strict=True)
        if e.calls
    ]
    return _sums(lines, lambda line: (line.phase, line.kernel, line.label))


def by_kernel(lines: Iterable[Line]) -> list[Line]:
    """Sums over the steps of each kernel and phase, slowest first; their label is empty."""
    sums = _sums(lines, lambda line: (line.phase, line.kernel, ""))
    return slowest(sums, len(sums))


def _sums(lines: Iterable[Line], key: Callable[[Line], tuple[str, str, str]]) -> list[Line]:
    """The lines of each (phase, kernel, label) that `key` gives, as one."""
    groups: dict[tuple[str, str, str], list[Line]] = {}
    for line in lines:
        groups.setdefault(key(line), []).append(line)
    return [
        Line(
            phase,
            kernel,
            label,
            sum(line.calls for line in group),
            sum(line.seconds for line in group),
            sum(line.multiply_adds for line in group),
            sum(line.bytes for line in group),
        )
        for (phase, kernel, label), group in groups.items()
    ]


def slowest(lines: Iterable[Line], count: int) -> list[Line]:
    """The `count` lines that took longest, slowest first."""
    return sorted(lines, key=lambda line: -line.seconds)[:count]


def table_cells(line: Line, everything: float) -> tuple[str, str, str, str]:
    """Milliseconds a call, share of `everything` seconds, GFLOP/s and GB/s; "–" where a kernel has no multiply-adds."""
    seconds = max(line.seconds, 1e-12)
    return (
        f"{1e3 * line.seconds / line.calls:.3f}",
        f"{line.seconds / max(everything, 1e-12):.1%}",
        f"{2e-9 * line.multiply_adds / seconds:.1f}" if line.multiply_adds else "–",
        f"{1e-9 * line.bytes / seconds:.1f}",
    )
