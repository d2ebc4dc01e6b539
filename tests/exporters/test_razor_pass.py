"""What the razor pass packs, where it puts the packs, and that gradients with packed values are the definition's."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch

from edge_razor.exporters.training_graph import to_proto, validate
from tests.exporters.graphs import Builder, N, assert_equal_gradients, op_types, train
from tests.reference.graph_backward import run_training_graph
from tests.reference.razor import razor, to_bf16


def packs(model: ir.Model) -> list[str]:
    """Names of the packed values."""
    return [n.inputs[0].name for n in model.graph if n.op_type == "Pack"]


def weight_gradient_operands(model: ir.Model) -> list[str]:
    return [n.inputs[0].name for n in model.graph if n.op_type in ("ConvGradWeight", "LinearGradWeight", "MulGrad")]


def test_one_pack_per_value_directly_behind_its_producer() -> None:
    b = Builder()
    x = b.conv("a", b.input(4, 4, 2), 3, activation="relu")
    y = b.op("Add", b.conv("left", x, 3, 3), b.conv("right", x, 3))
    y = b.op("Affine", y, b.param("scale", 3), None)
    model, result = train(b, y)
    assert_equal_gradients(result)
    assert packs(model) == [x.name, y.producer().inputs[0].name]
    for node in model.graph:
        if node.op_type == "Pack":
            nodes = list(model.graph)
            assert nodes[nodes.index(node) - 1] is node.inputs[0].producer()
            assert node.metadata_props["phase"] == "forward"
            assert node.metadata_props["layer"] == node.inputs[0].producer().metadata_props["layer"]
    assert weight_gradient_operands(model).count(f"kept/{x.name}") == 2
    validate(to_proto(model))


def test_packed_value_dies_in_the_forward_pass() -> None:
    b = Builder()
    x = b.conv("a", b.input(4, 4, 2), 3)
    model, _ = train(b, b.conv("b", x, 2))
    assert {node.metadata_props["phase"] for node in x.consumers()} == {"forward"}


def test_the_networks_input_is_read_directly() -> None:
    b = Builder()
    x = b.input(4, 4, 2)
    model, result = train(b, b.conv("a", x, 3))
    assert packs(model) == []
    assert weight_gradient_operands(model) == [x.name]


def test_the_networks_input_in_another_shape_is_read_directly() -> None:
    b = Builder()
    x = b.op("Reshape", b.op("Reshape", b.input(4, 4, 2), b.ints(-1, 8, 4)), b.ints(-1, 32))
    model, result = train(b, b.linear("fc", x, 3))
    assert_equal_gradients(result)
    assert packs(model) == []


def test_another_shape_of_a_computed_value_is_packed() -> None:
    b = Builder()
    x = b.op("Reshape", b.conv("a", b.input(4, 4, 2), 3), b.ints(-1, 48))
    model, _ = train(b, b.linear("fc", x, 3))
    assert packs(model) == [x.name]


def test_a_value_that_the_backward_pass_needs_dense_is_not_packed_as_well() -> None:
    b = Builder()
    x = b.conv("a", b.input(4, 4, 2), 3)
    p = b.op("Softmax", x, axis=3)
    model, result = train(b, b.conv("b", p, 2))
    assert_equal_gradients(result)
    assert packs(model) == []
    assert p.name in weight_gradient_operands(model)


def test_products_of_parameters_are_not_packed() -> None:
    b = Builder()
    gain = b.op("Mul", b.param("a", 3, 4), b.param("b", 4))
    model, result = train(b, b.op("Add", b.input(3, 4), gain))
    assert_equal_gradients(result)
    assert packs(model) == []


def test_frozen_layers_are_not_packed() -> None:
    b = Builder()
    x = b.conv("a", b.input(4, 4, 2), 3)
    y = b.conv("c", b.conv("b", x, 3), 3)
    model, _ = train(b, y, trainable=["b.weight"])
    assert packs(model) == [x.name]


def test_squeeze_and_excite_packs_the_big_operand_and_keeps_the_gate_dense() -> None:
    b = Builder()
    x = b.conv("a", b.input(4, 4, 2), 3)
    gate = b.conv("gate", b.op("ReduceMean", x, b.ints(1, 2), keepdims=1), 3, activation="sigmoid")
    model, _ = train(b, b.op("Mul", x, gate))
    assert x.name in packs(model) and gate.name not in packs(model)
    assert "backward" in {n.metadata_props["phase"] for n in gate.consumers()}


@pytest.mark.parametrize("form", ["plain", "centered"])
@pytest.mark.parametrize("rows", [(3, 3), (1, 7), (13, 11)])
def test_weight_gradient_comes_from_the_kept_form(rows: tuple[int, int], form: str) -> None:
    b = Builder()
    x = b.conv("a", b.input(*rows, 3), 5)
    y = b.conv("b", x, 4)
    target = b.target(y, "mse")
    model, _ = train(b, y)
    exact = run_training_graph(model, b.inputs, target, b.params)
    kept = run_training_graph(model, b.inputs, target, b.params, sparsity=0.75, form=form)
    dense = np.einsum("nhwc,oc->nhwo", b.inputs["input"], b.params["a.weight"][:, :, 0, 0]).reshape(N, -1, 5)
    expected = razor(dense, 0.75, form) if rows != (1, 7) else to_bf16(dense.astype(np.float32))
    dy = 2 * (exact.prediction - torch.from_numpy(target)) / target.size
    gradient = dy.reshape(-1, 4).T.numpy() @ expected.reshape(-1, 5).astype(np.float64)
    np.testing.assert_allclose(kept.gradients["b.weight"][:, :, 0, 0], gradient, rtol=1e-9, atol=1e-12)
    assert kept.loss == exact.loss
    # Only the weight gradient behind the pack is approximate.
    torch.testing.assert_close(kept.gradients["a.weight"], exact.gradients["a.weight"], rtol=0, atol=0)


def test_smooth_activations_keep_four_bits_of_derivative_where_there_are_rows() -> None:
    b = Builder()
    x = b.conv("a", b.input(3, 3, 2), 4, activation="silu")
    y = b.linear("fc", b.op("ReduceMean", x, b.ints(1, 2), keepdims=0), 3, activation="silu")
    target = b.target(y, "mse")
    model, exact = train(b, y)
    arguments = (model, b.inputs, target, b.params)
    kept = run_training_graph(*arguments, sparsity=0.5)
    dense = run_training_graph(*arguments, sparsity=0.5, activation_keep="dense")
    exact = run_training_graph(*arguments)
    assert not torch.equal(kept.gradients["a.weight"], dense.gradients["a.weight"])
    # The classifier has one row a sample: its activation keeps the derivative as it is.
    torch.testing.assert_close(kept.gradients["fc.bias"], exact.gradients["fc.bias"], rtol=1e-12, atol=0)


def test_a_graph_without_packs_runs_the_same() -> None:
    b = Builder()
    y = b.conv("b", b.conv("a", b.input(4, 4, 2), 3, bn=True), 2)
    model, result = train(b, y, packs=False)
    assert_equal_gradients(result)
    assert "Pack" not in op_types(model)
