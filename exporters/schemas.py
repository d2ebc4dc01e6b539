"""Schemas of the operators of domain ``ai.edge_razor``, in one table; docs/operators.md is generated from it.

Importing registers them with ONNX, so that ``onnx.checker`` accepts training graphs.
``python -m edge_razor.exporters.schemas`` prints the Markdown table.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx
from onnx.defs import OpSchema

from edge_razor.exporters.graph_edit import DOMAIN

__all__ = ["OPERATORS", "Attribute", "Operand", "Operator", "markdown", "register"]

FLOAT, KEPT, EITHER, INDEX, ONLY_INDEX = "T", "U", "K", "L", "I"
EITHER_KEY, EITHER_VALUE = "K2", "K3"  # of operands that are kept independently of the first
TYPES = {
    FLOAT: (["tensor(float)"], "float32"),
    KEPT: (["tensor(uint8)"], "kept bytes"),
    EITHER: (["tensor(float)", "tensor(uint8)"], "float32, or kept bytes"),
    EITHER_KEY: (["tensor(float)", "tensor(uint8)"], "float32, or kept bytes"),
    EITHER_VALUE: (["tensor(float)", "tensor(uint8)"], "float32, or kept bytes"),
    INDEX: (["tensor(int64)", "tensor(float)"], "class index, or float32 target"),
    ONLY_INDEX: (["tensor(int64)"], "index"),
}


@dataclass(frozen=True)
class Operand:
    """An input or output; ``shape`` is documentation."""

    name: str
    shape: str = ""
    type: str = FLOAT
    optional: bool = False


@dataclass(frozen=True)
class Attribute:
    """An attribute; required if it has no default."""

    name: str
    default: int | float | str | list[int] | None = None
    kind: str = "ints"


@dataclass(frozen=True)
class Operator:
    """One operator of the domain."""

    name: str
    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    attributes: tuple[Attribute, ...]
    doc: str


def _opt(name: str, shape: str = "") -> Operand:
    return Operand(name, shape, optional=True)


ACT = (Attribute("activation", "none", "string"), Attribute("alpha", 0.0, "float"), Attribute("beta", 0.0, "float"))
CONV = (
    Attribute("strides", [1, 1]),
    Attribute("pads", [0, 0, 0, 0]),
    Attribute("dilations", [1, 1]),
    Attribute("group", 1, "int"),
)
POOL = (Attribute("kernel_shape"), Attribute("strides", [1, 1]), Attribute("pads", [0, 0, 0, 0]))
AVERAGE = (*POOL, Attribute("count_include_pad", 0, "int"), Attribute("ceil_mode", 0, "int"))
MAX = (*POOL, Attribute("dilations", [1, 1]))
TRANS = (Attribute("transW", 1, "int"),)
COLUMNS = (Attribute("layout", kind="string"), *TRANS)
INPUT_SHAPE, WEIGHT_SHAPE = Attribute("input_shape"), Attribute("weight_shape")
EPSILON = (Attribute("epsilon", 1e-5, "float"),)
ATTENTION = (
    Attribute("heads", kind="int"),
    Attribute("kv_heads", kind="int"),
    Attribute("scale", kind="float"),
    Attribute("causal", 0, "int"),
    Attribute("ratio", 0.0, "float"),
    Attribute("stream", 0, "int"),
)
POSITION = (Attribute("kind", kind="string"), Attribute("number", kind="int"))
RMS = (Attribute("rms", 0, "int"),)
DROPOUT = (Attribute("ratio", 0.5, "float"), Attribute("stream", 0, "int"))
X, Y, DY, DX, W = Operand("X"), Operand("Y"), Operand("dY"), Operand("dX"), Operand("W")
PACKED_X = Operand("X", "or kept(X)", EITHER)
KEPT_OUT, KEPT_IN = Operand("kept", "", KEPT, optional=True), Operand("kept", "", KEPT)
SCALE, SHIFT = _opt("scale", "[O]"), _opt("shift", "[O]")
LOSS = (Operand("loss", "scalar"), Operand("dprediction"))

OPERATORS = (
    Operator(
        "Conv",
        (Operand("X", "[N,H,W,C]"), Operand("W", "[O,C/g,kh,kw]"), SCALE, SHIFT),
        (Operand("Y", "[N,OH,OW,O]"), KEPT_OUT),
        (*CONV, *ACT),
        "Y = act(scale·conv(X,W) + shift); pads are top, left, bottom, right",
    ),
    Operator(
        "ConvGradInput",
        (DY, W, SCALE),
        (DX,),
        (*CONV, INPUT_SHAPE),
        "gradient of scale·conv(X,W) for X; input_shape is [H,W,C]",
    ),
    Operator(
        "ConvGradWeight",
        (PACKED_X, DY),
        (Operand("G", "[O,C/g,kh,kw]"),),
        (*CONV, INPUT_SHAPE, WEIGHT_SHAPE),
        "Σ over positions of X·dY, not multiplied by scale",
    ),
    Operator(
        "Linear",
        (Operand("X", "[…,C]"), Operand("W", "[O,C], or [C,O] if transW = 0"), SCALE, SHIFT),
        (Operand("Y", "[…,O]"), KEPT_OUT),
        (*TRANS, *ACT),
        "Y = act(scale·X·Wᵀ + shift)",
    ),
    Operator("LinearGradInput", (DY, W, SCALE), (DX,), TRANS, "gradient of scale·X·Wᵀ for X"),
    Operator(
        "LinearGradWeight",
        (PACKED_X, DY),
        (Operand("G", "as W"),),
        (*TRANS, WEIGHT_SHAPE),
        "Σ over rows of X·dY, not multiplied by scale",
    ),
    Operator(
        "Affine",
        (Operand("X", "[…,C]"), _opt("scale", "[C]"), _opt("shift", "[C]")),
        (Y, KEPT_OUT),
        ACT,
        "Y = act(scale·X + shift); with neither, an activation alone",
    ),
    Operator("ActivationGrad", (DY, KEPT_IN), (DX,), ACT, "dY times the activation's derivative"),
    Operator(
        "BatchNormFold",
        (_opt("gamma", "[C]"), _opt("beta", "[C]"), Operand("mean", "[C]"), Operand("var", "[C]"), _opt("bias", "[C]")),
        (Operand("scale", "[C]"), Operand("shift", "[C]")),
        EPSILON,
        "scale = gamma/√(var+ε), shift = beta + (bias − mean)·scale",
    ),
    Operator(
        "BatchNormGrad",
        (
            Operand("dot", "[C]"),
            Operand("dshift", "[C]"),
            Operand("mean", "[C]"),
            Operand("var", "[C]"),
            _opt("bias", "[C]"),
        ),
        (Operand("dgamma", "[C]"),),
        EPSILON,
        "dgamma = (dot + (bias − mean)·dshift)/√(var+ε); dot is the gradient of scale",
    ),
    Operator(
        "ColumnDot",
        (W, Operand("G", "as W")),
        (Operand("dot", "[O]"),),
        COLUMNS,
        "dot[o] = Σ W[o,…]·G[o,…]; layout is conv or linear",
    ),
    Operator(
        "ScaleColumns",
        (Operand("G"), Operand("scale", "[O]")),
        (Operand("dW", "as G"),),
        COLUMNS,
        "dW[o,…] = scale[o]·G[o,…]",
    ),
    Operator("ChannelSum", (DY,), (Operand("sum", "[C]"),), (), "sum over all but the last dimension"),
    Operator(
        "MulGrad",
        (PACKED_X, DY),
        (Operand("dB", "[N,1,…,C] or [C]"),),
        (Attribute("reduce", kind="string"),),
        "Σ X·dY over the rows (reduce = samples) or rows and samples (reduce = all)",
    ),
    Operator(
        "Pack",
        (X,),
        (Operand("kept", "", KEPT),),
        (),
        "keeps X for the backward pass in the form that the planner chooses",
    ),
    Operator("MaxPool", (X,), (Y, KEPT_OUT), MAX, "padding never wins; of equal elements the first in row-major order"),
    Operator("MaxPoolGrad", (DY, KEPT_IN), (DX,), (*MAX, INPUT_SHAPE), "dY where the window's largest element was"),
    Operator("AveragePool", (X,), (Y,), AVERAGE, "as ONNX AveragePool, in channels-last"),
    Operator("AveragePoolGrad", (DY,), (DX,), (*AVERAGE, INPUT_SHAPE), "gradient of AveragePool"),
    Operator(
        "ReduceGrad",
        (DY,),
        (DX,),
        (
            Attribute("axes"),
            Attribute("keepdims", 1, "int"),
            Attribute("scale", 1.0, "float"),
            INPUT_SHAPE,
        ),
        "dX = scale·broadcast(dY): gradient of ReduceSum and ReduceMean; input_shape leaves the batch out",
    ),
    Operator("SoftmaxGrad", (DY, Y), (DX,), (Attribute("axis", -1, "int"),), "dX = Y·(dY − Σ Y·dY)"),
    Operator(
        "LayerNorm",
        (Operand("X", "[…,C]"), _opt("gamma", "[C]"), _opt("beta", "[C]")),
        (Y, _opt("xhat", "[…,C]"), _opt("rstd", "[…]")),
        (*EPSILON, *RMS),
        "Y = gamma·xhat + beta, xhat = (X − mean)·rstd over the last dimension; rms = 1: without mean (RMSNorm)",
    ),
    Operator(
        "LayerNormGrad",
        (Operand("xhat", "or kept(xhat)", EITHER), DY, Operand("rstd"), _opt("gamma", "[C]")),
        (_opt("dX"), _opt("dgamma", "[C]"), _opt("dbeta", "[C]")),
        RMS,
        "with g = gamma·dY: dX = rstd·(g − mean(g) − xhat·mean(g·xhat)); rms = 1: without mean(g)",
    ),
    Operator(
        "Attention",
        (
            Operand("Q", "[N,T,heads·d]"),
            Operand("K", "[N,S,kv_heads·d]"),
            Operand("V", "[N,S,kv_heads·d]"),
            _opt("key_mask", "[N,S]"),
            _opt("bias", "[T,S] or [heads,T,S]"),
        ),
        (Operand("Y", "[N,T,heads·d]"), KEPT_OUT),
        ATTENTION,
        "per head Y = dropout(P)·V, P = softmax(scale·Q·Kᵀ + bias) over the keys that key_mask (1: look, 0: not) and "
        "causal leave; 0 where they leave none",
    ),
    Operator(
        "AttentionGrad",
        (
            Operand("Q", "or kept(Q)", EITHER),
            Operand("K", "or kept(K)", EITHER_KEY),
            Operand("V", "or kept(V)", EITHER_VALUE),
            _opt("key_mask"),
            _opt("bias"),
            DY,
            Operand("kept", "", KEPT, optional=True),
        ),
        (_opt("dQ"), _opt("dK"), _opt("dV")),
        ATTENTION,
        "gradients of Attention, from what it kept of P, or P again from Q and K",
    ),
    Operator(
        "Embedding",
        (Operand("ids", "[N,…]", ONLY_INDEX), Operand("W", "[V,C]")),
        (Operand("Y", "[N,…,C]"),),
        (Attribute("padding_idx", -1, "int"),),
        "rows of W; padding_idx gets no gradient",
    ),
    Operator(
        "EmbeddingGrad",
        (Operand("ids", "[N,…]", ONLY_INDEX), DY),
        (Operand("G", "[V,C]"),),
        (WEIGHT_SHAPE, Attribute("padding_idx", -1, "int")),
        "sum of the rows of dY by index",
    ),
    Operator(
        "SelectPosition",
        (Operand("X", "[N,T,C]"), Operand("source", "[N,T]", INDEX)),
        (Operand("Y", "[N,C]"),),
        POSITION,
        "a row of each sample: of the positions whose source (an input) is not `number`, kind = last: the last, or 0; "
        "kind = count: their number less one, or the last of all",
    ),
    Operator(
        "SelectPositionGrad",
        (DY, Operand("source", "[N,T]", INDEX)),
        (DX,),
        (*POSITION, INPUT_SHAPE),
        "dY at the position of SelectPosition, 0 elsewhere; input_shape is [T,C]",
    ),
    Operator(
        "BatchMatMul",
        (Operand("A", "[N,…,M,K]"), Operand("B", "[N,…,K,P]")),
        (Operand("Y", "[N,…,M,P]"),),
        (Attribute("transA", 0, "int"), Attribute("transB", 0, "int")),
        "product of two computed values; transA, transB: the last two dimensions of A, B are swapped",
    ),
    Operator(
        "Rotary",
        (Operand("X", "[N,T,heads·d]"), Operand("cos", "[T,d]"), Operand("sin", "[T,d]")),
        (Y,),
        (Attribute("heads", kind="int"), Attribute("inverse", 0, "int")),
        "per head Y = X·cos + rotate_half(X)·sin, rotate_half([a,b]) = [−b,a]; inverse = 1: the transpose, its "
        "gradient",
    ),
    Operator(
        "ExpandBatch",
        (Operand("X", "[1,…]"), Operand("like", "[N,…]")),
        (Operand("Y", "[N,…]"),),
        (),
        "X for each sample of the batch, whose size is that of `like`",
    ),
    Operator("Dropout", (X,), (Y,), DROPOUT, "training: counter-based mask, kept elements times 1/(1−ratio)"),
    Operator("DropoutGrad", (DY,), (DX,), DROPOUT, "the mask of Dropout with the same stream again"),
    Operator(
        "CrossEntropyLoss",
        (Operand("logits", "[N,…,C]"), Operand("target", "[N,…]", INDEX)),
        LOSS,
        (Attribute("label_smoothing", 0.0, "float"), Attribute("ignore_index", -100, "int")),
        "torch's cross_entropy, mean over the positions of the batch whose target is not ignore_index, and its "
        "gradient",
    ),
    Operator("MSELoss", (Operand("prediction"), Operand("target", "", INDEX)), LOSS, (), "torch's mse_loss, mean"),
    Operator(
        "BCEWithLogitsLoss",
        (Operand("prediction"), Operand("target", "", INDEX)),
        LOSS,
        (),
        "torch's binary_cross_entropy_with_logits, mean",
    ),
)


def _schema(operator: Operator) -> OpSchema:
    def formal(operand: Operand) -> OpSchema.FormalParameter:
        option = OpSchema.FormalParameterOption
        kind = option.Optional if operand.optional else option.Single
        return OpSchema.FormalParameter(operand.name, operand.type, operand.shape, param_option=kind)

    def attribute(item: Attribute) -> OpSchema.Attribute:
        if item.default is None:
            return OpSchema.Attribute(item.name, getattr(OpSchema.AttrType, item.kind.upper()), required=True)
        return OpSchema.Attribute(item.name, onnx.helper.make_attribute(item.name, item.default))

    used = {operand.type for operand in (*operator.inputs, *operator.outputs)}
    return OpSchema(
        operator.name,
        DOMAIN,
        1,
        operator.doc,
        inputs=[formal(o) for o in operator.inputs],
        outputs=[formal(o) for o in operator.outputs],
        attributes=[attribute(a) for a in operator.attributes],
        type_constraints=[(key, allowed, doc) for key, (allowed, doc) in TYPES.items() if key in used],
    )


def register() -> None:
    """Makes the operators known to ``onnx``; again has no effect."""
    # onnxscript imports this module, and it refuses to be imported once two domains share an operator's name.
    import onnx.reference  # noqa: F401

    for operator in OPERATORS:
        if not onnx.defs.has(operator.name, DOMAIN):
            onnx.defs.register_schema(_schema(operator))


def markdown() -> str:
    """The table of docs/operators.md."""

    def operands(items: tuple[Operand, ...]) -> str:
        return ", ".join(f"{o.name}{'?' if o.optional else ''}{' ' + o.shape if o.shape else ''}" for o in items)

    def attribute(item: Attribute) -> str:
        return f"`{item.name}`" if item.default is None else f"`{item.name}` = {item.default}"

    lines = [
        f"# Operators of `{DOMAIN}`",
        "",
        "Version 1. Generated by `python -m edge_razor.exporters.schemas` from the table that `onnx.checker` uses too.",
        "[training-graph.md](training-graph.md) says how they make a graph. `?` marks what may be absent; an attribute",
        "without a default is required.",
        "",
        "| operator | inputs | outputs | attributes | meaning |",
        "|---|---|---|---|---|",
    ]
    for op in OPERATORS:
        attributes = ", ".join(attribute(a) for a in op.attributes) or "–"
        lines.append(f"| `{op.name}` | {operands(op.inputs)} | {operands(op.outputs)} | {attributes} | {op.doc} |")
    return "\n".join(lines) + "\n"


register()

if __name__ == "__main__":
    print(markdown(), end="")
