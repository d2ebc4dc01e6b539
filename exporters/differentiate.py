"""Reverse-mode differentiation: forward graph → training graph (docs/training-graph.md), with dense operands.

Only what leads from a trainable parameter to the loss gets backward nodes. The razor pass (`exporters.razor`) then
decides which operands are kept packed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import onnx_ir as ir

from edge_razor.errors import UnsupportedOpError, UsageError
from edge_razor.exporters.gradients import RULES, Tape
from edge_razor.exporters.graph_edit import DOMAIN, AttributeValue, dims, shape_text, to_shape

__all__ = ["LOSSES", "differentiate"]

LOSSES = {"cross_entropy": "CrossEntropyLoss", "mse": "MSELoss", "bce_with_logits": "BCEWithLogitsLoss"}
"""Loss name in the API and in bundle.json → operator."""


def differentiate(model: ir.Model, loss: Mapping[str, Any], trainable: Sequence[str]) -> ir.Model:
    """Adds target, loss and backward part to a forward graph, in place.

    Args:
        model: one output, the prediction [N, …]; node shapes set; parameters are initializers.
        loss: ``{"name": "cross_entropy" | "mse" | "bce_with_logits", "label_smoothing": 0.0}``.
        trainable: parameter names; each gets an output ``grad/<name>`` in the parameter's shape.

    Returns:
        ``model``, with input ``target``, output ``loss`` (float32 scalar) and the gradients behind the prediction.

    Raises:
        UsageError: an unknown loss or parameter, or one that does not influence the prediction.
        UnsupportedOpError: operators without a gradient rule, all of them at once.
    """
    graph = model.graph
    if len(graph.outputs) != 1:
        raise UsageError(f"training needs a model with one output; this one has {len(graph.outputs)}")
    parameters = _parameters(graph, trainable)
    _name_nodes(graph)
    forward = list(graph)
    tape = Tape(graph)
    _mark_needed(tape, forward, parameters.values())
    _refuse_unknown(tape, forward)
    _add_loss(tape, graph, loss)
    for node in reversed(forward):
        _differentiate_node(tape, node)
    gradients = _gradient_outputs(tape, parameters)
    graph.extend(tape.nodes)
    graph.outputs.extend(gradients)
    graph.opset_imports[DOMAIN] = 1
    return model


def _parameters(graph: ir.Graph, trainable: Sequence[str]) -> dict[str, ir.Value]:
    unknown = [name for name in trainable if name not in graph.initializers]
    if unknown:
        raise UsageError(f"no such parameter in the graph: {', '.join(unknown)}")
    if not trainable:
        raise UsageError("nothing to train: the set of trainable parameters is empty")
    return {name: graph.initializers[name] for name in trainable}


def _name_nodes(graph: ir.Graph) -> None:
    """Gives every forward node a name of its own, and its phase."""
    taken: set[str] = set()
    for node in graph:
        stem = node.name or node.outputs[0].name or node.op_type
        name, count = stem, 1
        while name in taken:
            count += 1
            name = f"{stem}/{count}"
        node.name = name
        taken.add(name)
        node.metadata_props["phase"] = "forward"
        node.metadata_props.setdefault("layer", "")


def _mark_needed(tape: Tape, forward: Iterable[ir.Node], parameters: Iterable[ir.Value]) -> None:
    """A value needs a gradient if a trainable parameter influences it."""
    tape.require(parameters)
    for node in forward:
        if node.op_type == "BatchNormFold":
            # Of its two outputs only shift depends on beta and bias.
            scale, shift = node.outputs
            if tape.needs(node.inputs[0]):
                tape.require([scale])
            if any(tape.needs(v) for v in node.inputs):
                tape.require([shift])
        elif any(tape.needs(v) for v in node.inputs):
            tape.require(node.outputs)


def _refuse_unknown(tape: Tape, forward: Iterable[ir.Node]) -> None:
    unknown = tuple(
        (node.name or "", node.op_type, ", ".join(shape_text(v) for v in node.inputs))
        for node in forward
        if (node.domain, node.op_type) not in RULES and any(tape.needs(v) for v in node.outputs)
    )
    if unknown:
        listed = "; ".join(f"{op} {name!r} ({shapes})" for name, op, shapes in unknown)
        raise UnsupportedOpError(f"differentiate: no gradient is known for {listed}", unknown)


def _add_loss(tape: Tape, graph: ir.Graph, loss: Mapping[str, Any]) -> None:
    """Appends the loss node to the graph and starts the backward pass at the prediction."""
    name = str(loss.get("name"))
    if name not in LOSSES:
        raise UsageError(f"unknown loss {name!r}; known: {', '.join(LOSSES)}")
    prediction = graph.outputs[0]
    if not tape.needs(prediction):
        raise UsageError("no trainable parameter influences the model's output")
    shape = dims(prediction)
    classes = name == "cross_entropy"
    if classes and len(shape) < 2:
        raise UsageError(f"cross_entropy needs an output of [N, …, classes]; this one is {shape_text(prediction)}")
    for reserved in ("target", "loss"):
        if tape.unique(reserved) != reserved:
            raise UsageError(f"the model has a value called {reserved!r}, a name that training needs; rename it")
    target = ir.Value(
        name="target",
        type=ir.TensorType(ir.DataType.INT64 if classes else ir.DataType.FLOAT),
        shape=to_shape(shape[:-1] if classes else shape),
    )
    graph.inputs.append(target)
    attributes: dict[str, AttributeValue] = {}
    if classes:
        attributes["label_smoothing"] = float(loss.get("label_smoothing", 0.0))
    outputs = [
        ir.Value(name="loss", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([])),
        ir.Value(
            name=tape.unique(f"d/{prediction.name}"), type=ir.TensorType(ir.DataType.FLOAT), shape=to_shape(shape)
        ),
    ]
    node = ir.node(LOSSES[name], [prediction, target], attributes, domain=DOMAIN, outputs=outputs)
    node.name = tape.unique("loss/node")
    node.metadata_props.update({"phase": "loss", "layer": "loss"})
    graph.append(node)
    graph.outputs.append(outputs[0])
    tape.add_gradient(prediction, outputs[1])


def _differentiate_node(tape: Tape, node: ir.Node) -> None:
    dys = [tape.gradient(y) if tape.needs(y) else None for y in node.outputs]
    if all(dy is None for dy in dys):
        return
    tape.at(node)
    for value, gradient in zip(node.inputs, RULES[node.domain, node.op_type](tape, node, dys), strict=False):
        if value is not None and gradient is not None and tape.needs(value):
            tape.add_gradient(value, gradient)


def _gradient_outputs(tape: Tape, parameters: Mapping[str, ir.Value]) -> list[ir.Value]:
    """The parameters' gradients under the names ``grad/<parameter>``."""
    dead = [name for name, value in parameters.items() if tape.gradient(value) is None]
    if dead:
        raise UsageError(f"these trainable parameters do not influence the model's output: {', '.join(dead)}")
    outputs: list[ir.Value] = []
    for name, value in parameters.items():
        gradient = tape.gradient(value)
        assert gradient is not None
        if gradient in outputs:
            # One value is the gradient of two parameters, but an output has one name.
            shape = dims(value)
            gradient = tape.standard("Reshape", [gradient, tape.ints(shape)], shape, name=f"d/{name}")
        gradient.name = f"grad/{name}"
        outputs.append(gradient)
    return outputs
