"""Shape arithmetic away: every shape becomes known, and constants are folded.

The graph is folded twice, for two concrete batch sizes; both results have the same structure. A dimension that is equal
in both is a constant, one that is proportional to the batch is ``a*N``, anything else cannot be trained with a symbolic
batch. This needs no symbolic algebra, and whatever constant folding can evaluate (Shape, Gather, Concat, Range, …) is
covered.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnxscript.optimizer import fold_constants

from edge_razor.errors import UnsupportedOpError
from edge_razor.exporters.graph_edit import BATCH, constant, dims, is_parameter, remove_dead, to_shape

# Two primes that no layer width equals by accident; nothing is computed with them but shapes.
_BATCHES = (7919, 7927)
_ROUNDS = 6
_BROADCASTING = ("Add", "Sub", "Mul", "Div", "Where")


def resolve_shapes(model: ir.Model) -> ir.Model:
    """Returns a model in which every value's shape is known up to N and all that follows from shapes is an initializer.

    Expects inputs whose first dimension is the batch and whose others are integers. Parameters are never folded.

    Raises:
        UnsupportedOpError: shapes that depend on data, or on the batch in another way than proportionally.
    """
    first, second = (_fold(model, batch) for batch in _BATCHES)
    nodes = list(first.graph)
    others = list(second.graph)
    if [n.op_type for n in nodes] != [n.op_type for n in others]:
        raise UnsupportedOpError(
            "the model's operators depend on the batch size; export it for inputs with a fixed structure"
        )
    problems: list[tuple[str, str, str]] = []
    for node, other in zip(nodes, others, strict=True):
        _merge_node(first.graph, node, other, problems)
    for value in first.graph.inputs:
        shape = value.shape
        assert shape is not None
        value.shape = to_shape([BATCH, *(d for d in list(shape)[1:] if isinstance(d, int))])
    if problems:
        listing = "; ".join(f"{name} ({op}): {what}" for name, op, what in problems)
        raise UnsupportedOpError(
            f"{len(problems)} operators depend on the batch size or on data: {listing}", tuple(problems)
        )
    remove_dead(first.graph)
    return first


def _fold(model: ir.Model, batch: int) -> ir.Model:
    """A copy of ``model`` for ``batch`` samples with constants folded and shapes inferred."""
    model = model.clone()
    graph = model.graph
    for node in graph:
        for output in node.outputs:
            output.shape = None
    inputs = list(graph.inputs)
    for value in inputs:
        assert value.shape is not None
        value.shape = ir.Shape([batch, *list(value.shape)[1:]])
    # As graph inputs without data the parameters cannot be folded, and shape inference copies none of their bytes.
    parameters = [value for value in graph.initializers.values() if is_parameter(value)]
    data = {value.name: value.const_value for value in parameters}
    for value in parameters:
        del graph.initializers[value.name]  # type: ignore[arg-type]
        value.const_value = None
        graph.inputs.append(value)
    for _ in range(_ROUNDS):
        if not fold_constants(
            model, onnx_shape_inference=True, input_size_limit=2**24, output_size_limit=2**24
        ).modified:
            break
    _constants_to_initializers(graph)
    remove_dead(graph)
    for value in parameters:
        graph.inputs.remove(value)
        value.const_value = data[value.name]
        graph.register_initializer(value)
    return model


def _constants_to_initializers(graph: ir.Graph) -> None:
    for node in list(graph):
        value = node.outputs[0]
        if node.op_type != "Constant" or node.domain:
            continue
        tensor = ir.convenience.get_const_tensor(value)
        if tensor is None or tensor.dtype == ir.DataType.STRING:
            continue
        replacement = constant(graph, tensor.numpy(), str(value.name))
        ir.convenience.replace_all_uses_with(value, replacement)
        graph.remove(node, safe=True)


def _merge_node(graph: ir.Graph, node: ir.Node, other: ir.Node, problems: list[tuple[str, str, str]]) -> None:
    """Gives the outputs of ``node`` symbolic shapes, and rewrites constants that differ between the two batch sizes."""
    name = str(node.name)
    for value, twin in zip(node.outputs, other.outputs, strict=True):
        if not value.uses() and not value.is_graph_output():
            continue
        sizes = _merge_shape(value, twin)
        if sizes is None:
            problems.append((name, node.op_type, "shape unknown, or not proportional to the batch"))
            return
        value.shape = to_shape(sizes)
    for index, (operand, counterpart) in enumerate(zip(node.inputs, other.inputs, strict=True)):
        if operand is None or counterpart is None or operand.const_value is None or is_parameter(operand):
            continue
        mine, theirs = operand.const_value.numpy(), counterpart.const_value.numpy()  # type: ignore[union-attr]
        if mine.shape == theirs.shape and np.array_equal(mine, theirs, equal_nan=True):
            continue
        if node.op_type == "Reshape" and index == 1:
            sizes = [-1 if size and size % BATCH == 0 else size for size in dims(node.outputs[0])]
            node.replace_input_with(index, constant(graph, np.array(sizes, np.int64)))
        elif node.op_type == "Expand" and index == 1:
            # 1 is neutral; `canonicalize_reshapes` drops the node or refuses it.
            node.replace_input_with(index, constant(graph, np.where(mine == theirs, mine, 1).astype(np.int64)))
        elif node.op_type in _BROADCASTING and (row := _repeated_row(mine, theirs)) is not None:
            node.replace_input_with(index, constant(graph, row))
        else:
            problems.append((name, node.op_type, f"input {index} depends on the batch"))


def _repeated_row(mine: np.ndarray, theirs: np.ndarray) -> np.ndarray | None:
    """[1, …] of a constant that repeats it for each sample."""
    if mine.ndim == 0 or mine.ndim != theirs.ndim or (mine.shape[0], theirs.shape[0]) != _BATCHES:
        return None
    row = mine[:1]
    same = all(
        a.shape[1:] == row.shape[1:] and np.array_equal(a, np.broadcast_to(row, a.shape)) for a in (mine, theirs)
    )
    return np.ascontiguousarray(row) if same else None


def _merge_shape(value: ir.Value, twin: ir.Value) -> list[int] | None:
    """Dimensions with ``BATCH`` for N; None if unknown or not proportional."""
    if value.shape is None or twin.shape is None or len(value.shape) != len(twin.shape):
        return None
    sizes = []
    for a, b in zip(value.shape, twin.shape, strict=True):
        if not isinstance(a, int) or not isinstance(b, int):
            return None
        if a == b:
            sizes.append(a)
        elif a % _BATCHES[0] == 0 and b % _BATCHES[1] == 0 and a // _BATCHES[0] == b // _BATCHES[1]:
            sizes.append(a // _BATCHES[0] * BATCH)
        else:
            return None
    return sizes
