"""softmax(scale·Q·Kᵀ)·V in the spellings of torch's scaled_dot_product_attention and of eager code → Attention.

Q, K and V arrive as [N, heads, positions, d]. The operator takes them as [N, positions, heads·d], which is how a linear
layer writes them: the transpositions that are put in here cancel those of the model when the graph gets its layout.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edge_razor.exporters.canonicalize.reshapes import reshape_node
from edge_razor.exporters.graph_edit import (
    DOMAIN,
    array,
    bypass,
    constant,
    dims,
    ints,
    make_node,
    only_consumer,
    remove_dead,
    replace,
)

_SWAP_LAST, _HEADS = [0, 1, 3, 2], [0, 2, 1, 3]


def canonicalize_attention(model: ir.Model) -> ir.Model:
    """See module docstring; an additive mask that is a constant becomes the operator's bias."""
    graph = model.graph
    for node in list(graph):
        if not node.domain and node.op_type == "Softmax":
            _fuse(graph, node)
    remove_dead(graph)
    return model


def merge_transpositions(model: ir.Model) -> ir.Model:
    """[N,H,S,D] → [H·N,S,D] → [H·N,D,S] → [N,H,D,S], torch's way to transpose the last two, as one Transpose. Comes
    before views are merged with their neighbours."""
    for node in list(model.graph):
        _merge_transposition(node)
    remove_dead(model.graph)
    return model


def _producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and not node.domain and node.op_type == op_type else None


def _merge_transposition(node: ir.Node) -> None:
    if node.domain or node.op_type != "Reshape" or len(dims(node.outputs[0])) != 4:
        return
    transpose = _producer(node.inputs[0], "Transpose")
    merge = _producer(transpose.inputs[0], "Reshape") if transpose is not None else None
    if transpose is None or merge is None or ints(transpose, "perm") != [0, 2, 1]:
        return
    source = merge.inputs[0]
    assert source is not None
    shape = dims(source)
    if len(shape) != 4 or dims(node.outputs[0]) != (*shape[:2], shape[3], shape[2]):
        return
    if dims(merge.outputs[0])[1:] != shape[2:]:
        return
    target = [dims(node.outputs[0])]
    replace(node, [make_node("Transpose", [source], {"perm": _SWAP_LAST}, shapes=target, like=node)])


def _scaled(value: ir.Value) -> tuple[ir.Value, float]:
    """(x, factor) of x·factor or x/factor with a constant number; (value, 1) otherwise."""
    node = value.producer()
    if node is None or node.domain or node.op_type not in ("Mul", "Div"):
        return value, 1.0
    for index in (0, 1) if node.op_type == "Mul" else (1,):
        data = array(node.inputs[index])
        other = node.inputs[1 - index]
        if data is not None and data.size == 1 and other is not None and dims(other) == dims(value):
            number = float(data.reshape(-1)[0])
            inner, factor = _scaled(other)
            return inner, factor * (number if node.op_type == "Mul" else 1.0 / number)
    return value, 1.0


def _with_bias(scores: ir.Value) -> tuple[ir.Value, np.ndarray | None]:
    """(scores, constant [T,S] or [H,T,S] that is added to them)."""
    node = _producer(scores, "Add")
    if node is None:
        return scores, None
    shape = dims(scores)
    for index in (0, 1):
        data, other = array(node.inputs[index]), node.inputs[1 - index]
        if data is None or other is None or dims(other) != shape:
            continue
        squeezed = data.reshape(data.shape[1:]) if data.ndim == 4 and data.shape[0] == 1 else data
        squeezed = squeezed[0] if squeezed.ndim == 3 and squeezed.shape[0] == 1 else squeezed
        if squeezed.ndim in (2, 3):
            full = shape[2:] if squeezed.ndim == 2 else shape[1:]
            try:
                return other, np.ascontiguousarray(np.broadcast_to(squeezed, full), dtype=np.float32)
            except ValueError:
                continue
    return scores, None


