"""Moves the graph to channels-last (NHWC).

Each value is *placed*: its runtime value plus the order in which that one stores the user's dimensions. A Transpose of
the user's graph only changes the order and costs nothing, so ConvNeXt's permutes and the shuffle's NCHW arithmetic
disappear; a real Transpose is written only where an operator needs an order that its operand has not. The batch is
always the first runtime dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from edge_razor.errors import UnsupportedOpError
from edge_razor.exporters.canonicalize.reshapes import reshape_node
from edge_razor.exporters.graph_edit import BATCH, constant, dims, ints, is_constant, make_node, remove_dead, to_shape

Order = tuple[int, ...]


@dataclass(frozen=True)
class Placed:
    """A value of the user's graph at run time: dimension i of ``value`` is the user's dimension ``order[i]``."""

    value: ir.Value
    order: Order


class ChannelsLast(NamedTuple):
    """Result of `channels_last`; orders are as in `Placed`, one per graph input."""

    model: ir.Model
    input_orders: list[Order]
    output_order: Order


def channel_order(rank: int) -> Order:
    """The order with the user's dimension 1 (channels) last: (0, 2, 3, 1) for rank 4."""
    return (0, *range(2, rank), 1) if rank > 1 else (0,)


def squeezed(order: Order, sizes: tuple[int, ...]) -> Order:
    """``order`` without dimensions of size 1: two orders that agree in it describe the same bytes."""
    return tuple(d for d in order if sizes[d] != 1)


