"""Optimizer settings, where parameters and their state live, and the update steps."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite, prod

from edge_razor.errors import UsageError

from .context import Tensor
from .graph import Graph
from .program import ALIGNMENT, Buffer, Region, Step

__all__ = ["Memory", "Optimizer", "Parameter", "lay_out_parameters", "update_step"]


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
    """A parameter or frozen tensor in the params region, with its state in the state region."""

    name: str
    shape: tuple[int, ...]
    perm: tuple[int, ...]
    trainable: bool
    buffer: Buffer
    states: tuple[Buffer, ...]
    accumulator: Buffer | None


@dataclass(frozen=True, slots=True)
class Memory:
    """The two regions that do not depend on the schedule."""

    parameters: dict[str, Parameter]
    params_bytes: int
    state_bytes: int
    accumulator_bytes: int  # the part of state_bytes that only micro-batches need


def lay_out_parameters(
    graph: Graph, perms: dict[str, tuple[int, ...] | None], optimizer: Optimizer, micro_batches: int
) -> Memory:
    """Places every float initializer that the graph uses, in file order, and its optimizer state."""
    parameters: dict[str, Parameter] = {}
    sizes = {Region.PARAMS: 0, Region.STATE: 0}
    accumulators = 0

    def claim(name: str, size: int, region: Region) -> Buffer:
        offset = sizes[region]
        sizes[region] += -(-size // ALIGNMENT) * ALIGNMENT
        return Buffer(name, size, region, offset)

    for name, initializer in graph.initializers.items():
        if name not in perms:
            continue
        size = 4 * prod(initializer.shape)
        trainable = name in graph.gradients
        buffer = claim(name, size, Region.PARAMS)
        states: tuple[Buffer, ...] = ()
        accumulator = None
        if trainable:
            states = tuple(claim(f"state {i} of {name}", size, Region.STATE) for i in range(optimizer.states))
            if optimizer.accumulates(micro_batches):
                before = sizes[Region.STATE]
                accumulator = claim(f"accumulator of {name}", size, Region.STATE)
                accumulators += sizes[Region.STATE] - before
        perm = perms[name] or tuple(range(len(initializer.shape)))
        parameters[name] = Parameter(name, initializer.shape, perm, trainable, buffer, states, accumulator)
    return Memory(parameters, sizes[Region.PARAMS], sizes[Region.STATE], accumulators)


def update_step(parameter: Parameter, gradient: Tensor, optimizer: Optimizer) -> Step:
    """The step that updates one parameter from its complete gradient."""
    n = gradient.elements
    label = f"{parameter.name}:update"
    if optimizer.name == "adamw":
        floats = [*optimizer.betas, optimizer.eps, optimizer.weight_decay]
        operands = [parameter.buffer, gradient.buffer, *parameter.states, parameter.accumulator]
        return Step("adamw", label, [n], floats, operands, backward=True)
    momentum = parameter.states[0] if parameter.states else None
    ints, floats = [n, int(optimizer.nesterov)], [optimizer.momentum, optimizer.weight_decay]
    operands = [parameter.buffer, gradient.buffer, momentum, parameter.accumulator]
    return Step("sgd", label, ints, floats, operands, backward=True)
