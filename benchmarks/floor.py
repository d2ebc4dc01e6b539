"""The least time that a training step can take on a machine, from the training graph and two measured rates.

    floor = multiply-adds / (sgemm multiply-adds a second) + bytes / (bytes a second of a stream)

Multiply-adds, of convolutions, matrix products and attention by their definition (taps in the padding included):

- forward, and gradient of the input wherever the graph needs it: all;
- gradient of the weight: all where the input is kept dense or as bf16; the kept share (1 − s) where it is razor.

Bytes that must move between memory and processor, each value counted once for each of these passes:

- every activation (the output of each forward node, views left out): written, read; its gradient: written, read;
- the network's input: read forward; once more where a weight gradient reads it;
- what is kept in packed form (razor, bf16, activation bits, pool indices): written, read;
  what is kept dense lies where the activation lies: read once more;
- every trained parameter: read forward, read backward, gradient written and read, parameter written; a frozen tensor:
  read forward.

It adds arithmetic and traffic although a processor overlaps them, and it counts activations that could stay in a cache
as moved: a yardstick, which a very good kernel on a small layer may beat.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path

from edge_razor.bundle import Bundle
from edge_razor.planner.graph import Graph, Node, read_graph
from edge_razor.planner.storage import Form, Storage, choose_storage

PRODUCTS = ("Conv", "Linear")


@dataclass(frozen=True)
class Work:
    """What one training step must do."""

    forward: int  # multiply-adds
    grad_input: int
    grad_weight: int
    bytes: int

    @property
    def multiply_adds(self) -> int:
        return self.forward + self.grad_input + self.grad_weight

    def seconds(self, multiply_adds_per_second: float, bytes_per_second: float) -> float:
        """The floor."""
        return self.multiply_adds / multiply_adds_per_second + self.bytes / bytes_per_second


def _rows(graph: Graph, storage: dict[str, Storage], node: Node, index: int, samples: int) -> tuple[int, int]:
    """(rows a sample, columns) of an operand, packed or not."""
    kept = storage.get(node.input(index))
    if kept is not None:
        return kept.rows, kept.cols
    shape = graph.shape(node.input(index), node).at(samples)
    return shape[1], shape[2]


def step_work(graph: Graph, samples: int, storage: dict[str, Storage]) -> Work:
    """Work of a step of `samples` samples whose values are kept as `storage` says."""
    multiply_adds = {"": 0, "GradInput": 0, "GradWeight": 0}
    moved = 0
    used: set[str] = set()
    for node in graph.nodes:
        used.update(name for name in node.inputs if name)
        for op in PRODUCTS:
            kind = node.op.removeprefix(op)
            if not node.op.startswith(op) or kind not in multiply_adds:
                continue
            rows = graph.shape(node.output(0) if not kind else node.input(1 if kind == "GradWeight" else 0), node)
            weight = node.integers("weight_shape") if kind == "GradWeight" else graph.shape(node.input(1), node).dims
            # Each element of Y (or dY) takes part in one product with every weight of its output channel.
            amount = prod(rows.at(samples)) * prod(weight) // rows.dims[-1]
            kept = storage.get(node.input(0))
            if kind == "GradWeight" and kept and kept.form in (Form.RAZOR_PLAIN, Form.RAZOR_CENTERED):
                amount = amount * kept.keep // (kept.rows * kept.cols)
            multiply_adds[kind] += amount
            if kind == "GradWeight" and node.input(0) in graph.inputs:
                moved += 4 * prod(graph.shape(node.input(0), node).at(samples))
        if node.op in ("Attention", "AttentionGrad"):
            # Two products forward, five backward (the scores once more): each head's T·S scores times its d columns.
            q, k = (_rows(graph, storage, node, index, samples) for index in (0, 1))
            multiply_adds["" if node.op == "Attention" else "GradInput"] += (
                (2 if node.op == "Attention" else 5) * samples * q[0] * k[0] * q[1]
            )
        if node.phase == "forward" and node.op not in ("Reshape", "Pack") and node.output(0) in graph.shapes:
            shape = graph.shape(node.output(0), node)
            moved += 4 * 4 * prod(shape.at(samples)) if shape.batch else 0
    for name in graph.inputs:
        if name != "target":
            moved += 4 * prod(graph.shapes[name].at(samples))
    for value in storage.values():
        moved += 2 * value.bytes or 4 * value.samples * value.rows * value.cols
    for name, tensor in graph.initializers.items():
        if tensor.dtype == "float32" and name in used:
            moved += (5 if name in graph.gradients else 1) * 4 * prod(tensor.shape)
    return Work(multiply_adds[""], multiply_adds["GradInput"], multiply_adds["GradWeight"], moved)


def bundle_work(bundle: Path, samples: int, sparsity: float, razor: str) -> Work:
    """Work of a step on a bundle; see the head of this file for what counts."""
    with Bundle(bundle) as opened:
        graph = read_graph(opened.read_file("training.onnx"), opened.manifest.raw["output"]["name"])
    return step_work(graph, samples, choose_storage(graph, samples, sparsity, razor))
