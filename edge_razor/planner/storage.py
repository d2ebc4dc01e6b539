"""How each kept value is stored between the forward and the backward pass, and how many bytes that takes.

A value → `Storage` table is all that lowering knows about the choice, so a planner that chooses per value only fills
the table differently.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from fractions import Fraction
from functools import lru_cache
from math import floor
from typing import Literal

from edge_razor.errors import BundleError, UsageError

from .graph import Graph, Node

__all__ = [
    "ActivationKeep",
    "Choice",
    "Form",
    "KeptValue",
    "Place",
    "Storage",
    "at_place",
    "check_razor",
    "choose_storage",
    "keep_count",
    "kept_values",
    "packed_storage",
]

Place = Literal["memory", "recompute", "spill"]

MIN_ROWS = 8  # below this many rows a sample a block mean costs more than it describes


class Form(IntEnum):
    """Form of a kept tensor; the numbers are those of the plan file."""

    DENSE = 0
    BF16 = 1
    RAZOR_PLAIN = 2
    RAZOR_CENTERED = 3
    ROWS = 4  # of attention's probabilities, the largest of each query


class ActivationKeep(IntEnum):
    """What an activation keeps for its backward; the numbers are those of the plan file."""

    NOTHING = 0
    BITS = 1
    Q4 = 2
    DENSE = 3


# Codes of docs/plan-format.md.
ACTIVATIONS = {
    name: code
    for code, name in enumerate(
        "none relu clip leaky_relu hardsigmoid hardswish sigmoid tanh silu gelu gelu_tanh".split()
    )
}
PIECEWISE_LINEAR = {"relu", "clip", "leaky_relu", "hardsigmoid"}


@dataclass(frozen=True, slots=True)
class Storage:
    """One kept value: `form` is a `Form` for packed inputs, an `ActivationKeep` for activations, None for pool indices.

    `bytes` is 0 where the value itself stays alive and nothing is copied (dense packed inputs). samples × rows × cols
    is the shape that the kernels see, `keep` the values kept a sample. `place` says where it is between the forward
    and the backward pass: in memory, made again exactly when it is read, or in the spill file.
    """

    form: Form | ActivationKeep | None
    samples: int
    rows: int
    cols: int
    keep: int
    bytes: int
    place: Place = "memory"

    @property
    def exact(self) -> bool:
        """Whether nothing is lost of what the backward pass computes from it."""
        if isinstance(self.form, Form):
            return self.form == Form.DENSE
        return self.form != ActivationKeep.Q4


def keep_count(elements: int, sparsity: float) -> int:
    """Values kept of a sample's `elements`: n − ⌊s·n⌋ with s taken as the decimal number it prints as.

    >>> keep_count(10, 0.9), keep_count(1000, 0.97), keep_count(7, 0.5), keep_count(3, 0.99)
    (1, 30, 4, 1)
    """
    return elements - floor(Fraction(str(sparsity)) * elements)


@dataclass(frozen=True, slots=True)
class Choice:
    """How a value is kept, whatever the number of samples: `kind`, and for a razor form the share that is dropped.

    Kinds: "dense", "bf16", "plain", "centered" (razor forms); "int8" (centered with nothing dropped); for activations
    "dense", "q4", "bits"; "index" for pooling.
    """

    kind: str
    sparsity: float = 0.0

    def __str__(self) -> str:
        return f"{self.kind} {self.sparsity}" if self.kind in RAZOR else self.kind

    @staticmethod
    def parse(text: str) -> Choice:
        """What `str` wrote.

        Raises:
            UsageError: it is no choice.
        """
        kind, _, number = text.partition(" ")
        try:
            choice = Choice(kind, float(number) if number else 0.0)
        except ValueError:
            choice = Choice("", 0.0)
        if str(choice) != text or choice.kind not in KINDS or not 0 <= choice.sparsity < 1:
            raise UsageError(f"{text!r} is no way to keep a value; one would be 'dense' or 'centered 0.95'")
        return choice


DENSE, BF16, INT8, Q4, BITS, INDEX = (Choice(kind) for kind in ("dense", "bf16", "int8", "q4", "bits", "index"))
RAZOR = {"plain": Form.RAZOR_PLAIN, "centered": Form.RAZOR_CENTERED}
KINDS = {"dense", "bf16", "int8", "q4", "bits", "index", *RAZOR}


@dataclass(frozen=True, slots=True)
class KeptValue:
    """A value that the backward pass needs: samples × rows × cols elements for one micro-batch.

    `role` decides which choices there are:
    "reference" lies in memory anyway (the network's own input, and what the backward pass reads directly);
    "packed" feeds weight gradients, "normalized" a LayerNorm's gradient, "attention" the Q, K and V of one;
    "smooth" and "linear" are activations' slopes; "index" is a pooling's.
    """

    role: str
    samples: int
    rows: int
    cols: int
    batch: int  # samples of the micro-batch

    @property
    def tall(self) -> bool:
        """Whether a sample has rows enough for block means and columns of nibbles to pay."""
        rows = self.rows if self.role != "smooth" else self.rows // self.batch
        return rows >= MIN_ROWS

    def choices(self, razor: str, sparsities: Sequence[float]) -> list[Choice]:
        """All ways to keep it, the exact one first."""
        if self.role in ("linear", "index"):
            return [BITS if self.role == "linear" else INDEX]
        if self.role == "smooth":
            return [DENSE, Q4] if self.tall else [DENSE]
        found = [DENSE]
        if self.role != "reference":
            found.append(BF16)
        if self.role == "normalized" and self.tall:
            found.append(INT8)
        if self.role == "packed" and self.tall:
            found.extend(Choice(razor, s) for s in sparsities if s > 0)
        return found

    def uniform(self, sparsity: float, razor: str) -> Choice:
        """The choice where one sparsity is asked for all values (`choose_storage` says which)."""
        choices = self.choices(razor, (sparsity,))
        return choices[-1] if sparsity > 0 else choices[0]

    def storage(self, choice: Choice) -> Storage:
        """Form and bytes of the value as `choice` keeps it."""
        n, rows, cols = self.samples, self.rows, self.cols
        if self.role == "index":
            return Storage(None, n, rows, cols, 0, n * rows * cols)
        if self.role == "linear":
            return Storage(ActivationKeep.BITS, n, rows, cols, 0, rows * ((cols + 7) // 8))
        if self.role == "smooth":
            if choice.kind == "q4":
                return Storage(ActivationKeep.Q4, n, rows, cols, 0, rows * ((cols + 1) // 2))
            return Storage(ActivationKeep.DENSE, n, rows, cols, 0, 4 * rows * cols)
        if choice.kind == "dense":
            return Storage(Form.DENSE, n, rows, cols, 0, 0)
        if choice.kind == "bf16":
            return Storage(Form.BF16, n, rows, cols, 0, _packed_bytes(Form.BF16, n, rows, cols, 0))
        form = RAZOR.get(choice.kind, Form.RAZOR_CENTERED)
        keep = rows * cols if choice.kind == "int8" else keep_count(rows * cols, choice.sparsity)
        return Storage(form, n, rows, cols, keep, _packed_bytes(form, n, rows, cols, keep))


def kept_values(graph: Graph, samples: int) -> dict[str, KeptValue]:
    """Every value that `graph` keeps for a micro-batch of `samples`, in graph order."""
    alive = _alive_anyway(graph)
    found: dict[str, KeptValue] = {}
    for node in graph.nodes:
        if node.op == "Pack":
            found[node.output(0)] = _packed(graph, node, samples, node.input(0) in alive)
        elif node.op in ("Conv", "Linear", "Affine"):
            if node.output(1) in graph.consumers:
                found[node.output(1)] = _activation(graph, node, samples)
        elif node.op == "MaxPool" and node.output(1) in graph.consumers:
            shape = graph.shape(node.output(0), node).at(samples)
            if len(shape) != 4:
                node.fail(f"its output must have 4 dimensions, not {len(shape)}")
            n, h, w, c = shape
            found[node.output(1)] = KeptValue("index", n, h * w, c, samples)
    return found


def choose_storage(graph: Graph, samples: int, sparsity: float, razor: str) -> dict[str, Storage]:
    """Storage of every kept value of `graph` for a micro-batch of `samples`, with one sparsity for all.

    Sparsity 0 keeps everything exactly: packed inputs stay alive as they are, smooth activations keep their dense
    input. Above 0, packed inputs take the `razor` form ("centered" or "plain"), or bf16 below 8 rows a sample and for
    the Q, K and V of attention, whose probabilities are made from them again. The normalized value of a LayerNorm is
    kept whole, block means and int8: what flows on to earlier layers is made from it, and nothing in it is small.
    Smooth activations take 4 bits an element. Piecewise-linear activations always keep 1 bit. The network's own input,
    and values that the backward pass reads directly anyway, are never copied.

    Raises:
        UsageError: sparsity outside [0, 1), or an unknown razor form.
    """
    check_razor(sparsity, razor)
    return {name: value.storage(value.uniform(sparsity, razor)) for name, value in kept_values(graph, samples).items()}


def check_razor(sparsity: float, razor: str) -> None:
    """
    Raises:
        UsageError: sparsity outside [0, 1), or an unknown razor form.
    """
    if not 0 <= sparsity < 1:
        raise UsageError(f'sparsity must be "auto" or at least 0 and below 1, not {sparsity}')
    if razor not in RAZOR:
        raise UsageError(f'razor must be "centered" or "plain", not {razor!r}')


def at_place(
    graph: Graph, table: dict[str, Storage], samples: int, names: Collection[str], place: Place
) -> dict[str, Storage]:
    """`table` with the kept values `names` at `place`.

    Names may be kept values (keys of the table) or forward values that the backward pass reads as they are, or that
    values are made again from. What is made again is kept in no form, so its entry becomes that of sparsity 0.
    """
    exact = choose_storage(graph, samples, 0, "centered") if place == "recompute" else table
    changed = dict(table)
    for node in graph.nodes:
        for name in node.outputs:
            if name not in names:
                continue
            if name in table:
                changed[name] = replace(exact[name], place=place)
                continue
            shape = graph.shape(name, node)
            rows, cols = shape.sample_elements // shape.dims[-1], shape.dims[-1]
            if shape.batch:
                rows *= samples
            changed[name] = Storage(Form.DENSE, 1, rows, cols, 0, 0, place)
    return changed


def _alive_anyway(graph: Graph) -> set[str]:
    """The network's inputs, values that the backward pass reads directly, and views of either."""
    alive = set(graph.inputs)
    for node in graph.nodes:
        if node.phase == "backward":
            alive.update(i for i in node.inputs if i)
        elif node.op == "Reshape" and node.input(0) in graph.inputs:
            alive.add(node.output(0))
    return alive


def _packed(graph: Graph, node: Node, samples: int, alive: bool) -> KeptValue:
    shape = graph.shape(node.input(0), node)
    if not shape.batch or not shape.dims:
        node.fail(f"cannot pack a value of shape {shape}")
    # Convolutions and per-sample products see a·N samples; a matrix product sees N samples of a times the rows.
    readers = {consumer.op for consumer in graph.consumers.get(node.output(0), ())}
    per_image = bool(readers & {"ConvGradWeight", "MulGrad"})
    n = shape.batch * samples if per_image else samples
    cols = shape.dims[-1]
    rows = shape.sample_elements * samples // (n * cols)
    role = "reference" if alive else "packed"
    if not alive and len(readers) == 1:
        role = {"AttentionGrad": "attention", "LayerNormGrad": "normalized"}.get(next(iter(readers)), role)
    return KeptValue(role, n, rows, cols, samples)


def _activation(graph: Graph, node: Node, samples: int) -> KeptValue:
    activation = node.text("activation", "none")
    if activation not in ACTIVATIONS or activation == "none":
        node.fail(f"activation {activation!r} keeps nothing for a backward pass")
    shape = graph.shape(node.output(0), node)
    if not shape.dims:
        node.fail(f"cannot keep an activation of shape {shape}")
    cols = shape.dims[-1]
    rows = shape.sample_elements * samples // cols
    return KeptValue("linear" if activation in PIECEWISE_LINEAR else "smooth", 1, rows, cols, samples)


def packed_storage(form: Form, samples: int, rows: int, cols: int, keep: int) -> Storage:
    """A kept value of this form, with its bytes; `keep` values a sample (of `Form.ROWS`: a row)."""
    return Storage(form, samples, rows, cols, keep, _packed_bytes(form, samples, rows, cols, keep))


@lru_cache(maxsize=65536)
def _packed_bytes(form: int, samples: int, rows: int, cols: int, keep: int) -> int:
    from edge_razor.runtime import packed_bytes

    try:
        return packed_bytes(form, samples, rows, cols, keep)
    except UsageError as error:
        raise BundleError(f"training graph: {error}") from error
