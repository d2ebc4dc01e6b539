"""How attention keeps what its backward pass needs: `keep_probabilities` is the alternative to recomputation."""

from __future__ import annotations

from .graph import Graph, Node
from .storage import MIN_ROWS, Form, Storage, keep_count, packed_storage

__all__ = ["ATTENTION", "keep_probabilities"]

ATTENTION = ("recompute", "probabilities")


def keep_probabilities(
    graph: Graph, table: dict[str, Storage], samples: int, sparsity: float, razor: str
) -> dict[str, Storage]:
    """`table` (`choose_storage`) with the probabilities of every attention pruned and kept, Back Razor's way.

    Each query keeps S − ⌊s·S⌋ of the probabilities of its S keys. No probability is made from Q, K and V again then, so
    they take the razor form, as other packed inputs. At sparsity 0, with fewer than 8 keys, and in graphs of before the
    operator had such an output, attention stays as `table` has it.
    """
    if sparsity == 0:
        return table
    form = Form.RAZOR_CENTERED if razor == "centered" else Form.RAZOR_PLAIN
    changed = dict(table)
    kept = {node.output(1): node for node in graph.nodes if node.op == "Attention" and node.output(1)}
    for name, node in kept.items():
        shapes = [graph.shape(value, node) for value in node.inputs[:2]]
        if any(len(shape.dims) != 2 for shape in shapes) or shapes[1].dims[0] < MIN_ROWS:
            continue
        rows, keys = shapes[0].dims[0], shapes[1].dims[0]
        heads, keep = node.integer("heads"), keep_count(keys, sparsity)
        if name in graph.consumers and heads > 0:
            changed[name] = packed_storage(Form.ROWS, heads * samples, rows, keys, keep)
    for name, storage in table.items():
        readers = graph.consumers.get(name, [])
        if (
            storage.form is Form.BF16
            and storage.rows >= MIN_ROWS
            and readers
            and all(_reads(r, changed) for r in readers)
        ):
            keep = keep_count(storage.rows * storage.cols, sparsity)
            changed[name] = packed_storage(form, storage.samples, storage.rows, storage.cols, keep)
    return changed


def _reads(node: Node, table: dict[str, Storage]) -> bool:
    """Whether `node` is a backward pass from kept probabilities."""
    return node.op == "AttentionGrad" and node.input(6) in table
