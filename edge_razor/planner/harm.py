"""How far a way of keeping values puts the gradient off: expected ‖ĝ − g‖² / ‖g‖² over all trained parameters.

Each kept value adds Σ share² · error² over the parameters whose gradient is computed from it: share is the parameter's
part of the gradient's norm, error the relative error that the choice brings to that parameter's gradient. Errors of
different values are taken as independent. Both come from a harm table that `edge-razor fidelity` measures on the
user's data (`--harm FILE`), or from the curves below.
"""

from __future__ import annotations

import json
import math
import os
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_razor.errors import DataError, UsageError
from edge_razor.regular_file import read_regular

from .graph import Graph
from .storage import Choice

__all__ = ["HarmModel", "HarmTable", "read_harm_table"]

VERSION = 1
_MAX_BYTES = 64 * 2**20  # of a harm table: thousands of parameters take kilobytes

# Relative error of a weight gradient where everything that may be is kept at that sparsity, root mean square over the
# weights: mean of EfficientNet-Lite0 on Fashion-MNIST (64 × 64, 32 images) and MiniLM-L6 on package descriptions (32
# tokens, 16 texts), both pretrained. Gradient error orders sparsities within a form, not one form against another:
# which of the two is used is the user's --razor. Centered passes 1 because its kept residuals stand for the dropped
# ones, too: more noise in one batch, less bias over many (docs/decisions.md).
RAZOR_ERROR: Mapping[str, tuple[tuple[float, float], ...]] = {
    "centered": (
        (0.0, 0.005), (0.5, 0.10), (0.6, 0.13), (0.7, 0.18), (0.8, 0.24), (0.85, 0.30), (0.9, 0.39), (0.925, 0.46),
        (0.95, 0.57), (0.96, 0.63), (0.97, 0.72), (0.98, 0.85), (0.99, 1.11), (1.0, 2.0),
    ),
    "plain": (
        (0.0, 0.002), (0.5, 0.14), (0.6, 0.20), (0.7, 0.27), (0.8, 0.37), (0.85, 0.43), (0.9, 0.50), (0.925, 0.54),
        (0.95, 0.60), (0.96, 0.62), (0.97, 0.66), (0.98, 0.70), (0.99, 0.75), (1.0, 1.0),
    ),
}  # fmt: skip
# bf16 rounds to 8 bits (2⁻⁹/√3 of each element); int8 to 1/127 of the sample's largest residual, about five
# deviations; the derivative in 4 bits to 1/15 of its range, 0.024 where its root mean square is 0.6.
FIXED_ERROR = {"bf16": 0.0015, "int8": 0.01, "q4": 0.04, "dense": 0.0, "bits": 0.0, "index": 0.0}

# A razor form that earlier layers see, too, is the big operand of a squeeze-and-excite product: only the gradient of
# the factor is computed from it, which is the smaller part of what flows on. A guess: nobody has measured it alone.
ONWARD = 0.1


@dataclass(frozen=True, slots=True)
class HarmTable:
    """What a probe measured: norm of each parameter's exact gradient, and its relative error by sparsity, ascending."""

    razor: str
    norms: Mapping[str, float]
    errors: Mapping[str, tuple[tuple[float, float], ...]]


def read_harm_table(path: str | os.PathLike[str]) -> HarmTable:
    """Reads and checks a harm table; it is untrusted input.

    Raises:
        DataError: it cannot be read, or is no harm table.
    """
    try:
        data = json.loads(read_regular(Path(path), _MAX_BYTES))
    except OSError as error:
        raise DataError(f"{path}: cannot read the harm table: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: the harm table is no JSON ({error})") from error
    if not isinstance(data, dict) or data.get("version") != VERSION:
        raise DataError(f"{path}: no harm table of version {VERSION}; write one with 'edge-razor fidelity'")
    razor, parameters = data.get("razor"), data.get("parameters")
    if not isinstance(razor, str) or razor not in RAZOR_ERROR or not isinstance(parameters, dict) or not parameters:
        raise DataError(f"{path}: the harm table has no 'razor' (centered or plain) or no 'parameters'")
    norms: dict[str, float] = {}
    errors: dict[str, tuple[tuple[float, float], ...]] = {}
    for name, entry in parameters.items():
        norms[name], errors[name] = _entry(path, name, entry)
    if not any(norms.values()):
        raise DataError(f"{path}: every gradient of the harm table is 0")
    return HarmTable(razor, norms, errors)


