"""Which parameters train: ``all``, ``head``, ``last:N``, ``bias``, ``norm`` or glob patterns → parameter names."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from edge_razor.errors import UsageError
from edge_razor.exporters.graph_edit import DOMAIN, is_parameter

__all__ = ["Parameter", "parameters", "resolve"]

ROLES: dict[tuple[str, str], tuple[str, ...]] = {
    (DOMAIN, "Conv"): ("", "weight", "scale", "bias"),
    (DOMAIN, "Linear"): ("", "weight", "scale", "bias"),
    (DOMAIN, "BatchNormFold"): ("gamma", "beta", "statistic", "statistic", "bias"),
    (DOMAIN, "Affine"): ("", "gamma", "beta"),
    (DOMAIN, "LayerNorm"): ("", "gamma", "beta"),
    ("", "Add"): ("bias", "bias"),
    ("", "Sub"): ("bias", "bias"),
    ("", "Mul"): ("scale", "scale"),
    ("", "Div"): ("", "scale"),
}
"""(domain, operator) → what a parameter is as its operand 0, 1, …; ``weight`` where nothing is said."""
NORM_ROLES = frozenset({"gamma", "beta"})
BIAS_ROLES = frozenset({"bias", "beta"})


@dataclass(frozen=True)
class Parameter:
    """A tensor of the user's model.

    Attributes:
        name: as in the state dict.
        layer: the module that owns it; for names without a dot the layer of the node that reads it.
        role: ``weight``, ``bias``, ``gamma``, ``beta``, ``scale``, or ``statistic`` (BatchNorm's mean and variance,
            never trained).
    """

    name: str
    layer: str
    role: str


def parameters(model: ir.Model) -> list[Parameter]:
    """Parameters of a forward graph, in the order in which the forward pass needs them.

    A convolution's weight stands before the BatchNorm behind it, though the graph folds the BatchNorm first: a
    node of nothing but parameters is visited from its first reader.
    """
    found: dict[str, Parameter] = {}
    inputs = set(model.graph.inputs)
    computed: set[ir.Value] = set()
    for node in model.graph:
        if any(v in inputs or v in computed for v in node.inputs):
            computed.update(node.outputs)

    def visit(node: ir.Node, reader: ir.Node) -> None:
        roles = ROLES.get((node.domain, node.op_type), ())
        for index, value in enumerate(node.inputs):
            if value is None or value in inputs or value in computed:
                continue
            producer = value.producer()
            if producer is not None:
                visit(producer, reader)
            elif is_parameter(value) and value.name and value.name not in found:
                role = roles[index] if index < len(roles) else ""
                if not role and (node.domain, node.op_type) == ("", "Reshape"):
                    role = _role_behind(node)
                owner, dot, _ = value.name.rpartition(".")
                layer = owner if dot else reader.metadata_props.get("layer") or reader.name or value.name
                found[value.name] = Parameter(value.name, layer, role or "weight")

    for node in model.graph:
        if node.outputs[0] in computed:
            visit(node, node)
    return list(found.values())


def _role_behind(node: ir.Node) -> str:
    """Role of a parameter that its reader sees in another shape."""
    for reader, index in node.outputs[0].uses():
        roles = ROLES.get((reader.domain, reader.op_type), ())
        if index < len(roles):
            return roles[index]
    return ""


def resolve(spec: str, available: Sequence[Parameter]) -> list[str]:
    """Names of the parameters that ``spec`` selects, in graph order.

    Args:
        spec: one term or several joined by commas: ``all``; ``head``, the last layer with parameters; ``last:N``, the
            last N such layers, a convolution and the BatchNorm behind it being two; ``bias``, everything that is added,
            BatchNorm's beta included (their gradients keep no activations); ``norm``, gamma and beta of normalization
            layers; anything else is a glob pattern on names, as in ``features.1[0-9].*``.
        available: of `parameters`. Statistics are never selected.

    Raises:
        UsageError: a term selects nothing; close names are listed.
    """
    trainable = [p for p in available if p.role != "statistic"]
    terms = [term.strip() for term in spec.split(",")]
    selected: set[str] = set()
    for term in terms:
        names = _select(term, trainable)
        if not names:
            raise UsageError(_nothing(term, available))
        selected.update(names)
    return [p.name for p in trainable if p.name in selected]


def _select(term: str, trainable: Sequence[Parameter]) -> list[str]:
    if term == "all":
        return [p.name for p in trainable]
    if term == "head" or term.startswith("last:"):
        count = 1 if term == "head" else _count(term)
        last = set(list(dict.fromkeys(p.layer for p in trainable))[-count:])
        return [p.name for p in trainable if p.layer in last]
    if term in ("bias", "norm"):
        roles = BIAS_ROLES if term == "bias" else NORM_ROLES
        return [p.name for p in trainable if p.role in roles]
    return [p.name for p in trainable if fnmatch.fnmatchcase(p.name, term)]


def _count(term: str) -> int:
    digits = term.removeprefix("last:")
    if not (digits.isascii() and digits.isdigit()) or int(digits) == 0:
        raise UsageError(f"trainable {term!r}: N of last:N must be a positive whole number")
    return int(digits)


def _nothing(term: str, available: Sequence[Parameter]) -> str:
    if any(fnmatch.fnmatchcase(p.name, term) for p in available):
        return f"trainable {term!r} matches only BatchNorm statistics, which are never trained"
    names = [p.name for p in available if p.role != "statistic"]
    words = [word for word in ("all", "head", "last:1", "bias", "norm") if word != term]
    close = difflib.get_close_matches(term, [*names, *words], n=4, cutoff=0.5)
    hint = f"close: {', '.join(close)}" if close else f"names look like: {', '.join(names[:4]) or 'none'}"
    return f"trainable {term!r} selects no parameter of the model; {hint}"
