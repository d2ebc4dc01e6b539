"""How each kept value is stored between the forward and the backward pass, and how many bytes that takes.

A value → `Storage` table is all that lowering knows about the choice, so a planner that chooses per value only fills
the table differently.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from enum import IntEnum
from fractions import Fraction
from functools import lru_cache
from math import floor
from typing import Literal

from edge_razor.errors import BundleError, UsageError

from .graph import Graph, Node

__all__ = ["ActivationKeep", "Form", "Place", "Storage", "at_place", "choose_storage", "keep_count"]

Place = Literal["memory", "recompute", "spill"]

MIN_ROWS = 8  # below this many rows a sample a block mean costs more than it describes


class Form(IntEnum):
    """Form of a kept tensor; the numbers are those of the plan file."""

    DENSE = 0
    BF16 = 1
    RAZOR_PLAIN = 2
    RAZOR_CENTERED = 3


class ActivationKeep(IntEnum):
    """What an activation keeps for its backward; the numbers are those of the plan file."""

    NOTHING = 0
    BITS = 1
    Q4 = 2
    DENSE = 3


# Codes of docs/plan-format.md.
ACTIVATIONS = {
    name: code
    for code, name in enumerate(
        "none relu clip leaky_relu hardsigmoid hardswish sigmoid tanh silu gelu gelu_tanh".split()
    )
}
PIECEWISE_LINEAR = {"relu", "clip", "leaky_relu", "hardsigmoid"}


@dataclass(frozen=True, slots=True)
class Storage:
    """One kept value: `form` is a `Form` for packed inputs, an `ActivationKeep` for activations, None for pool indices.

    `bytes` is 0 where the value itself stays alive and nothing is copied (dense packed inputs). samples × rows × cols
    is the shape that the kernels see, `keep` the values kept a sample. `place` says where it is between the forward
    and the backward pass: in memory, made again exactly when it is read, or in the spill file.
    """

    form: Form | ActivationKeep | None
    samples: int
    rows: int
    cols: int
    keep: int
    bytes: int
    place: Place = "memory"

    @property
    def exact(self) -> bool:
        """Whether nothing is lost of what the backward pass computes from it."""
        if isinstance(self.form, Form):
            return self.form == Form.DENSE
        return self.form != ActivationKeep.Q4


def keep_count(elements: int, sparsity: float) -> int:
    """Values kept of a sample's `elements`: n − ⌊s·n⌋ with s taken as the decimal number it prints as.

    >>> keep_count(10, 0.9), keep_count(1000, 0.97), keep_count(7, 0.5), keep_count(3, 0.99)
    (1, 30, 4, 1)
    """
    return elements - floor(Fraction(str(sparsity)) * elements)


def choose_storage(graph: Graph, samples: int, sparsity: float, razor: str) -> dict[str, Storage]:
    """Storage of every kept value of `graph` for a micro-batch of `samples`.

    Sparsity 0 keeps everything exactly: packed inputs stay alive as they are, smooth activations keep their dense
    input. Above 0, packed inputs take the `razor` form ("centered" or "plain"), or bf16 below 8 rows a sample and for
    the Q, K and V of attention, whose probabilities are made from them again. The normalized value of a LayerNorm is
    kept whole, block means and int8: what flows on to earlier layers is made from it, and nothing in it is small.
    Smooth activations take 4 bits an element. Piecewise-linear activations always keep 1 bit. The network's own input,
    and values that the backward pass reads directly anyway, are never copied.

    Raises:
        UsageError: sparsity outside [0, 1), or an unknown razor form.
    """
    if not 0 <= sparsity < 1:
        raise UsageError(f'sparsity must be "auto" or at least 0 and below 1, not {sparsity}')
    if razor not in ("centered", "plain"):
        raise UsageError(f'razor must be "centered" or "plain", not {razor!r}')
    form = Form.RAZOR_CENTERED if razor == "centered" else Form.RAZOR_PLAIN
    alive = _alive_anyway(graph)
    table: dict[str, Storage] = {}
    for node in graph.nodes:
        if node.op == "Pack":
            table[node.output(0)] = _packed(graph, node, samples, sparsity, form, node.input(0) in alive)
        elif node.op in ("Conv", "Linear", "Affine"):
            if node.output(1) in graph.consumers:
                table[node.output(1)] = _activation(graph, node, samples, sparsity)
        elif node.op == "MaxPool" and node.output(1) in graph.consumers:
            shape = graph.shape(node.output(0), node).at(samples)
            n, h, w, c = shape
            table[node.output(1)] = Storage(None, n, h * w, c, 0, n * h * w * c)
    return table


def at_place(
    graph: Graph, table: dict[str, Storage], samples: int, names: Collection[str], place: Place
) -> dict[str, Storage]:
    """`table` with the kept values `names` at `place`.

    Names may be kept values (keys of the table) or forward values that the backward pass reads as they are, or that
    values are made again from. What is made again is kept in no form, so its entry becomes that of sparsity 0.
    """
    exact = choose_storage(graph, samples, 0, "centered") if place == "recompute" else table
    changed = dict(table)
    for node in graph.nodes:
        for name in node.outputs:
            if name not in names:
                continue
            if name in table:
                changed[name] = replace(exact[name], place=place)
                continue
            shape = graph.shape(name, node)
            rows, cols = shape.sample_elements // shape.dims[-1], shape.dims[-1]
            if shape.batch:
                rows *= samples
            changed[name] = Storage(Form.DENSE, 1, rows, cols, 0, 0, place)
    return changed


def _alive_anyway(graph: Graph) -> set[str]:
    """The network's inputs, values that the backward pass reads directly, and views of either."""
    alive = set(graph.inputs)
    for node in graph.nodes:
        if node.phase == "backward":
            alive.update(i for i in node.inputs if i)
        elif node.op == "Reshape" and node.input(0) in graph.inputs:
            alive.add(node.output(0))
    return alive


