"""BatchNormalization with frozen statistics → BatchNormFold + the scale and shift of the convolution before it, else +
Affine.

The convolution's weight stays as it is, so that every parameter keeps its name, data and gradient: only the two vectors
are computed.
"""

from __future__ import annotations

import onnx_ir as ir

from edge_razor.exporters.graph_edit import (
    DOMAIN,
    array,
    dims,
    is_constant,
    make_node,
    number,
    only_consumer,
    remove_dead,
    replace,
    text,
)


def fuse_batchnorm(model: ir.Model) -> ir.Model:
    """See module docstring. A convolution's bias becomes the ``bias`` of the BatchNormFold."""
    for node in list(model.graph):
        if node.op_type == "BatchNormalization" and not node.domain:
            _fuse(node)
    remove_dead(model.graph)
    return model


def _fuse(node: ir.Node) -> None:
    data, gamma, beta, mean, var = node.inputs[:5]
    assert data is not None and mean is not None and var is not None
    if _all_equal(gamma, 1.0):
        gamma = None
    if _all_equal(beta, 0.0):
        beta = None
    producer = data.producer()
    absorbed = producer is not None and only_consumer(data) is node and _takes_scale(producer, len(dims(data)))
    bias = None
    if absorbed and producer is not None and len(producer.inputs) > 3:
        bias = producer.inputs[3]
    width = dims(mean)
    name = str(node.outputs[0].name)
    fold = make_node(
        "BatchNormFold",
        [gamma, beta, mean, var, bias],
        {"epsilon": number(node, "epsilon", 1e-5)},
        domain=DOMAIN,
        shapes=[width, width],
        like=node,
        names=[f"{name}/scale", f"{name}/shift"],
    )
    fold.name = f"{node.name}/fold"
    scale, shift = fold.outputs
    node.resize_outputs(1)
    if absorbed and producer is not None:
        inputs = [producer.inputs[0], producer.inputs[1], scale, shift]
        fused = ir.node(
            producer.op_type,
            inputs,
            domain=DOMAIN,
            outputs=[ir.Value(type=data.type, shape=data.shape)],
        )
        fused.attributes.update(producer.attributes)
        fused.metadata_props["layer"] = producer.metadata_props.get("layer", "")
    else:
        attributes = {"activation": "none"}
        fused = make_node("Affine", [data, scale, shift], attributes, domain=DOMAIN, shapes=[dims(data)], like=node)
    replace(node, [fold, fused])


def _takes_scale(producer: ir.Node, rank: int) -> bool:
    """Conv, and Linear on a matrix (its channel is the last dimension, which is BatchNorm's only for rank 2), not yet
    scaled."""
    if producer.domain != DOMAIN or producer.op_type not in ("Conv", "Linear"):
        return False
    unscaled = len(producer.inputs) < 3 or producer.inputs[2] is None
    return unscaled and text(producer, "activation", "none") == "none" and (producer.op_type == "Conv" or rank == 2)


def _all_equal(value: ir.Value | None, number_: float) -> bool:
    """torch writes the weight and bias of a BatchNorm without parameters as constants of ones and zeros."""
    data = array(value)
    return is_constant(value) and data is not None and bool((data == number_).all())
