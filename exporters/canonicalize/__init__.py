"""Standard ONNX in all its spellings → the few forward operators of docs/training-graph.md, still in NCHW order.

A pass that cannot convert a node leaves it and says why in ``node.meta["why"]``; `check_supported` reports all of them
at once.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from edge_razor.exporters.canonicalize.activations import canonicalize_activations
from edge_razor.exporters.canonicalize.attention import canonicalize_attention, merge_transpositions, remove_nan_guards
from edge_razor.exporters.canonicalize.axes import canonicalize_axes
from edge_razor.exporters.canonicalize.convolution import canonicalize_convolutions
from edge_razor.exporters.canonicalize.dropout import canonicalize_dropout, dropout_of_probabilities
from edge_razor.exporters.canonicalize.elementwise import canonicalize_elementwise
from edge_razor.exporters.canonicalize.gather import canonicalize_gather, slices_to_split
from edge_razor.exporters.canonicalize.linear import canonicalize_linear, linear_on_rows
from edge_razor.exporters.canonicalize.masks import masks_to_float
from edge_razor.exporters.canonicalize.padding import canonicalize_padding
from edge_razor.exporters.canonicalize.pooling import canonicalize_pooling
from edge_razor.exporters.canonicalize.positions import select_positions
from edge_razor.exporters.canonicalize.reshapes import canonicalize_reshapes
from edge_razor.exporters.canonicalize.rotary import canonicalize_rotary
from edge_razor.exporters.canonicalize.supported import check_supported
from edge_razor.exporters.canonicalize.transformer import (
    canonicalize_batch_expansion,
    canonicalize_layer_norm,
    canonicalize_written_norms,
)

__all__ = ["PASSES", "canonicalize"]

# In order: views first so that patterns meet their neighbours; pooling and convolution before padding, which folds into
# both.
PASSES: tuple[Callable[[ir.Model], ir.Model], ...] = (
    select_positions,
    masks_to_float,
    canonicalize_batch_expansion,
    dropout_of_probabilities,
    canonicalize_gather,
    remove_nan_guards,
    merge_transpositions,
    canonicalize_reshapes,
    canonicalize_axes,
    canonicalize_rotary,
    slices_to_split,
    canonicalize_attention,
    canonicalize_layer_norm,
    canonicalize_written_norms,
    canonicalize_elementwise,
    canonicalize_activations,
    canonicalize_convolutions,
    canonicalize_pooling,
    canonicalize_padding,
    canonicalize_linear,
    linear_on_rows,
    canonicalize_dropout,
)


def canonicalize(model: ir.Model) -> ir.Model:
    """Runs all passes in place; shapes must be resolved (`resolve_shapes`).

    Raises:
        UnsupportedOpError: lists every node that is none of the operators known.
    """
    for rewrite in PASSES:
        model = rewrite(model)
    check_supported(model)
    return model
