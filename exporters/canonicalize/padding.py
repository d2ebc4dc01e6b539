"""Pad → into the Conv or pool behind it, else one spelling: constant mode, one pair for each dimension."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edge_razor.exporters.graph_edit import (
    DOMAIN,
    array,
    bypass,
    constant,
    dims,
    integer,
    ints,
    make_node,
    remove_dead,
    replace,
    text,
)


def canonicalize_padding(model: ir.Model) -> ir.Model:
    """See module docstring. Runs after convolution and pooling have explicit pads."""
    graph = model.graph
    for node in list(graph):
        if node.op_type == "Pad" and not node.domain:
            _pad(graph, node)
    remove_dead(graph)
    return model


def _pad(graph: ir.Graph, node: ir.Node) -> None:
    source = node.inputs[0]
    given = array(node.inputs[1])
    assert source is not None
    rank = len(dims(source))
    if text(node, "mode", "constant") != "constant":
        node.meta["why"] = f"mode {text(node, 'mode', '')}; only constant padding is known"
        return
    fill = node.inputs[2] if len(node.inputs) > 2 else None
    fill_data = array(fill)
    axes = array(node.inputs[3]) if len(node.inputs) > 3 else np.arange(rank)
    if given is None or axes is None or (fill is not None and fill_data is None):
        node.meta["why"] = "its pads are computed from data"
        return
    value = 0.0 if fill_data is None or not fill_data.size else float(fill_data.reshape(-1)[0])
    pads = [0] * (2 * rank)
    for i, axis in enumerate(axes):
        pads[int(axis) % rank] = int(given[i])
        pads[rank + int(axis) % rank] = int(given[len(axes) + i])
    if min(pads) < 0:
        node.meta["why"] = f"negative pads {pads}"
        return
    if pads[0] or pads[rank]:
        node.meta["why"] = "pads the batch dimension"
        return
    if not any(pads):
        bypass(node, source)
        return
    uses = list(node.outputs[0].uses())
    spatial = rank == 4 and pads[1] == 0 and pads[5] == 0 and not node.outputs[0].is_graph_output()
    if spatial and uses and all(use.idx == 0 and _absorbs(use.node, value) for use in uses):
        for use in uses:
            _absorb(use.node, [pads[2], pads[3], pads[6], pads[7]])
        bypass(node, source)
        return
    inputs: list[ir.Value | None] = [source, constant(graph, np.array(pads, np.int64))]
    if value != 0.0:
        inputs.append(constant(graph, np.array(value, np.float32)))
    replace(node, [make_node("Pad", inputs, {"mode": "constant"}, shapes=[dims(node.outputs[0])], like=node)])


def _absorbs(consumer: ir.Node, value: float) -> bool:
    """Whether padding with ``value`` before ``consumer`` is what its own ``pads`` attribute would do."""
    if consumer.domain != DOMAIN:
        return False
    if consumer.op_type == "Conv":
        return value == 0.0
    if consumer.op_type == "MaxPool":
        return value <= float(np.finfo(np.float32).min)
    if consumer.op_type == "AveragePool":
        # The Pad's zeros count in the average; the pool's own padding must count too.
        counted = integer(consumer, "count_include_pad", 0) == 1 or not any(ints(consumer, "pads"))
        return value == 0.0 and counted and integer(consumer, "ceil_mode", 0) == 0
    return False


def _absorb(consumer: ir.Node, pads: list[int]) -> None:
    total = [a + b for a, b in zip(ints(consumer, "pads"), pads, strict=True)]
    consumer.attributes["pads"] = ir.AttrInt64s("pads", total)
    if consumer.op_type == "AveragePool":
        consumer.attributes["count_include_pad"] = ir.AttrInt64("count_include_pad", 1)
