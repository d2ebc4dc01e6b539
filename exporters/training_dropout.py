"""Dropout of training, seen by a trace in eval mode.

``nn.Dropout`` modules are patched one by one. What libraries write as a function of ``self.training`` (attention's
probabilities in ``scaled_dot_product_attention(dropout_p=…)``, ``F.dropout(x, p, self.training)``) is absent from an
eval-mode forward. So the model first runs once in training mode, which shows the modules that call such functions with
a probability; these alone are traced in training mode, with each call turned into an operator that the trace keeps. A
module whose training mode does anything beside dropout (batch statistics, stochastic depth, …) stays in eval mode, with
a warning: with dropout as the identity its output must be that of eval mode.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

if TYPE_CHECKING:
    import torch

__all__ = ["PROBABILITIES", "mark_probabilities", "training_dropout", "translations"]

PROBABILITIES = "edge_razor.dropout_of_probabilities"
"""Metadata of a Dropout node behind an attention: its ratio is that of the probabilities."""

_SEED = 20_221  # of the Dropout nodes that stand for it between translation and `mark_probabilities`
_NAMES = ("dropout", "scaled_dot_product_attention")  # functions of torch.nn.functional


@contextlib.contextmanager
def training_dropout(
    model: torch.nn.Module, traced: torch.nn.Module, inputs: Sequence[torch.Tensor], *, enabled: bool
) -> Iterator[None]:
    """While active, a trace of ``traced`` (``model``, or a wrapper around it) with ``inputs`` shows dropout. ``model``
    is in eval mode before and afterwards.

    Warns:
        UserWarning: names the modules whose functional dropout cannot be kept.
    """
    if not enabled:
        yield
        return
    with _patched_modules(model), _patched_functions(model) as calls:
        for module in _dropping(model, traced, inputs, calls):
            module.training = True
        try:
            yield
        finally:
            for module in model.modules():
                module.training = False


@contextlib.contextmanager
def _patched_modules(model: torch.nn.Module) -> Iterator[None]:
    """nn.Dropout modules with p > 0 call ``edge_razor::dropout``. An instance attribute hides the class's forward
    method; nothing in the module tree is replaced."""
    import torch

    operator, patched = _operators()[0], []
    for module in model.modules():
        # Subclasses may mean something else (a user's own schedule), and Dropout2d drops whole channels.
        if type(module) is torch.nn.Dropout and 0.0 < module.p < 1.0:
            module.forward = _with_ratio(operator, module.p)  # type: ignore[method-assign]
            patched.append(module)
    try:
        yield
    finally:
        for module in patched:
            del module.forward


def _with_ratio(operator: Any, ratio: float) -> Any:
    return lambda x: operator(x, ratio)


@contextlib.contextmanager
def _patched_functions(model: torch.nn.Module) -> Iterator[list[torch.nn.Module]]:
    """Functional dropout becomes an operator that does nothing, in torch and in the files that define the model's
    modules. Yields a list to which each call appends the innermost module whose forward is running."""
    import torch
    from torch.nn.modules import module as hooks

    functional = torch.nn.functional
    values, probabilities = _operators()
    original_dropout, original_attention = (getattr(functional, name) for name in _NAMES)
    running: list[torch.nn.Module] = []
    calls: list[torch.nn.Module] = []

    def dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
        if not training or not 0.0 < p < 1.0:
            return original_dropout(input, p, training, inplace)
        calls.extend(running[-1:])
        return values(input, p)

    def attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **options: Any,
    ) -> torch.Tensor:
        if not 0.0 < dropout_p < 1.0:
            return original_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)
        calls.extend(running[-1:])
        return probabilities(original_attention(query, key, value, attn_mask, 0.0, is_causal, **options), dropout_p)

    replaced = {id(original_dropout): dropout, id(original_attention): attention}
    files = {cls.__module__ for module in model.modules() for cls in type(module).__mro__}
    holders = [functional, *(sys.modules[name] for name in sorted(files) if name in sys.modules)]
    found = [(h, n, v) for h in dict.fromkeys(holders) for n, v in list(vars(h).items()) if id(v) in replaced]
    before = hooks.register_module_forward_pre_hook(lambda module, _: running.append(module))
    after = hooks.register_module_forward_hook(lambda *_: (running.pop(), None)[1], always_call=True)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one fused call that knows no dropout
    for holder, name, original in found:
        setattr(holder, name, replaced[id(original)])
    try:
        yield calls
    finally:
        for holder, name, original in found:
            setattr(holder, name, original)
        torch.backends.mha.set_fastpath_enabled(fast)
        before.remove()
        after.remove()


def _dropping(
    model: torch.nn.Module, traced: torch.nn.Module, inputs: Sequence[torch.Tensor], calls: list[torch.nn.Module]
) -> list[torch.nn.Module]:
    """The modules to trace in training mode; see module docstring."""
    import torch

    batch_norm = torch.nn.modules.batchnorm._BatchNorm
    others = [module for module in model.modules() if not isinstance(module, batch_norm)]
    try:
        _run(model, traced, inputs, others)
    except Exception as error:  # a model's training mode may need what export does not have
        warnings.warn(
            f"dropout outside of nn.Dropout modules is not kept: in training mode the model fails with {error}",
            UserWarning,
            stacklevel=2,
        )
        return []
    found = list(dict.fromkeys(calls))
    if not found:
        return []
    expected = _run(model, traced, inputs, [])

    def faithful(modules: list[torch.nn.Module], times: int) -> bool:
        calls.clear()
        with contextlib.suppress(Exception):
            return torch.allclose(_run(model, traced, inputs, modules), expected, 1e-4, 1e-5) and len(calls) == times
        return False

    counts = {module: calls.count(module) for module in found}
    if faithful(found, sum(counts.values())):
        return found
    kept = [module for module in found if faithful([module], counts[module])]
    names = {module: name for name, module in model.named_modules()}
    lost = ", ".join(names.get(module) or type(module).__name__ for module in found if module not in kept)
    if lost:
        warnings.warn(
            f"the dropout of {lost} is not kept: in training mode it does more than dropout; put that into a module of "
            "its own, or use nn.Dropout",
            UserWarning,
            stacklevel=2,
        )
    return kept


def _run(
    model: torch.nn.Module, traced: torch.nn.Module, inputs: Sequence[torch.Tensor], training: list[torch.nn.Module]
) -> torch.Tensor:
    """The output with these modules in training mode; buffers, training flags and random state are as before
    afterwards."""
    import torch

    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    for module in training:
        module.training = True
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            result: torch.Tensor = traced(*inputs)
            return result
    finally:
        for module in training:
            module.training = False
        for buffer, copy in buffers:
            buffer.copy_(copy)


_registered: list[Any] = []


def _operators() -> tuple[Any, Any]:
    """``edge_razor::dropout(x, ratio)`` and ``edge_razor::attention_dropout(y, ratio)``, y what an attention gives;
    both change nothing. Registered with torch on first use."""
    import torch

    for name in ("dropout", "attention_dropout") if not _registered else ():
        # The schema is explicit since torch reads string annotations of this module otherwise.
        operator = torch.library.custom_op(
            f"edge_razor::{name}",
            lambda x, ratio: x.clone(),
            mutates_args=(),
            schema="(Tensor x, float ratio) -> Tensor",
        )
        operator.register_fake(lambda x, ratio: torch.empty_like(x))
        _registered.append(operator)
    return _registered[0], _registered[1]


def translations(opset: int) -> dict[Any, Any]:
    """What torch.onnx makes of the operators."""
    import onnxscript
    import torch

    _operators()
    op = onnxscript.values.Opset("", opset)

    # training_mode = true keeps constant folding from removing the node.
    def dropout(x: Any, ratio: float) -> Any:
        return op.Dropout(x, op.Constant(value_float=ratio), op.Constant(value=ir.tensor(np.array(True))))[0]

    def attention_dropout(x: Any, ratio: float) -> Any:
        training = op.Constant(value=ir.tensor(np.array(True)))
        return op.Dropout(x, op.Constant(value_float=ratio), training, seed=_SEED)[0]

    namespace = torch.ops.edge_razor
    return {namespace.dropout.default: dropout, namespace.attention_dropout.default: attention_dropout}


def mark_probabilities(graph: ir.Graph) -> None:
    """Marks the nodes that came from ``edge_razor::attention_dropout`` with `PROBABILITIES`."""
    for node in graph:
        if node.op_type == "Dropout" and not node.domain and node.attributes.get_int("seed", 0) == _SEED:
            node.metadata_props[PROBABILITIES] = "1"
            del node.attributes["seed"]
