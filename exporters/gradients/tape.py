"""What gradient rules work with: it emits backward nodes, adds up gradients, and knows which values need one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from edge_razor.errors import UnsupportedOpError
from edge_razor.exporters.graph_edit import BATCH, DOMAIN, AttributeValue, constant, dims, shape_text, to_shape

GradientRule = Callable[["Tape", ir.Node, Sequence["ir.Value | None"]], Sequence["ir.Value | None"]]
"""(tape, forward node, gradient of each output or None) → gradient of each input; None where ``tape.needs`` says no."""


def is_batched(value: ir.Value) -> bool:
    """Whether the first dimension of ``value`` grows with the batch; parameters and what only they make do not."""
    shape = dims(value)
    return bool(shape) and shape[0] != 0 and shape[0] % BATCH == 0


def unsupported(node: ir.Node, why: str) -> UnsupportedOpError:
    """The error for a forward node whose gradient is not defined here."""
    shapes = ", ".join(shape_text(v) for v in node.inputs)
    return UnsupportedOpError(
        f"differentiate: {node.op_type} {node.name!r} ({shapes}): {why}", ((node.name or "", node.op_type, shapes),)
    )


class Tape:
    """The backward part of one graph while it is made.

    Attributes:
        nodes: backward nodes so far, in execution order.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self.nodes: list[ir.Node] = []
        self._graph = graph
        self._needed: set[ir.Value] = set()
        self._gradients: dict[ir.Value, ir.Value] = {}
        self._ints: dict[tuple[int, ...], ir.Value] = {}
        self._source: ir.Node | None = None
        self._phase = "backward"
        values: list[ir.Value] = [*graph.inputs, *graph.initializers.values()]
        for node in graph:
            values.extend(node.outputs)
        self._names = {value.name for value in values} | {node.name for node in graph}

    def unique(self, name: str) -> str:
        """``name``, or ``name/2``, … if the graph has that already; the result is taken from then on."""
        candidate, count = name, 1
        while candidate in self._names:
            count += 1
            candidate = f"{name}/{count}"
        self._names.add(candidate)
        return candidate

    def require(self, values: Iterable[ir.Value]) -> None:
        """Marks values whose gradient must be computed."""
        self._needed.update(values)

    def needs(self, value: ir.Value | None) -> bool:
        """Whether the gradient of ``value`` must be computed; False for an absent operand."""
        return value is not None and value in self._needed

    def at(self, node: ir.Node, phase: str = "backward") -> None:
        """Nodes emitted from now on belong to the layer of the forward node ``node``."""
        self._source, self._phase = node, phase

    def emit(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        shape: Sequence[int],
        attributes: Mapping[str, AttributeValue] | None = None,
        *,
        name: str,
        domain: str = DOMAIN,
    ) -> ir.Value:
        """Appends a node with one float32 output of ``shape`` (as `graph_edit.dims` gives it) called like ``name``."""
        return self.emit_many(op_type, inputs, [shape], attributes, names=[name], domain=domain)[0]

    def emit_many(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        shapes: Sequence[Sequence[int]],
        attributes: Mapping[str, AttributeValue] | None = None,
        *,
        names: Sequence[str],
        domain: str = DOMAIN,
    ) -> Sequence[ir.Value]:
        """`emit` for several outputs; one whose name is empty is left out."""
        assert self._source is not None, "Tape.at comes before Tape.emit"
        operands = list(inputs)
        while operands and operands[-1] is None:
            operands.pop()
        outputs = [
            ir.Value(name=self.unique(name), type=ir.TensorType(ir.DataType.FLOAT), shape=to_shape(shape))
            if name
            else ir.Value(name="")
            for name, shape in zip(names, shapes, strict=True)
        ]
        node = ir.node(op_type, operands, dict(attributes or {}), domain=domain, outputs=outputs)
        node.name = self.unique(f"{self._source.name}/{op_type}")
        node.metadata_props["phase"] = self._phase
        node.metadata_props["layer"] = self._source.metadata_props.get("layer", "")
        self.nodes.append(node)
        return node.outputs

    def standard(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        shape: Sequence[int],
        attributes: Mapping[str, AttributeValue] | None = None,
        *,
        name: str,
    ) -> ir.Value:
        """`emit` for an operator of ONNX itself."""
        return self.emit(op_type, inputs, shape, attributes, name=name, domain="")

    def ints(self, values: Iterable[int]) -> ir.Value:
        """An inline int64 initializer, shared by all that need the same numbers."""
        key = tuple(int(v) for v in values)
        if key not in self._ints:
            name = self.unique("int64/" + ",".join(map(str, key)))
            self._ints[key] = constant(self._graph, np.array(key, dtype=np.int64), name)
        return self._ints[key]

    def kept(self, node: ir.Node, what: str) -> ir.Value:
        """Asks the forward node for its second output: a uint8 vector that the backward pass consumes."""
        if len(node.outputs) < 2:
            node.resize_outputs(2)
        kept = node.outputs[1]
        if not kept.name:
            kept.name = self.unique(f"kept/{node.outputs[0].name}/{what}")
            describe_kept(kept)
        return kept

    def more_outputs(self, node: ir.Node, described: Mapping[str, Sequence[int]]) -> list[ir.Value]:
        """Asks the forward node for float32 outputs behind its first: name → shape."""
        node.resize_outputs(1 + len(described))
        values = list(node.outputs[1:])
        for value, (name, shape) in zip(values, described.items(), strict=True):
            value.name = self.unique(name)
            value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), to_shape(shape)
        return values

    def add_gradient(self, value: ir.Value, gradient: ir.Value) -> None:
        """Adds ``gradient`` to what is known of ``value``'s gradient, at once: only one sum is alive at a time."""
        known = self._gradients.get(value)
        if known is not None:
            gradient = self.standard("Add", [known, gradient], dims(value), name=f"d/{value.name}")
        self._gradients[value] = gradient

    def gradient(self, value: ir.Value) -> ir.Value | None:
        """The gradient of ``value`` so far; None if nothing has contributed."""
        return self._gradients.get(value)


def describe_kept(value: ir.Value) -> None:
    """Gives a kept value its type: uint8 of a length that only the planner knows."""
    value.type = ir.TensorType(ir.DataType.UINT8)
    value.shape = ir.Shape([ir.SymbolicDim(f"bytes({value.name})")])