def _entry(path: str | os.PathLike[str], name: str, entry: Any) -> tuple[float, tuple[tuple[float, float], ...]]:
    try:
        norm = _number(entry["norm"])
        points = sorted((float(s), _number(e["relative_error"])) for s, e in entry["errors"].items())
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
        raise DataError(f"{path}: the harm table's entry of {name!r} is malformed") from None
    if not points or not all(0 <= s < 1 for s, _ in points):
        raise DataError(f"{path}: the harm table's entry of {name!r} has no error at a sparsity from 0 to 1")
    return norm, tuple(points)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(value)
    number = float(value)
    if not math.isfinite(number) or not 0 <= number <= 1e30:
        raise ValueError(value)
    return number


class HarmModel:
    """Harm of every choice of one graph, before and after freezing layers.

    Without a table every trained weight (a tensor of two or more dimensions; if there is none, every parameter) is
    taken to have the same share of the gradient's norm.
    """

    def __init__(self, graph: Graph, table: HarmTable | None, razor: str) -> None:
        """`graph`: with all parameters that may train.

        Raises:
            UsageError: the table is of another razor form or another model.
        """
        self.table, self.razor = table, razor
        names = list(graph.gradients)
        if table is not None:
            if table.razor != razor:
                raise UsageError(
                    f"the harm table was measured with --razor {table.razor}, not {razor}; measure it again"
                )
            missing = [name for name in names if name not in table.norms]
            if missing:
                raise UsageError(f"the harm table has no parameter {missing[0]!r}: it was measured with another model")
            weights = {name: table.norms[name] ** 2 for name in names}
        else:
            wide = {name for name in names if len(graph.initializers[name].shape) > 1} or set(names)
            weights = {name: float(name in wide) for name in names}
        total = sum(weights.values()) or 1.0
        self.share: dict[str, float] = {name: weight / total for name, weight in weights.items()}
        """Parameter → its part of the squared norm of the whole gradient; they add up to 1."""

    def fed(self, graph: Graph) -> dict[str, Fed]:
        """What is computed from each value that the backward pass of `graph` reads."""
        parameters = {value: name for name, value in graph.gradients.items()}
        reach: dict[str, tuple[frozenset[str], frozenset[str]]] = {}  # value → (own, onward)
        nothing = frozenset[str]()
        for node in reversed(graph.nodes):
            if node.phase != "backward":
                continue
            own, onward = nothing, nothing
            for out in filter(None, node.outputs):
                first, second = reach.get(out, (nothing, nothing))
                if out in parameters:
                    first |= {parameters[out]}
                if out in graph.shapes and graph.shapes[out].batch:  # a gradient that flows on to earlier layers
                    onward |= first | second
                else:
                    own, onward = own | first, onward | second
            for name in filter(None, node.inputs):
                first, second = reach.get(name, (nothing, nothing))
                reach[name] = (first | own, second | onward)
        return {
            name: Fed(tuple(sorted(own)), self._shared(own), self._shared(onward - own))
            for name, (own, onward) in reach.items()
        }

    def _shared(self, names: frozenset[str]) -> float:
        return math.fsum(
            self.share[name] for name in names
        )  # whatever the set's order, which is another in each process

    def harm(self, choice: Choice, fed: Fed) -> float:
        """Expected squared relative error of the whole gradient if `choice` keeps the value that feeds `fed`."""
        if choice.kind in FIXED_ERROR:
            return FIXED_ERROR[choice.kind] ** 2 * (fed.own_share + fed.onward_share)
        usual = interpolate(RAZOR_ERROR[choice.kind], choice.sparsity) ** 2
        harm = ONWARD * usual * fed.onward_share
        if self.table is None:
            return harm + usual * fed.own_share
        for name in fed.own:
            measured = self.table.errors[name]
            points = ((0.0, 0.0), *measured, (1.0, max(1.0, measured[-1][1])))
            harm += self.share[name] * interpolate(points, choice.sparsity) ** 2
        return harm


@dataclass(frozen=True, slots=True)
class Fed:
    """Parameters whose gradient is computed from a kept value: those of its own layer, their share of the gradient's
    squared norm, and the share of earlier layers, whose gradients are computed from what is computed from it."""

    own: tuple[str, ...]
    own_share: float
    onward_share: float


def interpolate(points: tuple[tuple[float, float], ...], at: float) -> float:
    """Piecewise linear through (x, y) of ascending x; beyond the ends, the end's.

    >>> interpolate(((0.0, 0.0), (1.0, 2.0)), 0.5)
    1.0
    """
    index = bisect_left(points, (at,))
    if index == 0:
        return points[0][1]
    if index == len(points):
        return points[-1][1]
    (x0, y0), (x1, y1) = points[index - 1], points[index]
    return y1 if x1 <= x0 else y0 + (y1 - y0) * (at - x0) / (x1 - x0)