def _packed(graph: Graph, node: Node, samples: int, sparsity: float, form: Form, alive: bool) -> Storage:
    shape = graph.shape(node.input(0), node)
    if not shape.batch or not shape.dims:
        node.fail(f"cannot pack a value of shape {shape}")
    # Convolutions and per-sample products see a·N samples; a matrix product sees N samples of a times the rows.
    readers = {consumer.op for consumer in graph.consumers.get(node.output(0), ())}
    per_image = bool(readers & {"ConvGradWeight", "MulGrad"})
    n = shape.batch * samples if per_image else samples
    cols = shape.dims[-1]
    rows = shape.sample_elements * samples // (n * cols)
    if sparsity == 0 or alive:
        return Storage(Form.DENSE, n, rows, cols, 0, 0)
    if rows < MIN_ROWS or readers == {"AttentionGrad"}:
        return Storage(Form.BF16, n, rows, cols, 0, _packed_bytes(Form.BF16, n, rows, cols, 0))
    if readers == {"LayerNormGrad"}:
        form, keep = Form.RAZOR_CENTERED, rows * cols  # in int8, nothing dropped: see `choose_storage`
    else:
        keep = keep_count(rows * cols, sparsity)
    return Storage(form, n, rows, cols, keep, _packed_bytes(form, n, rows, cols, keep))


def _activation(graph: Graph, node: Node, samples: int, sparsity: float) -> Storage:
    activation = node.text("activation", "none")
    if activation not in ACTIVATIONS or activation == "none":
        node.fail(f"activation {activation!r} keeps nothing for a backward pass")
    shape = graph.shape(node.output(0), node)
    if not shape.dims:
        node.fail(f"cannot keep an activation of shape {shape}")
    cols = shape.dims[-1]
    rows = shape.sample_elements * samples // cols
    if activation in PIECEWISE_LINEAR:
        return Storage(ActivationKeep.BITS, 1, rows, cols, 0, rows * ((cols + 7) // 8))
    if sparsity > 0 and rows // samples >= MIN_ROWS:
        return Storage(ActivationKeep.Q4, 1, rows, cols, 0, rows * ((cols + 1) // 2))
    return Storage(ActivationKeep.DENSE, 1, rows, cols, 0, 4 * rows * cols)


@lru_cache(maxsize=65536)
def _packed_bytes(form: int, samples: int, rows: int, cols: int, keep: int) -> int:
    from edge_razor.runtime import packed_bytes

    try:
        return packed_bytes(form, samples, rows, cols, keep)
    except UsageError as error:
        raise BundleError(f"training graph: {error}") from error
