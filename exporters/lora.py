"""LoRA: frozen linear layers with a trained low-rank addition, y = W·x + (alpha/r)·B·A·x (Hu et al., "LoRA: Low-Rank
Adaptation of Large Language Models", 2021). A starts as torch initializes a linear layer, B at zero, as in PEFT.
"""

from __future__ import annotations

import fnmatch
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from edge_razor.errors import UsageError
from edge_razor.exporters.graph_edit import DOMAIN, constant, dims, integer, is_parameter, make_node
from edge_razor.exporters.trainable import parameters

__all__ = ["Lora", "insert_lora", "parse_lora"]


@dataclass(frozen=True)
class Lora:
    """What ``trainable="lora:…"`` asks for.

    Attributes:
        rank: r.
        alpha: the addition is multiplied by alpha/r.
        targets: glob patterns on the layers' names; empty: every linear layer but the last layer of the model.
        others: what else trains, in the words of `trainable.resolve`; empty: nothing.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = ()
    others: str = ""


def parse_lora(spec: str) -> Lora | None:
    """``lora:r=8,alpha=16,targets=*.query|*.value,head`` → its parts; None for a spec of another kind.

    Terms without ``=`` train as they are, such as a new head.

    Raises:
        UsageError: an unknown option, or a number that is none.
    """
    if spec != "lora" and not spec.startswith("lora:"):
        return None
    rank, alpha, targets, others = 8.0, 0.0, tuple[str, ...](), list[str]()
    for term in filter(None, (term.strip() for term in spec.removeprefix("lora").removeprefix(":").split(","))):
        name, equals, value = term.partition("=")
        if not equals:
            others.append(term)
        elif name == "r":
            rank = _number(spec, name, value, whole=True)
        elif name == "alpha":
            alpha = _number(spec, name, value, whole=False)
        elif name == "targets" and value:
            targets = tuple(value.split("|"))
        else:
            raise UsageError(f"trainable {spec!r}: {term!r} is not known; options are r=, alpha= and targets=")
    return Lora(int(rank), alpha or rank, targets, ",".join(others))


def _number(spec: str, name: str, text: str, *, whole: bool) -> float:
    try:
        value = int(text) if whole else float(text)
    except ValueError:
        value = 0
    if not 0 < value < 1e9:
        raise UsageError(f"trainable {spec!r}: {name}={text} must be a positive {'whole ' if whole else ''}number")
    return value


def insert_lora(model: ir.Model, lora: Lora) -> dict[str, dict[str, Any]]:
    """Adds A and B to the linear layers of a forward graph before activations are fused, in place.

    Returns:
        weight's name → ``a``, ``b`` (names of the new parameters), ``transposed`` (the weight is [in, out]).

    Raises:
        UsageError: no linear layer has a name that fits, or r is larger than a layer.
    """
    graph = model.graph
    layers = [(node, str(node.inputs[1].name)) for node in graph if _adaptable(node) and node.inputs[1]]
    names = [name for _, name in layers]
    known = parameters(model)
    last = known[-1].layer if known else ""
    owners = {p.name: p.layer for p in known}
    adapted: dict[str, dict[str, Any]] = {}
    for node, name in layers:
        layer = owners.get(name, name)
        chosen = _fits(lora.targets, layer, name) if lora.targets else layer != last
        if chosen:
            adapted[name] = _adapt(graph, node, name, lora)
    if not adapted:
        shown = ", ".join(dict.fromkeys(owners.get(name, name) for name in names)) or "none"
        raise UsageError(f"trainable lora: no linear layer fits {'|'.join(lora.targets) or 'it'}; there are: {shown}")
    return adapted


def _adaptable(node: ir.Node) -> bool:
    """Tied weights are left alone: an addition to one use is none to the others."""
    if node.domain != DOMAIN or node.op_type != "Linear" or node.inputs[1] is None:
        return False
    return is_parameter(node.inputs[1]) and len(list(node.inputs[1].uses())) == 1


def _fits(targets: Sequence[str], layer: str, name: str) -> bool:
    """PEFT's way, the last part of a layer's name, works too."""
    return any(
        fnmatch.fnmatchcase(layer, target) or fnmatch.fnmatchcase(name, target) or layer.endswith(f".{target}")
        for target in targets
    )


def _adapt(graph: ir.Graph, node: ir.Node, name: str, lora: Lora) -> dict[str, Any]:
    x, y = node.inputs[0], node.outputs[0]
    assert x is not None
    inputs, outputs = dims(x)[-1], dims(y)[-1]
    if lora.rank > min(inputs, outputs):
        raise UsageError(f"trainable lora: r={lora.rank} is larger than layer {name!r} of {inputs} to {outputs}")
    stem = name.removesuffix(".weight")
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    bound = 1 / math.sqrt(inputs)
    a = _parameter(graph, f"{stem}.lora_A.weight", rng.uniform(-bound, bound, (lora.rank, inputs)))
    b = _parameter(graph, f"{stem}.lora_B.weight", np.zeros((outputs, lora.rank)))
    linear: dict[str, int | str] = {"transW": 1, "activation": "none"}
    reduced, shape = [(*dims(x)[:-1], lora.rank)], [dims(y)]
    down = make_node("Linear", [x, a], linear, domain=DOMAIN, shapes=reduced, like=node, names=[f"{y.name}/lora_A"])
    factor = lora.alpha / lora.rank
    scale = None if factor == 1 else constant(graph, np.full(outputs, factor, np.float32))
    operands = [down.outputs[0], b, scale]
    up = make_node("Linear", operands, linear, domain=DOMAIN, shapes=shape, like=node, names=[f"{y.name}/lora_B"])
    total = make_node("Add", [y, up.outputs[0]], shapes=shape, like=node, names=[f"{y.name}/adapted"])
    ir.convenience.replace_all_uses_with(y, total.outputs[0], replace_graph_outputs=True)
    total.replace_input_with(0, y)
    graph.insert_after(node, [down, up, total])
    for made in (down, up, total):
        made.name = made.outputs[0].name
    return {"a": a.name, "b": b.name, "transposed": not integer(node, "transW", 1)}


def _parameter(graph: ir.Graph, name: str, data: np.ndarray) -> ir.Value:
    value = constant(graph, np.ascontiguousarray(data, np.float32), name)
    value.meta["parameter"] = True
    return value
