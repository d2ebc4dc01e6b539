"""``edge_razor.export``: torch module or ONNX file → bundle. The stages of the exporter in order."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

import edge_razor
from edge_razor.bundle import write_bundle
from edge_razor.errors import UsageError
from edge_razor.exporters.capture import Captured, capture
from edge_razor.exporters.differentiate import LOSSES, differentiate
from edge_razor.exporters.forward import Forward, build_forward
from edge_razor.exporters.graph_edit import BATCH, is_parameter
from edge_razor.exporters.load_onnx import load_onnx
from edge_razor.exporters.lora import Lora, insert_lora, parse_lora
from edge_razor.exporters.razor import insert_packs
from edge_razor.exporters.tokenizer import read_tokenizer
from edge_razor.exporters.trainable import Parameter, parameters, resolve
from edge_razor.exporters.training_graph import to_proto, validate

if TYPE_CHECKING:
    import torch

__all__ = ["export"]

TOKEN_LOSS = "token_cross_entropy"


def export(
    model: torch.nn.Module | str | os.PathLike[str],
    example_inputs: Any,
    path: str | os.PathLike[str],
    *,
    loss: str = "cross_entropy",
    label_smoothing: float = 0.0,
    trainable: str = "all",
    classes: Sequence[str] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    dropout: bool = True,
    tokenizer: str | os.PathLike[str] | None = None,
    buckets: Sequence[int] = (),
) -> Path:
    """Writes the bundle of a model that is ready for planning and training.

    Args:
        model: an ``nn.Module`` (read only; train or eval mode does not matter, BatchNorm statistics stay frozen), or a
            ``.onnx`` file.
        example_inputs: a float32 tensor, a tuple of tensors, or a mapping from argument names of forward() to tensors,
            first dimension = batch (its size is free); int64 and bool tensors are token indices or
            masks. For a ``.onnx`` file None, or anything with shapes that fixes dimensions which the file leaves free.
        path: the bundle directory to make.
        loss: ``cross_entropy`` (int class targets, classes in the output's dimension 1 as torch has them),
            ``token_cross_entropy`` (the same with classes last, as language models have them: [N, tokens, vocabulary];
            targets of −100 do not count), ``mse`` or ``bce_with_logits`` (float targets in the output's
            shape).
        label_smoothing: in [0, 1), cross_entropy only.
        trainable: ``all``, ``head``, ``last:N``, ``bias``, ``norm`` or glob patterns, joined by commas; or
            ``lora:r=8,alpha=16,targets=*.query|*.value,head`` (see `lora.parse_lora`): low-rank additions to frozen
            linear layers, and what is named without ``=``.
        classes: names of the output's classes.
        preprocessing: what `edge-razor train` does with images: ``resize``, ``crop`` (pixels), ``mean``, ``std`` (per
            channel), ``interpolation``; see docs/bundle.md.
        dropout: keep dropout for training: ``nn.Dropout``, ``F.dropout``, that of attention's probabilities (ONNX:
            Dropout nodes). DropPath and stochastic depth are never kept. A UserWarning names modules whose dropout
            cannot be kept, see `training_dropout`.
        tokenizer: tokenizer.json of a language model, or the directory that it is in; goes into the bundle, so that
            `edge-razor train` takes texts.
        buckets: for a model of texts: fewer tokens, for which training graphs are made, too, so that short texts cost
            less. Needs an nn.Module and a mapping or tuple of [batch, tokens] inputs.

    Returns:
        ``path``.

    Raises:
        UsageError: an argument is wrong, or torch cannot trace the model.
        UnsupportedOpError: lists every operator that cannot be trained.
        BundleError: the ``.onnx`` file cannot be read, or ``path`` is something else than a bundle.
    """
    loss_table = _check_loss(loss, label_smoothing)
    _check_buckets(buckets, model, example_inputs)
    if isinstance(model, str | os.PathLike):
        captured = load_onnx(model, example_inputs, dropout=dropout)
    else:
        captured = capture(model, example_inputs, dropout=dropout)
    lora = parse_lora(trainable)
    # The passes drop initializers that they no longer need; the state dict must come back whole.
    tensors = _parameter_data(captured)

    def trained(captured: Captured) -> tuple[Forward, ir.Model, list[str], dict[str, dict[str, Any]]]:
        """Forward graph, training graph, trained parameters and LoRA layers."""
        adapted: dict[str, dict[str, Any]] = {}
        forward = build_forward(
            captured,
            classes_last=loss == "cross_entropy",
            adapt=None if lora is None else lambda graph: adapted.update(insert_lora(graph, lora)),
        )
        selected = _trained(trainable, lora, adapted, parameters(forward.model))
        return forward, insert_packs(differentiate(forward.model, loss_table, selected)), selected, adapted

    dtypes = {str(v.name): v.dtype.name.lower() for v in captured.model.graph.inputs if v.dtype is not None}
    forward, training, selected, adapted = trained(captured)
    if classes is not None:
        _check_classes(classes, forward, loss)
    tokens, text = (None, None) if tokenizer is None else read_tokenizer(tokenizer, training.graph)
    training_proto = to_proto(training)
    validate(training_proto)
    tensors |= _constants(training, tensors)
    shorter = {}
    for length in buckets:
        assert not isinstance(model, str | os.PathLike)  # `_check_buckets` has refused it
        _, graph, others, _ = trained(capture(model, _cut(example_inputs, length), dropout=dropout))
        if others != selected:
            raise UsageError(f"with {length} tokens the model trains other parameters; leave the bucket out")
        _rename_constants(graph, tensors, length)
        tensors |= _constants(graph, tensors)
        shorter[length] = to_proto(graph)
        validate(shorter[length])
    manifest = {
        "producer": f"edge-razor {edge_razor.__version__}",
        "inputs": [
            {
                "name": value.name,
                "dtype": _json_dtype(dtypes, value.name),
                "indices": value.dtype == ir.DataType.INT64,
                "shape": _json_shape(shape),
                "perm": list(order),
            }
            for value, shape, order in zip(
                training.graph.inputs, forward.input_shapes, forward.input_orders, strict=False
            )
        ],
        "output": {
            "name": training.graph.outputs[0].name,
            "shape": _json_shape(forward.output_shape),
            "perm": [forward.output_order.index(d) for d in range(len(forward.output_order))],
        },
        "loss": loss_table,
        "trainable": {"spec": trainable, "parameters": selected},
        "state_dict": [name for name in captured.state_dict if name not in captured.aliases],
        "aliases": captured.aliases,
        "classes": None if classes is None else [str(name) for name in classes],
        "preprocessing": None if preprocessing is None else dict(preprocessing),
        "text": text,
        "lora": None if lora is None else {"rank": lora.rank, "alpha": lora.alpha, "layers": adapted},
    }
    return write_bundle(path, training_proto, to_proto(forward.inference), tensors, manifest, tokens, shorter)


def _trained(
    spec: str, lora: Lora | None, adapted: Mapping[str, Mapping[str, Any]], available: Sequence[Parameter]
) -> list[str]:
    """Names of the parameters that train: with LoRA its own, and what is named beside it."""
    if lora is None:
        return resolve(spec, available)
    added = {str(layer[part]) for layer in adapted.values() for part in ("a", "b")}
    others = [p for p in available if p.name not in added]
    chosen = added | set(resolve(lora.others, others) if lora.others else [])
    return [p.name for p in available if p.name in chosen]


def _check_loss(loss: str, label_smoothing: float) -> dict[str, object]:
    known = (*LOSSES, TOKEN_LOSS)
    if loss not in known:
        raise UsageError(f"unknown loss {loss!r}; choose one of {', '.join(known)}")
    if not 0.0 <= label_smoothing < 1.0:
        raise UsageError(f"label_smoothing is {label_smoothing}; it must be at least 0 and below 1")
    if label_smoothing and loss not in ("cross_entropy", TOKEN_LOSS):
        raise UsageError(f"label_smoothing works with cross_entropy only, not with {loss}")
    return {"name": "cross_entropy" if loss == TOKEN_LOSS else loss, "label_smoothing": float(label_smoothing)}


def _check_classes(classes: Sequence[str], forward: Forward, loss: str) -> None:
    if isinstance(classes, str):
        raise UsageError("classes is one text; give a list of names")
    axis = 1 if loss == "cross_entropy" else len(forward.output_shape) - 1
    width = forward.output_shape[axis]
    if len(classes) != width:
        raise UsageError(f"{len(classes)} class names are given, but the model's output has {width} classes")
    if len(set(classes)) != len(classes):
        raise UsageError("two classes have the same name")


def _parameter_data(captured: Captured) -> dict[str, np.ndarray]:
    """Every tensor of the user's state dict, by name (tied tensors once)."""
    graph = captured.model.graph
    used = {
        str(value.name): np.ascontiguousarray(value.const_value.numpy())
        for value in graph.initializers.values()
        if is_parameter(value) and value.const_value is not None
    }
    return {**used, **captured.extra}


