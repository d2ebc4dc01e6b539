"""The front half of the exporter: model as captured → forward part of the training graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import onnx_ir as ir

from edge_razor.errors import UsageError
from edge_razor.exporters.canonicalize import canonicalize
from edge_razor.exporters.canonicalize.masks import resolve_masks
from edge_razor.exporters.canonicalize.shapes import resolve_shapes
from edge_razor.exporters.capture import Captured
from edge_razor.exporters.channels_last import Order, channels_last
from edge_razor.exporters.fuse_activation import fuse_activation
from edge_razor.exporters.fuse_batchnorm import fuse_batchnorm
from edge_razor.exporters.graph_edit import DOMAIN, dims
from edge_razor.exporters.inference_graph import inference_graph
from edge_razor.exporters.tidy import tidy


class Forward(NamedTuple):
    """Attributes:
    model: forward operators of docs/training-graph.md, channels-last.
    inference: the same function in standard ONNX, the user's layout.
    input_shapes, output_shape: the user's layout, `graph_edit.dims` form.
    input_orders, output_order: runtime dimension i is the user's dimension order[i].
    """

    model: ir.Model
    inference: ir.Model
    input_shapes: list[tuple[int, ...]]
    output_shape: tuple[int, ...]
    input_orders: list[Order]
    output_order: Order


def build_forward(
    captured: Captured, *, classes_last: bool = False, adapt: Callable[[ir.Model], None] | None = None
) -> Forward:
    """Runs every pass of the front half. ``classes_last``: the user's output dimension 1 becomes the last at run time
    (cross-entropy over positions). ``adapt`` changes the graph before activations are fused.

    Raises:
        UsageError: the model has not exactly one float32 output with a batch.
        UnsupportedOpError: see `canonicalize`.
    """
    if len(captured.model.graph.outputs) != 1:
        raise UsageError(f"training needs a model with one output; this one has {len(captured.model.graph.outputs)}")
    resolved = resolve_shapes(resolve_masks(captured.model))
    inference = inference_graph(resolved)
    model = fuse_batchnorm(canonicalize(resolved))
    if adapt is not None:
        adapt(model)
    model = fuse_activation(model)
    input_shapes = [dims(value) for value in model.graph.inputs]
    output_shape = dims(model.graph.outputs[0])
    if len(output_shape) < 2:
        raise UsageError(
            f"the model's output has {len(output_shape)} dimensions; training needs a batch and at least one more"
        )
    model, input_orders, output_order = channels_last(model, classes_last=classes_last and len(output_shape) > 2)
    model = tidy(model)
    model.graph.opset_imports.clear()
    model.graph.opset_imports.update({"": 20, DOMAIN: 1})
    model.producer_name = "edge-razor"
    return Forward(model, inference, input_shapes, output_shape, input_orders, output_order)
