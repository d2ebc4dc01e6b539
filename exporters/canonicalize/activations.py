"""Activations in any spelling → one ``Affine`` node with an ``activation`` attribute.

A chain of elementwise operators with scalar constants is a function of one number, so it is recognized by its values:
x·sigmoid(x), Mul(x, Div(Clip(Add(x, 3), 0, 6), 6)) or GELU written with Erf in any order of factors are found without a
pattern for each spelling. The values are compared in float64 on a grid where any two activations of the table differ by
far more than the tolerance (the closest pair, GELU and its tanh form, differs by 4.7e-4).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from edge_razor.exporters.graph_edit import (
    DOMAIN,
    array,
    bypass,
    dims,
    is_constant,
    make_node,
    number,
    remove_dead,
    replace,
    text,
)

Array = np.ndarray
_FAR = 1.0e4
_GRID = np.concatenate([np.linspace(-12.0, 12.0, 193), [-_FAR, _FAR]])
# Constants in graphs are float32, so a spelling may be off by their rounding.
_TOLERANCE = 3.0e-6
_MAX_DEPTH = 12
_FLOAT_MAX = float(np.finfo(np.float32).max)

_erf = np.vectorize(math.erf, otypes=[np.float64])


def _sigmoid(x: Array) -> Array:
    with np.errstate(over="ignore"):
        return 1.0 / (1.0 + np.exp(-x))


def _gelu_tanh(x: Array) -> Array:
    return 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


# Activations without parameters: name → definition (docs/training-graph.md).
_FIXED: dict[str, Callable[[Array], Array]] = {
    "relu": lambda x: np.maximum(x, 0.0),
    "sigmoid": _sigmoid,
    "tanh": np.tanh,
    "silu": lambda x: x * _sigmoid(x),
    "hardswish": lambda x: x * np.clip(x + 3.0, 0.0, 6.0) / 6.0,
    "gelu": lambda x: 0.5 * x * (1.0 + _erf(x / math.sqrt(2.0))),
    "gelu_tanh": _gelu_tanh,
}


def _clip(node: ir.Node, x: Array, low: Array | None = None, high: Array | None = None) -> Array:
    x = x if low is None else np.maximum(x, low)
    return x if high is None else np.minimum(x, high)


# Standard operators → their values; operands are numbers or arrays over the grid.
_EVALUATE: dict[str, Callable[..., Array]] = {
    "Add": lambda node, a, b: a + b,
    "Sub": lambda node, a, b: a - b,
    "Mul": lambda node, a, b: a * b,
    "Div": lambda node, a, b: a / b,
    "Pow": lambda node, a, b: np.power(a, b),
    "Neg": lambda node, a: -a,
    "Exp": lambda node, a: np.exp(a),
    "Abs": lambda node, a: np.abs(a),
    "Min": lambda node, a, b: np.minimum(a, b),
    "Max": lambda node, a, b: np.maximum(a, b),
    "Relu": lambda node, a: np.maximum(a, 0.0),
    "Clip": _clip,
    "Sigmoid": lambda node, a: _sigmoid(a),
    "Tanh": lambda node, a: np.tanh(a),
    "Erf": lambda node, a: _erf(a),
    "LeakyRelu": lambda node, a: np.where(a >= 0.0, a, number(node, "alpha", 0.01) * a),
    "HardSigmoid": lambda node, a: np.clip(number(node, "alpha", 0.2) * a + number(node, "beta", 0.5), 0.0, 1.0),
    "HardSwish": lambda node, a: _FIXED["hardswish"](a),
    "Gelu": lambda node, a: _FIXED["gelu_tanh" if text(node, "approximate", "none") == "tanh" else "gelu"](a),
    "Swish": lambda node, a: a * _sigmoid(number(node, "alpha", 1.0) * a),
    "Mish": lambda node, a: a * np.tanh(np.log1p(np.exp(a))),
}


def recognize(values: Array, grid: Array = _GRID) -> tuple[str, float, float] | None:
    """The activation whose values on ``grid`` these are: (name, alpha, beta), ("none", 0, 0) for the identity; None if
    unknown."""

    def same(candidate: Array) -> bool:
        return bool(np.all(np.abs(values - candidate) <= _TOLERANCE * np.maximum(1.0, np.abs(candidate))))

    if values.shape != grid.shape or not np.all(np.isfinite(values)):
        return None
    if same(grid):
        return "none", 0.0, 0.0
    for name, function in _FIXED.items():
        if same(function(grid)):
            return name, 0.0, 0.0
    low, high, at_zero = float(values[-2]), float(values[-1]), float(np.interp(0.0, grid[:-2], values[:-2]))
    if low < high and same(np.clip(grid, low, high)):
        return "clip", -_FLOAT_MAX if low <= -_FAR else low, _FLOAT_MAX if high >= _FAR else high
    slope = low / -_FAR
    if 0.0 < slope < 1.0 and same(np.where(grid > 0.0, grid, slope * grid)):
        return "leaky_relu", slope, 0.0
    if 0.0 < at_zero < 1.0:
        # Two neighbours of zero on the grid lie on the line unless the slope is steeper than the grid is fine.
        middle = len(grid[:-2]) // 2
        alpha = float((values[middle + 1] - values[middle]) / (grid[middle + 1] - grid[middle]))
        if alpha > 0.0 and same(np.clip(alpha * grid + at_zero, 0.0, 1.0)):
            return "hardsigmoid", alpha, at_zero
    return None


def canonicalize_activations(model: ir.Model) -> ir.Model:
    """See module docstring. Larger patterns are found first; identities (``x * 1``) disappear."""
    graph = model.graph
    for node in reversed(list(graph)):
        output = node.outputs[0] if node.outputs else None
        if output is None or not (output.uses() or output.is_graph_output()):
            continue
        if node.domain or node.op_type not in _EVALUATE:
            continue
        for base in _candidates(node):
            values = _evaluate(node, base)
            found = recognize(values) if values is not None else None
            if found is None:
                continue
            name, alpha, beta = found
            if name == "none":
                bypass(node, base)
            else:
                attributes = activation_attributes(name, alpha, beta)
                replace(
                    node, [make_node("Affine", [base], attributes, domain=DOMAIN, shapes=[dims(output)], like=node)]
                )
            break
    remove_dead(graph)
    return model


def activation_attributes(name: str, alpha: float, beta: float) -> dict[str, str | float]:
    """Attributes ``activation``, ``alpha``, ``beta`` of a node, the last two only where the activation has them."""
    attributes: dict[str, str | float] = {"activation": name}
    if name in ("clip", "leaky_relu", "hardsigmoid"):
        attributes["alpha"] = alpha
    if name in ("clip", "hardsigmoid"):
        attributes["beta"] = beta
    return attributes


def _is_scalar(value: ir.Value) -> bool:
    return is_constant(value) and value.const_value is not None and value.const_value.size == 1


def _candidates(node: ir.Node) -> list[ir.Value]:
    """Values that ``node`` may be a function of: ancestors through elementwise operators, the farthest first."""
    shape = dims(node.outputs[0])
    found: dict[ir.Value, int] = {}
    frontier = [node]
    for depth in range(_MAX_DEPTH):
        reached = []
        for current in frontier:
            for value in current.inputs:
                if value is None or _is_scalar(value):
                    continue
                found[value] = depth
                producer = value.producer()
                if producer is not None and not producer.domain and producer.op_type in _EVALUATE:
                    reached.append(producer)
        frontier = list(dict.fromkeys(reached))
    ordered = sorted(found, key=lambda value: -found[value])
    return [value for value in ordered if value.dtype == ir.DataType.FLOAT and dims(value) == shape]


def _evaluate(node: ir.Node, base: ir.Value) -> Array | None:
    """Values of the output of ``node`` over the grid of ``base``; None if it depends on anything else."""
    known: dict[ir.Value, Array | None] = {base: _GRID}

    def value_of(value: ir.Value, depth: int) -> Array | None:
        if value in known:
            return known[value]
        if _is_scalar(value):
            data = array(value)
            assert data is not None
            result: Array | None = data.astype(np.float64).reshape(()) if data.dtype.kind == "f" else None
        else:
            producer = value.producer()
            result = None
            if producer is not None and not producer.domain and producer.op_type in _EVALUATE and depth < _MAX_DEPTH:
                result = apply(producer, depth + 1)
        known[value] = result
        return result

    def apply(current: ir.Node, depth: int) -> Array | None:
        operands: list[Array | None] = []
        for value in current.inputs:
            operand = None if value is None else value_of(value, depth)
            if operand is None and value is not None:
                return None
            operands.append(operand)
        try:
            return _EVALUATE[current.op_type](current, *operands)
        except TypeError:
            return None  # more operands than the table's two (Min and Max are variadic)

    with np.errstate(all="ignore"):
        return apply(node, 0)
