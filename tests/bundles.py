"""A small hand-made bundle: a linear classifier in both graphs, for tests that handle bundles as files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from edge_razor.bundle import write_bundle


def external(name: str, dims: list[int]) -> TensorProto:
    """A float initializer whose data are elsewhere, as the exporter hands it over."""
    tensor = TensorProto(name=name, dims=dims, data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "weights.safetensors"
    return tensor


def linear_manifest(features: int = 6, classes: int = 3) -> dict[str, Any]:
    return {
        "producer": "edge-razor tests",
        "inputs": [{"name": "input", "dtype": "float32", "shape": [None, features], "perm": [0, 1]}],
        "output": {"name": "logits", "shape": [None, classes], "perm": [0, 1]},
        "loss": {"name": "cross_entropy", "label_smoothing": 0.0},
        "trainable": {"spec": "all", "parameters": ["fc.weight", "fc.bias"]},
        "state_dict": ["fc.weight", "fc.bias", "steps", "tied.weight"],
        "aliases": {"tied.weight": "fc.weight"},
        "classes": None,
        "preprocessing": None,
    }


def linear_tensors(features: int = 6, classes: int = 3, seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {
        "fc.weight": generator.standard_normal((classes, features), dtype=np.float32),
        "fc.bias": generator.standard_normal(classes, dtype=np.float32),
        "steps": np.array(7, dtype=np.int64),
    }


def linear_models(features: int = 6, classes: int = 3) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """Training graph and inference graph of `logits = input · fc.weightᵀ + fc.bias` with cross-entropy."""

    def value(name: str, shape: list[Any], kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, shape)

    def node(op: str, inputs: list[str], outputs: list[str], phase: str, **attributes: Any) -> onnx.NodeProto:
        made = helper.make_node(op, inputs, outputs, name=f"{phase}/{op}", domain="ai.edge_razor", **attributes)
        for key, text in (("phase", phase), ("layer", "fc")):
            entry = made.metadata_props.add()
            entry.key, entry.value = key, text
        return made

    parameters = [external("fc.weight", [classes, features]), external("fc.bias", [classes])]
    training = helper.make_graph(
        [
            node("Linear", ["input", "fc.weight", "", "fc.bias"], ["logits"], "forward", transW=1),
            node("CrossEntropyLoss", ["logits", "target"], ["loss", "dlogits"], "loss", label_smoothing=0.0),
            node("ChannelSum", ["dlogits"], ["grad/fc.bias"], "backward"),
            node(
                "LinearGradWeight",
                ["input", "dlogits"],
                ["grad/fc.weight"],
                "backward",
                transW=1,
                weight_shape=[classes, features],
            ),
        ],
        "training",
        [value("input", ["N", features]), value("target", ["N"], TensorProto.INT64)],
        [
            value("logits", ["N", classes]),
            value("loss", []),
            value("grad/fc.weight", [classes, features]),
            value("grad/fc.bias", [classes]),
        ],
        parameters,
        value_info=[value("dlogits", ["N", classes])],
    )
    inference = helper.make_graph(
        [helper.make_node("Gemm", ["input", "fc.weight", "fc.bias"], ["logits"], name="fc", transB=1)],
        "inference",
        [value("input", ["N", features])],
        [value("logits", ["N", classes])],
        parameters,
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("ai.edge_razor", 1)]
    return (
        helper.make_model(training, opset_imports=opsets, ir_version=10),
        helper.make_model(inference, opset_imports=opsets[:1], ir_version=10),
    )


def write_linear_bundle(path: Path, features: int = 6, classes: int = 3, **changes: Any) -> Path:
    """Writes the bundle; `changes` replace fields of its manifest."""
    training, inference = linear_models(features, classes)
    return write_bundle(
        path,
        training,
        inference,
        linear_tensors(features, classes),
        {**linear_manifest(features, classes), **changes},
    )
