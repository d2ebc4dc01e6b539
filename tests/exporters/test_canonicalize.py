"""Each operator in its spellings: computes the same afterwards, in the one form that the training graph knows."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_razor.errors import UnsupportedOpError
from edge_razor.exporters.forward import Forward, build_forward
from edge_razor.exporters.load_onnx import load_onnx
from tests.exporters.forward_reference import ops
from tests.exporters.onnx_models import X4, check_body, onnx_model, save

SAME = "float[N,4,6,5] y"


def activation(forward: Forward) -> str:
    (node,) = forward.model.graph
    return node.attributes["activation"].as_string()


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("y = Relu(x)", "relu"),
        ("y = Sigmoid(x)", "sigmoid"),
        ("y = Tanh(x)", "tanh"),
        ("y = HardSwish(x)", "hardswish"),
        ("y = HardSigmoid <alpha = 0.2, beta = 0.4> (x)", "hardsigmoid"),
        ("y = LeakyRelu <alpha = 0.1> (x)", "leaky_relu"),
        ("y = Gelu(x)", "gelu"),
        ('y = Gelu <approximate = "tanh"> (x)', "gelu_tanh"),
        ("s = Sigmoid(x) y = Mul(x, s)", "silu"),
        ("s = Sigmoid(x) y = Mul(s, x)", "silu"),
        ("a = Constant <value_float = 0.0> () b = Constant <value_float = 6.0> () y = Clip(x, a, b)", "clip"),
        ("a = Constant <value_float = -1.0> () y = Clip(x, a)", "clip"),
        ("a = Constant <value_float = 0.0> () r = Max(x, a) b = Constant <value_float = 6.0> () y = Min(b, r)", "clip"),
        (
            "c = Constant <value_float = 3.0> () z = Constant <value_float = 0.0> () s = Constant <value_float "
            "= 6.0> ()"
            "a = Add(c, x) k = Clip(a, z, s) d = Div(k, s) y = Mul(x, d)",
            "hardswish",
        ),
        (
            "c = Constant <value_float = 3.0> () z = Constant <value_float = 0.0> () s = Constant <value_float "
            "= 6.0> ()"
            "a = Add(x, c) k = Clip(a, z, s) m = Mul(k, x) y = Div(m, s)",
            "hardswish",
        ),
        (
            "c = Constant <value_float = 3.0> () z = Constant <value_float = 0.0> () s = Constant <value_float "
            "= 6.0> ()"
            "a = Add(x, c) k = Clip(a, z, s) y = Div(k, s)",
            "hardsigmoid",
        ),
        (
            "r = Constant <value_float = 1.4142135> () h = Constant <value_float = 0.5> () one = Constant "
            "<value_float = 1.0> ()"
            "d = Div(x, r) e = Erf(d) a = Add(e, one) m = Mul(x, a) y = Mul(m, h)",
            "gelu",
        ),
        (
            "k = Constant <value_float = 0.70710677> () h = Constant <value_float = 0.5> () one = Constant "
            "<value_float = 1.0> ()"
            "d = Mul(x, k) e = Erf(d) a = Add(one, e) g = Mul(h, a) y = Mul(g, x)",
            "gelu",
        ),
        (
            "k = Constant <value_float = 0.7978846> () h = Constant <value_float = 0.5> () one = Constant "
            "<value_float = 1.0> ()"
            "c = Constant <value_float = 0.044715> () three = Constant <value_float = 3.0> ()"
            "p = Pow(x, three) q = Mul(c, p) r = Add(x, q) s = Mul(k, r) t = Tanh(s) u = Add(t, one) v = Mul(x, "
            "u) y = Mul(v, h)",
            "gelu_tanh",
        ),
    ],
)
def test_activation_spellings_become_one_node(body: str, expected: str) -> None:
    assert activation(check_body(body, SAME)) == expected


def test_swish_with_another_slope_is_no_silu(tmp_path: Path) -> None:
    body = "k = Constant <value_float = 1.702> () a = Mul(x, k) s = Sigmoid(a) y = Mul(x, s)"
    assert ops(check_body(body, SAME)) == ["Mul", "Affine", "Mul"]


def test_multiplication_by_one_disappears() -> None:
    body = "one = Constant <value_float = 1.0> () a = Mul(x, one) y = Relu(a)"
    assert ops(check_body(body, SAME)) == ["Affine"]


@pytest.mark.parametrize(
    ("attributes", "output"),
    [
        ("kernel_shape = [3, 3], pads = [1, 0, 2, 1], strides = [2, 1]", "float[N,8,4,4] y"),
        ("kernel_shape = [3, 3], dilations = [2, 2], pads = [2, 2, 2, 2]", "float[N,8,6,5] y"),
        ('kernel_shape = [3, 3], auto_pad = "SAME_UPPER", strides = [2, 2]', "float[N,8,3,3] y"),
        ('kernel_shape = [3, 3], auto_pad = "SAME_LOWER", strides = [2, 2]', "float[N,8,3,3] y"),
        ('kernel_shape = [3, 3], auto_pad = "VALID"', "float[N,8,4,3] y"),
    ],
)
def test_convolution_padding(attributes: str, output: str) -> None:
    forward = check_body(f"y = Conv <{attributes}> (x, w, b)", output, w=(8, 4, 3, 3), b=(8,))
    assert ops(forward) == ["Conv"]
    assert [i.name if i else None for i in next(iter(forward.model.graph)).inputs[1:]] == ["w", None, "b"]


def test_grouped_and_depthwise_convolution() -> None:
    body = "a = Conv <group = 2, kernel_shape = [1, 1]> (x, w) y = Conv <group = 6, kernel_shape = [2, 2]> (a, v)"
    assert ops(check_body(body, "float[N,6,5,4] y", w=(6, 2, 1, 1), v=(6, 1, 2, 2))) == ["Conv", "Conv"]


@pytest.mark.parametrize(
    "consumer", ["Conv <kernel_shape = [3, 3], pads = [0, 1, 0, 1]> (p, w)", "AveragePool <kernel_shape = [3, 3]> (p)"]
)
def test_zero_padding_folds_into_its_consumer(consumer: str) -> None:
    body = f"k = Constant <value_ints = [0, 0, 1, 0, 0, 0, 2, 3]> () p = Pad(x, k) y = {consumer}"
    weights = {"w": (4, 4, 3, 3)} if "Conv" in consumer else {}
    assert "Pad" not in ops(check_body(body, "float[N,4,h,w] y", **weights))


def test_zero_padding_before_max_pool_stays() -> None:
    """Zeros can win against negative values, a MaxPool's own padding never does."""
    body = (
        "k = Constant <value_ints = [0, 0, 1, 1, 0, 0, 1, 1]> () p = Pad(x, k) y = MaxPool <kernel_shape = [2, 2]> (p)"
    )
    assert ops(check_body(body, "float[N,4,7,6] y")) == ["Pad", "MaxPool"]


