"""What a model computes from its integer inputs and the shapes of its inputs alone (attention masks, position indices,
lengths) → one spelling.

Such chains of Gather, Range, comparison, Where, … differ from library to library and from release to release, but there
are few things that they can mean. So they are recognized by what they compute: each chain is evaluated for several
inputs, and replaced by the simplest expression that gives the same values in all of them:

- a constant;
- the input itself, or ``1 − input``, seen in another shape;
- which keys a query may look at: a key mask per sample, combined with a constant matrix (causal or any other);
- the number of positions that a mask leaves, at least some ε.

Rows of an attention mask that leave no key are not compared: libraries differ in what they do with them, and the result
of such a query is meaningless. What is none of these stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from edge_razor.errors import UnsupportedOpError
from edge_razor.exporters.canonicalize.positions import recognize_position, refuse_position, rewrite_position
from edge_razor.exporters.graph_edit import bypass, constant, is_parameter, remove_dead

Array = np.ndarray

INTEGER = (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL)
_NUMPY = {ir.DataType.INT64: np.int64, ir.DataType.INT32: np.int32, ir.DataType.BOOL: np.bool_}
_BATCHES = (3, 3, 3, 3, 3, 5)  # of the trial inputs; two sizes tell the batch dimension from others
_NONE, _ALL = 0, 1  # the trials in which every mask is 0, and 1
_MASK_DIMENSIONS = 3
_MASKED = -1e4  # what is added to a score that shall not count is below this; BERT's own code uses −10,000


def index_inputs(graph: ir.Graph) -> list[ir.Value]:
    """Inputs of whole numbers or booleans."""
    return [value for value in graph.inputs if value.dtype in INTEGER]


def resolve_masks(model: ir.Model) -> ir.Model:
    """Rewrites a captured graph in place; see module docstring. Inputs have a free first dimension, others are fixed.

    Raises:
        UnsupportedOpError: the chain cannot be evaluated.
    """
    graph = model.graph
    inputs = index_inputs(graph)
    dependent = _dependent(graph, inputs)
    frontier = [value for value in dependent if any(_outside(use.node, dependent) for use in value.uses())]
    frontier = [value for value in frontier if value not in inputs]
    if not frontier:
        return model
    numbers = _numbers(dependent)
    trials = list(_trials(graph, inputs, numbers))
    try:
        results = _evaluate(model, frontier, trials)
    except UnsupportedOpError:
        if inputs:
            raise
        return model
    for value, found in zip(frontier, results, strict=True):
        if not inputs and found[0].ndim < _MASK_DIMENSIONS:
            continue  # shape arithmetic, which `resolve_shapes` folds
        position = recognize_position(found, {v: [_mask(v, trial) for trial in trials] for v in inputs}, numbers)
        if position is not None and rewrite_position(graph, value, position):
            continue
        refuse_position(value)
        rewrite = _recognize(graph, inputs, trials, found)
        if rewrite is not None:
            _replace(graph, value, rewrite, ir.DataType.from_numpy(found[0].dtype))
    remove_dead(graph)
    return model


def _dependent(graph: ir.Graph, inputs: list[ir.Value]) -> dict[ir.Value, None]:
    """Values that the integer inputs, shapes of inputs and constants alone determine, constants left out; in order."""
    dependent: dict[ir.Value, None] = dict.fromkeys(inputs)
    fixed: set[ir.Value] = set()
    for node in graph:
        operands = [value for value in node.inputs if value is not None]
        if node.op_type == "Shape" and operands and operands[0].is_graph_input():
            dependent.update(dict.fromkeys(node.outputs))
            continue
        known = all(v in dependent or v in fixed or _is_fixed(v) for v in operands)
        if not known or node.domain or any(a.type == ir.AttributeType.GRAPH for a in node.attributes.values()):
            continue
        if any(v in dependent for v in operands):
            dependent.update(dict.fromkeys(node.outputs))
        else:
            fixed.update(node.outputs)
    return dependent


def _is_fixed(value: ir.Value) -> bool:
    if value.const_value is None:
        return False
    return not is_parameter(value) or value.dtype in INTEGER


def _outside(node: ir.Node, dependent: dict[ir.Value, None]) -> bool:
    return not all(output in dependent for output in node.outputs)


def masks_to_float(model: ir.Model) -> ir.Model:
    """Inputs of whole numbers that index no table become float32, as the training graph has them; their casts go."""
    graph = model.graph
    for value in index_inputs(graph):
        users = [use.node for use in value.uses()]
        if any(node.op_type == "Gather" for node in users):
            for node in users:
                if node.op_type not in ("Gather", "SelectPosition"):
                    node.meta["why"] = f"input {value.name} indexes a table; a mask must be an input of its own"
            value.type = ir.TensorType(ir.DataType.INT64)
            continue
        value.type = ir.TensorType(ir.DataType.FLOAT)
        for node in users:
            if node.op_type == "Cast" and node.outputs[0].dtype == ir.DataType.FLOAT:
                bypass(node, value)
    return model


# ---- What the chains compute ----


@dataclass(frozen=True)
class Trial:
    """One set of inputs."""

    samples: int
    arrays: dict[str, Array]


def _numbers(dependent: dict[ir.Value, None]) -> list[int]:
    """Whole numbers that the chains mention, such as the index of the padding token."""
    found: set[int] = set()
    for value in dependent:
        node = value.producer()
        for operand in node.inputs if node is not None else ():
            tensor = None if operand is None else ir.convenience.get_const_tensor(operand)
            if tensor is not None and tensor.size == 1 and tensor.dtype in INTEGER:
                found.add(int(tensor.numpy().reshape(-1)[0]))
    return sorted(found)


def _trials(graph: ir.Graph, inputs: list[ir.Value], numbers: list[int]) -> Iterator[Trial]:
    """Inputs of 0 and 1, as masks have them. Indices of a table are random rows of it, and half of them ``numbers``:
    what happens to one token alone must not look like a constant. Of other inputs only the shape matters."""
    rng = np.random.default_rng(0)
    sizes = {v: [size for use in v.uses() if (size := _rows(use.node, use.idx))] for v in inputs}
    tables = {v: min(found) for v, found in sizes.items() if found}
    for number, samples in enumerate(_BATCHES):
        arrays: dict[str, Array] = {}
        for value in graph.inputs:
            shape = (samples, *(int(d) for d in list(value.shape or [])[1:] if isinstance(d, int)))
            if value not in inputs:
                arrays[str(value.name)] = np.zeros(shape, np.float32)
                continue
            size = shape[-1] if len(shape) > 1 else 1
            if value in tables:
                data = rng.integers(0, tables[value], shape)
                special = [n for n in numbers if 0 <= n < tables[value]]
                if special:
                    data = np.where(rng.random(shape) < 0.5, rng.choice(special, shape), data)
                if special and number == _NONE:  # nothing but padding
                    data[...] = np.resize(special, samples).reshape(-1, *(1,) * (len(shape) - 1))
            elif number in (_NONE, _ALL):
                data = np.full(shape, number, np.int64)
            elif number in (2, 3):  # padded behind, padded before
                lengths = rng.integers(1, size + 1, (*shape[:-1], 1))
                data = (np.arange(size) < lengths).astype(np.int64)
                data = data if number == 2 else data[..., ::-1]
            else:
                data = rng.integers(0, 2, shape)
                data[1] = 0
            arrays[str(value.name)] = np.ascontiguousarray(data).astype(_NUMPY[value.dtype or ir.DataType.INT64])
        yield Trial(samples, arrays)


def _rows(node: ir.Node, operand: int) -> int:
    """Rows of the parameter that ``node`` looks up by this operand; 0 if it does not."""
    table = node.inputs[0] if node.op_type == "Gather" and operand == 1 else None
    size = table.shape[0] if is_parameter(table) and table is not None and table.shape is not None else 0
    return size if isinstance(size, int) else 0


class GatherElements(OpRun):
    """onnx's own evaluation (1.23) fails for more than 64 elements along the axis."""

    op_domain = ""

    def _run(self, data: Array, indices: Array, axis: int = 0) -> tuple[Array]:
        return (np.take_along_axis(data, indices, axis),)


