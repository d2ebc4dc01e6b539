"""What a caller binds to a plan: inputs, target and output of the model, in the user's and the runtime's layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from edge_razor.errors import BundleError

from .graph import Graph

__all__ = ["Binding", "Interface", "read_interface"]


@dataclass(frozen=True, slots=True)
class Binding:
    """One input or output. `shape` is a sample's shape in the user's layout with the batch first (0 stands for it).

    Inputs: runtime dimension d is the user's dimension perm[d]. Outputs: the other way round, the user's d is the
    runtime's perm[d]. `classes` inputs hold int32 indices, of classes or of
    rows of a table. `mul` and `add` normalize uint8 input per channel.
    """

    name: str
    shape: tuple[int, ...]
    perm: tuple[int, ...]
    classes: bool = False
    mul: tuple[float, ...] = ()
    add: tuple[float, ...] = ()

    def at(self, samples: int) -> tuple[int, ...]:
        return (samples, *self.shape[1:])


@dataclass(frozen=True, slots=True)
class Interface:
    inputs: tuple[Binding, ...]  # the target last
    output: Binding


def read_interface(graph: Graph, manifest: Mapping[str, Any]) -> Interface:
    """The bindings that `bundle.json` states, checked against the graph.

    Raises:
        BundleError: a field is missing, or does not agree with the graph.
    """
    try:
        output = _binding(manifest["output"])
        stated = [_binding(i) for i in manifest["inputs"]]
        loss = str(manifest["loss"]["name"])
        normalization = _normalization(manifest.get("preprocessing"))
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise BundleError(
            f"bundle.json: inputs, output, loss or preprocessing is missing or malformed ({error!r})"
        ) from error
    if [b.name for b in stated] != graph.inputs[:-1]:
        raise BundleError(f"bundle.json: inputs {[b.name for b in stated]} are not the graph's {graph.inputs[:-1]}")
    indices = {node.input(0) for node in graph.nodes if node.op == "Embedding"}
    inputs = [replace(b, classes=True) if b.name in indices else _with_normalization(b, normalization) for b in stated]
    for binding in inputs:
        _agree(binding.name, tuple(binding.shape[p] for p in binding.perm), graph)
    runtime = [0] * len(output.shape)
    for user, dim in enumerate(output.perm):
        runtime[dim] = output.shape[user]
    _agree(output.name, tuple(runtime), graph)
    target = _target(output, loss)
    _agree("target", tuple(target.shape[p] for p in target.perm), graph)
    return Interface((*inputs, target), output)


def _binding(entry: Mapping[str, Any]) -> Binding:
    shape = tuple(0 if d is None else int(d) for d in entry["shape"])
    perm = tuple(int(p) for p in entry["perm"])
    if not shape or shape[0] != 0 or min(shape[1:], default=1) < 1 or sorted(perm) != list(range(len(shape))):
        raise ValueError(f"shape {entry['shape']} with perm {entry['perm']}")
    if perm[0] != 0:
        raise ValueError(f"perm {entry['perm']} moves the batch dimension")
    return Binding(str(entry["name"]), shape, perm)


def _target(output: Binding, loss: str) -> Binding:
    """The target has the output's shape; class indices lack the class dimension, the runtime's last."""
    inverse = [output.perm.index(d) for d in range(len(output.perm))]  # runtime d is the user's inverse[d]
    if loss != "cross_entropy":
        return Binding("target", output.shape, tuple(inverse))
    classes = inverse.pop()
    shape = tuple(d for i, d in enumerate(output.shape) if i != classes)
    return Binding("target", shape, tuple(p - (p > classes) for p in inverse), classes=True)


def _normalization(preprocessing: Mapping[str, Any] | None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """uint8 → (x / 255 − mean) / std as x · mul + add."""
    if not preprocessing or not preprocessing.get("mean") or not preprocessing.get("std"):
        return (), ()
    mean, std = [float(v) for v in preprocessing["mean"]], [float(v) for v in preprocessing["std"]]
    if len(mean) != len(std):
        raise ValueError(f"mean {mean} and std {std}")
    return tuple(1 / (255 * s) for s in std), tuple(-m / s for m, s in zip(mean, std, strict=True))


def _with_normalization(binding: Binding, normalization: tuple[tuple[float, ...], tuple[float, ...]]) -> Binding:
    """Image inputs carry the bundle's normalization if they have as many channels, else x / 255."""
    if len(binding.shape) != 4:
        return binding
    mul, add = normalization
    channels = binding.shape[binding.perm[-1]]
    if len(mul) != channels:
        mul, add = (1 / 255,) * channels, (0.0,) * channels
    return Binding(binding.name, binding.shape, binding.perm, binding.classes, mul, add)


def _agree(name: str, runtime_shape: tuple[int, ...], graph: Graph) -> None:
    shape = graph.shapes.get(name)
    if shape is None or shape.batch != 1 or runtime_shape[1:] != shape.dims:
        raise BundleError(
            f"bundle.json: {name!r} is {list(runtime_shape)} in the runtime's layout, the graph says {shape}"
        )
