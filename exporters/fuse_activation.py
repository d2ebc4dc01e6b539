"""An activation that alone follows a Conv, Linear or Affine becomes that node's ``activation``."""

from __future__ import annotations

import onnx_ir as ir

from edge_razor.exporters.graph_edit import DOMAIN, bypass, only_consumer, remove_dead, text

_HOSTS = ("Conv", "Linear", "Affine")
_ATTRIBUTES = ("activation", "alpha", "beta")


def fuse_activation(model: ir.Model) -> ir.Model:
    """See module docstring. Runs after `fuse_batchnorm`."""
    for node in list(model.graph):
        if node.domain != DOMAIN or node.op_type != "Affine" or len(node.inputs) > 1:
            continue
        data = node.inputs[0]
        assert data is not None
        host = data.producer()
        if host is None or host.domain != DOMAIN or host.op_type not in _HOSTS:
            continue
        if text(host, "activation", "none") != "none" or only_consumer(data) is not node:
            continue
        for name in _ATTRIBUTES:
            if name in node.attributes:
                host.attributes[name] = node.attributes[name]
        # The host's output takes the activation's name, by which readers know the value.
        known_as = node.outputs[0].name
        bypass(node, data)
        data.name = known_as
    remove_dead(model.graph)
    return model
