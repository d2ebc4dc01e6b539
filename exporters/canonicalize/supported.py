"""The check that nothing unknown is left after canonicalization."""

from __future__ import annotations

import onnx_ir as ir

from edge_razor.errors import UnsupportedOpError
from edge_razor.exporters.graph_edit import DOMAIN, shape_text

_STANDARD = (
    "Add Sub Mul Div Neg Concat Split Slice Transpose Pad Reshape Softmax ReduceMean ReduceSum BatchNormalization"
).split()
_RAZOR = (
    "Conv Linear Affine MaxPool AveragePool Dropout LayerNorm Attention ExpandBatch Embedding Rotary BatchMatMul "
    "SelectPosition"
).split()


def check_supported(model: ir.Model) -> None:
    """Raises UnsupportedOpError that lists every node that is not known, with name, type, input shapes and, where a
    pass has said so, the reason."""
    unknown, lines = [], []
    for node in model.graph:
        known = node.op_type in (_STANDARD if not node.domain else _RAZOR if node.domain == DOMAIN else ())
        why = node.meta.get("why") or _wrong_type(node)
        if known and not why:
            continue
        shapes = ", ".join(shape_text(value) for value in node.inputs)
        op = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        unknown.append((str(node.name), op, shapes))
        lines.append(f"{node.name}: {op}({shapes})" + (f": {why}" if why else ""))
    if unknown:
        count = "1 operator" if len(unknown) == 1 else f"{len(unknown)} operators"
        raise UnsupportedOpError(f"{count} of the model cannot be trained: " + "; ".join(lines), tuple(unknown))


def _wrong_type(node: ir.Node) -> str:
    if node.op_type == "BatchNormalization":
        if node.attributes.get_int("training_mode", 0):
            return "it uses batch statistics; only frozen running statistics are known"
        if any(v is not None and v.producer() is not None for v in node.inputs[1:]):
            return "its statistics are computed"
    for value in node.outputs:
        if value.dtype is not None and value.dtype != ir.DataType.FLOAT:
            return f"its result is {value.dtype.name}, not float32"
    return ""
