"""A training graph as a file: no weights inside, and every promise of docs/training-graph.md checked."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, TensorProto

from edge_razor.errors import BundleError
from edge_razor.exporters.training_graph import WEIGHTS_FILE, to_proto, validate
from tests.exporters.graphs import Builder, train
from tests.reference.graph_backward import run_training_graph


def example() -> tuple[Builder, ModelProto]:
    b = Builder()
    x = b.conv("a", b.input(4, 4, 2), 3, bn=True, activation="relu")
    x = b.op("MaxPool", b.conv("b", x, 3), kernel_shape=[2, 2], strides=[2, 2])
    model, _ = train(b, b.op("ReduceMean", x, b.ints(1, 2), keepdims=0), loss="cross_entropy")
    return b, to_proto(model)


def test_weights_are_references_and_constants_are_inline() -> None:
    b, proto = example()
    for tensor in proto.graph.initializer:
        if tensor.name in b.params:
            assert tensor.data_location == TensorProto.EXTERNAL
            assert {e.key: e.value for e in tensor.external_data} == {"location": WEIGHTS_FILE}
            assert not tensor.raw_data and not tensor.float_data
            assert tuple(tensor.dims) == b.params[tensor.name].shape
        else:
            assert tensor.data_type == TensorProto.INT64 and tensor.data_location == TensorProto.DEFAULT
    assert {t.name for t in proto.graph.initializer if t.data_type == TensorProto.FLOAT} == set(b.params)


def test_the_model_keeps_its_weights() -> None:
    b = Builder()
    model, _ = train(b, b.linear("fc", b.input(4), 3))
    to_proto(model)
    weight = model.graph.initializers["fc.weight"].const_value
    np.testing.assert_allclose(weight.numpy(), b.params["fc.weight"], rtol=1e-6)


def test_a_file_runs_like_the_graph_that_it_came_from() -> None:
    b = Builder()
    y = b.conv("b", b.conv("a", b.input(4, 4, 2), 3, bn=True, activation="silu"), 2)
    target = b.target(y, "mse")
    model, _ = train(b, y)
    expected = run_training_graph(model, b.inputs, target, b.params)
    proto = onnx.load_from_string(to_proto(model).SerializeToString())
    actual = run_training_graph(proto, b.inputs, target, b.params)
    # BatchNorm's epsilon is a float32 in the file.
    torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-7, atol=0)
    for name, gradient in expected.gradients.items():
        torch.testing.assert_close(actual.gradients[name], gradient, rtol=1e-6, atol=1e-9)


def node(proto: ModelProto, op_type: str) -> onnx.NodeProto:
    return next(n for n in proto.graph.node if n.op_type == op_type)


def info(proto: ModelProto, name: str) -> onnx.ValueInfoProto:
    return next(v for v in (*proto.graph.value_info, *proto.graph.output) if v.name == name)


def remove_info(proto: ModelProto) -> None:
    proto.graph.value_info.remove(info(proto, node(proto, "ConvGradInput").output[0]))


def symbolic_width(proto: ModelProto) -> None:
    info(proto, node(proto, "Conv").output[0]).type.tensor_type.shape.dim[2].dim_param = "W"


def odd_batch(proto: ModelProto) -> None:
    info(proto, node(proto, "Conv").output[0]).type.tensor_type.shape.dim[0].dim_param = "N+1"


def set_phase(n: onnx.NodeProto, phase: str) -> None:
    next(e for e in n.metadata_props if e.key == "phase").value = phase


def forward_reads_kept(proto: ModelProto) -> None:
    for n in proto.graph.node:
        set_phase(n, "forward")


def inline_weight(proto: ModelProto) -> None:
    tensor = next(t for t in proto.graph.initializer if t.name == "a.weight")
    shape = tuple(tensor.dims)
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.zeros(shape, np.float32), "a.weight"))


def wrong_gradient_shape(proto: ModelProto) -> None:
    info(proto, "grad/a.weight").type.tensor_type.shape.dim[0].dim_value = 77


def drop_gradients(proto: ModelProto) -> None:
    outputs = list(proto.graph.output)
    del proto.graph.output[:]
    for v in outputs:
        (proto.graph.value_info if v.name.startswith("grad/") else proto.graph.output).append(v)


def drop_metadata(proto: ModelProto) -> None:
    del node(proto, "Conv").metadata_props[:]


def phase_out_of_order(proto: ModelProto) -> None:
    set_phase(proto.graph.node[0], "backward")


def same_name(proto: ModelProto) -> None:
    proto.graph.node[1].name = proto.graph.node[0].name


def foreign_operator(proto: ModelProto) -> None:
    node(proto, "ChannelSum").domain = "com.example"


def unknown_operator(proto: ModelProto) -> None:
    node(proto, "ChannelSum").op_type = "ColumnSum"


def standard_convolution(proto: ModelProto) -> None:
    node(proto, "Conv").domain = ""


def missing_attribute(proto: ModelProto) -> None:
    del node(proto, "ConvGradWeight").attribute[:]


def reversed_nodes(proto: ModelProto) -> None:
    nodes = list(reversed(proto.graph.node))
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)


def newer_domain(proto: ModelProto) -> None:
    for entry in proto.opset_import:
        entry.version += 1


def unread_kept(proto: ModelProto) -> None:
    grad = node(proto, "MaxPoolGrad")
    pool = node(proto, "MaxPool")
    pool.output[1] = "kept/unread"
    kept = info(proto, grad.input[1])
    kept.name = "kept/unread"
    grad.input[1] = node(proto, "Pack").output[0]


def misnamed_kept(proto: ModelProto) -> None:
    old = node(proto, "Pack").output[0]
    info(proto, old).name = "packed"
    for n in proto.graph.node:
        for names in (n.input, n.output):
            for index, name in enumerate(names):
                if name == old:
                    names[index] = "packed"


def static_input(proto: ModelProto) -> None:
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 8


def vector_loss(proto: ModelProto) -> None:
    info(proto, "loss").type.tensor_type.shape.dim.add().dim_value = 2


def half_precision(proto: ModelProto) -> None:
    next(t for t in proto.graph.initializer if t.name == "a.weight").data_type = TensorProto.FLOAT16


def target_renamed(proto: ModelProto) -> None:
    proto.graph.input[1].name = "labels"
    node(proto, "CrossEntropyLoss").input[1] = "labels"


DAMAGES: list[tuple[Callable[[ModelProto], None], str]] = [
    (remove_info, "has no shape"),
    (symbolic_width, "Conv_1.*not float32 of shape"),
    (odd_batch, "Conv_1.*not float32 of shape"),
    (forward_reads_kept, "reads kept value .* no backward node"),
    (inline_weight, "a.weight.*weights.safetensors"),
    (wrong_gradient_shape, "grad/a.weight.*77"),
    (drop_gradients, "nothing trains"),
    (drop_metadata, "Conv_1.*metadata"),
    (phase_out_of_order, "forward node after a backward node"),
    (same_name, "used twice"),
    (foreign_operator, "com.example"),
    (unknown_operator, "no operator ai.edge_razor::ColumnSum"),
    (standard_convolution, "no operator onnx::Conv"),
    (missing_attribute, "input_shape"),
    (reversed_nodes, "topological"),
    (newer_domain, "opsets"),
    (unread_kept, "kept/unread.*no backward node reads it"),
    (misnamed_kept, "'packed'"),
    (static_input, "'input'.*no batch dimension"),
    (vector_loss, "no scalar"),
    (half_precision, "FLOAT16"),
    (target_renamed, "'target' is missing"),
]


def test_the_example_is_valid() -> None:
    validate(example()[1])


@pytest.mark.parametrize("damage,message", DAMAGES, ids=[d.__name__ for d, _ in DAMAGES])
def test_damage_is_named(damage: Callable[[ModelProto], None], message: str) -> None:
    _, proto = example()
    damage(proto)
    with pytest.raises(BundleError, match=message):
        validate(proto)


def test_onnx_itself_accepts_the_graph_with_its_weights_in_place() -> None:
    b, proto = example()
    for tensor in proto.graph.initializer:
        if tensor.name in b.params:
            tensor.CopyFrom(onnx.numpy_helper.from_array(b.params[tensor.name].astype(np.float32), tensor.name))
    onnx.checker.check_model(proto, full_check=True)
