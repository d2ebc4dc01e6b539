"""softmax(scale·Q·Kᵀ)·V in the spellings of torch's scaled_dot_product_attention and of eager code → Attention.

Q, K and V arrive as [N, heads, positions, d]. The operator takes them as [N, positions, heads·d], which is how a linear
layer writes them: the transpositions that are put in here cancel those of the model when the graph gets its layout.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edge_razor.exporters.canonicalize.dropout import dropout_ratio
from edge_razor.exporters.canonicalize.heads import HEADS, join_heads, split_heads
from edge_razor.exporters.graph_edit import (
    DOMAIN,
    bypass,
    constant,
    dims,
    fixed,
    ints,
    made_by,
    make_node,
    only_consumer,
    remove_dead,
    replace,
)

_SWAP_LAST = [0, 1, 3, 2]
_FILL = -1e4  # what is added to, or put in the place of, a score that shall not count is at most this


def canonicalize_attention(model: ir.Model) -> ir.Model:
    """See module docstring. A constant mask becomes the operator's bias or ``causal``, a mask of keys its key_mask."""
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


def _merge_transposition(node: ir.Node) -> None:
    if node.domain or node.op_type != "Reshape" or len(dims(node.outputs[0])) != 4:
        return
    transpose = made_by(node.inputs[0], "Transpose")
    merge = made_by(transpose.inputs[0], "Reshape") if transpose is not None else None
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
        data = fixed(node.inputs[index])
        other = node.inputs[1 - index]
        if data is not None and data.size == 1 and other is not None and dims(other) == dims(value):
            number = float(data.reshape(-1)[0])
            inner, factor = _scaled(other)
            return inner, factor * (number if node.op_type == "Mul" else 1.0 / number)
    return value, 1.0


@dataclass
class Masks:
    """What decides which keys count: an additive constant [1, 1 or heads, T or 1, S], and a key mask [N, S]."""

    bias: np.ndarray | None = None
    key: ir.Value | None = None
    inverted: bool = False

    def add(self, bias: np.ndarray) -> None:
        self.bias = bias if self.bias is None else self.bias + bias

    def look(self, value: ir.Value | None, *, hides: bool) -> bool:
        """Takes a boolean [1 or N, 1 or heads, 1 or T, S] as `resolve_masks` spells it: a constant, a comparison of the
        key mask with ½, both joined by And, or Not of these. Returns False if it is none of them."""
        data = fixed(value)
        if data is not None:
            if data.dtype != np.bool_ or data.ndim < 2 or data.ndim == 4 and data.shape[0] != 1:
                return False
            self.add(np.where(~data if hides else data, 0, -np.inf).astype(np.float32))
            return True
        node = made_by(value, "Not", "And", "Greater", "Less")
        if node is None:
            return False
        if node.op_type == "Not":
            return self.look(node.inputs[0], hides=not hides)
        if node.op_type == "And":
            return not hides and all(self.look(operand, hides=False) for operand in node.inputs)
        view = made_by(node.inputs[0], "Reshape")
        key = view.inputs[0] if view is not None else None
        half = fixed(node.inputs[1])
        if key is None or len(dims(key)) != 2 or half is None or half.reshape(-1).tolist() != [0.5]:
            return False
        found = (key, (node.op_type == "Less") != hides)
        if self.key is not None and (self.key, self.inverted) != found:
            return False
        self.key, self.inverted = found
        return True


def _masked(scores: ir.Value, masks: Masks) -> ir.Value | None:
    """The scores below additions of masks and replacements by a large negative number; None if a mask is unknown."""
    shape = dims(scores)
    node = made_by(scores, "Add", "Where")
    if node is None:
        return scores
    if node.op_type == "Where":
        for index in (1, 2):
            fill, inner = fixed(node.inputs[3 - index]), node.inputs[index]
            if fill is None or inner is None or fill.size != 1 or float(fill.reshape(-1)[0]) > _FILL:
                continue
            return _masked(inner, masks) if masks.look(node.inputs[0], hides=index == 2) else None
        return scores
    for index in (0, 1):
        inner, added = node.inputs[1 - index], node.inputs[index]
        if inner is None or added is None or dims(inner) != shape:
            continue
        bias = fixed(added)
        if bias is not None and bias.dtype.kind == "f" and (bias.ndim < 4 or bias.shape[0] == 1):
            masks.add(bias.reshape((1,) * (4 - bias.ndim) + bias.shape))
            return _masked(inner, masks)
        where = made_by(added, "Where")
        static, fill = (fixed(where.inputs[1]), fixed(where.inputs[2])) if where is not None else (None, None)
        if where is None or static is None or fill is None or fill.size != 1 or float(fill.reshape(-1)[0]) > _FILL:
            continue
        if not masks.look(where.inputs[0], hides=False):
            return None
        masks.add(static)
        return _masked(inner, masks)
    return scores


