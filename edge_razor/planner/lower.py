"""Lowering: training graph → kernel steps over unplaced buffers, one rule per operator."""

from __future__ import annotations

from edge_razor.errors import BundleError, PlanError

from . import lower_conv, lower_math, lower_shape, lower_transformer
from .context import Lowering, Tensor
from .graph import DOMAIN, Graph
from .optimizer import Memory, Optimizer, update_step
from .program import Buffer, Places, Program, Region, Step
from .segments import articulation_points
from .storage import Place, Storage

__all__ = ["check_operators", "lower_inference", "lower_training"]

RULES = {
    **{(DOMAIN, op): rule for op, rule in lower_conv.RULES.items()},
    **{(DOMAIN, op): rule for op, rule in lower_transformer.RULES.items()},
    **{
        (DOMAIN if op.endswith(("Grad", "Loss")) or op in ("MaxPool", "AveragePool", "Dropout") else "", op): rule
        for op, rule in lower_math.RULES.items()
    },
    **{("", op): rule for op, rule in lower_shape.RULES.items()},
}


def check_operators(graph: Graph) -> None:
    """Raises BundleError at the first node whose operator has no rule."""
    for node in graph.nodes:
        if (node.domain, node.op) not in RULES:
            node.fail(f"unknown operator in domain {node.domain!r}")


def lower_training(
    graph: Graph, samples: int, storage: dict[str, Storage], memory: Memory, optimizer: Optimizer, threads: int
) -> tuple[Program, list[Step]]:
    """Steps of one micro-batch of `samples` in graph order, and apart from them one update step a trainable parameter.

    Raises:
        BundleError: the graph breaks a rule of docs/training-graph.md.
        PlanError: a gradient and its parameter are stored in different layouts.
    """
    lowering = _walk(graph, samples, storage, memory, threads)
    updates: list[Step] = []
    for name, value in graph.gradients.items():
        gradient, parameter = lowering.tensors.get(value), memory.parameters.get(name)
        if gradient is None or parameter is None:
            raise BundleError(f"training graph: {value!r} is no float tensor, or parameter {name!r} is used by no node")
        if (gradient.perm or tuple(range(len(gradient.shape)))) != parameter.perm or gradient.shape != parameter.shape:
            raise PlanError(f"the gradient of {name!r} has another shape or layout than the parameter")
        updates.append(update_step(parameter, gradient, optimizer))
    inputs = [lowering.tensors[i].buffer for i in graph.inputs]
    return Program(lowering.steps, inputs, places=_places(graph, lowering)), updates


def _places(graph: Graph, lowering: Lowering) -> Places:
    """What the storage table says about buffers, from what it says about values: several may be views of one buffer.

    A buffer is in memory if any of its readers wants it there; what is in the spill file is not made again.
    """
    table = lowering.storage
    if all(storage.place == "memory" for storage in table.values()):
        return Places()
    for name, storage in table.items():
        if storage.place == "recompute" and not storage.exact:
            raise PlanError(f"internal: {name!r} is to be made again exactly, but is stored as {storage.form!r}")
    wanted: dict[Buffer, set[Place]] = {}

    def want(name: str, place: Place) -> None:
        buffer = lowering.buffer(name)
        if buffer is not None and buffer.region == Region.ARENA:
            wanted.setdefault(buffer, set()).add(place)

    made = {output for node in graph.nodes if node.phase != "backward" for output in node.outputs if output}
    for node in graph.nodes:
        if node.phase == "backward":
            for name in made.intersection(node.inputs):
                want(name, table[name].place if name in table else "memory")
    points = {name for name in articulation_points(graph) if name not in table}
    checkpoints = {lowering.buffer(name) for name in points}
    for name, storage in table.items():
        if name not in lowering.kept:
            want(name, storage.place)
            if storage.place != "recompute":
                checkpoints.add(lowering.buffer(name))
    again = frozenset(buffer for buffer, places in wanted.items() if places == {"recompute"})
    spilled = frozenset(b for b, places in wanted.items() if "memory" not in places and "spill" in places)
    return Places(again, frozenset(b for b in checkpoints if b is not None) - again, spilled)


def lower_inference(graph: Graph, samples: int, memory: Memory, threads: int) -> tuple[Program, Tensor]:
    """Forward steps of `graph.inference()` for `samples`, and the model output's tensor."""
    lowering = _walk(graph, samples, {}, memory, threads)
    if graph.output not in lowering.tensors:
        raise BundleError(f"training graph: output {graph.output!r} is no float tensor")
    output = lowering.tensors[graph.output]
    return Program(lowering.steps, [lowering.tensors[i].buffer for i in graph.inputs], [output.buffer]), output


def _walk(graph: Graph, samples: int, storage: dict[str, Storage], memory: Memory, threads: int) -> Lowering:
    params = {
        name: Tensor(p.buffer, p.shape, None if p.perm == tuple(range(len(p.perm))) else p.perm, form=p.form)
        for name, p in memory.parameters.items()
    }
    by_rows = frozenset(v for p, v in graph.gradients.items() if p in params and memory.parameters[p].row_capacity)
    lowering = Lowering(graph, samples, storage, params, threads, by_rows)
    for name in graph.inputs:
        lowering.bind_input(name)
    for node in graph.nodes:
        try:
            RULES[node.domain, node.op](lowering, node)
        except (IndexError, KeyError, ValueError, TypeError, ZeroDivisionError) as error:
            node.fail(f"inconsistent shapes or attributes ({error})")
    return lowering
