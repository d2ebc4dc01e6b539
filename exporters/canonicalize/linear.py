"""Gemm, and MatMul with a weight (+ Add of a bias) → ``ai.edge_razor`` Linear; of two computed values → BatchMatMul."""

from __future__ import annotations

import onnx_ir as ir

from edge_razor.exporters.graph_edit import (
    BATCH,
    DOMAIN,
    bypass,
    dims,
    integer,
    ints,
    made_by,
    make_node,
    number,
    only_consumer,
    remove_dead,
    replace,
    to_shape,
)


def canonicalize_linear(model: ir.Model) -> ir.Model:
    """See module docstring. The weight keeps its layout: ``transW`` says which one it is."""
    for node in list(model.graph):
        if node.domain or node.op_type not in ("Gemm", "MatMul"):
            continue
        data, weight, bias = [*node.inputs, None][:3]
        assert data is not None and weight is not None
        trans = integer(node, "transB", 0) if node.op_type == "Gemm" else 0
        weight, trans = _look_through_transpose(weight, trans)
        if weight.producer() is not None or weight.is_graph_input() or len(dims(weight)) != 2:
            _two_computed(node, data, weight)
            continue
        if node.op_type == "Gemm" and (integer(node, "transA", 0) or number(node, "alpha", 1.0) != 1.0):
            node.meta["why"] = "transA and alpha other than 1 are not known"
            continue
        if bias is not None and number(node, "beta", 1.0) != 1.0:
            node.meta["why"] = "beta other than 1 is not known"
            continue
        shape = dims(node.outputs[0])
        name = str(node.outputs[0].name)
        separate = bias is not None and not _is_bias(bias, shape[-1])
        if node.op_type == "MatMul":
            bias = _absorb_add(node, shape[-1])
        inputs = [data, weight, None, None if separate else bias]
        attributes: dict[str, int | str] = {"transW": trans, "activation": "none"}
        linear = make_node("Linear", inputs, attributes, domain=DOMAIN, shapes=[shape], like=node)
        if separate:
            linear.outputs[0].name = f"{name}/product"
            replace(node, [linear, make_node("Add", [linear.outputs[0], bias], shapes=[shape], like=node)])
        else:
            replace(node, [linear])
    remove_dead(model.graph)
    return model


def _two_computed(node: ir.Node, a: ir.Value, b: ir.Value) -> None:
    """Both of one batch, all leading dimensions the same: BatchMatMul."""
    left, right = dims(a), dims(b)
    batched = len(left) > 2 and left[0] % BATCH == 0 and left[:-2] == right[:-2]
    computed = all(v.producer() is not None or v.is_graph_input() for v in (a, b))
    if node.op_type == "MatMul" and batched and computed:
        shapes = [(*left[:-1], right[-1])]
        replace(node, [make_node("BatchMatMul", [a, b], domain=DOMAIN, shapes=shapes, like=node)])
    else:
        node.meta["why"] = "multiplies two computed values that are not of one batch, or a parameter of another shape"


def linear_on_rows(model: ir.Model) -> ir.Model:
    """View to [rows, C], linear layer, view back (a Gemm needs two dimensions) → the linear layer alone."""
    for node in list(model.graph):
        if node.domain != DOMAIN or node.op_type != "Linear":
            continue
        data, back = node.inputs[0], only_consumer(node.outputs[0])
        view = made_by(data, "Reshape")
        source = view.inputs[0] if view is not None else None
        if data is None or source is None or back is None or back.op_type != "Reshape" or back.domain:
            continue
        shape = dims(back.outputs[0])
        if (
            shape[:-1] == dims(source)[:-1]
            and dims(source)[-1] == dims(data)[-1]
            and shape[-1] == dims(node.outputs[0])[-1]
        ):
            node.replace_input_with(0, source)
            node.outputs[0].shape = to_shape(shape)
            bypass(back, node.outputs[0])
    remove_dead(model.graph)
    return model


def _is_bias(value: ir.Value, width: int) -> bool:
    return value.producer() is None and not value.is_graph_input() and dims(value) == (width,)


def _look_through_transpose(weight: ir.Value, trans: int) -> tuple[ir.Value, int]:
    """torch writes ``x @ W.T``: the transpose of a parameter becomes the other ``transW``."""
    producer = weight.producer()
    if producer is not None and producer.op_type == "Transpose" and not producer.domain:
        source = producer.inputs[0]
        if ints(producer, "perm", [1, 0]) == [1, 0] and source is not None:
            return source, 1 - trans
    return weight, trans


def _absorb_add(node: ir.Node, width: int) -> ir.Value | None:
    """The bias of an Add that alone follows ``node``; the Add is removed."""
    add = only_consumer(node.outputs[0])
    if add is None or add.op_type != "Add" or add.domain:
        return None
    for index, value in enumerate(add.inputs):
        if value is not None and value is not node.outputs[0] and _is_bias(value, width):
            bypass(add, add.inputs[1 - index] or node.outputs[0])
            return value
    return None
