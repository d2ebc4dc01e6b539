"""Every gradient of a training graph equals torch's autograd over the same forward nodes, in float64."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F

from edge_razor.errors import UnsupportedOpError, UsageError
from edge_razor.exporters.differentiate import differentiate
from edge_razor.exporters.training_graph import to_proto, validate
from tests.exporters.graphs import Builder, assert_equal_gradients, op_types, train
from tests.reference.graph_backward import run_training_graph

CONVOLUTIONS: dict[str, dict] = {
    "pointwise": dict(out=5, kernel=1),
    "3x3": dict(out=4, kernel=3),
    "one_output_channel": dict(out=1, kernel=3),
    "strided": dict(out=4, kernel=3, strides=[2, 2]),
    "unequal_strides": dict(out=4, kernel=3, strides=[2, 1]),
    "dilated": dict(out=4, kernel=3, dilations=[2, 2], pads=[2, 2, 2, 2]),
    "asymmetric_pads": dict(out=4, kernel=3, strides=[2, 2], pads=[0, 1, 2, 0]),
    "no_pads": dict(out=4, kernel=3, pads=[0, 0, 0, 0]),
    "grouped": dict(out=4, kernel=3, group=2),
    "depthwise": dict(out=6, kernel=3, group=6),
    "depthwise_multiplied": dict(out=12, kernel=3, group=6),
}
ACTIVATIONS: dict[str, dict] = {
    "relu": {},
    "clip": dict(alpha=-0.3, beta=0.8),
    "leaky_relu": dict(alpha=0.1),
    "hardsigmoid": dict(alpha=1 / 6, beta=0.5),
    "hardswish": {},
    "sigmoid": {},
    "tanh": {},
    "silu": {},
    "gelu": {},
    "gelu_tanh": {},
}


@pytest.mark.parametrize("normalized", ["plain", "bias", "bn", "bn_bias"])
@pytest.mark.parametrize("geometry", CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())
def test_convolution(geometry: dict, normalized: str) -> None:
    b = Builder()
    x = b.conv("stem", b.input(7, 5, 3), 6)
    y = b.conv("conv", x, bn="bn" in normalized, bias="bias" in normalized, **geometry)
    model, result = train(b, y)
    assert_equal_gradients(result)
    validate(to_proto(model))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", ["conv", "linear", "affine"])
def test_activation(kind: str, activation: str) -> None:
    b = Builder()
    attributes = {"activation": activation} | ACTIVATIONS[activation]
    x = b.conv("stem", b.input(3, 3, 2), 4)
    if kind == "conv":
        y = b.conv("conv", x, 5, 3, bn=True, **attributes)
    elif kind == "linear":
        y = b.linear("fc", x, 5, **attributes)
    else:
        y = b.op("Affine", x, *b.batch_norm("bn", 4), **attributes)
    model, result = train(b, y)
    assert_equal_gradients(result)
    assert f"kept/{y.name}/activation" in {v.name for n in model.graph for v in n.outputs}
    validate(to_proto(model))


@pytest.mark.parametrize("trans", [0, 1])
@pytest.mark.parametrize("shape", [(6,), (1,), (5, 6), (2, 3, 6)])
def test_linear(shape: tuple[int, ...], trans: int) -> None:
    b = Builder()
    x = b.linear("first", b.input(*shape), 6, transW=trans)
    w = b.param("fc.weight", *((4, 6) if trans else (6, 4)))
    y = b.op("Linear", x, w, *b.batch_norm("bn", 4), transW=trans)
    model, result = train(b, y)
    assert_equal_gradients(result)
    validate(to_proto(model))


def test_affine_alone_is_an_activation() -> None:
    b = Builder()
    x = b.conv("stem", b.input(3, 3, 2), 4)
    model, result = train(b, b.op("Affine", x, activation="relu"))
    assert_equal_gradients(result)


def test_affine_with_only_a_shift() -> None:
    b = Builder()
    x = b.op("Affine", b.conv("stem", b.input(3, 3, 2), 4), None, b.param("shift", 4))
    assert_equal_gradients(train(b, x)[1])


POOLS: dict[str, Callable[[Builder, ir.Value], ir.Value]] = {
    "max": lambda b, x: b.op("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2]),
    "max_padded": lambda b, x: b.op("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    "max_asymmetric": lambda b, x: b.op("MaxPool", x, kernel_shape=[3, 2], strides=[2, 1], pads=[0, 0, 2, 1]),
    "max_dilated": lambda b, x: b.op("MaxPool", x, kernel_shape=[2, 2], strides=[1, 1], dilations=[2, 2]),
    "average": lambda b, x: b.op("AveragePool", x, kernel_shape=[2, 3], strides=[1, 2]),
    "average_padded": lambda b, x: b.op("AveragePool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 0, 1, 1]),
    "average_pads_count": lambda b, x: b.op(
        "AveragePool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1], count_include_pad=1
    ),
    "average_ceil": lambda b, x: b.op("AveragePool", x, kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
}


@pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS.keys())
def test_pooling(pool: Callable[[Builder, ir.Value], ir.Value]) -> None:
    b = Builder()
    model, result = train(b, pool(b, b.conv("stem", b.input(6, 8, 2), 3)))
    assert_equal_gradients(result)
    validate(to_proto(model))


def test_max_pool_ties_go_to_the_first() -> None:
    b = Builder()
    x = b.input(4, 3, 2)
    left, right = b.conv("left", x, 3), b.conv("right", x, 3)
    b.params["right.weight"][:] = b.params["left.weight"]
    y = b.op("MaxPool", b.op("Concat", left, right, axis=2), kernel_shape=[2, 6], strides=[2, 1])
    _, result = train(b, y)
    assert result.gradients["left.weight"].abs().max() > 0
    assert result.gradients["right.weight"].abs().max() == 0
    torch.testing.assert_close(result.gradients["left.weight"], result.autograd["left.weight"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("op", ["ReduceMean", "ReduceSum"])
@pytest.mark.parametrize("keepdims", [0, 1])
@pytest.mark.parametrize("axes", [(1, 2), (-1,), (2,), (-3, -2, -1)])
def test_reduction(op: str, keepdims: int, axes: tuple[int, ...]) -> None:
    b = Builder()
    x = b.conv("stem", b.input(3, 4, 2), 5)
    model, result = train(b, b.op(op, x, b.ints(*axes), keepdims=keepdims))
    assert_equal_gradients(result)
    validate(to_proto(model))


# Shape of the second operand, against a first one of [N, 3, 4, 5]; None stands for the batch.
BROADCASTS: dict[str, tuple[tuple[int | None, ...], str]] = {
    "same": ((None, 3, 4, 5), ""),
    "squeeze_excite": ((None, 1, 1, 5), "samples"),
    "per_sample": ((None, 1, 1, 1), "samples"),
    "spatial_gate": ((None, 3, 4, 1), ""),
    "columns_kept_one_axis": ((None, 3, 1, 5), ""),
    "channel": ((5,), "all"),
    "channel_ranked": ((1, 1, 1, 5), "all"),
    "scalar": ((), "all"),
    "one": ((1,), "all"),
    "row_of_images": ((3, 4, 5), ""),
    "position": ((1, 3, 4, 1), ""),
}


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Div"])
@pytest.mark.parametrize("pattern", BROADCASTS)
def test_broadcasting(pattern: str, op: str, swapped: bool) -> None:
    shape, reduce = BROADCASTS[pattern]
    b = Builder()
    source = b.input(3, 4, 2)
    a = b.conv("a", source, 5)
    if shape and shape[0] is None:
        c = b.conv("c", source, int(shape[-1] or 0))
        axes = [axis for axis in (1, 2) if shape[axis] == 1]
        c = b.op("ReduceMean", c, b.ints(*axes), keepdims=1) if axes else c
        # Away from zero, so that quotients stay tame.
        c = b.op("Add", b.op("Affine", c, activation="sigmoid"), b.param("offset", 1, positive=True))
    else:
        c = b.param("factor", *(int(d or 0) for d in shape), positive=True)
    if op == "Div" and swapped:
        a = b.op("Add", b.op("Affine", a, activation="sigmoid"), b.param("floor", 1, positive=True))
    model, result = train(b, b.op(op, c, a) if swapped else b.op(op, a, c))
    assert_equal_gradients(result)
    if op == "Mul":
        modes = [n.attributes.get_string("reduce") for n in model.graph if n.op_type == "MulGrad"]
        assert modes == ([reduce] if reduce else [])
    validate(to_proto(model))


def test_broadcasting_in_two_dimensions() -> None:
    b = Builder()
    x = b.linear("fc", b.input(4), 5)
    y = b.op("Mul", x, b.param("gain", 5))
    y = b.op("Mul", y, b.op("ReduceMean", x, b.ints(1), keepdims=1))
    assert_equal_gradients(train(b, y)[1])


def test_an_operand_wider_than_one_of_size_one_on_both_sides() -> None:
    b = Builder()
    a = b.op("ReduceMean", b.conv("a", b.input(3, 4, 2), 5), b.ints(2), keepdims=1)
    c = b.op("ReduceMean", b.conv("c", b.graph.inputs[0], 5), b.ints(1), keepdims=1)
    assert_equal_gradients(train(b, b.op("Mul", a, c))[1])


def test_value_times_itself() -> None:
    b = Builder()
    x = b.conv("a", b.input(3, 4, 2), 5)
    assert_equal_gradients(train(b, b.op("Mul", x, x))[1])


def test_negation_and_softmax_on_every_axis() -> None:
    for axis in (1, 2, 3, -1):
        b = Builder()
        x = b.op("Neg", b.conv("a", b.input(3, 4, 2), 5))
        assert_equal_gradients(train(b, b.op("Softmax", x, axis=axis))[1])


def test_standalone_batch_norm_with_relu() -> None:
    b = Builder()
    x = b.op("Affine", b.input(3, 4, 2), *b.batch_norm("bn", 2), activation="relu")
    model, result = train(b, b.conv("conv", x, 3, 3))
    assert_equal_gradients(result)
    assert "MulGrad" in op_types(model)


def test_concat_of_which_every_part_trains() -> None:
    b = Builder()
    x = b.input(3, 4, 2)
    y = b.op("Concat", b.conv("a", x, 3), b.conv("b", x, 1), b.conv("c", x, 4), axis=3)
    model, result = train(b, y)
    assert_equal_gradients(result)
    assert op_types(model, "backward").count("Split") == 1


def test_concat_of_which_some_parts_train() -> None:
    b = Builder()
    x = b.input(3, 4, 2)
    y = b.op("Concat", x, b.conv("b", x, 3), b.conv("c", x, 4), axis=-1)
    model, result = train(b, y, trainable=["b.weight", "c.weight"])
    assert_equal_gradients(result)
    assert "Split" not in op_types(model)


def test_concat_of_a_value_with_itself() -> None:
    b = Builder()
    x = b.conv("a", b.input(3, 4, 2), 3)
    assert_equal_gradients(train(b, b.op("Concat", x, x, axis=2))[1])


def test_split_with_all_outputs_used() -> None:
    b = Builder()
    parts = b.ops("Split", b.conv("a", b.input(3, 4, 2), 6), b.ints(1, 2, 3), outputs=3, axis=3)
    y = b.op("Concat", b.op("Neg", parts[2]), b.conv("b", parts[1], 2), parts[0], axis=3)
    model, result = train(b, y)
    assert_equal_gradients(result)
    assert "Pad" not in op_types(model)


@pytest.mark.parametrize("used", [[0], [1], [2], [0, 2]])
def test_split_with_unused_outputs(used: list[int]) -> None:
    b = Builder()
    parts = b.ops("Split", b.conv("a", b.input(3, 4, 2), 6), b.ints(1, 2, 3), outputs=3, axis=3)
    y = b.op("Concat", *(b.conv(f"b{i}", parts[i], 2) for i in used), axis=3)
    model, result = train(b, y)
    assert_equal_gradients(result)
    validate(to_proto(model))


@pytest.mark.parametrize(
    "starts,ends,axes", [((1,), (3,), (3,)), ((-2,), (9999,), (3,)), ((0, 1), (2, -1), (1, 2)), ((0,), (5,), (-1,))]
)
def test_slice(starts: tuple, ends: tuple, axes: tuple) -> None:
    b = Builder()
    x = b.conv("a", b.input(3, 4, 2), 5)
    model, result = train(b, b.op("Slice", x, b.ints(*starts), b.ints(*ends), b.ints(*axes)))
    assert_equal_gradients(result)
    validate(to_proto(model))


@pytest.mark.parametrize("axes", [None, (1, 2), (-1,)])
def test_pad(axes: tuple[int, ...] | None) -> None:
    b = Builder()
    x = b.conv("a", b.input(3, 4, 2), 5)
    if axes is None:
        y = b.op("Pad", x, b.ints(0, 1, 0, 2, 0, 0, 3, 0))
    else:
        y = b.op("Pad", x, b.ints(*range(1, 2 * len(axes) + 1)), None, b.ints(*axes))
    model, result = train(b, y)
    assert_equal_gradients(result)


def test_channel_shuffle() -> None:
    b = Builder()
    x = b.op("Reshape", b.conv("a", b.input(3, 4, 2), 6, bn=True), b.ints(-1, 3, 4, 2, 3))
    x = b.op("Reshape", b.op("Transpose", x, perm=[0, 1, 2, 4, 3]), b.ints(-1, 3, 4, 6))
    model, result = train(b, b.conv("b", x, 4, 3))
    assert_equal_gradients(result)
    validate(to_proto(model))


def test_transposition_that_is_not_its_own_inverse() -> None:
    b = Builder()
    x = b.op("Transpose", b.conv("a", b.input(3, 4, 2), 6), perm=[0, 2, 3, 1])
    assert_equal_gradients(train(b, b.linear("fc", x, 2))[1])


def test_samples_folded_into_rows() -> None:
    b = Builder()
    x = b.op("Reshape", b.conv("a", b.input(3, 4, 2), 6), b.ints(-1, 6))
    y = b.op("Mul", b.linear("fc", x, 5, activation="silu"), b.param("gain", 5))
    model, result = train(b, y)
    assert str(y.shape[0]) == "12*N"
    assert_equal_gradients(result)
    validate(to_proto(model))


def test_dropout_uses_its_mask_again() -> None:
    b = Builder()
    x = b.op("Dropout", b.conv("a", b.input(6, 5, 2), 4), ratio=0.4, stream=3)
    model, result = train(b, b.op("Dropout", b.conv("b", x, 3), ratio=0.2, stream=5))
    assert_equal_gradients(result)
    validate(to_proto(model))


@pytest.mark.parametrize("shape", [(5,), (3, 4, 5)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_torchs(shape: tuple[int, ...], smoothing: float) -> None:
    b = Builder()
    y = b.linear("fc", b.input(*shape), 7)
    target = b.target(y, "cross_entropy")
    model = differentiate(b.model(y), {"name": "cross_entropy", "label_smoothing": smoothing}, b.trainable())
    result = run_training_graph(model, b.inputs, target, b.params, autograd=True)
    logits, labels = result.prediction.reshape(-1, 7), torch.from_numpy(target).reshape(-1)
    expected = F.cross_entropy(logits, labels, label_smoothing=smoothing)
    torch.testing.assert_close(result.loss, expected, rtol=1e-7, atol=0)  # the attribute is a float32
    assert_equal_gradients(result)
    validate(to_proto(model))


@pytest.mark.parametrize(
    "loss,function", [("mse", F.mse_loss), ("bce_with_logits", F.binary_cross_entropy_with_logits)]
)
def test_element_losses_are_torchs(loss: str, function: Callable) -> None:
    b = Builder()
    y = b.linear("fc", b.input(3, 5), 7)
    target = b.target(y, loss)
    model = differentiate(b.model(y), {"name": loss}, b.trainable())
    result = run_training_graph(model, b.inputs, target, b.params, autograd=True)
    torch.testing.assert_close(result.loss, function(result.prediction, torch.from_numpy(target)), rtol=1e-12, atol=0)
    assert_equal_gradients(result)
    validate(to_proto(model))


def small_net(seed: int = 0) -> tuple[Builder, ir.Value]:
    """A residual, squeeze-and-excite, depthwise, dense-connection, layer-scale, pooled classifier."""
    b = Builder(seed)
    x = b.conv("stem", b.input(8, 8, 3), 6, 3, bn=True, activation="relu", strides=[2, 2], pads=[0, 0, 1, 1])
    y = b.conv("depth", x, 6, 3, bn=True, bias=True, group=6, activation="hardswish")
    s = b.op("ReduceMean", y, b.ints(1, 2), keepdims=1)
    s = b.conv("squeeze", s, 2, bias=True, activation="relu")
    s = b.conv("excite", s, 6, bias=True, activation="hardsigmoid", alpha=1 / 6, beta=0.5)
    y = b.op("Add", b.conv("project", b.op("Mul", y, s), 6, bn=True), x)
    z = b.op("Affine", y, *b.batch_norm("dense_bn", 6), activation="relu")
    y = b.op("Concat", y, b.conv("grow", z, 4, 3), axis=3)
    y = b.op("Mul", y, b.op("Reshape", b.param("gamma", 10, 1, 1), b.ints(10)))
    y = b.op("MaxPool", y, kernel_shape=[2, 2], strides=[2, 2])
    y = b.op("Dropout", b.op("ReduceMean", y, b.ints(1, 2), keepdims=0), ratio=0.2, stream=1)
    return b, b.linear("fc", y, 5)


SETS = {
    "all": None,
    "head": ["fc.weight", "fc.bias"],
    "one_weight": ["depth.weight"],
    "biases": ["depth.bias", "squeeze.bias", "stem_bn.bias", "fc.bias"],
    "gammas": ["stem_bn.weight", "dense_bn.weight"],
    "layer_scale": ["gamma"],
    "last_block": ["grow.weight", "gamma", "fc.weight", "fc.bias"],
}


@pytest.mark.parametrize("names", SETS.values(), ids=SETS.keys())
@pytest.mark.parametrize("loss", ["cross_entropy", "mse", "bce_with_logits"])
def test_network_with_every_trainable_set(names: list[str] | None, loss: str) -> None:
    b, y = small_net()
    model, result = train(b, y, loss=loss, trainable=names)
    assert_equal_gradients(result)
    validate(to_proto(model))
    assert {f"grad/{n}" for n in names or b.trainable()} <= {v.name for v in model.graph.outputs}


@pytest.mark.parametrize("seed", range(3))
def test_gradient_equals_finite_differences(seed: int) -> None:
    b, y = small_net(seed)
    target = b.target(y, "cross_entropy")
    names = ["depth.weight", "dense_bn.weight", "gamma", "fc.bias", "squeeze.bias"]
    model = differentiate(b.model(y), {"name": "cross_entropy", "label_smoothing": 0.1}, names)

    def loss() -> float:
        return float(run_training_graph(model, b.inputs, target, b.params).loss)

    gradients = run_training_graph(model, b.inputs, target, b.params).gradients
    for name in names:
        flat = b.params[name].reshape(-1)
        index = int(gradients[name].abs().argmax())
        middle, step = flat[index], 1e-6
        flat[index] = middle + step
        above = loss()
        flat[index] = middle - step
        below = loss()
        flat[index] = middle
        measured = (above - below) / (2 * step)
        assert measured == pytest.approx(float(gradients[name].reshape(-1)[index]), rel=1e-5), name


def test_nothing_before_the_first_trainable_parameter_has_a_backward_part_or_is_kept() -> None:
    b, y = small_net()
    model, _ = train(b, y, loss="cross_entropy", trainable=["fc.weight", "fc.bias"])
    assert op_types(model, "backward") == ["ChannelSum", "LinearGradWeight"]
    kept = [v.name for n in model.graph for v in n.outputs if v.name and v.name.startswith("kept/")]
    assert kept == [f"kept/{y.producer().inputs[0].name}"]


def test_frozen_weights_get_no_gradient_and_keep_no_input() -> None:
    b = Builder()
    x = b.input(4, 4, 2)
    for index in range(3):
        x = b.conv(f"c{index}", x, 3, bn=True, activation="relu")
    model, result = train(b, x, trainable=["c0_bn.bias"])
    assert_equal_gradients(result)
    back = ["ActivationGrad", "ConvGradInput"] * 2 + ["ActivationGrad", "ChannelSum"]
    assert op_types(model, "backward") == back
    assert "Pack" not in op_types(model)


def test_backward_nodes_come_in_reverse_order_and_belong_to_layers() -> None:
    b = Builder()
    x = b.input(4, 4, 2)
    for index in range(3):
        x = b.conv(f"c{index}", x, 3, bn=True)
    model, _ = train(b, x)
    layers = [n.metadata_props["layer"] for n in model.graph if n.op_type == "ConvGradWeight"]
    assert layers == ["c2", "c1", "c0"]
    assert {n.metadata_props["phase"] for n in model.graph} == {"forward", "loss", "backward"}


def test_shared_weights_add_up() -> None:
    b = Builder()
    w = b.param("w", 4, 4)
    scale, shift = b.batch_norm("bn", 4)
    x = b.input(5, 4)
    for _ in range(3):
        x = b.op("Linear", x, w, scale, shift, activation="tanh")
    model, result = train(b, x)
    assert_equal_gradients(result)
    validate(to_proto(model))


def test_two_parameters_with_one_gradient() -> None:
    b = Builder()
    total = b.op("Add", b.param("a", 4), b.param("b", 4))
    model, result = train(b, b.op("Add", b.input(5, 4), total))
    assert_equal_gradients(result)
    validate(to_proto(model))


@pytest.mark.parametrize("name,smoothing", [("hinge", 0.0)])
def test_unknown_loss(name: str, smoothing: float) -> None:
    b, y = small_net()
    with pytest.raises(UsageError, match="hinge.*cross_entropy"):
        differentiate(b.model(y), {"name": name, "label_smoothing": smoothing}, b.trainable())


def test_unknown_parameter() -> None:
    b, y = small_net()
    with pytest.raises(UsageError, match="fc.wieght"):
        differentiate(b.model(y), {"name": "mse"}, ["fc.wieght"])


def test_empty_trainable_set() -> None:
    b, y = small_net()
    with pytest.raises(UsageError, match="nothing to train"):
        differentiate(b.model(y), {"name": "mse"}, [])


def test_parameter_without_influence() -> None:
    b = Builder()
    x = b.input(4)
    b.linear("unused", x, 3)
    y = b.linear("fc", x, 3)
    with pytest.raises(UsageError, match=r"unused\.weight"):
        differentiate(b.model(y), {"name": "mse"}, ["fc.weight", "unused.weight"])


def test_frozen_output() -> None:
    b = Builder()
    x = b.input(4)
    b.linear("unused", x, 3)
    with pytest.raises(UsageError, match="no trainable parameter"):
        differentiate(b.model(b.linear("fc", x, 3)), {"name": "mse"}, ["unused.weight"])


def test_reserved_name() -> None:
    b = Builder()
    y = b.linear("fc", b.input(4, name="target"), 3)
    with pytest.raises(UsageError, match="'target'"):
        differentiate(b.model(y), {"name": "mse"}, b.trainable())


def test_operators_without_gradient_are_listed_all_at_once() -> None:
    b = Builder()
    x = b.linear("fc", b.input(4), 3)
    for op in ("Erf", "Sqrt"):
        node = ir.node(op, [x], outputs=[ir.Value(name=op, type=x.type, shape=x.shape)])
        node.name = f"the_{op}"
        b.graph.append(node)
        x = node.outputs[0]
    with pytest.raises(UnsupportedOpError, match=r"Erf 'the_Erf' \(\[N,3\]\); Sqrt 'the_Sqrt'") as caught:
        differentiate(b.model(x), {"name": "mse"}, b.trainable())
    assert [op for _, op, _ in caught.value.nodes] == ["Erf", "Sqrt"]


@pytest.mark.parametrize(
    "build,why",
    [
        (lambda b, x: b.op("ReduceMean", x, b.ints(0, 1), keepdims=1), "over the batch"),
        (lambda b, x: b.op("Concat", x, x, axis=0), "batch dimension"),
        (lambda b, x: b.op("Pad", x, b.ints(0, -1, 0, 0, 0, 0)), "negative pads"),
    ],
)
def test_geometry_without_gradient_names_the_node(build: Callable, why: str) -> None:
    b = Builder()
    y = build(b, b.linear("fc", b.input(4, 5), 3))
    name = y.producer().name
    with pytest.raises(UnsupportedOpError, match=f"{name}.*{why}"):
        differentiate(b.model(y), {"name": "mse"}, b.trainable())
