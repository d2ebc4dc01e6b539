"""Front end for torch: ``nn.Module`` → ONNX graph with a symbolic batch dimension and the state dict's names.

``torch.onnx.export(dynamo=True)`` traces the module in eval mode, so batch statistics and stochastic depth vanish.
Dropout is kept (`training_dropout`): while tracing it is a custom operator that becomes an ONNX Dropout node.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from edge_razor.errors import UsageError
from edge_razor.exporters.multihead import batch_first_attention
from edge_razor.exporters.training_dropout import mark_probabilities, training_dropout, translations

if TYPE_CHECKING:
    import torch

OPSET = 20


@dataclass
class Captured:
    """A model as it comes from a front end.

    Attributes:
        model: standard ONNX ops; parameters are initializers marked by ``mark_parameters``.
        state_dict: names that the user's own file has, in order.
        aliases: tied tensors, second name → first name.
        extra: tensors of the state dict that the graph does not use (``num_batches_tracked``), by name.
    """

    model: ir.Model
    state_dict: list[str]
    aliases: dict[str, str] = field(default_factory=dict)
    extra: dict[str, np.ndarray] = field(default_factory=dict)


def mark_parameters(graph: ir.Graph, names: Sequence[str]) -> None:
    """Marks the initializers ``names`` as tensors of the user's model: passes keep their name, data and layout."""
    for name in names:
        graph.initializers[name].meta["parameter"] = True