def test_padding_of_channels_with_a_value() -> None:
    body = (
        "k = Constant <value_ints = [0, 1, 0, 2, 0, 0, 3, 0]> () c = Constant <value_float = 1.5> () y = Pad(x, k, c)"
    )
    assert ops(check_body(body, "float[N,5,9,7] y")) == ["Pad"]


@pytest.mark.parametrize(
    "pool",
    [
        "MaxPool <kernel_shape = [3, 3], strides = [2, 2], ceil_mode = 1> (x)",
        "MaxPool <kernel_shape = [2, 3], pads = [1, 1, 0, 1], dilations = [2, 1]> (x)",
        'MaxPool <kernel_shape = [3, 3], strides = [2, 2], auto_pad = "SAME_UPPER"> (x)',
        "AveragePool <kernel_shape = [3, 2], strides = [2, 2], pads = [1, 0, 1, 1]> (x)",
        "AveragePool <kernel_shape = [3, 2], strides = [2, 2], pads = [1, 0, 1, 1], count_include_pad = 1> (x)",
        "AveragePool <kernel_shape = [3, 3], strides = [2, 2], ceil_mode = 1> (x)",
    ],
)
def test_pooling(pool: str) -> None:
    forward = check_body(f"y = {pool}", "float[N,4,h,w] y")
    (node,) = forward.model.graph
    assert not node.attributes.get_int("ceil_mode", 0)


@pytest.mark.parametrize(
    ("body", "output"),
    [
        ("y = GlobalAveragePool(x)", "float[N,4,1,1] y"),
        ("a = Constant <value_ints = [2, 3]> () y = ReduceMean <keepdims = 0> (x, a)", "float[N,4] y"),
        ("a = Constant <value_ints = [-3]> () y = ReduceSum <keepdims = 0> (x, a)", "float[N,6,5] y"),
        ("a = Constant <value_ints = [1, -1]> () y = ReduceSum (x, a)", "float[N,1,6,1] y"),
    ],
)
def test_reductions(body: str, output: str) -> None:
    assert set(ops(check_body(body, output))) == {"ReduceSum" if "Sum" in body else "ReduceMean"}