def _evaluate(model: ir.Model, wanted: list[ir.Value], trials: list[Trial]) -> list[list[Array]]:
    """Values of ``wanted`` for each trial: one list per value."""
    graph = model.graph
    needed: set[ir.Node] = set()
    pending = [value.producer() for value in wanted]
    while pending:
        node = pending.pop()
        if node is not None and node not in needed:
            needed.add(node)
            pending += [v.producer() for v in node.inputs if v is not None]
    copy = model.clone()
    values = {str(output.name): output for node in copy.graph for output in node.outputs}
    copy.graph.outputs.clear()
    copy.graph.outputs.extend(values[str(value.name)] for value in wanted)
    for node, original in reversed(list(zip(list(copy.graph), list(graph), strict=True))):
        if original not in needed:
            copy.graph.remove(node, safe=True)
    remove_dead(copy.graph)
    used = {value for node in copy.graph for value in node.inputs}
    for value in [v for v in copy.graph.inputs if v not in used]:
        copy.graph.inputs.remove(value)
    feeds = {value.name for value in copy.graph.inputs}
    for value in values.values():
        value.shape = None
    try:
        evaluator = ReferenceEvaluator(ir.to_proto(copy), new_ops=[GatherElements])
        runs = [
            evaluator.run(None, {name: data for name, data in trial.arrays.items() if name in feeds})
            for trial in trials
        ]
    except Exception as error:  # the evaluator raises whatever numpy does
        problem = tuple((str(v.name), "", "") for v in wanted)
        raise UnsupportedOpError(
            f"what the model computes from its integer inputs cannot be evaluated: {error}", problem
        ) from error
    lists: list[list[Array]] = [list(run) for run in runs]  # type: ignore[arg-type]
    return [[np.asarray(run[index]) for run in lists] for index in range(len(wanted))]