def _fuse(graph: ir.Graph, softmax: ir.Node) -> None:
    probabilities, scores = softmax.outputs[0], softmax.inputs[0]
    assert scores is not None
    if len(dims(scores)) != 4 or softmax.attributes.get_int("axis", -1) % 4 != 3:
        return
    product = only_consumer(probabilities)
    if product is None or product.op_type != "MatMul" or product.domain or product.inputs[0] is not probabilities:
        return
    inner, factor = _scaled(scores)
    inner, bias = _with_bias(inner)
    if bias is not None and factor != 1.0:
        return
    inner, more = _scaled(inner)
    matmul = _producer(inner, "MatMul")
    if matmul is None:
        return
    left, right, v = matmul.inputs[0], matmul.inputs[1], product.inputs[1]
    assert left is not None and right is not None and v is not None
    q, q_factor = _scaled(left)
    kt, k_factor = _scaled(right)
    if dims(q)[:2] != dims(v)[:2] or dims(kt)[:2] != dims(v)[:2] or dims(q)[3] != dims(v)[3]:
        return
    heads, d = dims(q)[1], dims(q)[3]
    nodes: list[ir.Node] = []
    operands = [_rows(graph, q, _HEADS, softmax, nodes), _key_rows(graph, kt, softmax, nodes)]
    operands.append(_rows(graph, v, _HEADS, softmax, nodes))
    masks: list[ir.Value | None] = [None, None]
    if bias is not None:
        masks[1] = constant(graph, bias)
    n, _, t, _ = dims(q)
    attributes = {
        "heads": heads,
        "kv_heads": heads,
        "scale": factor * more * q_factor * k_factor,
        "causal": 0,
        "ratio": 0.0,
        "stream": 0,
    }
    fused = make_node(
        "Attention", [*operands, *masks], attributes, domain=DOMAIN, shapes=[(n, t, heads * d)], like=product
    )
    fused.outputs[0].name = f"{product.outputs[0].name}/rows"
    split = reshape_node(graph, fused.outputs[0], (n, t, heads, d), product)
    split.outputs[0].name = f"{product.outputs[0].name}/heads"
    back = make_node("Transpose", [split.outputs[0]], {"perm": _HEADS}, shapes=[(n, heads, t, d)], like=product)
    replace(product, [*nodes, fused, split, back])


def _rows(graph: ir.Graph, value: ir.Value, perm: list[int], like: ir.Node, nodes: list[ir.Node]) -> ir.Value:
    """``value`` transposed to [N, positions, heads, d] and viewed as [N, positions, heads·d]; appends the nodes."""
    n, positions, heads, d = (dims(value)[p] for p in perm)
    transpose = make_node("Transpose", [value], {"perm": perm}, shapes=[(n, positions, heads, d)], like=like)
    transpose.outputs[0].name = f"{value.name}/positions/{len(nodes)}"
    view = reshape_node(graph, transpose.outputs[0], (n, positions, heads * d), like)
    view.outputs[0].name = f"{value.name}/rows/{len(nodes)}"
    nodes += [transpose, view]
    return view.outputs[0]


def _key_rows(graph: ir.Graph, kt: ir.Value, like: ir.Node, nodes: list[ir.Node]) -> ir.Value:
    """Rows of K from Kᵀ [N, heads, d, positions]."""
    swap = _producer(kt, "Transpose")
    if swap is not None and ints(swap, "perm") == _SWAP_LAST and swap.inputs[0] is not None:
        return _rows(graph, swap.inputs[0], _HEADS, like, nodes)
    return _rows(graph, kt, [0, 3, 1, 2], like, nodes)


def remove_nan_guards(model: ir.Model) -> ir.Model:
    """torch replaces NaN probabilities of rows without any key by 0, which Attention does by definition."""
    for node in list(model.graph):
        if node.domain or node.op_type != "Where":
            continue
        test = _producer(node.inputs[0], "IsNaN")
        value = node.inputs[2]
        if test is not None and value is not None and test.inputs[0] is value and _producer(value, "Softmax"):
            bypass(node, value)
    remove_dead(model.graph)
    return model
