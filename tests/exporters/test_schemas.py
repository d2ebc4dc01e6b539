"""The operator table is what ONNX's checker uses, what the gradient rules emit, and what the documentation shows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from edge_razor.exporters.gradients import RULES
from edge_razor.exporters.graph_edit import DOMAIN
from edge_razor.exporters.schemas import OPERATORS, Operator, markdown, register
from tests.reference import graph_backward

DOCS = Path(__file__).parents[2] / "docs"


def check(node: onnx.NodeProto, types: dict[str, int]) -> None:
    """Runs ONNX's checker on a graph of one node."""
    inputs = [helper.make_tensor_value_info(n, types.get(n, TensorProto.FLOAT), [n]) for n in node.input]
    outputs = [helper.make_tensor_value_info(n, types.get(n, TensorProto.FLOAT), [n]) for n in node.output]
    graph = helper.make_graph([node], "g", inputs, outputs)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(model, full_check=True)


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda o: o.name)
def test_checker_accepts_a_full_node_of_every_operator(operator: Operator) -> None:
    types = {o.name: TensorProto.UINT8 for o in (*operator.inputs, *operator.outputs) if o.type == "U"}
    types |= {o.name: TensorProto.INT64 for o in operator.inputs if o.type in ("L", "I")}
    values = {"ints": [1, 1], "int": 1, "float": 0.5, "string": "conv"}
    attributes = {a.name: values[a.kind] if a.default is None else a.default for a in operator.attributes}
    inputs, outputs = [o.name for o in operator.inputs], [o.name for o in operator.outputs]
    check(helper.make_node(operator.name, inputs, outputs, domain=DOMAIN, **attributes), types)


@pytest.mark.parametrize(
    "node,message",
    [
        (helper.make_node("Conv", ["X"], ["Y"], domain=DOMAIN), "input size 1 not in range"),
        (helper.make_node("Conv", ["X", "W"], ["Y"], domain=DOMAIN, stride=[1, 1]), "Unrecognized attribute: stride"),
        (helper.make_node("MulGrad", ["X", "dY"], ["dB"], domain=DOMAIN), "Required attribute 'reduce' is missing"),
        (helper.make_node("MulGrad", ["X", "dY"], ["dB"], domain=DOMAIN, reduce=1), "attribute type.*reduce"),
        (helper.make_node("Pack", ["X"], ["a", "b"], domain=DOMAIN), "output size 2 not in range"),
    ],
)
def test_checker_refuses_wrong_nodes(node: onnx.NodeProto, message: str) -> None:
    with pytest.raises((onnx.checker.ValidationError, onnx.shape_inference.InferenceError), match=message):
        check(node, {})


def test_registering_again_has_no_effect() -> None:
    register()
    register()
    assert onnx.defs.get_schema("Conv", 1, DOMAIN).doc


def test_every_gradient_rule_is_for_an_operator_of_the_table_or_of_onnx() -> None:
    names = {o.name for o in OPERATORS}
    for domain, op_type in RULES:
        assert op_type in names if domain == DOMAIN else onnx.defs.has(op_type)


def test_the_reference_knows_every_operator_of_the_table() -> None:
    assert {o.name for o in OPERATORS} <= set(graph_backward.OPERATORS)


def test_documentation_is_up_to_date() -> None:
    """Regenerate with: python -m edge_razor.exporters.schemas > docs/operators.md"""
    assert (DOCS / "operators.md").read_text() == markdown()


def test_training_graph_document_names_every_operator() -> None:
    text = (DOCS / "training-graph.md").read_text()
    assert [o.name for o in OPERATORS if f"`{o.name}`" not in text] == []


def test_torch_export_still_works_after_the_operators_are_registered() -> None:
    # onnx.reference refuses to be imported once two domains share an operator's name, and onnxscript imports it.
    code = "from edge_razor.exporters.schemas import register; register(); import onnxscript"
    subprocess.run([sys.executable, "-c", code], check=True)
