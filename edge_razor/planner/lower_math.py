"""Lowering of element-wise arithmetic, reductions, pooling, softmax, dropout and losses to kernel steps."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from .context import Lowering, Tensor, collapse, row_major
from .graph import Node

__all__ = ["RULES"]

_BINARY = {"Add": 0, "Sub": 1, "Mul": 2, "Div": 3}


def broadcast_strides(node: Node, shape: Sequence[int], dims: Sequence[int]) -> list[int]:
    """Element strides that walk `shape` as numpy broadcasts it to `dims`."""
    if len(shape) > len(dims):
        node.fail(f"shape {list(shape)} does not broadcast to {list(dims)}")
    padded = [1] * (len(dims) - len(shape)) + list(shape)
    strides = row_major(padded)
    for i, (have, want) in enumerate(zip(padded, dims, strict=True)):
        if have != want:
            if have != 1:
                node.fail(f"shape {list(shape)} does not broadcast to {list(dims)}")
            strides[i] = 0
    return strides


def _binary(lowering: Lowering, node: Node) -> None:
    a, b = lowering.tensor(node, 0), lowering.tensor(node, 1)
    if a.perm != b.perm or a.perm is not None and a.shape != b.shape:
        node.fail("operands are stored in different layouts")
    y = lowering.output(node, perm=a.perm)
    dims, (sa, sb) = collapse(
        y.shape, broadcast_strides(node, a.shape, y.shape), broadcast_strides(node, b.shape, y.shape)
    )
    ints = [_BINARY[node.op], len(dims), *dims, *sa, *sb]
    lowering.emit(node, "binary", ints, [], [a.buffer, b.buffer, y.buffer])


def _neg(lowering: Lowering, node: Node) -> None:
    x = lowering.tensor(node, 0)
    y = lowering.output(node, perm=x.perm)
    _same_size(node, x, y)
    lowering.emit(node, "neg", [x.elements], [], [x.buffer, y.buffer])


def _same_size(node: Node, x: Tensor, y: Tensor) -> None:
    if x.shape != y.shape:
        node.fail(f"shapes {list(x.shape)} and {list(y.shape)} differ")


def axis_in(node: Node, axis: int, rank: int) -> int:
    """`axis` counted from the front."""
    if not -rank <= axis < rank:
        node.fail(f"axis {axis} is outside rank {rank}")
    return axis % rank


def _reduce(lowering: Lowering, node: Node) -> None:
    x, y = lowering.plain(node, 0), lowering.output(node)
    axes = lowering.graph.int_input(node, 1)
    if axes is None:
        axes = node.integers("axes", [] if node.integer("noop_with_empty_axes", 0) else list(range(len(x.shape))))
    reduced = {axis_in(node, a, len(x.shape)) for a in axes}
    left = [d for i, d in enumerate(x.shape) if i not in reduced]
    if prod(left) != y.elements:
        node.fail(f"reducing {list(x.shape)} over {sorted(reduced)} does not give {list(y.shape)}")
    dims: list[int] = []
    flags: list[int] = []
    for i, extent in enumerate(x.shape):
        if extent == 1:
            continue
        flag = int(i in reduced)
        if flags and flags[-1] == flag:
            dims[-1] *= extent
        else:
            dims.append(extent)
            flags.append(flag)
    if 1 not in flags:  # nothing but extents of 1 is reduced: the same numbers in another shape
        lowering.tensors[node.output(0)] = Tensor(x.buffer, y.shape)
        return
    ints = [int(node.op == "ReduceMean"), len(dims), *dims, *flags]
    lowering.emit(node, "reduce", ints, [], [x.buffer, y.buffer])


def _reduce_grad(lowering: Lowering, node: Node) -> None:
    dy, dx = lowering.plain(node, 0), lowering.output(node)
    axes = {axis_in(node, a, len(dx.shape)) for a in node.integers("axes")}
    kept = [1 if i in axes else d for i, d in enumerate(dx.shape)]
    if prod(kept) != dy.elements:
        node.fail(f"dY {list(dy.shape)} is not {list(dx.shape)} reduced over {sorted(axes)}")
    dims, (strides,) = collapse(dx.shape, broadcast_strides(node, kept, dx.shape))
    ints = [len(dims), *dims, *strides]
    lowering.emit(node, "broadcast", ints, [node.number("scale", 1.0)], [dy.buffer, dx.buffer])


def _window(node: Node) -> tuple[list[int], list[int], list[int]]:
    kernel, pads = node.integers("kernel_shape"), node.integers("pads", [0, 0, 0, 0])
    strides = node.integers("strides", [1, 1])
    if len(kernel) != 2 or len(strides) != 2 or len(pads) != 4 or min(*kernel, *strides) < 1 or min(pads) < 0:
        node.fail(f"kernel_shape {kernel}, strides {strides} or pads {pads} are not valid")
    return kernel, strides, pads


def _pool_dims(node: Node, x: Sequence[int], y: Sequence[int]) -> list[int]:
    if len(x) != 4 or len(y) != 4 or x[0] != y[0] or x[3] != y[3]:
        node.fail(f"cannot pool {list(x)} to {list(y)}")
    return [*x, y[1], y[2]]


def _max_pool_ints(node: Node, x: Sequence[int], y: Sequence[int]) -> list[int]:
    kernel, strides, pads = _window(node)
    dilations = node.integers("dilations", [1, 1])
    if len(dilations) != 2 or min(dilations) < 1:
        node.fail(f"dilations {dilations} are not valid")
    return [*_pool_dims(node, x, y), *kernel, *strides, pads[0], pads[1], *dilations]


def _max_pool(lowering: Lowering, node: Node) -> None:
    x, y = lowering.plain(node, 0), lowering.output(node)
    index = lowering.keep(node, 1)
    lowering.emit(node, "max_pool", _max_pool_ints(node, x.shape, y.shape), [], [x.buffer, y.buffer, index])


def _max_pool_grad(lowering: Lowering, node: Node) -> None:
    dy, (index, _), dx = lowering.plain(node, 0), lowering.kept_input(node, 1), lowering.output(node)
    if index.bytes != dy.elements:
        node.fail(f"kept index of {index.bytes} elements does not fit dY {list(dy.shape)}")
    lowering.emit(node, "max_pool_grad", _max_pool_ints(node, dx.shape, dy.shape), [], [dy.buffer, index, dx.buffer])


def _average_pool_ints(node: Node, x: Sequence[int], y: Sequence[int]) -> list[int]:
    kernel, strides, pads = _window(node)
    return [*_pool_dims(node, x, y), *kernel, *strides, *pads, int(bool(node.integer("count_include_pad", 0)))]


def _average_pool(lowering: Lowering, node: Node) -> None:
    x, y = lowering.plain(node, 0), lowering.output(node)
    lowering.emit(node, "average_pool", _average_pool_ints(node, x.shape, y.shape), [], [x.buffer, y.buffer])


def _average_pool_grad(lowering: Lowering, node: Node) -> None:
    dy, dx = lowering.plain(node, 0), lowering.output(node)
    lowering.emit(node, "average_pool_grad", _average_pool_ints(node, dx.shape, dy.shape), [], [dy.buffer, dx.buffer])


def _softmax(lowering: Lowering, node: Node) -> None:
    """Softmax: X → Y. SoftmaxGrad: dY, Y → dX."""
    operands = [lowering.plain(node, i) for i in range(2 if node.op == "SoftmaxGrad" else 1)]
    out = lowering.output(node)
    for tensor in operands:
        _same_size(node, tensor, out)
    axis = axis_in(node, node.integer("axis", -1), len(out.shape))
    ints = [prod(out.shape[:axis]), out.shape[axis], prod(out.shape[axis + 1 :])]
    kernel = "softmax_grad" if node.op == "SoftmaxGrad" else "softmax"
    lowering.emit(node, kernel, ints, [], [*(t.buffer for t in operands), out.buffer])


def _dropout(lowering: Lowering, node: Node) -> None:
    """Dropout and DropoutGrad: the mask comes from the counter, so both are the same step. Identity in inference."""
    x = lowering.plain(node, 0)
    ratio = node.number("ratio", 0.5)
    if not 0 <= ratio < 1:
        node.fail(f"ratio {ratio} must be at least 0 and below 1")
    if ratio == 0 or not lowering.graph.gradients:
        lowering.alias(node, x)
        return
    y = lowering.output(node)
    _same_size(node, x, y)
    if x.elements % lowering.samples:
        node.fail(f"shape {list(x.shape)} has no batch dimension")
    ints = [x.elements // lowering.samples, lowering.samples, node.integer("stream", 0)]
    lowering.emit(node, "dropout", ints, [ratio], [x.buffer, y.buffer])


def _loss(lowering: Lowering, node: Node) -> None:
    prediction, target = lowering.plain(node, 0), lowering.plain(node, 1)
    gradient = None
    if node.output(1):
        gradient = lowering.output(node, 1)
        _same_size(node, prediction, gradient)
    operands = [prediction.buffer, target.buffer, gradient.buffer if gradient else None]
    per_sample = prediction.elements // lowering.samples
    if node.op == "CrossEntropyLoss":
        if target.shape != prediction.shape[:-1]:
            node.fail(f"logits {list(prediction.shape)} need a class index of shape {list(prediction.shape[:-1])}")
        classes = prediction.shape[-1]
        ints = [lowering.samples, per_sample // classes, classes, node.integer("ignore_index", -100)]
        lowering.emit(node, "cross_entropy", ints, [node.number("label_smoothing", 0.0)], operands)
    else:
        _same_size(node, prediction, target)
        kernel = "mse" if node.op == "MSELoss" else "bce_logits"
        lowering.emit(node, kernel, [lowering.samples, per_sample], [], operands)


RULES = {
    "Add": _binary,
    "Sub": _binary,
    "Mul": _binary,
    "Div": _binary,
    "Neg": _neg,
    "ReduceMean": _reduce,
    "ReduceSum": _reduce,
    "ReduceGrad": _reduce_grad,
    "MaxPool": _max_pool,
    "MaxPoolGrad": _max_pool_grad,
    "AveragePool": _average_pool,
    "AveragePoolGrad": _average_pool_grad,
    "Softmax": _softmax,
    "SoftmaxGrad": _softmax,
    "Dropout": _dropout,
    "DropoutGrad": _dropout,
    "CrossEntropyLoss": _loss,
    "MSELoss": _loss,
    "BCEWithLogitsLoss": _loss,
}
