"""Training graphs that break the contract are refused with the node's name, never planned and never a crash."""

from __future__ import annotations

from collections.abc import Callable

import onnx
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from edge_razor.errors import BundleError, EdgeRazorError, PlanError
from edge_razor.planner.context import collapse
from edge_razor.planner.planning import plan_graph
from edge_razor.planner.search import Search

from .conftest import graph_of, settings
from .networks import Built, Network
from .test_execution import transformer


def first(model: onnx.ModelProto, op: str) -> onnx.NodeProto:
    return next(n for n in model.graph.node if n.op_type == op)


def attribute(node: onnx.NodeProto, name: str, value: object) -> None:
    kept = [a for a in node.attribute if a.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, onnx.helper.make_attribute(name, value)])


def dim(model: onnx.ModelProto, name: str, axis: int, value: int | str) -> None:
    infos = (*model.graph.value_info, *model.graph.input, *model.graph.output)
    entry = next(v for v in infos if v.name == name).type.tensor_type.shape.dim[axis]
    if isinstance(value, str):
        entry.dim_param = value
    else:
        entry.dim_value = value


BREAKS: dict[str, Callable[[onnx.ModelProto], object]] = {
    "unknown operator": lambda m: setattr(first(m, "Conv"), "op_type", "Convolve"),
    "unknown domain": lambda m: setattr(first(m, "Conv"), "domain", "com.example"),
    "no phase": lambda m: first(m, "Conv").ClearField("metadata_props"),
    "undefined input": lambda m: first(m, "Add").input.__setitem__(0, "nowhere"),
    "value defined twice": lambda m: first(m, "Add").output.__setitem__(0, first(m, "Conv").output[0]),
    "strides of zero": lambda m: attribute(first(m, "Conv"), "strides", [0, 1]),
    "three strides": lambda m: attribute(first(m, "Conv"), "strides", [1, 1, 1]),
    "strides as text": lambda m: attribute(first(m, "Conv"), "strides", "fast"),
    "group that does not divide": lambda m: attribute(first(m, "Conv"), "group", 5),
    "negative pads": lambda m: attribute(first(m, "Conv"), "pads", [-1, 0, 0, 0]),
    "unknown activation": lambda m: attribute(first(m, "Conv"), "activation", "snake"),
    "wrong output size": lambda m: dim(m, first(m, "Conv").output[0], 1, 99),
    "symbolic inner dimension": lambda m: dim(m, first(m, "Conv").output[0], 1, "H"),
    "batch dimension of another name": lambda m: dim(m, first(m, "Conv").output[0], 0, "batch"),
    "empty dimension": lambda m: dim(m, first(m, "Conv").output[0], 3, 0),
    "huge dimension": lambda m: dim(m, first(m, "Conv").output[0], 1, 2**50),
    "axis outside": lambda m: attribute(first(m, "ReduceGrad"), "axes", [7]),
    "wrong weight shape": lambda m: attribute(first(m, "ConvGradWeight"), "weight_shape", [1, 2, 3, 4]),
    "wrong input shape": lambda m: attribute(first(m, "ConvGradWeight"), "input_shape", [1, 2, 3]),
    "missing attribute": lambda m: first(m, "ConvGradWeight").ClearField("attribute"),
    "kept value as tensor": lambda m: first(m, "Add").input.__setitem__(0, first(m, "Pack").output[0]),
    "tensor as kept value": lambda m: first(m, "ActivationGrad").input.__setitem__(1, "input"),
    "gradient of nothing": lambda m: m.graph.output.append(
        onnx.helper.make_tensor_value_info("grad/nothing", onnx.TensorProto.FLOAT, [1])
    ),
    "no loss": lambda m: m.graph.output.remove(next(o for o in m.graph.output if o.name == "loss")),
    "no target": lambda m: m.graph.input.pop(),
    "newer operators": lambda m: setattr(next(o for o in m.opset_import if o.domain), "version", 2),
    "missing output": lambda m: first(m, "Add").output.__setitem__(0, ""),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_graph_is_a_bundle_error(mobile: tuple[Network, Built], name: str) -> None:
    built = mobile[1]
    model = onnx.load_model_from_string(built.training)
    BREAKS[name](model)
    with pytest.raises(BundleError, match="training graph|bundle.json"):
        plan_graph(model.SerializeToString(), built.manifest, settings(), None)


TRANSFORMER_BREAKS: dict[str, Callable[[onnx.ModelProto], object]] = {
    "heads that do not divide": lambda m: attribute(first(m, "Attention"), "heads", 3),
    "no heads": lambda m: attribute(first(m, "Attention"), "heads", 0),
    "kv_heads that do not divide": lambda m: attribute(first(m, "Attention"), "kv_heads", 3),
    "scale as text": lambda m: attribute(first(m, "Attention"), "scale", "large"),
    "infinite scale": lambda m: attribute(first(m, "AttentionGrad"), "scale", float("inf")),
    "ratio of one": lambda m: attribute(first(m, "Attention"), "ratio", 1.0),
    "causal of two": lambda m: attribute(first(m, "Attention"), "causal", 2),
    "K of another width": lambda m: first(m, "Attention").input.__setitem__(1, first(m, "Attention").input[0]),
    "key mask of another shape": lambda m: first(m, "Attention").input.append(first(m, "Linear").output[0]),
    "bias of another shape": lambda m: first(m, "Attention").input.extend(["", first(m, "Linear").output[0]]),
    "K and V kept for something else": lambda m: first(m, "AttentionGrad").input.__setitem__(
        1, next(n for n in m.graph.node if n.op_type == "Pack" and "attention" not in n.output[0]).output[0]
    ),
    "dY of another shape": lambda m: first(m, "AttentionGrad").input.__setitem__(5, first(m, "Slice").output[0]),
    "rms of two": lambda m: attribute(first(m, "LayerNorm"), "rms", 2),
    "negative epsilon": lambda m: attribute(first(m, "LayerNorm"), "epsilon", -1.0),
    "gamma of another length": lambda m: first(m, "LayerNorm").input.__setitem__(
        1, next(t.name for t in m.graph.initializer if list(t.dims) == [32])
    ),
    "rstd of another shape": lambda m: first(m, "LayerNormGrad").input.__setitem__(2, first(m, "Linear").output[0]),
    "a token of another width": lambda m: dim(m, first(m, "ExpandBatch").output[0], 2, 17),
}


@pytest.mark.parametrize("sparsity", [0.0, 0.9])
@pytest.mark.parametrize("name", TRANSFORMER_BREAKS)
def test_a_broken_transformer_is_a_bundle_error(name: str, sparsity: float) -> None:
    built = transformer(Network((9, 7, 3)))
    model = onnx.load_model_from_string(built.training)
    plan_graph(model.SerializeToString(), built.manifest, settings(sparsity=sparsity), None)
    TRANSFORMER_BREAKS[name](model)
    with pytest.raises(BundleError, match="training graph"):
        plan_graph(model.SerializeToString(), built.manifest, settings(sparsity=sparsity), None)


def test_a_part_of_a_transformer_computes_no_more_than_it_needs() -> None:
    """With only the last norm's scale, nothing of attention is kept or differentiated."""
    net = Network((9, 7, 3))
    built = transformer(net)
    graph = graph_of(built).restricted([n for n in built.parameters if n.startswith("norm")][-2:-1])
    assert {n.op for n in graph.nodes if n.phase == "backward"} & {"LayerNormGrad", "AttentionGrad"} == {
        "LayerNormGrad"
    }
    candidate = Search(graph, settings(sparsity=0.0)).candidate(0.0, 8)
    (step,) = [s for s in candidate.train.steps if s.kernel == "layer_norm_grad"]
    assert [o is not None for o in step.operands[4:7]] == [False, True, False]


@pytest.mark.parametrize("data", [b"", b"not onnx", b"\x00" * 100])
def test_what_is_no_onnx_is_a_bundle_error(mobile: tuple[Network, Built], data: bytes) -> None:
    with pytest.raises(BundleError):
        plan_graph(data, mobile[1].manifest, settings(), None)


@hypothesis_settings(max_examples=150, deadline=None, print_blob=True)
@given(st.data())
def test_altered_bytes_are_planned_or_refused_but_never_crash(
    mobile: tuple[Network, Built], data: st.DataObject
) -> None:
    built = mobile[1]
    changed = bytearray(built.training)
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    try:
        plan_graph(bytes(changed), built.manifest, settings(sparsity=0.9, micro_batch=1), None)
    except EdgeRazorError:
        pass


def test_a_parameter_wanted_in_two_layouts_is_a_plan_error() -> None:
    net = Network((1, 1, 4))
    x = net.linear(net.reshape(net.input, (4,)), 4, bias=False)
    weight = net.graph.initializers[next(iter(net.parameters))]
    y = net.binary("Mul", net.reshape(x, (1, 4)), weight)
    built = net.build(net.mean(y, (1,)))
    with pytest.raises(PlanError, match="different layouts"):
        plan_graph(built.training, built.manifest, settings(), None)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.data())
def test_collapsing_dimensions_walks_the_same_elements_in_the_same_order(dims: list[int], data: st.DataObject) -> None:
    strides = [data.draw(st.lists(st.integers(0, 8), min_size=len(dims), max_size=len(dims))) for _ in range(2)]

    def walk(extents: list[int], steps: list[int]) -> list[int]:
        offsets = [0]
        for extent, step in zip(extents, steps, strict=True):
            offsets = [o + i * step for o in offsets for i in range(extent)]
        return offsets

    fewer, shorter = collapse(dims, *strides)
    assert len(fewer) <= len(dims)
    for before, after in zip(strides, shorter, strict=True):
        assert walk(dims, before) == walk(fewer, after)
