"""Optimizer settings, where parameters and their state live, and the update steps."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from math import isfinite, prod

from edge_razor.errors import UsageError

from .context import ParamForm, Tensor
from .frozen import stored_bytes
from .graph import Graph, Node
from .program import ALIGNMENT, Buffer, Region, Step

__all__ = ["Memory", "Optimizer", "Parameter", "lay_out_parameters", "row_set_bytes", "table_rows", "update_step"]


@dataclass(frozen=True, slots=True)
class Optimizer:
    """Settings of `torch.optim.SGD` or `torch.optim.AdamW`, without the learning rate (that is the trainer's)."""

    name: str = "sgd"
    momentum: float = 0.9
    nesterov: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in ("sgd", "adamw"):
            raise UsageError(f'optimizer must be "sgd" or "adamw", not {self.name!r}')
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in (*self.betas, self.momentum)):
            raise UsageError(f"momentum {self.momentum} and betas {self.betas} must be at least 0 and below 1")
        if not self.eps > 0 or not self.weight_decay >= 0 or not isfinite(self.eps + self.weight_decay):
            raise UsageError(f"eps {self.eps} must be above 0 and weight_decay {self.weight_decay} at least 0")
        if self.nesterov and (self.name != "sgd" or not self.momentum):
            raise UsageError("nesterov needs sgd with momentum above 0")

    @property
    def states(self) -> int:
        """Tensors of state a trainable parameter: momentum, or AdamW's two moments."""
        return 2 if self.name == "adamw" else int(self.momentum > 0)

    def accumulates(self, micro_batches: int) -> bool:
        """Whether micro-batches need a gradient accumulator (plain momentum adds up in the momentum buffer itself)."""
        return micro_batches > 1 and not (self.name == "sgd" and self.momentum > 0 and not self.nesterov)


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter or frozen tensor in the params region or the weights file, with its state in the state region.

    `row_capacity`: rows of a table that the gradient of a whole batch may touch, if the gradient is kept as a row set
    (the accumulator then is one, too); 0: an ordinary gradient.
    """

    name: str
    shape: tuple[int, ...]
    perm: tuple[int, ...]
    trainable: bool
    buffer: Buffer
    states: tuple[Buffer, ...]
    accumulator: Buffer | None
    row_capacity: int = 0
    form: ParamForm = ParamForm.FLOAT


@dataclass(frozen=True, slots=True)
class Memory:
    """The regions that do not depend on the schedule.

    `mapped_bytes` are those of parameters in the weights file that become resident there: tables of which only rows are
    read are left out.
    """

    parameters: dict[str, Parameter]
    params_bytes: int
    state_bytes: int
    mapped_bytes: int
    accumulator_bytes: int  # the part of state_bytes that only micro-batches need


def row_set_bytes(rows: int, cols: int, capacity: int) -> int:
    """Bytes of the gradient of a table [rows, cols] that touches at most `capacity` rows (docs/plan-format.md)."""
    return -(-4 * rows // ALIGNMENT) * ALIGNMENT + 4 * capacity * cols


def table_rows(graph: Graph, perms: dict[str, tuple[int, ...] | None]) -> dict[str, int]:
    """Tables whose gradient is kept by rows → rows that one sample may touch, fewer than the table has.

    Those whose only use is one embedding: the gradient of a table that is an output layer, too, is dense anyway.
    """
    makers: dict[str, Node] = {n.output(0): n for n in graph.nodes if n.op == "EmbeddingGrad"}
    tables = {}
    for parameter, value in graph.gradients.items():
        node, shape = makers.get(value), graph.initializers[parameter].shape
        if node is None or value in graph.consumers or perms.get(parameter) is not None or len(shape) != 2:
            continue
        ids = graph.shape(node.input(0), node).sample_elements
        if ids < shape[0]:
            tables[parameter] = ids
    return tables


def lay_out_parameters(
    graph: Graph,
    perms: dict[str, tuple[int, ...] | None],
    optimizer: Optimizer,
    batch_size: int,
    micro_batches: int,
    tables: dict[str, int],
    forms: dict[str, ParamForm],
    looked_up: Collection[str],
) -> Memory:
    """Places every float initializer that the graph uses, in file order, and its optimizer state.

    `tables` is `table_rows` of the graph of the longest samples, `forms` those of `frozen_forms`, `looked_up` those of
    `looked_up_tables`.
    """
    parameters: dict[str, Parameter] = {}
    sizes = {Region.PARAMS: 0, Region.STATE: 0}
    accumulators = mapped = 0

    def claim(name: str, size: int, region: Region) -> Buffer:
        offset = sizes[region]
        sizes[region] += -(-size // ALIGNMENT) * ALIGNMENT
        return Buffer(name, size, region, offset)

    for name, initializer in graph.initializers.items():
        if name not in perms:
            continue
        size = 4 * prod(initializer.shape)
        trainable, form = name in graph.gradients, forms.get(name, ParamForm.FLOAT)
        if form == ParamForm.IN_FILE:
            mapped += 0 if name in looked_up else size
            buffer = Buffer(name, size, Region.MAPPED, len(parameters))
        else:
            buffer = claim(name, stored_bytes(initializer.shape, perms[name], form), Region.PARAMS)
        states: tuple[Buffer, ...] = ()
        accumulator, row_capacity = None, 0
        if trainable:
            if name in tables:
                row_capacity = min(initializer.shape[0], batch_size * tables[name])
            states = tuple(claim(f"state {i} of {name}", size, Region.STATE) for i in range(optimizer.states))
            if optimizer.accumulates(micro_batches):
                before = sizes[Region.STATE]
                added = (
                    row_set_bytes(initializer.shape[0], initializer.shape[1], row_capacity) if row_capacity else size
                )
                accumulator = claim(f"accumulator of {name}", added, Region.STATE)
                accumulators += sizes[Region.STATE] - before
        perm = perms[name] or tuple(range(len(initializer.shape)))
        parameters[name] = Parameter(
            name, initializer.shape, perm, trainable, buffer, states, accumulator, row_capacity, form
        )
    return Memory(parameters, sizes[Region.PARAMS], sizes[Region.STATE], mapped, accumulators)


def update_step(parameter: Parameter, gradient: Tensor, optimizer: Optimizer) -> Step:
    """The step that updates one parameter from its complete gradient."""
    label = f"{parameter.name}:update"
    ints, rows = [gradient.elements], ""
    if gradient.row_capacity:
        accumulated = parameter.row_capacity if parameter.accumulator else 0
        ints, rows = [*parameter.shape, gradient.row_capacity, accumulated], "_rows"
    if optimizer.name == "adamw":
        floats = [*optimizer.betas, optimizer.eps, optimizer.weight_decay]
        operands = [parameter.buffer, gradient.buffer, *parameter.states, parameter.accumulator]
        return Step(f"adamw{rows}", label, ints, floats, operands, backward=True)
    momentum = parameter.states[0] if parameter.states else None
    ints, floats = [*ints, int(optimizer.nesterov)], [optimizer.momentum, optimizer.weight_decay]
    operands = [parameter.buffer, gradient.buffer, momentum, parameter.accumulator]
    return Step(f"sgd{rows}", label, ints, floats, operands, backward=True)