class Layout:
    """Placed values of the graph under rewriting, and the operations that rules (`layout_rules`) need."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self._placed: dict[ir.Value, Placed] = {}
        self._arranged: dict[tuple[ir.Value, Order, tuple[int, ...]], ir.Value] = {}
        self._node: ir.Node | None = None

    def enter(self, node: ir.Node) -> None:
        """From now on new nodes go before ``node`` and belong to its layer."""
        self._node = node

    def place(self, user: ir.Value, value: ir.Value, order: Order) -> None:
        self._placed[user] = Placed(value, order)

    def placed(self, user: ir.Value) -> Placed:
        """Where ``user`` is; initializers are where they were."""
        return self._placed.get(user) or Placed(user, tuple(range(len(dims(user)))))

    def fail(self, why: str) -> UnsupportedOpError:
        node = self._node
        assert node is not None
        shapes = ", ".join(str(v.shape) for v in node.inputs if v is not None)
        return UnsupportedOpError(
            f"{node.name}: {node.op_type}({shapes}): {why}", ((str(node.name), node.op_type, shapes),)
        )

    def insert(self, node: ir.Node) -> list[ir.Value]:
        """Puts a new node before the current one; returns its outputs."""
        assert self._node is not None
        self.graph.insert_before(self._node, node)
        return list(node.outputs)

    def emit(
        self,
        inputs: list[ir.Value | None],
        order: Order,
        attributes: dict[str, ir.Attr] | None = None,
    ) -> None:
        """Repeats the current node on runtime operands; its outputs are placed in ``order``."""
        old = self._node
        assert old is not None
        sizes = [dims(output) for output in old.outputs]
        shapes = [[size[d] for d in order] for size in sizes]
        new = make_node(old.op_type, inputs, domain=old.domain, shapes=shapes, like=old)
        new.attributes.update({**old.attributes, **(attributes or {})})
        new.name = old.name
        for output, fresh in zip(old.outputs, self.insert(new), strict=True):
            fresh.name = output.name
            self.place(output, fresh, order)

    def in_order(self, user: ir.Value, order: Order) -> ir.Value:
        """Runtime value of ``user`` in ``order``: as it is, viewed, or transposed."""
        placed = self.placed(user)
        if placed.order == order:
            return placed.value
        if placed.order[0] != order[0] and dims(user)[placed.order[0]] % BATCH == 0:
            raise self.fail("needs the batch in another place than first")
        return self._arrange(placed, dims(user), order, tuple(dims(user)[d] for d in order))

    def broadcast_operand(self, user: ir.Value, order: Order) -> ir.Value:
        """Runtime value of an operand that is broadcast against one of rank ``len(order)`` placed in ``order``; what
        has no batch loses its leading dimensions of size 1, so that a factor of one number a channel is a vector."""
        sizes = dims(user)
        missing = len(order) - len(sizes)
        own = tuple(d - missing for d in order if d >= missing)
        if any(size % BATCH == 0 and size for size in sizes):
            if missing:
                raise self.fail("broadcasts tensors of different ranks over the batch")
            return self.in_order(user, own)
        if int(np.prod(sizes)) == 1 and is_constant(user):
            return user
        target = [sizes[d - missing] if d >= missing else 1 for d in order]
        while target and target[0] == 1:
            target.pop(0)
        return self._arrange(self.placed(user), sizes, own, tuple(target))

    def _arrange(self, placed: Placed, sizes: tuple[int, ...], order: Order, target: tuple[int, ...]) -> ir.Value:
        """``placed`` transposed to ``order``, then viewed as ``target``."""
        key = (placed.value, order, target)
        if key in self._arranged:
            return self._arranged[key]
        value = placed.value
        perm = [placed.order.index(d) for d in order]
        moves = squeezed(placed.order, sizes) != squeezed(order, sizes)
        if is_constant(value):
            if moves or dims(value) != target:
                data = value.const_value.numpy().transpose(perm).reshape(target)  # type: ignore[union-attr]
                value = constant(self.graph, np.ascontiguousarray(data))
        else:
            if moves:
                shape = [sizes[d] for d in order]
                (value,) = self.insert(
                    make_node(
                        "Transpose",
                        [value],
                        {"perm": perm},
                        shapes=[shape],
                        like=self._node,
                        names=[f"{value.name}/transposed"],
                    )
                )
            if dims(value) != target:
                node = reshape_node(self.graph, value, target, self._node)
                node.outputs[0].name = f"{value.name}/view"
                (value,) = self.insert(node)
        self._arranged[key] = value
        return value


def channels_last(model: ir.Model, *, classes_last: bool = False) -> ChannelsLast:
    """Rewrites ``model`` in place.

    Args:
        classes_last: the output's dimension 1 (the classes of torch's cross-entropy) must come last at run time.

    Raises:
        UnsupportedOpError: an operator moves the batch away from the first dimension.
    """
    from edge_razor.exporters.layout_rules import RULES

    graph = model.graph
    layout = Layout(graph)
    input_orders, new_inputs = [], []
    for user in graph.inputs:
        order = _input_order(user)
        value = ir.Value(name=user.name, type=user.type, shape=to_shape([dims(user)[d] for d in order]))
        layout.place(user, value, order)
        input_orders.append(order)
        new_inputs.append(value)
    old_nodes = list(graph)
    for node in old_nodes:
        layout.enter(node)
        RULES[node.domain, node.op_type](layout, node)
    (output,) = graph.outputs
    name = output.name
    order = channel_order(len(dims(output))) if classes_last else layout.placed(output).order
    result = layout.in_order(output, order)
    graph.outputs[0] = result
    graph.remove(old_nodes, safe=True)
    graph.inputs.clear()
    graph.inputs.extend(new_inputs)
    if result not in new_inputs and result.producer() is not None:
        result.name = name
    remove_dead(graph)
    return ChannelsLast(model, input_orders, order)


def _input_order(user: ir.Value) -> Order:
    """Channels-last for images. A graph that begins by transposing its NHWC input to NCHW has it the right way
    already."""
    rank = len(dims(user))
    if rank != 4:
        return tuple(range(rank))
    consumers = [use.node for use in user.uses()]
    perms = [tuple(ints(n, "perm")) for n in consumers if n.op_type == "Transpose"]
    if consumers and len(perms) == len(consumers) and len(set(perms)) == 1:
        order = tuple(perms[0][d] for d in channel_order(4))
        if order[0] == 0:
            return order
    return channel_order(rank)
