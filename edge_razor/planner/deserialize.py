"""Reading the steps of a plan file back (docs/plan-format.md), for reports (the runtime has its own reader)."""

from __future__ import annotations

import re
import struct
from typing import Any, NamedTuple

from edge_razor.errors import PlanError

from .program import KERNELS, Buffer, Region, Step
from .serialize import HEADER, check_header

__all__ = ["PlanSteps", "read_steps"]


# Fields of a parameter, an input and an output, which lie before the steps: "s" is a string, "[x]" a vector.
_RECORDS = ("sBB[Q][B]Q[Q]", "sB[Q][B]QQ[f][f]", "s[Q][B]Q")


class PlanSteps(NamedTuple):
    """Both programs of a plan, in execution order. Buffers have region, offset and bytes, but no name."""

    train: list[Step]
    evaluate: list[Step]


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = 0

    def unpack(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from("<" + layout, self.data, self.position)
        self.position += struct.calcsize("<" + layout)
        return values

    def text(self) -> str:
        (length,) = self.unpack("I")
        return self.unpack(f"{length}s")[0].decode()

    def items(self, code: str) -> list[Any]:
        (count,) = self.unpack("I")
        return list(self.unpack(f"{count}{code}"))

    def skip(self, record: str) -> None:
        """Passes over fields, as ``_RECORDS`` writes them."""
        for vector, code in re.findall(r"(\[)?(\w)", record):
            if vector:
                self.items(code)
            elif code == "s":
                self.text()
            else:
                self.unpack(code)

    def step(self) -> Step:
        kernel, label = self.text(), self.text()
        if kernel not in KERNELS:
            raise PlanError(f"plan file: step {label!r} has the unknown kernel {kernel!r}")
        ints, floats = self.items("q"), self.items("f")
        return Step(kernel, label, ints, floats, [self.operand() for _ in range(self.unpack("I")[0])])

    def operand(self) -> Buffer | None:
        region, offset, size = self.unpack("BQQ")
        return Buffer("", size, Region(region), offset) if region else None


def read_steps(plan: bytes) -> PlanSteps:
    """The steps of a plan file.

    Raises:
        PlanError: no plan file, damaged, of another version, or with a kernel that is not known here.
    """
    check_header(plan)
    reader = _Reader(plan[HEADER.size :])
    try:
        reader.skip("sIIIQQQQ")
        for record in _RECORDS:
            for _ in range(reader.unpack("I")[0]):
                reader.skip(record)
        programs = [[reader.step() for _ in range(reader.unpack("I")[0])] for _ in range(2)]
    except (struct.error, ValueError) as error:
        raise PlanError(f"plan file is damaged: {error}") from error
    return PlanSteps(*programs)
