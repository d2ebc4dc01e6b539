"""Conv → ``ai.edge_razor`` Conv: explicit pads, the bias as ``shift``."""

from __future__ import annotations

import onnx_ir as ir

from edge_razor.exporters.canonicalize.pooling import explicit_pads
from edge_razor.exporters.graph_edit import (
    DOMAIN,
    AttributeValue,
    array,
    dims,
    integer,
    ints,
    is_constant,
    make_node,
    remove_dead,
    replace,
)


def canonicalize_convolutions(model: ir.Model) -> ir.Model:
    """See module docstring. Activations are still NCHW: `channels_last` moves them. A bias of zeros (torch exports
    ``bias=False`` so) is dropped."""
    for node in list(model.graph):
        if node.op_type != "Conv" or node.domain:
            continue
        data, weight, bias = [*node.inputs, None][:3]
        assert data is not None and weight is not None
        if len(dims(data)) != 4:
            node.meta["why"] = f"{len(dims(data)) - 2}-dimensional; only 2-dimensional convolution is known"
            continue
        if weight.producer() is not None or weight.is_graph_input():
            node.meta["why"] = "its weight is computed, not a parameter"
            continue
        zeros = array(bias)
        if is_constant(bias) and zeros is not None and not zeros.any():
            bias = None
        kernel = dims(weight)[2:]
        strides, dilations = ints(node, "strides", [1, 1]), ints(node, "dilations", [1, 1])
        attributes: dict[str, AttributeValue] = {
            "strides": strides,
            "pads": explicit_pads(node, dims(data)[2:], kernel, strides, dilations),
            "dilations": dilations,
            "group": integer(node, "group", 1),
            "activation": "none",
        }
        shapes = [dims(node.outputs[0])]
        replace(
            node, [make_node("Conv", [data, weight, None, bias], attributes, domain=DOMAIN, shapes=shapes, like=node)]
        )
    remove_dead(model.graph)
    return model
