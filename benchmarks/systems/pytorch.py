"""PyTorch in its variants: eager, channels_last, compiled, with activation checkpointing, with plain Back Razor."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.models import build
from benchmarks.systems.back_razor import BackRazor
from benchmarks.systems.system import System


class Checkpointed(nn.Module):
    """Keeps a block's inputs only; the backward pass runs the block again. ``inputs`` collects what is kept."""

    def __init__(self, block: nn.Module, inputs: list[Tensor]) -> None:
        super().__init__()
        self.block = block
        self.inputs = inputs

    def forward(self, *values: Any, **options: Any) -> Any:
        self.inputs += [value for value in (*values, *options.values()) if isinstance(value, Tensor)]
        return checkpoint(self.block, *values, use_reentrant=False, **options)


def checkpoint_blocks(model: nn.Module) -> list[Tensor]:
    """Checkpoints every block of the model, in place.

    The blocks are those that the literature names: inverted residuals, residual blocks, layers of a transformer.
    Returns the list to which each forward pass adds the blocks' inputs; the caller empties it.
    """
    inputs: list[Tensor] = []
    blocks = _blocks(model)
    for name, block in list(blocks.named_children()):
        setattr(blocks, name, Checkpointed(block, inputs))
    return inputs


def _blocks(model: nn.Module) -> nn.Module:
    """A Sequential, or a model's ``_blocks`` or ``blocks``, or (Hugging Face's models) its outermost list of modules.

    Raises:
        ValueError: the model has none of these.
    """
    if isinstance(model, nn.Sequential):
        return model
    for name in ("_blocks", "blocks"):
        if hasattr(model, name):
            return getattr(model, name)  # type: ignore[no-any-return]
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            return module
    raise ValueError(f"{type(model).__name__} has no blocks that could be checkpointed")


def storages(tensors: list[Tensor]) -> dict[int, int]:
    """Address → bytes of the storages under the tensors, each once."""
    found = [t.untyped_storage() for t in tensors]
    return {s.data_ptr(): s.nbytes() for s in found}


def kept_bytes(forward: Callable[[], Tensor], parameters: list[Tensor], more: list[Tensor]) -> int:
    """Bytes that autograd keeps between the passes, each storage once, parameters and buffers left out.

    Args:
        forward: returns the loss.
        parameters: tensors that exist anyway.
        more: list that the forward pass fills with tensors that are kept apart from autograd's own.
    """
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    found = storages(saved) | storages(more)
    del loss
    return sum(size for address, size in found.items() if address not in storages(parameters))


def make(options: argparse.Namespace, inputs: Any, labels: np.ndarray) -> System:
    torch.set_num_threads(options.threads)
    model = build(options.model, options.size, options.classes).eval()
    x = [torch.from_numpy(array) for array in (inputs if isinstance(inputs, list) else [inputs])]
    y = torch.from_numpy(labels)
    if options.system == "torch-channels-last":
        model = model.to(memory_format=torch.channels_last)
        x = [array.contiguous(memory_format=torch.channels_last) for array in x]
    mode: AbstractContextManager[Any] = nullcontext()
    block_inputs: list[Tensor] = []
    if options.system == "torch-back-razor":
        mode = BackRazor(options.sparsity)
    elif options.system == "torch-checkpoint":
        block_inputs = checkpoint_blocks(model)
    tensors = [*model.parameters(), *model.buffers()]
    kind = torch.optim.AdamW if options.optimizer == "adamw" else torch.optim.SGD
    optimizer = kind(model.parameters(), lr=1e-3)
    network: Callable[..., Tensor] = torch.compile(model) if options.system == "torch-compile" else model

    def forward() -> Tensor:
        with mode:
            return torch.nn.functional.cross_entropy(network(*x), y)

    def step() -> float:
        optimizer.zero_grad()
        loss = forward()
        block_inputs.clear()
        loss.backward()
        optimizer.step()
        return loss.item()

    def finish() -> dict[str, Any]:
        block_inputs.clear()
        return {"kept_bytes": kept_bytes(forward, tensors, block_inputs)}

    return System(step, finish=finish)
