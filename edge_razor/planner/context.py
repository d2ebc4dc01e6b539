"""What the lowering rules share: tensors by value name, parameter storage, and how a step is emitted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from math import prod
from typing import NamedTuple

from edge_razor.errors import BundleError, PlanError, UsageError

from .graph import Graph, Node
from .program import KERNELS, Buffer, Step
from .storage import Storage

__all__ = [
    "CONV_PERM",
    "LINEAR_PERM",
    "Columns",
    "Lowering",
    "ParamForm",
    "Tensor",
    "collapse",
    "parameter_perms",
    "row_major",
]

# Runtime dimension d of a parameter is torch dimension perm[d]: OIHW is stored HWIO, Linear [out, in] as [in, out].
CONV_PERM = (2, 3, 1, 0)
LINEAR_PERM = (1, 0)

# Operators whose input `index` is a weight, and the layout that their kernel reads.
_WEIGHT_INPUT = {"Conv": 1, "ConvGradInput": 1, "Linear": 1, "LinearGradInput": 1, "ColumnDot": 0}


class ParamForm(IntEnum):
    """How a parameter is stored; the numbers are those of the plan file."""

    FLOAT = 0
    IN_FILE = 1
    BF16 = 2
    INT8 = 3


class Columns(NamedTuple):
    """Columns [first, first + width) of a matrix whose rows have `row` elements."""

    row: int
    first: int
    width: int


@dataclass(frozen=True, slots=True)
class Tensor:
    """A float tensor: `shape` as the graph states it (torch layout for parameters and their gradients).

    `perm` is None for row-major storage in that shape, else the stored order of the dimensions. A gradient with
    `row_capacity` is a row set of so many rows at most (docs/plan-format.md), 0: an ordinary tensor. `form` is a
    parameter's. `columns`: of the matrix in `buffer`, of which the tensor is these, row by row.
    """

    buffer: Buffer
    shape: tuple[int, ...]
    perm: tuple[int, ...] | None = None
    row_capacity: int = 0
    form: ParamForm = ParamForm.FLOAT
    columns: Columns | None = None

    @property
    def elements(self) -> int:
        return prod(self.shape)


def weight_perm(node: Node) -> tuple[int, ...] | None:
    """How `node` wants its weight (or makes its weight gradient) stored."""
    if node.op.startswith("Conv"):
        return CONV_PERM
    if node.op.startswith("Linear"):
        return LINEAR_PERM if node.integer("transW", 1) else None
    layout = node.text("layout", "conv")
    if layout not in ("conv", "linear"):
        node.fail(f"layout must be conv or linear, not {layout!r}")
    if layout == "conv":
        return CONV_PERM
    return LINEAR_PERM if node.integer("transW", 1) else None


def parameter_perms(graph: Graph) -> dict[str, tuple[int, ...] | None]:
    """The stored order of every float initializer in use.

    Raises:
        PlanError: two nodes need different orders of one parameter.
    """
    perms: dict[str, tuple[int, ...] | None] = {}
    first: dict[str, Node] = {}
    embedded: list[str] = []
    for node in graph.nodes:
        for index, name in enumerate(node.inputs):
            initializer = graph.initializers.get(name)
            if initializer is None or initializer.dtype != "float32":
                continue
            if node.op == "Pad" and index == 2:
                continue  # a fill value, taken as a number
            if node.op == "Embedding" and index == 1:
                embedded.append(name)  # read in either order
                continue
            perm = weight_perm(node) if _WEIGHT_INPUT.get(node.op) == index else None
            if perm is not None and len(perm) != len(initializer.shape):
                node.fail(f"weight {name!r} has shape {list(initializer.shape)}, expected {len(perm)} dimensions")
            if perms.setdefault(name, perm) != perm:
                raise PlanError(
                    f"parameter {name!r} is used by nodes {first[name].name!r} and {node.name!r} that need it stored "
                    "in different layouts; give one of them its own copy"
                )
            first.setdefault(name, node)
    return {**dict.fromkeys(embedded), **perms}


class Lowering:
    """Collects the steps of one program while the rules walk the graph."""

    def __init__(
        self,
        graph: Graph,
        samples: int,
        storage: dict[str, Storage],
        params: dict[str, Tensor],
        threads: int,
        row_gradients: frozenset[str] = frozenset(),
    ) -> None:
        """`row_gradients`: values that are made as row sets."""
        self.graph = graph
        self.samples = samples
        self.storage = storage
        self.threads = threads
        self.row_gradients = row_gradients
        self.steps: list[Step] = []
        self.tensors: dict[str, Tensor] = dict(params)
        self.kept: dict[str, Buffer] = {}
        self.kept_columns: dict[str, Columns] = {}
        """Of kept values that are columns of a buffer which is kept whole."""

    def bind_input(self, name: str) -> None:
        """Creates the buffer of a graph input; class indices are int32, as wide as float32."""
        shape = self.graph.shapes[name].at(self.samples)
        self.tensors[name] = Tensor(Buffer(name, 4 * prod(shape)), shape)

    def stored(self, node: Node, index: int) -> Tensor:
        """Input `index` of the node, however it lies."""
        name = node.input(index)
        if name not in self.tensors:
            node.fail(f"input {index} ({name!r}) is missing or no float tensor")
        return self.tensors[name]

    def tensor(self, node: Node, index: int) -> Tensor:
        """Input `index` of the node; a copy if it is columns of a wider matrix."""
        tensor = self.stored(node, index)
        if tensor.columns is None:
            return tensor
        name, (row, first, width) = node.input(index), tensor.columns
        copy = Tensor(Buffer(name, 4 * tensor.elements), tensor.shape)
        walk, (src, dst) = collapse([tensor.elements // width, width], [row, 1], [width, 1])
        self.emit(node, "copy", [len(walk), *walk, *src, *dst, first, 0], [], [tensor.buffer, copy.buffer])
        self.tensors[name] = copy
        return copy

    def plain(self, node: Node, index: int) -> Tensor:
        """Input `index`, which must be stored in the order of its shape."""
        tensor = self.tensor(node, index)
        if tensor.perm is not None:
            node.fail(f"input {node.input(index)!r} is stored as {list(tensor.perm)}, which this operator cannot read")
        if tensor.form in (ParamForm.BF16, ParamForm.INT8):
            node.fail(f"input {node.input(index)!r} is stored in {tensor.form.name}, which this operator cannot read")
        return tensor

    def columns(self, node: Node, index: int) -> Tensor:
        """Input `index` as `plain`, or columns of a wider matrix."""
        tensor = self.stored(node, index)
        return self.plain(node, index) if tensor.columns is None else tensor

    def optional(self, node: Node, index: int) -> Buffer | None:
        return self.plain(node, index).buffer if node.input(index) else None

    def vector(self, node: Node, index: int, length: int) -> Buffer | None:
        """The optional per-channel input `index`, checked to hold `length` elements."""
        if not node.input(index):
            return None
        tensor = self.plain(node, index)
        if tensor.elements != length:
            node.fail(f"input {node.input(index)!r} has {tensor.elements} elements, expected {length}")
        return tensor.buffer

    def output(self, node: Node, index: int = 0, perm: tuple[int, ...] | None = None) -> Tensor:
        """Creates output `index` in the shape that the graph states."""
        name = node.output(index)
        if not name:
            node.fail(f"output {index} is missing")
        shape = self.graph.shape(name, node).at(self.samples)
        tensor = Tensor(Buffer(name, 4 * prod(shape)), shape, perm)
        self.tensors[name] = tensor
        return tensor

    def alias(self, node: Node, source: Tensor) -> None:
        """Output 0 is `source`'s memory, in another shape if its storage is row-major."""
        shape = self.graph.shape(node.output(0), node).at(self.samples)
        if source.form in (ParamForm.BF16, ParamForm.INT8):
            node.fail(f"cannot view a parameter that is stored in {source.form.name}")
        if prod(shape) != source.elements or source.perm is not None and shape != source.shape:
            node.fail(f"cannot view shape {list(source.shape)}, stored as {source.perm}, as {list(shape)}")
        self.tensors[node.output(0)] = Tensor(source.buffer, shape, source.perm, columns=source.columns)

    def keep(self, node: Node, index: int) -> Buffer | None:
        """The buffer for kept output `index`, if anything consumes it."""
        name = node.output(index)
        if name not in self.storage:
            return None
        self.kept[name] = Buffer(name, self.storage[name].bytes)
        return self.kept[name]

    def buffer(self, name: str) -> Buffer | None:
        """The memory of a kept value or of a float value; None if it has none."""
        if name in self.kept:
            return self.kept[name]
        return self.tensors[name].buffer if name in self.tensors else None

    def kept_input(self, node: Node, index: int) -> tuple[Buffer, Storage]:
        name = node.input(index)
        if name not in self.kept:
            node.fail(f"input {name!r} is no kept value")
        return self.kept[name], self.storage[name]

    def emit(
        self, node: Node, kernel: str, ints: Sequence[int], floats: Sequence[float], operands: Sequence[Buffer | None]
    ) -> None:
        """Appends a step; adds its scratch operand."""
        step = Step(
            kernel, f"{node.layer}:{node.op}", list(ints), list(floats), list(operands), node.phase == "backward"
        )
        if KERNELS[kernel].scratch:
            try:
                size = scratch_bytes(kernel, tuple(ints), tuple(floats), self.threads)
            except UsageError as error:
                raise BundleError(f"training graph: node {node.name!r} ({node.op}): {error}") from error
            step.operands.append(Buffer(f"scratch of {node.name}", size) if size else None)
        self.steps.append(step)


