"""The razor pass: what weight gradients read is kept packed (Back Razor, Jiang et al., NeurIPS 2022), not dense.

``ConvGradWeight``, ``LinearGradWeight`` and ``MulGrad`` read a forward value X. This pass puts one ``Pack(X)`` behind
X's producer and lets them read its output, so that X itself dies in the forward pass. The planner later chooses each
pack's form.
"""

from __future__ import annotations

import onnx_ir as ir

from edge_razor.exporters.gradients import describe_kept, is_batched
from edge_razor.exporters.graph_edit import DOMAIN

__all__ = ["insert_packs"]

READERS = frozenset({"ConvGradWeight", "LinearGradWeight", "MulGrad"})
"""Operators whose first operand may be packed."""


def insert_packs(model: ir.Model) -> ir.Model:
    """Inserts the ``Pack`` nodes of a differentiated graph, in place.

    Not packed: the network's own input (it stays in memory anyway), parameters, and a value that another backward node
    needs dense, since it must be kept dense then and serves all.
    """
    graph = model.graph
    values: dict[ir.Value, list[ir.Node]] = {}
    for node in graph:
        if node.domain == DOMAIN and node.op_type in READERS:
            x = node.inputs[0]
            assert x is not None
            values.setdefault(x, []).append(node)
    for x, readers in values.items():
        producer = x.producer()
        if producer is None or _is_network_input(x) or not is_batched(x) or _needed_dense(x):
            continue
        kept = ir.Value(name=f"kept/{x.name}")
        describe_kept(kept)
        pack = ir.node("Pack", [x], domain=DOMAIN, outputs=[kept])
        pack.name = f"{producer.name}/Pack/{x.name}"
        pack.metadata_props.update({"phase": "forward", "layer": producer.metadata_props.get("layer", "")})
        graph.insert_after(producer, pack)
        for node in readers:
            node.replace_input_with(0, kept)
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
        node.metadata_props["phase"] == "backward" and not (node.op_type in READERS and index == 0)
        for node, index in value.uses()
    )
