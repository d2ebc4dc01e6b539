"""Lowering of LayerNorm, attention, embeddings, and of a value that is repeated for each sample, to kernel steps."""

from __future__ import annotations

from math import inf, isfinite, prod

from .context import LINEAR_PERM, Lowering, ParamForm, Tensor, collapse
from .graph import Node
from .lower_columns import column_ints, gradient_columns
from .lower_math import broadcast_strides
from .optimizer import row_set_bytes
from .program import Buffer
from .storage import Form

__all__ = ["RULES"]

_TABLE_FORMS = {ParamForm.BF16: 2, ParamForm.INT8: 3}  # of `embedding`; 0 and 1 are float32, as it is and transposed


def _used(lowering: Lowering, node: Node, index: int) -> Tensor | None:
    """Output `index`, if there is one and anything reads it."""
    name, graph = node.output(index), lowering.graph
    if not name or name not in graph.consumers and name not in graph.gradients.values():
        return None
    return lowering.output(node, index)


def _buffer(tensor: Tensor | None) -> Buffer | None:
    return None if tensor is None else tensor.buffer


def _rms(node: Node) -> int:
    rms = node.integer("rms", 0)
    if rms not in (0, 1):
        node.fail(f"rms must be 0 or 1, not {rms}")
    return rms


def _layer_norm(lowering: Lowering, node: Node) -> None:
    x, y = lowering.plain(node, 0), lowering.output(node)
    if x.shape != y.shape or not x.shape:
        node.fail(f"cannot normalize {list(x.shape)} to {list(y.shape)}")
    cols = x.shape[-1]
    xhat, rstd = _used(lowering, node, 1), _used(lowering, node, 2)
    if xhat is not None and xhat.shape != x.shape or rstd is not None and rstd.elements * cols != x.elements:
        node.fail("xhat has X's shape, and rstd one number a row")
    operands = [x.buffer, lowering.vector(node, 1, cols), lowering.vector(node, 2, cols), y.buffer]
    epsilon = node.number("epsilon", 1e-5)
    if not 0 <= epsilon < inf:
        node.fail(f"epsilon {epsilon} must be 0 or more and finite")
    ints = [x.elements // cols, cols, _rms(node)]
    lowering.emit(node, "layer_norm", ints, [epsilon], [*operands, _buffer(xhat), _buffer(rstd)])


def _kept_or_dense(lowering: Lowering, node: Node, index: int) -> tuple[Buffer, list[int]]:
    """Operand `index`, packed or as it is, and (form, samples, rows, cols, keep)."""
    if node.input(index) in lowering.kept:
        buffer, s = lowering.kept_input(node, index)
        return buffer, [int(s.form or 0), s.samples, s.rows, s.cols, s.keep]
    x = lowering.plain(node, index)
    cols = x.shape[-1] if x.shape else 1
    samples = lowering.samples if x.elements // cols % lowering.samples == 0 else 1
    return x.buffer, [int(Form.DENSE), samples, x.elements // (cols * samples), cols, 0]


def _layer_norm_grad(lowering: Lowering, node: Node) -> None:
    xhat, (form, samples, rows, cols, keep) = _kept_or_dense(lowering, node, 0)
    dy, rstd = lowering.plain(node, 1), lowering.plain(node, 2)
    if dy.elements != samples * rows * cols or rstd.elements != samples * rows or dy.shape[-1] != cols:
        node.fail(f"dY {list(dy.shape)} and rstd {list(rstd.shape)} do not fit [{samples}, {rows}, {cols}]")
    outputs = [_used(lowering, node, index) for index in range(3)]
    for tensor, elements in zip(outputs, (dy.elements, cols, cols), strict=True):
        if tensor is not None and tensor.elements != elements:
            node.fail(f"a gradient has shape {list(tensor.shape)}, expected {elements} elements")
    operands = [xhat, dy.buffer, rstd.buffer, lowering.vector(node, 3, cols), *map(_buffer, outputs), None, None]
    lowering.emit(node, "layer_norm_grad", [form, samples, rows, cols, keep, _rms(node)], [], operands)


def _attention_ints(
    lowering: Lowering, node: Node, q: tuple[int, int, int], k: tuple[int, int, int], v: tuple[int, int, int]
) -> tuple[list[int], list[float], Buffer | None, Buffer | None]:
    """Attributes, key_mask and bias, from Q, K and V as (samples, rows, columns)."""
    heads, kv_heads = node.integer("heads"), node.integer("kv_heads")
    if min(heads, kv_heads) < 1 or q[2] % heads or heads % kv_heads:
        node.fail(f"{heads} heads and {kv_heads} kv_heads do not fit {q[2]} columns")
    d = q[2] // heads
    if k != v or k[0] != q[0] or k[2] != kv_heads * d:
        node.fail(f"Q {list(q)}, K {list(k)} and V {list(v)} do not fit each other")
    n, t, s = q[0], q[1], k[1]
    scale, ratio = node.number("scale"), node.number("ratio", 0.0)
    if not isfinite(scale) or not 0 <= ratio < 1:
        node.fail(f"scale {scale} must be finite and ratio {ratio} at least 0 and below 1")
    mask, bias, bias_heads = None, None, 0
    if node.input(3):
        tensor = lowering.plain(node, 3)
        if tensor.elements != n * s:
            node.fail(f"key_mask has shape {list(tensor.shape)}, expected [{n}, {s}]")
        mask = tensor.buffer
    if node.input(4):
        tensor = lowering.plain(node, 4)
        bias_heads = tensor.elements // (t * s)
        if tensor.shape[-2:] != (t, s) or bias_heads not in (1, heads):
            node.fail(f"bias has shape {list(tensor.shape)}, expected [{t}, {s}] or [{heads}, {t}, {s}]")
        bias = tensor.buffer
    causal, stream = node.integer("causal", 0), node.integer("stream", 0)
    if causal not in (0, 1):
        node.fail(f"causal must be 0 or 1, not {causal}")
    ratio = ratio if lowering.graph.gradients else 0.0  # dropout is identity in inference
    return [n, t, s, heads, kv_heads, d, causal, bias_heads, stream], [scale, ratio], mask, bias


def _sizes(node: Node, tensor: Tensor) -> tuple[int, int, int]:
    if len(tensor.shape) != 3:
        node.fail(f"needs [samples, positions, columns], got {list(tensor.shape)}")
    n, rows, cols = tensor.shape
    return n, rows, cols


def _attention(lowering: Lowering, node: Node) -> None:
    q, k, v = (lowering.columns(node, i) for i in range(3))
    ints, floats, mask, bias = _attention_ints(lowering, node, *(_sizes(node, x) for x in (q, k, v)))
    y = lowering.output(node)
    if y.elements != q.elements:
        node.fail(f"Y {list(y.shape)} must have Q's shape {list(q.shape)}")
    kept = lowering.keep(node, 1)
    keep = lowering.storage[node.output(1)].keep if kept is not None else 0
    columns = column_ints([x.columns for x in (q, k, v)], [x.shape[2] for x in (q, k, v)])
    operands = [q.buffer, k.buffer, v.buffer, mask, bias, y.buffer, kept]
    lowering.emit(node, "attention", [*ints, keep, *columns], floats, operands)


def _attention_grad(lowering: Lowering, node: Node) -> None:
    operands = [_kept_or_dense(lowering, node, index) for index in range(3)]
    forms, keeps = ([layout[i] for _, layout in operands] for i in (0, 4))
    sizes = [(layout[1], layout[2], layout[3]) for _, layout in operands]
    ints, floats, mask, bias = _attention_ints(lowering, node, sizes[0], sizes[1], sizes[2])
    dy = lowering.plain(node, 5)
    together = gradient_columns(lowering, node)
    outputs = [together[index] if index in together else _used(lowering, node, index) for index in range(3)]
    for tensor, size in zip([dy, *outputs], [sizes[0], *sizes], strict=True):
        if tensor is not None and tensor.elements != prod(size):
            node.fail(f"a gradient has shape {list(tensor.shape)}, expected {list(size)}")
    kept, keep = None, 0
    if node.input(6) in lowering.kept:
        kept, storage = lowering.kept_input(node, 6)
        n, t, s, heads = ints[:4]
        if storage.form is not Form.ROWS or (storage.samples, storage.rows, storage.cols) != (n * heads, t, s):
            node.fail("its probabilities are kept for something else")
        keep, mask, bias, ints[7] = storage.keep, None, None, 0  # what is masked was never kept
    buffers = [*(buffer for buffer, _ in operands), mask, bias, dy.buffer, kept, *map(_buffer, outputs), *[None] * 3]
    columns = [lowering.kept_columns.get(node.input(index)) for index in range(3)]
    columns += [None if tensor is None else tensor.columns for tensor in outputs]
    more = column_ints(columns, [size[2] for size in (*sizes, *sizes)])
    lowering.emit(node, "attention_grad", [*ints, *forms, *keeps, keep, *more], floats, buffers)


def _expand_batch(lowering: Lowering, node: Node) -> None:
    x, y = lowering.plain(node, 0), lowering.output(node)
    dims, (strides,) = collapse(y.shape, broadcast_strides(node, x.shape, y.shape))
    lowering.emit(node, "broadcast", [len(dims), *dims, *strides], [1.0], [x.buffer, y.buffer])


def _ids(lowering: Lowering, node: Node) -> Buffer:
    """The indices of an embedding, which are an input of the model: the session checks their range."""
    if node.input(0) not in lowering.graph.inputs or node.input(0) == "target":
        node.fail(f"its indices {node.input(0)!r} are no input of the model")
    return lowering.tensor(node, 0).buffer


def _table(node: Node, shape: tuple[int, ...], perm: tuple[int, ...] | None) -> list[int]:
    """vocabulary, cols, transposed of a table [V, C]."""
    if len(shape) != 2 or perm not in (None, LINEAR_PERM):
        node.fail(f"a table of shape {list(shape)}, stored as {perm}; [vocabulary, columns] is needed")
    return [*shape, int(perm is not None)]


def _embedding(lowering: Lowering, node: Node) -> None:
    ids, w, y = lowering.tensor(node, 0), lowering.tensor(node, 1), lowering.output(node)
    table = _table(node, w.shape, w.perm)
    if w.form in _TABLE_FORMS:
        table[2] = _TABLE_FORMS[w.form]
    if y.elements != ids.elements * table[1]:
        node.fail(f"rows of {list(w.shape)} by indices {list(ids.shape)} do not give {list(y.shape)}")
    lowering.emit(node, "embedding", [ids.elements, *table], [], [_ids(lowering, node), w.buffer, y.buffer])


def _embedding_grad(lowering: Lowering, node: Node) -> None:
    ids, dy = lowering.tensor(node, 0), lowering.plain(node, 1)
    shape = tuple(node.integers("weight_shape"))
    if node.output(0) in lowering.row_gradients:
        _embedding_grad_rows(lowering, node, ids, dy, shape)
        return
    g = lowering.output(node, perm=_stored_as(lowering, node))
    table = _table(node, g.shape, g.perm)
    if shape != g.shape or dy.elements != ids.elements * table[1]:
        node.fail(f"dY {list(dy.shape)} of indices {list(ids.shape)} does not fit {list(g.shape)}")
    ints = [ids.elements, *table, node.integer("padding_idx", -1)]
    lowering.emit(node, "embedding_grad", ints, [], [_ids(lowering, node), dy.buffer, g.buffer])


def _embedding_grad_rows(lowering: Lowering, node: Node, ids: Tensor, dy: Tensor, shape: tuple[int, ...]) -> None:
    """The gradient as a row set: no buffer as large as the table."""
    value = node.output(0)
    stated = lowering.graph.shape(value, node).at(lowering.samples)
    vocabulary, cols, _ = _table(node, stated, None)
    if shape != stated or dy.elements != ids.elements * cols:
        node.fail(f"dY {list(dy.shape)} of indices {list(ids.shape)} does not fit {list(stated)}")
    capacity = min(ids.elements, vocabulary)
    rows = Buffer(value, row_set_bytes(vocabulary, cols, capacity))
    lowering.tensors[value] = Tensor(rows, stated, None, capacity)
    ints = [ids.elements, vocabulary, cols, capacity, node.integer("padding_idx", -1)]
    lowering.emit(node, "embedding_grad_rows", ints, [], [_ids(lowering, node), dy.buffer, rows])


def _stored_as(lowering: Lowering, node: Node) -> tuple[int, ...] | None:
    """The order in which the parameter is stored whose gradient, or part of it, this node makes."""
    graph, value = lowering.graph, node.output(0)
    parameters = {gradient: parameter for parameter, gradient in graph.gradients.items()}
    while value not in parameters:
        users = graph.consumers.get(value, [])
        if len(users) != 1 or users[0].op != "Add":
            return None
        value = users[0].output(0)
    return lowering.tensors[parameters[value]].perm


def _rotary(lowering: Lowering, node: Node) -> None:
    x, y = lowering.plain(node, 0), lowering.output(node)
    heads, inverse = node.integer("heads"), node.integer("inverse", 0)
    if len(x.shape) != 3 or x.shape != y.shape or heads < 1 or x.shape[2] % (2 * heads) or inverse not in (0, 1):
        node.fail(f"{heads} heads of even width do not fit {list(x.shape)}")
    n, t, width = x.shape
    tables = [lowering.plain(node, index) for index in (1, 2)]
    if any(table.shape != (t, width // heads) for table in tables):
        node.fail(f"cos and sin must have shape [{t}, {width // heads}]")
    operands = [x.buffer, *(table.buffer for table in tables), y.buffer]
    lowering.emit(node, "rotary", [n, t, heads, width // heads, inverse], [], operands)


def _batch_matmul(lowering: Lowering, node: Node) -> None:
    a, b, y = lowering.plain(node, 0), lowering.plain(node, 1), lowering.output(node)
    trans = [node.integer(name, 0) for name in ("transA", "transB")]
    if min(len(a.shape), len(b.shape), len(y.shape)) < 2 or any(t not in (0, 1) for t in trans):
        node.fail(f"cannot multiply {list(a.shape)} by {list(b.shape)}")
    m, k = a.shape[-2:] if not trans[0] else a.shape[:-3:-1]
    inner, p = b.shape[-2:] if not trans[1] else b.shape[:-3:-1]
    lead = a.shape[:-2]
    if inner != k or b.shape[:-2] != lead or y.shape != (*lead, m, p):
        node.fail(f"{list(a.shape)} by {list(b.shape)} does not give {list(y.shape)}")
    lowering.emit(node, "batch_matmul", [prod(lead), m, k, p, *trans], [], [a.buffer, b.buffer, y.buffer])


def _position(lowering: Lowering, node: Node) -> tuple[Buffer, list[int]]:
    """The source of SelectPosition, an input of the model, and (kind, number, integer)."""
    name, kind = node.input(1), node.text("kind", "")
    if name not in lowering.graph.inputs or name == "target" or kind not in ("last", "count"):
        node.fail(f"its source {name!r} must be an input of the model, and its kind last or count, not {kind!r}")
    indices = any(reader.op in ("Embedding", "EmbeddingGrad") for reader in lowering.graph.consumers[name])
    return lowering.tensor(node, 1).buffer, [int(kind == "count"), node.integer("number"), int(indices)]


def _select_position(lowering: Lowering, node: Node) -> None:
    x, y = lowering.plain(node, 0), lowering.output(node)
    n, positions, cols = _sizes(node, x)
    source, choice = _position(lowering, node)
    if y.elements != n * cols or lowering.tensor(node, 1).elements != n * positions:
        node.fail(f"cannot select one of {positions} positions from {list(x.shape)} as {list(y.shape)}")
    lowering.emit(node, "select_position", [n, positions, cols, *choice], [], [x.buffer, source, y.buffer])


def _select_position_grad(lowering: Lowering, node: Node) -> None:
    dy, dx = lowering.plain(node, 0), lowering.output(node)
    n, positions, cols = _sizes(node, dx)
    source, choice = _position(lowering, node)
    if dy.elements != n * cols or lowering.tensor(node, 1).elements != n * positions:
        node.fail(f"dY {list(dy.shape)} is no position of {list(dx.shape)}")
    lowering.emit(node, "select_position_grad", [n, positions, cols, *choice], [], [dy.buffer, source, dx.buffer])


RULES = {
    "SelectPosition": _select_position,
    "SelectPositionGrad": _select_position_grad,
    "BatchMatMul": _batch_matmul,
    "Embedding": _embedding,
    "EmbeddingGrad": _embedding_grad,
    "Rotary": _rotary,
    "LayerNorm": _layer_norm,
    "LayerNormGrad": _layer_norm_grad,
    "Attention": _attention,
    "AttentionGrad": _attention_grad,
    "ExpandBatch": _expand_batch,
}
