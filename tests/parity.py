"""One optimizer step in edge-razor and in PyTorch from the same start: how far apart the updates are, or gradients."""

from __future__ import annotations

import copy
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

EPSILON = float(np.finfo(np.float32).eps)
NOISE, NOISE_RUNS = 3e-6, 4  # of a tensor's root mean square: two float32 forward passes differ by about as much


@dataclass(frozen=True)
class Comparison:
    """Errors of one step.

    Attributes:
        loss_error: of the loss, relative.
        update_error: the worst parameter's max|Δ_ours − Δ_torch| / max|Δ_torch|.
        norm_error: ‖Δ_ours − Δ_torch‖ / ‖Δ_torch‖ over all parameters together.
        excess: the worst parameter's update_error less the float32 rounding of the parameter itself and twice what the
            oracle moves when rounding noise (a few float32 ulps) is added to what it keeps. Selection and quantization
            are discontinuous: an element on the threshold, or half-way between two int8 values, may fall on either
            side. At sparsity 0 only the rounding of the parameter is taken off.
        worst: name of the parameter with the largest excess.
        parameters: number of trained parameters.
    """

    loss_error: float
    update_error: float
    norm_error: float
    excess: float
    worst: str
    parameters: int


def randomize_norms(model: nn.Module, seed: int = 0) -> nn.Module:
    """Gives every BatchNorm statistics, and it and every LayerNorm a scale and shift that are not trivial, in place."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                module.running_mean.normal_(0, 0.2, generator=generator)
                module.running_var.uniform_(0.6, 1.6, generator=generator)
                module.weight.uniform_(0.7, 1.3, generator=generator)
                module.bias.normal_(0, 0.2, generator=generator)
        elif isinstance(module, nn.LayerNorm):
            with torch.no_grad():
                if module.weight is not None:
                    module.weight.uniform_(0.7, 1.3, generator=generator)
                if module.bias is not None:
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

    The learning rate is large by default (10,000 for SGD), so that the change, not the rounding of the parameter that
    it is added to, is what is compared.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch_size, *image, generator=generator)
    y = torch.randint(0, classes, (batch_size,), generator=generator)
    model = model.eval()
    if optimizer == "sgd":
        options.setdefault("momentum", 0.0)
    options.setdefault("weight_decay", 0.0)  # torch's AdamW has another default
    if lr is None:
        lr = 1e4 if optimizer == "sgd" else 1e-2
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
    trained = [name for name, _ in model.named_parameters() if name in set(trainer.trainable)]
    losses = [trainer.step(x.numpy(), y.numpy()) for _ in range(steps)]
    after = trainer.state_dict()
    for name, value in start.items():
        if name not in trained and np.any(after[name] != value.numpy()):
            raise AssertionError(f"{name} is frozen and changed")
    runs = []
    for noise in (0.0, *((NOISE,) * NOISE_RUNS if sparsity else ())):
        torch.manual_seed(seed + len(runs))
        runs.append(_train_in_torch(model, start, trained, x, y, steps, sparsity, form, noise, optimizer, lr, options))
    (oracle_losses, oracle), moved = runs[0], [changes for _, changes in runs[1:]]
    loss_error = max(abs(a - b) / abs(b) for a, b in zip(losses, oracle_losses, strict=True))
    worst, update_error, excess, square, norm = "", 0.0, -1.0, 0.0, 0.0
    for name in trained:
        change = oracle[name]
        difference = after[name] - start[name].numpy() - change
        rounding = steps * EPSILON * float(start[name].abs().max())  # of the parameter that the change is added to
        square += float((difference.astype(np.float64) ** 2).sum())
        norm += float((change.astype(np.float64) ** 2).sum())
        largest = float(np.abs(change).max()) or 1.0
        error = float(np.abs(difference).max()) / largest
        noise_floor = rounding / largest + 2 * max(
            (float(np.abs(other[name] - change).max()) / largest for other in moved), default=0.0
        )
        update_error = max(update_error, error)
        if not error - noise_floor <= excess:  # also catches NaN
            worst, excess = name, error - noise_floor
    return Comparison(loss_error, update_error, (square / norm) ** 0.5, excess, worst, len(trained))


def _train_in_torch(
    model: nn.Module,
    start: dict[str, Tensor],
    trained: list[str],
    x: Tensor,
    y: Tensor,
    steps: int,
    sparsity: float,
    form: str,
    noise: float,
    optimizer: str,
    lr: float,
    options: dict[str, Any],
) -> tuple[list[float], dict[str, np.ndarray]]:
    """The same steps in PyTorch from ``start``: each step's loss, and how far each trained parameter went."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in start.items():
            parameters[name].copy_(value)
    chosen = [parameters[name] for name in trained]
    update = (torch.optim.SGD if optimizer == "sgd" else torch.optim.AdamW)(chosen, lr=lr, **options)

    def keep(rows: Tensor) -> Tensor:
        return torch.as_tensor(razor(rows, sparsity, form))

    forward: Callable[[Tensor], Tensor] = KeptModel(model, keep, noise) if sparsity else model
    losses = []
    for _ in range(steps):
        model.zero_grad()
        loss = nn.functional.cross_entropy(forward(x), y)
        loss.backward()
        update.step()
        losses.append(loss.item())
    return losses, {name: (parameters[name].detach() - start[name]).numpy() for name in trained}


def torch_gradients(model: nn.Module, inputs: dict[str, Tensor], target: Tensor) -> tuple[float, dict[str, np.ndarray]]:
    """In float64, which no rounding hides; in the model's own mode, training or evaluation."""
    model = copy.deepcopy(model).double()
    if getattr(getattr(model, "config", None), "use_cache", False):
        model.config.use_cache = False
    result = model(**{k: v.double() if v.is_floating_point() else v for k, v in inputs.items()})
    logits = result if isinstance(result, Tensor) else result.logits
    loss = nn.functional.cross_entropy(logits.flatten(0, -2), target.flatten())
    loss.backward()
    return loss.item(), {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}


def moves(
    trainer: edge_razor.Trainer, inputs: dict[str, Tensor], target: Tensor
) -> tuple[float, dict[str, np.ndarray]]:
    """Gradients as one step of plain SGD with a learning rate of 1 shows them, without the rounding of parameters:
    training starts at zero momentum, so that the momentum is the gradient."""
    loss = trainer.step([v.numpy() for v in inputs.values()], target.numpy())
    return loss, {name: trainer._session.read_state(name, 0) for name in trainer.trainable}


def errors(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> tuple[float, str]:
    """The worst parameter's largest error, as a share of its largest gradient. Keys' biases have a gradient of zero (a
    constant added to all scores of a query changes nothing): every gradient counts as at least 1e-3 of the largest."""
    largest = max(float(np.abs(g).max()) for g in expected.values())
    scores = {
        name: float(np.abs(found[name] - g).max()) / max(float(np.abs(g).max()), 1e-3 * largest)
        for name, g in expected.items()
    }
    worst = max(scores, key=scores.__getitem__)
    return scores[worst], worst
