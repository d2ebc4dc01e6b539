"""The forward graph seen from recomputation: its articulation points, and what is kept between them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from math import prod

from edge_razor.errors import BundleError

from .graph import DOMAIN, Graph, Node
from .storage import PIECEWISE_LINEAR

__all__ = ["Forward", "Unit", "articulation_points"]


@dataclass(slots=True)
class Unit:
    """Memory that the forward pass leaves for the backward pass.

    `root` is the value whose memory it is, `names` are all names under which the backward pass reads it, `position`
    is the index of the forward node that makes it, `bytes` are a sample's, kept exactly.
    """

    root: str
    position: int
    bytes: float
    names: set[str] = field(default_factory=set)


class Forward:
    """The forward nodes of a graph in order, without `Pack`."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.nodes = [n for n in graph.nodes if n.phase == "forward" and n.op != "Pack"]
        self.position = {out: i for i, node in enumerate(self.nodes) for out in node.outputs if out}
        self._packed = {n.output(0): n.input(0) for n in graph.nodes if n.op == "Pack"}
        self.from_input = set(graph.inputs)
        """Values that depend on an input of the network; the others are made from parameters alone."""
        for node in self.nodes:
            if self.from_input.intersection(node.inputs):
                self.from_input.update(out for out in node.outputs if out)

    def root(self, name: str) -> str:
        """The value whose memory `name` is: what a Pack packs, and what a Reshape is another view of."""
        name = self._packed.get(name, name)
        while name in self.position and (node := self.nodes[self.position[name]]).op == "Reshape":
            name = node.input(0)
        return name

    def bytes(self, name: str) -> float:
        """A sample's bytes of a value, in float32."""
        shape = self.graph.shapes.get(name)
        if shape is None:
            raise BundleError(f"training graph: value {name!r} has no known shape")
        return 4.0 * shape.sample_elements

    @cached_property
    def units(self) -> dict[str, Unit]:
        """Root → what the backward pass reads of it, in forward order. Without the network's inputs, which stay in
        memory anyway, what is made from parameters alone (a few numbers a channel), and the probabilities of attention,
        which `keep_probabilities` alone may keep: its gradient makes them from Q, K and V otherwise."""
        names: dict[str, set[str]] = {}
        for node in self.graph.nodes:
            if node.phase == "backward":
                for name in node.inputs:
                    names.setdefault(self.root(name), set()).add(name)
        found = {}
        for index, node in enumerate(self.nodes):
            for out in node.outputs if node.op != "Attention" else node.outputs[:1]:
                if out in names and out in self.from_input:
                    found[out] = Unit(out, index, self._kept_bytes(node, out), names[out])
        return found

    def _kept_bytes(self, node: Node, name: str) -> float:
        if name in self.graph.shapes:
            return self.bytes(name)
        dense = self.bytes(node.output(0))
        if node.op == "MaxPool":
            return dense / 4
        return dense / 32 if node.text("activation", "none") in PIECEWISE_LINEAR else dense

    @cached_property
    def points(self) -> list[str]:
        """Articulation points, in order: values through which everything flows, as at the end of a residual block.

        After such a value is made, it alone of all values made from the network's inputs has readers still to come.
        """
        last: dict[str, int] = {}
        for node in self.graph.nodes:
            if node.phase == "loss":
                last.update((name, len(self.nodes)) for name in node.inputs)
        for index in range(len(self.nodes) - 1, -1, -1):
            for name in self.nodes[index].inputs:
                last.setdefault(name, index)
        inputs = set(self.graph.inputs)
        points: list[str] = []
        waiting: set[str] = set()
        for index, node in enumerate(self.nodes):
            waiting.update(
                out for out in node.outputs if out in self.from_input and out in last and self.root(out) not in inputs
            )
            waiting -= {name for name in waiting if last[name] <= index}
            if len(waiting) == 1 and waiting.isdisjoint(points[-1:]):
                points += waiting
        return points

    def work(self, node: Node) -> float:
        """What computing a forward node again costs for a sample, in multiply-adds; for ordering alone.

        An element that is only moved through memory counts as 16, about what it costs beside a matrix product.
        """
        if node.output(0) not in self.graph.shapes:
            return 0.0
        elements = self.graph.shapes[node.output(0)].sample_elements
        if node.domain == DOMAIN and node.op in ("Conv", "Linear"):
            weight = self._dims(node, 1, 2)
            outputs = weight[0] if node.op == "Conv" or node.integer("transW", 1) else weight[1]
            return float(elements) * (16 + prod(weight) / outputs)
        if node.op == "Attention":
            return float(elements) * (16 + 2 * self._dims(node, 1, 1)[0])
        if node.op == "BatchMatMul":
            inner = self._dims(node, 0, 2)[-2 if node.integer("transA", 0) else -1]
            return float(elements) * (16 + inner)
        return 16.0 * elements

    def _dims(self, node: Node, index: int, least: int) -> tuple[int, ...]:
        dims = self.graph.shape(node.input(index), node).dims
        if len(dims) < least:
            node.fail(f"input {node.input(index)!r} has {len(dims)} dimensions beside the batch, {least} are needed")
        return dims


def articulation_points(graph: Graph) -> list[str]:
    """Forward values through which everything flows, in order (`Forward.points`)."""
    return Forward(graph).points