# ---- Recognition ----


class _Builder:
    """Nodes of a replacement, each with its one output."""

    def __init__(self, graph: ir.Graph, stem: str) -> None:
        self.graph, self.stem, self.nodes = graph, stem, list[ir.Node]()

    def const(self, data: Array) -> ir.Value:
        return constant(self.graph, data, f"{self.stem}/const")

    def node(
        self, op_type: str, *inputs: ir.Value, dtype: ir.DataType = ir.DataType.FLOAT, **attributes: int
    ) -> ir.Value:
        output = ir.Value(name=f"{self.stem}/{op_type}{len(self.nodes)}", type=ir.TensorType(dtype))
        node = ir.node(op_type, list(inputs), attributes, outputs=[output])
        node.name = output.name
        self.nodes.append(node)
        return output


def _recognize(
    graph: ir.Graph, inputs: list[ir.Value], trials: list[Trial], found: list[Array]
) -> Callable[[_Builder, ir.DataType], ir.Value] | None:
    """What computes ``found``, as a function that builds it; None if it is none of the things known."""
    data = _constant(trials, found)
    if data is not None:
        return _constant_builder(data)
    for source in inputs:
        for recognize in (_attention, _same, _count):
            build = recognize(source, trials, found)
            if build is not None:
                return build
    return None


def _has_batch(trials: list[Trial], found: list[Array]) -> bool:
    return found[0].ndim > 0 and all(a.shape[0] == trial.samples for a, trial in zip(found, trials, strict=True))


def _constant(trials: list[Trial], found: list[Array]) -> Array | None:
    """[…] or, for what is the same in every sample, [1, …]."""
    rows = found
    if _has_batch(trials, found):
        rows = [a[:1] for a in found]
        if any(not np.array_equal(a, np.broadcast_to(a[:1], a.shape)) for a in found):
            return None
    if any(a.shape != rows[0].shape or not np.array_equal(a, rows[0], equal_nan=a.dtype.kind == "f") for a in rows):
        return None
    return rows[0]


def _constant_builder(data: Array) -> Callable[[_Builder, ir.DataType], ir.Value]:
    return lambda build, _: build.const(data)


def _mask(source: ir.Value, trial: Trial) -> Array:
    return trial.arrays[str(source.name)]


def _as_float(build: _Builder, source: ir.Value) -> ir.Value:
    return build.node("Cast", source, to=int(ir.DataType.FLOAT))


def _same(
    source: ir.Value, trials: list[Trial], found: list[Array]
) -> Callable[[_Builder, ir.DataType], ir.Value] | None:
    """The input or 1 − input, with dimensions of 1 put in, or repeated along them."""
    if not _has_batch(trials, found):
        return None
    shape, own = found[0].shape, _mask(source, trials[0]).shape
    # Positions of the input's dimensions among those of the value: the first that fit, from the front.
    places: list[int] = []
    for size in own:
        start = places[-1] + 1 if places else 0
        place = next((i for i in range(start, len(shape)) if shape[i] == size), None)
        if place is None:
            return None
        places.append(place)
    view = [-1 if i == places[0] else shape[i] if i in places else 1 for i in range(len(shape))]
    for inverted in (False, True):
        expected = [_mask(source, trial).astype(np.float64) for trial in trials]
        if inverted:
            expected = [1 - e for e in expected]
        pairs = zip(expected, found, strict=True)
        if all(np.array_equal(np.broadcast_to(e.reshape([len(a), *view[1:]]), a.shape), a) for e, a in pairs):
            break
    else:
        return None

    def build(b: _Builder, dtype: ir.DataType) -> ir.Value:
        if not inverted and len(view) == len(own) and dtype == source.dtype:
            return source
        value = _as_float(b, source)
        if inverted:
            value = b.node("Sub", b.const(np.array(1, np.float32)), value)
        value = b.node("Reshape", value, b.const(np.array(view, np.int64)))
        return value if dtype == ir.DataType.FLOAT else b.node("Cast", value, dtype=dtype, to=int(dtype))

    return build