def capture(model: torch.nn.Module, example_inputs: Any, *, dropout: bool = True) -> Captured:
    """Traces ``model``. Its training flags, ``requires_grad`` and forward methods are as before afterwards, also after
    an error.

    Args:
        example_inputs: a tensor, a tuple of tensors, or a mapping from the names of forward()'s arguments to tensors:
            float32, int64 or bool, first dimension = batch (of any size). Whole numbers are indices of an embedding, or
            masks.
        dropout: keep dropout for training.

    Raises:
        UsageError: an input is no such tensor, a parameter is not float32, or torch cannot
            trace the model.
    """
    import torch

    names: list[str] = []
    if isinstance(example_inputs, Mapping):
        names, inputs = [str(name) for name in example_inputs], tuple(example_inputs.values())
    else:
        inputs = (example_inputs,) if isinstance(example_inputs, torch.Tensor) else tuple(example_inputs)
    _check_inputs(inputs)
    tensors = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise UsageError(f"parameter {name} is {tensor.dtype}; export needs float32: call model.float()")
    # A batch of one would be specialized by torch.export; two rows of the same data trace the same graph.
    inputs = tuple(torch.cat([x[:1], x[:1]]) for x in inputs)
    traced = _first_output(model, names) if names or hasattr(model, "config") else model
    visible = training_dropout(model, traced, inputs, enabled=dropout)
    with _eval_mode(model), _without_cache(model), batch_first_attention(model), visible, _quiet():
        try:
            program = torch.onnx.export(
                traced,
                inputs,
                dynamo=True,
                optimize=False,
                opset_version=OPSET,
                dynamic_shapes=_dynamic_shapes(traced, len(inputs)),
                custom_translation_table=translations(OPSET),
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            raise UsageError(f"torch cannot export the model: {_root_cause(error)}") from error
    assert program is not None
    graph = program.model.graph
    mark_probabilities(graph)
    if traced is not model:
        _unwrap(graph, names or list(inspect.signature(model.forward).parameters))
    state = model.state_dict()
    aliases = _aliases(state)
    _restore_names(graph, state, aliases)
    used = [name for name in state if name in graph.initializers]
    mark_parameters(graph, used)
    trained = dict(model.named_parameters(remove_duplicate=False))
    for name in used:
        if name not in trained:
            graph.initializers[name].meta["buffer"] = True
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
            name = f"{path}.weight" if path else "weight"
            table = graph.initializers.get(aliases.get(name, name))
            if table is not None:
                table.meta["padding_idx"] = module.padding_idx  # ONNX's Gather has no such thing
    for node in graph:
        node.metadata_props["layer"] = _layer(node)
    stored = set(used) | set(aliases)
    extra = {name: tensor.detach().cpu().numpy().copy() for name, tensor in state.items() if name not in stored}
    return Captured(program.model, list(state), aliases, extra)


def _first_output(model: torch.nn.Module, names: Sequence[str]) -> torch.nn.Module:
    """``model`` with positional arguments called ``names``, and one tensor as its result: of a table of results (as
    Hugging Face models give) the logits, else the first tensor."""
    import torch

    class FirstOutput(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.training = model.training

        def forward(self, *values: torch.Tensor) -> torch.Tensor:
            result = self.model(**dict(zip(names, values, strict=True))) if names else self.model(*values)
            if isinstance(result, Mapping):
                result = result["logits"] if "logits" in result else next(iter(result.values()))
            return result[0] if isinstance(result, tuple | list) else result

    return FirstOutput()


def _unwrap(graph: ir.Graph, names: Sequence[str]) -> None:
    """Takes the prefix of `_first_output` off parameters and layers, and gives the inputs their names back."""
    for value in list(graph.initializers.values()):
        if value.name is not None and value.name.startswith("model."):
            del graph.initializers[value.name]
            value.name = value.name.removeprefix("model.")
            graph.initializers[value.name] = value
    taken = {output.name for node in graph for output in node.outputs}
    for value, name in zip(graph.inputs, names, strict=False):
        value.name = name if name not in taken else f"{name}/input"
    for node in graph:
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
        node.metadata_props["pkg.torch.onnx.name_scopes"] = scopes.replace("'model.", "'").replace("'model'", "''")


@contextlib.contextmanager
def _without_cache(model: torch.nn.Module) -> Iterator[None]:
    """A language model's keys and values of earlier tokens serve generation, not training."""
    config = getattr(model, "config", None)
    before = getattr(config, "use_cache", None)
    if before:
        config.use_cache = False  # type: ignore[union-attr]
    try:
        yield
    finally:
        if before:
            config.use_cache = before  # type: ignore[union-attr]


def _check_inputs(inputs: tuple[Any, ...]) -> None:
    import torch

    allowed = (torch.float32, torch.int64, torch.bool)

    if not inputs:
        raise UsageError("example_inputs is empty; give one tensor for each argument of forward()")
    for position, x in enumerate(inputs):
        if not isinstance(x, torch.Tensor) or x.dtype not in allowed:
            given = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
            raise UsageError(f"example input {position} is {given}; export needs float32, int64 or bool tensors")
        if x.dim() < 2 or x.shape[0] < 1:
            raise UsageError(
                f"example input {position} has shape {tuple(x.shape)}; dimension 0 must be a batch of at least 1"
            )


def _dynamic_shapes(model: torch.nn.Module, count: int) -> tuple[Any, ...]:
    """Dimension 0 of each input is the batch; what ``forward(self, *args)`` collects is one nested tuple to torch."""
    import torch

    shapes = tuple({0: torch.export.Dim("batch")} for _ in range(count))
    for position, parameter in enumerate(inspect.signature(model.forward).parameters.values()):
        if parameter.kind is parameter.VAR_POSITIONAL:
            return (*shapes[:position], shapes[position:])
    return shapes


def _root_cause(error: BaseException) -> str:
    """First line of the innermost cause that has a message."""
    message, cause = str(error), error.__cause__
    while cause is not None:
        message, cause = str(cause) or message, cause.__cause__
    return message.strip().splitlines()[0] if message.strip() else type(error).__name__


def _aliases(state: dict[str, torch.Tensor]) -> dict[str, str]:
    """Tied tensors: names that share storage, offset, shape and strides → the first of them."""
    first: dict[tuple[Any, ...], str] = {}
    aliases = {}
    for name, tensor in state.items():
        if tensor.numel() == 0:
            continue
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if key in first:
            aliases[name] = first[key]
        else:
            first[key] = name
    return aliases


def _restore_names(graph: ir.Graph, state: dict[str, torch.Tensor], aliases: dict[str, str]) -> None:
    """Uses of a tied tensor's second name read the first one. Data is copied, so that the graph does not share memory
    with the model."""
    for alias, name in aliases.items():
        value = graph.initializers.get(alias)
        if value is None:
            continue
        if name in graph.initializers:
            ir.convenience.replace_all_uses_with(value, graph.initializers[name])
            del graph.initializers[alias]
        else:
            del graph.initializers[alias]
            value.name = name
            graph.initializers[name] = value
    for name, value in graph.initializers.items():
        if name in state:
            value.const_value = ir.tensor(state[name].detach().cpu().contiguous().numpy().copy(), name=name)


def _layer(node: ir.Node) -> str:
    """Path of the torch module that ``node`` comes from; torch.onnx records the scopes, the operator's own name
    last."""
    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
    parts = [part.strip(" '\"") for part in scopes.strip("[]").split(",")]
    return parts[-2] if len(parts) > 1 and not parts[-2].startswith("_empty_nn_module") else ""


@contextlib.contextmanager
def _eval_mode(model: torch.nn.Module) -> Iterator[None]:
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in training:
            module.training = flag


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences the exporter's progress lines and its warnings about packages that are not installed."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
