"""The gradient of every operator of a training graph: one table, one rule per operator.

Rules read the forward node and emit backward nodes (docs/training-graph.md). A rule computes only what ``Tape.needs``
asks for.
"""

from __future__ import annotations

from edge_razor.exporters.gradients import arithmetic, layout, linear, pool, transformer
from edge_razor.exporters.gradients.tape import GradientRule, Tape, describe_kept, is_batched, unsupported
from edge_razor.exporters.graph_edit import DOMAIN

__all__ = ["RULES", "GradientRule", "Tape", "describe_kept", "is_batched", "unsupported"]

RULES: dict[tuple[str, str], GradientRule] = {
    (DOMAIN, "Conv"): linear.conv,
    (DOMAIN, "Linear"): linear.linear,
    (DOMAIN, "Affine"): linear.affine,
    (DOMAIN, "BatchNormFold"): linear.batch_norm_fold,
    (DOMAIN, "LayerNorm"): transformer.layer_norm,
    (DOMAIN, "Attention"): transformer.attention,
    (DOMAIN, "ExpandBatch"): transformer.expand_batch,
    (DOMAIN, "Embedding"): transformer.embedding,
    (DOMAIN, "SelectPosition"): transformer.select_position,
    (DOMAIN, "Rotary"): transformer.rotary,
    (DOMAIN, "BatchMatMul"): transformer.batch_matmul,
    (DOMAIN, "MaxPool"): pool.max_pool,
    (DOMAIN, "AveragePool"): pool.average_pool,
    ("", "ReduceMean"): pool.reduce,
    ("", "ReduceSum"): pool.reduce,
    ("", "Add"): arithmetic.add,
    ("", "Sub"): arithmetic.subtract,
    ("", "Neg"): arithmetic.negate,
    ("", "Mul"): arithmetic.multiply,
    ("", "Div"): arithmetic.divide,
    ("", "Softmax"): arithmetic.softmax,
    (DOMAIN, "Dropout"): arithmetic.dropout,
    ("", "Concat"): layout.concat,
    ("", "Split"): layout.split,
    ("", "Slice"): layout.slice_,
    ("", "Pad"): layout.pad,
    ("", "Transpose"): layout.transpose,
    ("", "Reshape"): layout.reshape_,
}
"""(domain, operator) → its rule."""