@lru_cache(maxsize=65536)
def scratch_bytes(kernel: str, ints: tuple[int, ...], floats: tuple[float, ...], threads: int) -> int:
    from edge_razor.runtime import kernel_scratch

    return kernel_scratch(kernel, ints, floats, threads)


def row_major(shape: Sequence[int]) -> list[int]:
    """Strides, in elements, of a dense row-major tensor.

    >>> row_major([2, 3, 4])
    [12, 4, 1]
    """
    strides = [1] * len(shape)
    for i in range(len(shape) - 2, -1, -1):
        strides[i] = strides[i + 1] * shape[i + 1]
    return strides


def collapse(dims: Sequence[int], *strides: Sequence[int]) -> tuple[list[int], list[list[int]]]:
    """The same walk with the fewest dimensions: drops those of 1, merges neighbours that every operand walks as one.

    >>> collapse([2, 1, 3, 4], [12, 12, 4, 1], [0, 0, 4, 1])
    ([2, 12], [[12, 1], [0, 1]])
    """
    out: list[int] = []
    walks: list[list[int]] = [[] for _ in strides]
    for i, extent in enumerate(dims):
        if extent == 1:
            continue
        if out and all(w[-1] == s[i] * extent for w, s in zip(walks, strides, strict=True)):
            out[-1] *= extent
            for w, s in zip(walks, strides, strict=True):
                w[-1] = s[i]
        else:
            out.append(extent)
            for w, s in zip(walks, strides, strict=True):
                w.append(s[i])
    if not out:
        return [1], [[1] for _ in strides]
    return out, walks