@pytest.mark.parametrize(
    "body",
    [
        "f = Flatten(x) y = Gemm <transB = 1> (f, w, b)",
        "f = Flatten(x) y = Gemm (f, v, b)",
        "f = Flatten(x) m = MatMul(f, v) y = Add(m, b)",
        "f = Flatten(x) m = MatMul(f, v) y = Add(b, m)",
        "f = Flatten(x) t = Transpose <perm = [1, 0]> (w) m = MatMul(f, t) y = Add(m, b)",
    ],
)
def test_matrix_products_with_a_weight(body: str) -> None:
    forward = check_body(body, "float[N,7] y", w=(7, 120), v=(120, 7), b=(7,))
    assert ops(forward) == ["Transpose", "Reshape", "Linear"]
    assert next(reversed(list(forward.model.graph))).inputs[3] is not None


def test_bias_that_is_no_vector_is_added() -> None:
    forward = check_body("f = Flatten(x) y = Gemm <transB = 1> (f, w, b)", "float[N,7] y", w=(7, 120), b=(1, 7))
    assert ops(forward)[2:] == ["Linear", "Reshape", "Add"]


@pytest.mark.parametrize(
    ("body", "output"),
    [
        ("y = Identity(x)", SAME),
        ("s = Shape(x) y = Reshape(x, s)", SAME),
        (
            "b = Shape <start = 0, end = 1> (x) c = Constant <value_ints = [-1]> () s = Concat <axis = 0> (b, "
            "c) y = Reshape(x, s)",
            "float[N,120] y",
        ),
        ("a = Constant <value_ints = [2]> () u = Unsqueeze(x, a) y = Squeeze(u, a)", SAME),
        ("y = Flatten <axis = 1> (x)", "float[N,120] y"),
    ],
)
def test_views_and_shape_arithmetic(body: str, output: str) -> None:
    forward = check_body(f"z = Relu(x) {body.replace('(x', '(z')}", output)
    assert set(ops(forward)) <= {"Affine", "Reshape", "Transpose"}
    if output == SAME:
        assert ops(forward) == ["Affine"]


@pytest.mark.parametrize(
    ("body", "output"),
    [
        ("a, b = Split <axis = 1, num_outputs = 2> (x) y = Sub(b, a)", "float[N,2,6,5] y"),
        (
            "k = Constant <value_ints = [1, 3]> () a, b = Split <axis = -3> (x, k) y = Concat <axis = 1> (b, x, a)",
            "float[N,8,6,5] y",
        ),
        (
            "s = Constant <value_ints = [-4]> () e = Constant <value_ints = [100]> () a = Constant <value_ints "
            "= [2]> () y = Slice(x, s, e, a)",
            "float[N,4,4,5] y",
        ),
        ("y = Softmax <axis = 1> (x)", SAME),
        ("y = Softmax <axis = 2> (x)", SAME),
        ("t = Transpose <perm = [0, 3, 1, 2]> (x) y = Softmax <axis = -1> (t)", "float[N,5,4,6] y"),
        ("n = Neg(x) y = Div(n, w)", SAME),
        ("y = Sum(x, w, x)", SAME),
        ("two = Constant <value_float = 2.0> () y = Pow(x, two)", SAME),
    ],
)
def test_axes_follow_the_layout(body: str, output: str) -> None:
    check_body(body, output, w=(4, 1, 1))


@pytest.mark.parametrize("shape", [(1,), (5,), (6, 1), (6, 5), (4, 1, 1), (1, 4, 1, 1), (4, 6, 5), (1, 1, 6, 5)])
def test_broadcast_operands_of_every_rank(shape: tuple[int, ...]) -> None:
    forward = check_body("a = Relu(x) y = Mul(a, w)", SAME, w=shape)
    factor = next(reversed(list(forward.model.graph))).inputs[1]
    assert factor is not None and factor.shape is not None
    assert len(factor.shape) <= 3, "what has no batch needs no leading ones"


def test_square_constant_is_transposed_with_the_data() -> None:
    """Its shape is the same in either order, its data are not."""
    body = (
        "t = Transpose <perm = [0, 1, 3, 2]> (x) k = Constant <value = float[2,2] {1.0, 2.0, 3.0, 4.0}> () m "
        "= Mul(t, k) y = Add(m, x)"
    )
    check_body(body, "float[N,4,2,2] y", "float[N,4,2,2] x")


def test_expand_before_a_product_disappears() -> None:
    body = "m = GlobalAveragePool(x) s = Shape(x) e = Expand(m, s) y = Mul(x, e)"
    assert ops(check_body(body, SAME)) == ["ReduceMean", "Mul"]


