"""The razor pass: what weight gradients read is kept packed (Back Razor, Jiang et al., NeurIPS 2022), not dense.

Weight gradients, ``MulGrad``, ``LayerNormGrad`` and ``AttentionGrad`` read a forward value X. This pass puts one
``Pack(X)`` behind X's producer and lets them read its output, so that X itself dies in the forward pass. The planner
later chooses each pack's form.
"""

from __future__ import annotations

import onnx_ir as ir

from edge_razor.exporters.gradients import describe_kept, is_batched
from edge_razor.exporters.graph_edit import DOMAIN

__all__ = ["insert_packs"]

READERS = {
    "ConvGradWeight": (0,),
    "LinearGradWeight": (0,),
    "MulGrad": (0,),
    "LayerNormGrad": (0,),
    "AttentionGrad": (0, 1, 2),
}
"""Operator → which of its operands may be packed."""


def insert_packs(model: ir.Model) -> ir.Model:
    """Inserts the ``Pack`` nodes of a differentiated graph, in place.

    Not packed: the network's own input (it stays in memory anyway), parameters, and a value that another backward node
    needs dense, since it must be kept dense then and serves all.
    """
    graph = model.graph
    values: dict[ir.Value, list[tuple[ir.Node, int]]] = {}
    for node in graph:
        for index in READERS.get(node.op_type, ()) if node.domain == DOMAIN else ():
            x = node.inputs[index]
            assert x is not None
            values.setdefault(x, []).append((node, index))
    for x, readers in values.items():
        producer = x.producer()
        if producer is None or _is_network_input(x) or not is_batched(x) or _needed_dense(x):
            continue
        # Attention is kept in another form than what is multiplied by it alone: each has its own copy.
        for suffix, group in (
            ("", [r for r in readers if r[0].op_type != "AttentionGrad"]),
            ("/attention", [r for r in readers if r[0].op_type == "AttentionGrad"]),
        ):
            if not group:
                continue
            kept = ir.Value(name=f"kept/{x.name}{suffix}")
            describe_kept(kept)
            pack = ir.node("Pack", [x], domain=DOMAIN, outputs=[kept])
            pack.name = f"{producer.name}/Pack/{x.name}{suffix}"
            pack.metadata_props.update({"phase": "forward", "layer": producer.metadata_props.get("layer", "")})
            graph.insert_after(producer, pack)
            for node, index in group:
                node.replace_input_with(index, kept)
    return model


def _is_network_input(value: ir.Value) -> bool:
    """Whether ``value`` is an input of the graph, or only another shape of one."""
    producer = value.producer()
    while producer is not None and (producer.domain, producer.op_type) == ("", "Reshape"):
        source = producer.inputs[0]
        assert source is not None
        value, producer = source, source.producer()
    return value.is_graph_input()


def _needed_dense(value: ir.Value) -> bool:
    return any(
        node.metadata_props["phase"] == "backward" and index not in READERS.get(node.op_type, ())
        for node, index in value.uses()
    )
