"""What lowering produces and scheduling and placement work on: buffers, and steps that read and write them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

__all__ = [
    "ACCUMULATE",
    "ACTIVATION_SUM",
    "ADDEND",
    "GRADIENT",
    "KERNELS",
    "SUM",
    "UPDATES",
    "Buffer",
    "Places",
    "Program",
    "Region",
    "Signature",
    "Step",
    "aligned",
    "is_sum",
    "touches",
]

ALIGNMENT = 64  # bytes; every offset in a plan is a multiple


class Region(IntEnum):
    """Where a buffer lives; the numbers are those of the plan file."""

    ARENA = 1
    PARAMS = 2
    STATE = 3
    MAPPED = 4  # a parameter in the weights file; its offset is its number among the plan's parameters


@dataclass(eq=False, slots=True)
class Buffer:
    """A stretch of memory. `offset` is -1 until the buffer is placed in its region.

    A buffer with a `whole` is a part of that one, from byte `start` of it on.
    """

    name: str
    bytes: int
    region: Region = Region.ARENA
    offset: int = -1
    whole: Buffer | None = None
    start: int = 0


class Signature(NamedTuple):
    """Operands of a kernel: which are written, which (written, read) pairs may share memory, scratch or not, and their
    names in the kernel table."""

    operands: int
    optional: frozenset[int]
    writes: frozenset[int]
    may_alias: tuple[tuple[int, int], ...]
    scratch: bool
    names: tuple[str, ...]


def _signature(text: str, *may_alias: tuple[int, int], scratch: bool = False) -> Signature:
    names = text.split()
    return Signature(
        len(names),
        frozenset(i for i, n in enumerate(names) if "?" in n),
        frozenset(i for i, n in enumerate(names) if "!" in n),
        may_alias,
        scratch,
        tuple(n.strip("?!") for n in names),
    )


# The kernel table of docs/plan-format.md. "!" marks an operand that is written, "?" one that may be absent; pairs are
# (written, read) operands that may share memory; scratch kernels take one more operand at the end.
KERNELS: dict[str, Signature] = {
    "conv": _signature("X W scale? shift? Y! kept?! addend?", (4, 6), scratch=True),
    "conv_grad_input": _signature("dY W scale? dX! kept? sums?!", scratch=True),
    "conv_grad_weight": _signature("X dY G!", scratch=True),
    "pack": _signature("X out!", scratch=True),
    "affine": _signature("X scale? shift? Y! kept?!", (3, 0)),
    "activation_grad": _signature("dY kept dX! sums?!", (2, 0), scratch=True),
    "channel_sum": _signature("dY out!", scratch=True),
    "batch_norm_fold": _signature("gamma? beta? mean var bias? scale! shift!"),
    "batch_norm_grad": _signature("dot dshift mean var bias? dgamma!"),
    "column_dot": _signature("W G out!"),
    "scale_columns": _signature("G scale out!", (2, 0)),
    "mul_grad": _signature("X dY out!", scratch=True),
    "binary": _signature("A B out!", (2, 0), (2, 1)),
    "neg": _signature("X Y!", (1, 0)),
    "reduce": _signature("X out!", scratch=True),
    "broadcast": _signature("dY dX!"),
    "max_pool": _signature("X Y! index?!"),
    "max_pool_grad": _signature("dY index dX!"),
    "average_pool": _signature("X Y!"),
    "average_pool_grad": _signature("dY dX!"),
    "softmax": _signature("X Y!", (1, 0)),
    "softmax_grad": _signature("dY Y dX!", (2, 0)),
    "layer_norm": _signature("X gamma? beta? Y! xhat?! rstd?!"),
    "layer_norm_grad": _signature(
        "xhat dY rstd gamma? dX?! dgamma?! dbeta?! addend? sums?!", (4, 1), (4, 7), scratch=True
    ),
    "attention": _signature("Q K V key_mask? bias? Y! probabilities?!", scratch=True),
    "attention_grad": _signature(
        "Q K V key_mask? bias? dY probabilities? dQ?! dK?! dV?! dQ_sums?! dK_sums?! dV_sums?!", scratch=True
    ),
    "select_position": _signature("X source Y!"),
    "select_position_grad": _signature("dY source dX!"),
    "embedding": _signature("ids W Y!"),
    "embedding_grad": _signature("ids dY G!"),
    "embedding_grad_rows": _signature("ids dY R!"),
    "batch_matmul": _signature("A B Y!"),
    "rotary": _signature("X cos sin Y!", (3, 0)),
    "copy": _signature("src dst!"),
    "fill": _signature("dst!"),
    "dropout": _signature("X Y!", (1, 0)),
    "cross_entropy": _signature("logits target dlogits?!", (2, 0)),
    "mse": _signature("prediction target dprediction?!", (2, 0)),
    "bce_logits": _signature("prediction target dprediction?!", (2, 0)),
    "spill_write": _signature("X"),
    "spill_read": _signature("X!"),
    "spill_wait": _signature("X"),
    "sgd": _signature("param! grad momentum?! accumulator?!"),
    "adamw": _signature("param! grad m! v! accumulator?!"),
    "sgd_rows": _signature("param! grad momentum?! accumulator?!"),
    "adamw_rows": _signature("param! grad m! v! accumulator?!"),
}
ADDEND = 6  # the operand of conv that is added to the product
SUM = 18  # the integer of conv_grad_input that says whether it sums dX; 2: sums += …
ACCUMULATE = 19  # … and the one that says dX += …
ACTIVATION_SUM = 4  # of activation_grad, as SUM
GRADIENT = 18  # where it is there, the integer of conv_grad_weight that says G += …
UPDATES = frozenset({"sgd", "adamw", "sgd_rows", "adamw_rows"})  # what they write they read first


@dataclass(eq=False, slots=True)
class Step:
    """One kernel call. Operands are whole buffers, in the order of the kernel table, scratch last.

    `backward` says that the step comes after the loss; it is not part of the plan file.
    """

    kernel: str
    label: str
    ints: list[int]
    floats: list[float]
    operands: list[Buffer | None]
    backward: bool = False

    @property
    def layer(self) -> str:
        """Module path that the step comes from: the label up to its operator."""
        return self.label.rpartition(":")[0]

    @property
    def writes(self) -> list[Buffer]:
        """Buffers that the step writes, scratch left out."""
        return [b for i, b in enumerate(self.operands) if b is not None and i in KERNELS[self.kernel].writes]

    @property
    def reads(self) -> list[Buffer]:
        """Buffers whose contents the step uses."""
        signature = KERNELS[self.kernel]
        reads = [
            b for i, b in enumerate(self.operands[: signature.operands]) if b is not None and i not in signature.writes
        ]
        if self.kernel in UPDATES:
            reads += self.writes  # updated, not overwritten
        if self.kernel == "conv_grad_input":
            dx, sums = self.operands[3], self.operands[5]
            reads += [dx] if self.ints[ACCUMULATE] and dx is not None else []
            reads += [sums] if self.ints[SUM] == 2 and sums is not None else []
        if self.kernel == "channel_sum" and self.ints[2:] == [1] and self.operands[1] is not None:
            reads.append(self.operands[1])
        if self.kernel == "activation_grad" and self.ints[ACTIVATION_SUM] == 2 and self.operands[3] is not None:
            reads.append(self.operands[3])
        if self.kernel == "conv_grad_weight" and self.ints[GRADIENT:][:1] == [1] and self.operands[2] is not None:
            reads.append(self.operands[2])
        return reads

    @property
    def scratch(self) -> Buffer | None:
        signature = KERNELS[self.kernel]
        return self.operands[-1] if signature.scratch and len(self.operands) > signature.operands else None


@dataclass(frozen=True, slots=True)
class Places:
    """Forward buffers that are not simply kept in memory until the backward pass reads them.

    `again`: made again then. `checkpoints`: what that may start from, beside whatever the backward pass reads and the
    network's inputs. `spilled`: in the spill file in between.
    """

    again: frozenset[Buffer] = frozenset()
    checkpoints: frozenset[Buffer] = frozenset()
    spilled: frozenset[Buffer] = frozenset()


@dataclass(slots=True)
class Program:
    """Steps in execution order. `inputs` are filled before the first step, `outputs` are read after the last."""

    steps: list[Step]
    inputs: list[Buffer] = field(default_factory=list)
    outputs: list[Buffer] = field(default_factory=list)
    places: Places = Places()


def aligned(size: int) -> int:
    """`size` bytes, rounded up to the alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def is_sum(step: Step) -> bool:
    """Whether it adds two values element by element, neither of them broadcast."""
    return step.kernel == "binary" and step.ints[:2] == [0, 1] and 0 not in step.ints[3:5]


def touches(steps: Iterable[Step]) -> dict[Buffer, list[int]]:
    """For each buffer the indices of the steps that have it as an operand, ascending."""
    found: dict[Buffer, list[int]] = {}
    for index, step in enumerate(steps):
        for buffer in step.operands:
            if buffer is not None and (buffer not in found or found[buffer][-1] != index):
                found.setdefault(buffer, []).append(index)
    return found