def _check_buckets(buckets: Sequence[int], model: Any, example_inputs: Any) -> None:
    if not buckets:
        return
    if isinstance(model, str | os.PathLike):
        raise UsageError("buckets need a torch model: a .onnx file has one length")
    values = example_inputs.values() if isinstance(example_inputs, Mapping) else example_inputs
    lengths = {tuple(x.shape[1:]) for x in values}
    if len(lengths) != 1 or len(next(iter(lengths))) != 1:
        raise UsageError(f"buckets need inputs of one shape [batch, tokens]; these are {sorted(lengths)}")
    longest = next(iter(lengths))[0]
    if any(not 0 < length < longest for length in buckets) or len(set(buckets)) < len(buckets):
        raise UsageError(f"buckets {list(buckets)} must be different numbers of tokens below the inputs' {longest}")


def _cut(example_inputs: Any, tokens: int) -> Any:
    if isinstance(example_inputs, Mapping):
        return {name: x[:, :tokens] for name, x in example_inputs.items()}
    return tuple(x[:, :tokens] for x in example_inputs)


def _constants(training: ir.Model, known: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Float constants of a training graph that are in no state dict."""
    return {
        str(name): value.const_value.numpy()
        for name, value in training.graph.initializers.items()
        if name not in known
        and value.const_value is not None
        and value.dtype is not None
        and value.dtype.is_floating_point()
    }


def _rename_constants(training: ir.Model, known: Mapping[str, np.ndarray], tokens: int) -> None:
    """Constants of a shorter graph that are others than those of the same name get a name of their own."""
    graph = training.graph
    for name, value in list(graph.initializers.items()):
        if is_parameter(value) or value.const_value is None or value.const_value.dtype != ir.DataType.FLOAT:
            continue
        data = value.const_value.numpy()
        if name in known and np.array_equal(known[name], data):
            continue
        del graph.initializers[name]
        value.name = f"tokens{tokens}/{name}"
        graph.initializers[value.name] = value


def _json_dtype(dtypes: Mapping[str, str], name: str | None) -> str:
    dtype = dtypes.get(str(name), "float")
    return "float32" if dtype == "float" else dtype


def _json_shape(sizes: tuple[int, ...]) -> list[int | None]:
    return [None if size % BATCH == 0 else size for size in sizes]