def _bias_operand(graph: ir.Graph, bias: np.ndarray | None, shape: tuple[int, ...]) -> tuple[ir.Value | None, int]:
    """The operator's bias [T, S] or [heads, T, S], if one is left, and its attribute ``causal``."""
    if bias is None:
        return None, 0
    _, heads, t, s = shape
    full = np.broadcast_to(bias, (1, bias.shape[1], t, s))[0].astype(np.float32)
    full = np.where(full < _FILL, np.float32(-np.inf), full)
    causal = int(t == s and np.isneginf(full[:, ~np.tri(t, dtype=bool)]).all())
    if causal:
        full = np.where(np.tri(t, dtype=bool), full, np.float32(0))
    if not full.any():
        return None, causal
    full = full[0] if len(full) == 1 else np.broadcast_to(full, (heads, t, s))
    return constant(graph, np.ascontiguousarray(full)), causal


def _ungrouped(value: ir.Value) -> ir.Value:
    """[N, kv_heads, S, d] behind [N, heads, S, d], in which each head of it is repeated (grouped-query attention)."""
    shape = dims(value)
    merge = made_by(value, "Reshape")
    expand = made_by(merge.inputs[0], "Expand") if merge is not None else None
    view = made_by(expand.inputs[0], "Reshape", "Unsqueeze") if expand is not None else None
    source = view.inputs[0] if view is not None else None
    if expand is None or view is None or source is None or len(shape) != 4 or len(dims(source)) != 4:
        return value
    n, heads, s, d = dims(source)
    repeated = dims(expand.outputs[0])
    if dims(view.outputs[0]) == (n, heads, 1, s, d) and repeated == (n, heads, shape[1] // heads, s, d):
        return source
    return value


def _fuse(graph: ir.Graph, softmax: ir.Node) -> None:
    probabilities, scores = softmax.outputs[0], softmax.inputs[0]
    assert scores is not None
    if len(dims(scores)) != 4 or softmax.attributes.get_int("axis", -1) % 4 != 3:
        return
    product, ratio = only_consumer(probabilities), 0.0
    if product is not None and product.op_type == "Dropout" and not product.domain:
        given = dropout_ratio(product)
        if given is None:
            return
        ratio, probabilities = given, product.outputs[0]
        product = only_consumer(probabilities)
    if product is None or product.op_type != "MatMul" or product.domain or product.inputs[0] is not probabilities:
        return
    masks = Masks()
    inner, factor = _scaled(scores)
    below = _masked(inner, masks)
    if below is None or masks.bias is not None and factor != 1.0 and np.isfinite(masks.bias[masks.bias != 0]).any():
        return
    inner, more = _scaled(below)
    matmul = made_by(inner, "MatMul")
    if matmul is None:
        return
    left, right, v = matmul.inputs[0], matmul.inputs[1], product.inputs[1]
    assert left is not None and right is not None and v is not None
    q, q_factor = _scaled(left)
    kt, k_factor = _scaled(right)
    if dims(q)[:2] != dims(v)[:2] or dims(kt)[:2] != dims(v)[:2] or dims(q)[3] != dims(v)[3]:
        return
    n, heads, t, d = dims(q)
    swap = made_by(kt, "Transpose")
    swapped = swap is not None and ints(swap, "perm") == _SWAP_LAST
    k = swap.inputs[0] if swap is not None and swapped else kt
    assert k is not None
    few_k, few_v = _ungrouped(k), _ungrouped(v)
    if swapped and dims(few_k)[1] == dims(few_v)[1]:
        k, v = few_k, few_v
    key = masks.key
    nodes: list[ir.Node] = []
    if key is not None and masks.inverted:
        one = constant(graph, np.array(1, np.float32))
        nodes.append(make_node("Sub", [one, key], shapes=[dims(key)], like=softmax))
        key = nodes[0].outputs[0]
        key.name = f"{product.outputs[0].name}/keys"
    operands: list[ir.Value | None] = []
    for index, (value, perm) in enumerate(((q, HEADS), (k, HEADS if swapped else [0, 3, 1, 2]), (v, HEADS))):
        rows, made = join_heads(graph, value, perm, softmax, f"/{product.outputs[0].name}/{index}")
        nodes += made
        operands.append(rows)
    bias, causal = _bias_operand(graph, masks.bias, dims(scores))
    attributes = {
        "heads": heads,
        "kv_heads": dims(v)[1],
        "scale": factor * more * q_factor * k_factor,
        "causal": causal,
        "ratio": ratio,
        "stream": 0,  # `canonicalize_dropout` numbers it
    }
    shapes = [(n, t, heads * d)]
    fused = make_node("Attention", [*operands, key, bias], attributes, domain=DOMAIN, shapes=shapes, like=product)
    replace(product, [*nodes, fused, *split_heads(graph, fused, product.outputs[0], heads, product)])


def remove_nan_guards(model: ir.Model) -> ir.Model:
    """torch replaces NaN probabilities of rows without any key by 0, which Attention does by definition."""
    for node in list(model.graph):
        if node.domain or node.op_type != "Where":
            continue
        test = made_by(node.inputs[0], "IsNaN")
        value = node.inputs[2]
        if test is not None and value is not None and test.inputs[0] is value and made_by(value, "Softmax"):
            bypass(node, value)
    remove_dead(model.graph)
    return model
