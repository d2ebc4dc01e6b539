"""MaxPool and AveragePool → ``ai.edge_razor`` with explicit pads; GlobalAveragePool → ReduceMean."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from edge_razor.exporters.canonicalize.axes import reduce_node
from edge_razor.exporters.graph_edit import DOMAIN, dims, integer, ints, make_node, remove_dead, replace, text


def explicit_pads(
    node: ir.Node, size: Sequence[int], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> list[int]:
    """``pads`` of a 2-D window [top, left, bottom, right] with ``auto_pad`` resolved; ``size`` is [H, W] of the input.

    SAME pads so that the output has ceil(size/stride) positions, the odd one at the end (UPPER) or start (LOWER).
    """
    mode = text(node, "auto_pad", "NOTSET")
    if mode in ("NOTSET", ""):
        return ints(node, "pads", [0, 0, 0, 0])
    if mode == "VALID":
        return [0, 0, 0, 0]
    begin, end = [], []
    for length, k, stride, dilation in zip(size, kernel, strides, dilations, strict=True):
        total = max(0, (-(-length // stride) - 1) * stride + (k - 1) * dilation + 1 - length)
        small = total // 2
        begin.append(small if mode == "SAME_UPPER" else total - small)
        end.append(total - small if mode == "SAME_UPPER" else small)
    return begin + end


def canonicalize_pooling(model: ir.Model) -> ir.Model:
    """See module docstring. ``ceil_mode`` becomes padding wherever padding does not change a result."""
    graph = model.graph
    for node in list(graph):
        if node.domain or node.op_type not in ("MaxPool", "AveragePool", "GlobalAveragePool"):
            continue
        data = node.inputs[0]
        assert data is not None
        rank = len(dims(data))
        if node.op_type == "GlobalAveragePool":
            replace(node, [reduce_node(graph, "ReduceMean", data, list(range(2, rank)), 1, node)])
        elif rank != 4:
            node.meta["why"] = f"{rank - 2}-dimensional; only 2-dimensional pooling is known"
        elif len(node.outputs) > 1 and (node.outputs[1].uses() or node.outputs[1].is_graph_output()):
            node.meta["why"] = "its indices are used"
        else:
            _pool(node, data)
    remove_dead(graph)
    return model


def _pool(node: ir.Node, data: ir.Value) -> None:
    size, out = dims(data)[2:], dims(node.outputs[0])[2:]
    kernel = ints(node, "kernel_shape")
    strides, dilations = ints(node, "strides", [1, 1]), ints(node, "dilations", [1, 1])
    pads = explicit_pads(node, size, kernel, strides, dilations)
    average = node.op_type == "AveragePool"
    include_pad = integer(node, "count_include_pad", 0) if any(pads) else 0
    ceil = integer(node, "ceil_mode", 0)
    if average and dilations != [1, 1]:
        node.meta["why"] = f"dilations {dilations}; average pooling knows only 1"
        return
    if ceil and not include_pad:
        # Padding never wins (max) and is not counted (average), so the windows that ceil_mode adds are padding.
        for d in range(2):
            reach = (out[d] - 1) * strides[d] + (kernel[d] - 1) * dilations[d] + 1
            pads[2 + d] = max(pads[2 + d], reach - size[d] - pads[d])
        ceil = 0
    attributes: dict[str, int | list[int]] = {"kernel_shape": kernel, "strides": strides, "pads": pads}
    if average:
        attributes |= {"count_include_pad": include_pad, "ceil_mode": ceil}
    else:
        attributes |= {"dilations": dilations}
    new = make_node(node.op_type, [data], attributes, domain=DOMAIN, shapes=[dims(node.outputs[0])], like=node)
    node.resize_outputs(1)
    replace(node, [new])
