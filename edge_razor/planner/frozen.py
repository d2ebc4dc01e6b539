"""How parameters that do not train are stored: read in the weights file as they lie there, or as bf16 or int8 rows."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from .context import LINEAR_PERM, ParamForm
from .graph import Graph, Initializer, Node
from .program import ALIGNMENT

__all__ = ["FROZEN_WEIGHTS", "frozen_forms", "looked_up_tables", "stored_bytes"]

FROZEN_WEIGHTS = {"fp32": ParamForm.IN_FILE, "bf16": ParamForm.BF16, "int8": ParamForm.INT8}
"""What `--frozen-weights` takes."""

Perms = dict[str, tuple[int, ...] | None]
_CONV_ROWS = (0, 2, 3, 1)  # OIHW with an output channel's taps in order, channels last
# Operators that read a weight by rows of an output channel, and which input it is.
_ROW_READERS = {"Linear": 1, "LinearGradInput": 1, "Conv": 1, "ConvGradInput": 1, "Embedding": 1}


def looked_up_tables(graphs: Sequence[Graph]) -> set[str]:
    """Parameters of which only rows are taken, by index: `Embedding` is their only reader in all graphs.

    In the weights file the runtime reads such a table row by row, so that none of it becomes resident.
    """
    rows: set[str] = set()
    others: set[str] = set()
    for graph in graphs:
        for node in graph.nodes:
            for index, name in enumerate(node.inputs):
                (rows if node.op == "Embedding" and index == 1 else others).add(name)
    return rows - others


def stored_bytes(shape: Sequence[int], perm: tuple[int, ...] | None, form: ParamForm) -> int:
    """Bytes of a parameter in a form (docs/plan-format.md, "Weights")."""
    elements = prod(shape)
    if form == ParamForm.BF16:
        return 2 * elements
    if form == ParamForm.INT8:
        rows = shape[perm[0] if perm else 0]
        return -(-4 * rows // ALIGNMENT) * ALIGNMENT + elements
    return 4 * elements


def frozen_forms(graphs: Sequence[Graph], perms: Perms, weights: str) -> tuple[dict[str, ParamForm], Perms]:
    """The form of every parameter that does not train and need not be copied as it is, and how all are stored then.

    Weights of linear layers and convolutions (depthwise ones left out) take the form that `weights` names, and so do
    embeddings that something else reads, too (tied output layers). `looked_up_tables` are read in the file whatever the
    form: that takes no memory and rounds nothing. In the file a linear layer or 1×1 convolution is read by rows of an
    output channel, where the trained form is by columns; a larger kernel lies there in an order that no kernel reads,
    and is copied. Other parameters are read in the file if they are stored as they lie there.

    Args:
        graphs: every graph that uses the parameters.
        perms: how parameters are stored that are copied as float32.
        weights: a key of `FROZEN_WEIGHTS`.
    """
    uses: dict[str, list[tuple[Node, int]]] = {}
    initializers: dict[str, Initializer] = {}
    for graph in graphs:
        initializers.update(graph.initializers)
        for node in graph.nodes:
            for index, name in enumerate(node.inputs):
                if name in perms:
                    uses.setdefault(name, []).append((node, index))
    trained = {name for graph in graphs for name in graph.gradients}
    looked_up = looked_up_tables(graphs)
    forms: dict[str, ParamForm] = {}
    stored = dict(perms)
    for name, perm in perms.items():
        if name in trained:
            continue
        shape = initializers[name].shape
        rows = _rows(shape, uses.get(name, ()))
        if rows is not None and weights != "fp32" and name not in looked_up:
            forms[name], stored[name] = FROZEN_WEIGHTS[weights], rows if _moves(rows) else None
        elif perm is None or rows is not None and not _moves(rows, shape):
            forms[name], stored[name] = ParamForm.IN_FILE, None
    return forms, stored


def _rows(shape: tuple[int, ...], uses: Sequence[tuple[Node, int]]) -> tuple[int, ...] | None:
    """The order that puts a weight into rows of an output channel; None if something reads it in another way."""
    found: set[tuple[int, ...]] = set()
    for node, index in uses:
        if _ROW_READERS.get(node.op) != index:
            return None
        if node.op == "Embedding":
            found.add((0, 1))
        elif node.op.startswith("Linear"):
            found.add((0, 1) if node.integer("transW", 1) else LINEAR_PERM)
        else:
            group = node.integer("group", 1)
            if group > 1 and group == shape[0]:
                return None  # depthwise: small, and its kernel has one form
            found.add(_CONV_ROWS)
    return found.pop() if len(found) == 1 and len(next(iter(found))) == len(shape) else None


def _moves(perm: tuple[int, ...], shape: Sequence[int] | None = None) -> bool:
    """Whether an order moves elements: of dimensions of `shape` larger than 1, if it is given."""
    moved = [d for d in perm if shape is None or shape[d] > 1]
    return moved != sorted(moved)