def _attention(
    source: ir.Value, trials: list[Trial], found: list[Array]
) -> Callable[[_Builder, ir.DataType], ir.Value] | None:
    """Boolean (look, or do not look) or additive mask [N, 1 or heads, T, S] of a key mask [N, S]."""
    keys = [_mask(source, trial) for trial in trials]
    shape, boolean = found[0].shape, found[0].dtype == np.bool_
    if len(shape) != 4 or keys[0].ndim != 2 or shape[3] != keys[0].shape[1] or not _has_batch(trials, found):
        return None
    if not boolean and found[0].dtype.kind != "f":
        return None
    for inverted in (False, True):
        for hides in (False, True) if boolean else (False,):
            actual = [_additive(a, hides=hides) for a in found]
            static = actual[_NONE if inverted else _ALL][:1]
            if not np.isfinite(static).any():
                continue
            if not static.any():
                static = np.zeros((1, 1, 1, shape[3]), np.float32)
            if all(_fits(a, (k == 0) == inverted, static) for a, k in zip(actual, keys, strict=True)):
                return _attention_builder(source, np.ascontiguousarray(static), boolean, inverted, hides)
    return None


def _additive(a: Array, *, hides: bool) -> Array:
    """A boolean or additive mask as what it adds to a score: −∞ where a key does not count."""
    if a.dtype == np.bool_:
        return np.where(~a if hides else a, 0, -np.inf).astype(np.float32)
    return np.where(a > _MASKED, a, -np.inf).astype(np.float32)


def _fits(actual: Array, look: Array, static: Array) -> bool:
    """Whether ``static`` is added where ``look`` [N, S] says so, in the rows that have a key."""
    expected = np.broadcast_to(np.where(look[:, None, None, :], static, np.float32(-np.inf)), actual.shape)
    some = np.isfinite(expected).any(axis=-1)
    return np.array_equal(actual[some], expected[some])


def _attention_builder(
    source: ir.Value, static: Array, boolean: bool, inverted: bool, hides: bool
) -> Callable[[_Builder, ir.DataType], ir.Value]:
    """Look = key mask > ½ and static finite; the additive form is Where(mask, static, −∞)."""

    def build(b: _Builder, dtype: ir.DataType) -> ir.Value:
        mask = b.node("Reshape", _as_float(b, source), b.const(np.array([-1, 1, 1, static.shape[3]], np.int64)))
        half = b.const(np.array(0.5, np.float32))
        look = b.node("Less" if inverted else "Greater", mask, half, dtype=ir.DataType.BOOL)
        if not boolean:
            return b.node("Where", look, b.const(static), b.const(np.array(-np.inf, np.float32)), dtype=dtype)
        if not np.isfinite(static).all():
            look = b.node("And", look, b.const(np.isfinite(static)), dtype=ir.DataType.BOOL)
        return b.node("Not", look, dtype=ir.DataType.BOOL) if hides else look

    return build


def _count(
    source: ir.Value, trials: list[Trial], found: list[Array]
) -> Callable[[_Builder, ir.DataType], ir.Value] | None:
    """Σ of a mask [N, S] over S, at least some ε: [N] or [N, 1 or more]."""
    keys = [_mask(source, trial) for trial in trials]
    if keys[0].ndim != 2 or found[0].ndim not in (1, 2) or not _has_batch(trials, found):
        return None
    counts = [k.sum(axis=1, dtype=np.float64) for k in keys]
    columns = [a.reshape(len(a), -1) for a in found]
    if any(not np.array_equal(np.broadcast_to(c[:, :1], c.shape), c) for c in columns):
        return None
    lowest = min(
        (float(c[n, 0]) for c, k in zip(columns, counts, strict=True) for n in range(len(k)) if k[n] == 0), default=0.0
    )
    if any(
        not np.allclose(np.maximum(k, lowest), c[:, 0], rtol=1e-6, atol=0) for c, k in zip(columns, counts, strict=True)
    ):
        return None

    def build(b: _Builder, dtype: ir.DataType) -> ir.Value:
        keep = int(found[0].ndim == 2)
        total = b.node("ReduceSum", _as_float(b, source), b.const(np.array([1], np.int64)), keepdims=keep)
        if lowest > 0:
            total = b.node("Clip", total, b.const(np.array(lowest, np.float32)))
        return total if dtype == ir.DataType.FLOAT else b.node("Cast", total, dtype=dtype, to=int(dtype))

    return build


def _replace(
    graph: ir.Graph, value: ir.Value, rewrite: Callable[[_Builder, ir.DataType], ir.Value], dtype: ir.DataType
) -> None:
    """Readers of ``value`` read what ``rewrite`` builds instead."""
    node = value.producer()
    assert node is not None
    builder = _Builder(graph, str(value.name))
    new = rewrite(builder, dtype)
    layer = node.metadata_props.get("layer", "")
    for made in builder.nodes:
        made.metadata_props["layer"] = layer
    graph.insert_after(node, builder.nodes)
    ir.convenience.replace_all_uses_with(value, new)
