"""Variadic and rare spellings of arithmetic → Add, Sub, Mul, Div with two operands."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edge_razor.exporters.graph_edit import array, constant, dims, make_node, remove_dead, replace


def canonicalize_elementwise(model: ir.Model) -> ir.Model:
    """``Sum`` → a chain of Add; ``Pow(x, 2)`` → ``Mul(x, x)``; ``Reciprocal(x)`` → ``Div(1, x)``."""
    graph = model.graph
    for node in list(graph):
        if node.domain:
            continue
        if node.op_type == "Sum" and len(node.inputs) >= 2:
            replace(node, _add_chain(node))
        elif node.op_type == "Pow" and _equals(node.inputs[1], 2.0):
            replace(node, [make_node("Mul", [node.inputs[0]] * 2, shapes=[dims(node.outputs[0])], like=node)])
        elif node.op_type == "Reciprocal":
            one = constant(graph, np.array(1.0, np.float32))
            replace(node, [make_node("Div", [one, node.inputs[0]], shapes=[dims(node.outputs[0])], like=node)])
    remove_dead(graph)
    return model


def _equals(value: ir.Value | None, number: float) -> bool:
    data = array(value)
    return data is not None and data.size == 1 and float(data.reshape(())) == number


def _add_chain(node: ir.Node) -> list[ir.Node]:
    total, chain = node.inputs[0], []
    for index, term in enumerate(node.inputs[1:]):
        assert total is not None and term is not None
        shape = np.broadcast_shapes(dims(total), dims(term))
        chain.append(
            make_node("Add", [total, term], shapes=[shape], like=node, names=[f"{node.outputs[0].name}/{index}"])
        )
        total = chain[-1].outputs[0]
    return chain
