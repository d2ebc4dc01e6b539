"""One optimizer step in edge-razor and in PyTorch from the same start: how far apart the updates are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import edge_razor
from tests.reference.razor import razor
from tests.reference.torch_model import KeptModel


@dataclass(frozen=True)
class Comparison:
    """Errors of one step: the loss, relative; the worst parameter's max|Δ_ours − Δ_torch| / max|Δ_torch|; its name."""

    loss_error: float
    update_error: float
    worst: str
    parameters: int


def randomize_norms(model: nn.Module, seed: int = 0) -> nn.Module:
    """Gives every BatchNorm statistics and a scale and shift that are not trivial, in place."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                module.running_mean.normal_(0, 0.2, generator=generator)
                module.running_var.uniform_(0.6, 1.6, generator=generator)
                module.weight.uniform_(0.7, 1.3, generator=generator)
                module.bias.normal_(0, 0.2, generator=generator)
    return model


def export_model(model: nn.Module, path: Path, image: tuple[int, ...], trainable: str = "all") -> Path:
    """Exports ``model`` in eval mode without dropout, as ``compare_step`` expects; returns ``path``."""
    edge_razor.export(model.eval(), (torch.zeros(2, *image),), path, trainable=trainable, dropout=False)
    return path


def compare_step(
    model: nn.Module,
    bundle: Path,
    *,
    image: tuple[int, ...],
    classes: int,
    sparsity: float = 0.0,
    form: str = "centered",
    batch_size: int = 4,
    micro_batch: int | None = None,
    optimizer: str = "sgd",
    steps: int = 1,
    seed: int = 0,
    lr: float | None = None,
    **options: Any,
) -> Comparison:
    """Takes ``steps`` steps on one random batch in both systems, from ``model`` and its ``bundle``, and compares.

    The learning rate is large by default (100 for SGD), so that the change, not the rounding of the parameter that it
    is added to, is what is compared.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch_size, *image, generator=generator)
    y = torch.randint(0, classes, (batch_size,), generator=generator)
    model = model.eval()
    if optimizer == "sgd":
        options.setdefault("momentum", 0.0)
    if lr is None:
        lr = 100.0 if optimizer == "sgd" else 1e-2
    trainer = edge_razor.Trainer(
        bundle,
        batch_size=batch_size,
        micro_batch=micro_batch,
        sparsity=sparsity,
        razor=form,
        optimizer=optimizer,
        lr=lr,
        threads=2,
        seed=0,
        **options,
    )
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    trained = set(trainer.trainable)
    parameters = [value for name, value in model.named_parameters() if name in trained]
    torch_options = dict(options)
    update: torch.optim.Optimizer = (
        torch.optim.SGD(parameters, lr=lr, **torch_options)
        if optimizer == "sgd"
        else torch.optim.AdamW(parameters, lr=lr, **torch_options)
    )
    forward: Callable[[Tensor], Tensor] = model
    if sparsity:
        forward = KeptModel(model, lambda rows: torch.as_tensor(razor(rows, sparsity, form)))
    loss_error = 0.0
    for _ in range(steps):
        ours = trainer.step(x.numpy(), y.numpy())
        update.zero_grad()
        loss = nn.functional.cross_entropy(forward(x), y)
        loss.backward()
        update.step()
        loss_error = max(loss_error, abs(ours - loss.item()) / abs(loss.item()))
    after = trainer.state_dict()
    worst, update_error = "", 0.0
    for name, value in model.named_parameters():
        change = (value.detach() - start[name]).numpy()
        mine = after[name] - start[name].numpy()
        if name not in trained:
            if np.any(mine):
                raise AssertionError(f"{name} is frozen and changed")
            continue
        largest = float(np.abs(change).max())
        error = float(np.abs(mine - change).max()) / largest if largest else float(np.abs(mine).max() > 0)
        if not error <= update_error:  # also catches NaN
            worst, update_error = name, error
    return Comparison(loss_error, update_error, worst, len(trained))