def test_channels_last_file_stays_as_it_is() -> None:
    """A file with NHWC input that transposes to NCHW and back: no Transpose is left, the input is not reordered."""
    body = (
        "t = Transpose <perm = [0, 3, 1, 2]> (x) c = Conv <kernel_shape = [1, 1]> (t, w) y = Transpose <perm "
        "= [0, 2, 3, 1]> (c)"
    )
    forward = check_body(body, "float[N,4,6,3] y", "float[N,4,6,5] x", w=(3, 5, 1, 1))
    assert ops(forward) == ["Conv"]
    assert (forward.input_orders, forward.output_order) == ([(0, 1, 2, 3)], (0, 1, 2, 3))


@pytest.mark.parametrize("opset", [11, 13, 17, 18])
def test_old_opsets(opset: int) -> None:
    axes = "a = Constant <value_ints = [2, 3]> ()"
    squeeze = "Squeeze <axes = [2, 3]> (g)" if opset < 13 else "Squeeze(g, a)"
    body = f"{axes if opset >= 13 else ''} c = Conv(x, w) r = Relu(c) g = GlobalAveragePool(r) y = {squeeze}"
    assert ops(check_body(body, "float[N,3] y", opset=opset, w=(3, 4, 3, 3))) == ["Conv", "ReduceMean", "Reshape"]


def test_batchnorm_behind_a_convolution_folds_with_its_bias() -> None:
    body = "c = Conv(x, w, b) n = BatchNormalization(c, pg, e, m, pv) y = Relu(n)"
    forward = check_body(body, "float[N,3,4,3] y", w=(3, 4, 3, 3), b=(3,), pg=(3,), e=(3,), m=(3,), pv=(3,))
    assert ops(forward) == ["BatchNormFold", "Conv"]
    assert [v.name if v else None for v in next(iter(forward.model.graph)).inputs] == ["pg", "e", "m", "pv", "b"]


def test_batchnorm_stands_alone_if_the_convolution_has_other_readers() -> None:
    body = "c = Conv(x, w) n = BatchNormalization(c, pg, e, m, pv) y = Add(n, c)"
    forward = check_body(body, "float[N,3,4,3] y", w=(3, 4, 3, 3), pg=(3,), e=(3,), m=(3,), pv=(3,))
    assert sorted(ops(forward)) == ["Add", "Affine", "BatchNormFold", "Conv"]


def test_activation_stands_alone_if_the_sum_before_it_has_other_readers() -> None:
    body = "c = Conv(x, w) r = Relu(c) y = Add(r, c)"
    assert ops(check_body(body, "float[N,3,4,3] y", w=(3, 4, 3, 3))) == ["Conv", "Affine", "Add"]


def test_every_unsupported_operator_is_listed(tmp_path: Path) -> None:
    body = (
        "a = Softplus(x) b = Relu(a) c = Elu(b) s = Constant <value_ints = [2]> () z = Constant <value_ints "
        "= [0]> () e = Constant <value_ints = [9]> () y = Slice(c, z, e, s, s)"
    )
    path = save(onnx_model(body, X4, "float[N,4,3,5] y"), tmp_path)
    with pytest.raises(UnsupportedOpError) as caught:
        build_forward(load_onnx(path))
    assert [(name, op) for name, op, _ in caught.value.nodes] == [
        ("Softplus_0", "Softplus"),
        ("Elu_2", "Elu"),
        ("Slice_6", "Slice"),
    ]
    assert caught.value.nodes[0][2] == "[N,4,6,5]"
    assert "steps [2]" in str(caught.value) and "3 operators" in str(caught.value)


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("y = Transpose <perm = [1, 0, 2, 3]> (x)", "batch"),
        ("y = Softmax <axis = 0> (x)", "batch"),
        ("y = Concat <axis = 0> (x, x)", "batch"),
        ("s = Size(x) f = Cast <to = 1> (s) y = Mul(x, f)", "batch"),
        ('k = Constant <value_ints = [0, 0, 1, 0, 0, 0, 1, 0]> () y = Pad <mode = "reflect"> (x, k)', "reflect"),
    ],
)
def test_what_cannot_be_trained_says_why(body: str, what: str, tmp_path: Path) -> None:
    inputs = X4 + (", float[N,4,5,6] x2" if "x2" in body else "")
    path = save(onnx_model(body, inputs, "float[a,b,c,d] y"), tmp_path)
    with pytest.raises(UnsupportedOpError, match=what):
        build_forward(load_onnx(path), classes_last=True)
