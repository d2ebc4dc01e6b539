"""Razor forms judged by the training curve of a small causal language model, emulated in PyTorch.

    python dev.py bench forms [--seeds 1]

The model, samples and schedule of `benchmarks.perplexity`. The forward pass is exact; only what the weight gradients of
the linear layers (the tied output layer too) are made from is replaced by the kept form, so that a form can be judged
before a kernel exists for it. Samples have 64 tokens: a centered block is a whole sample.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.common import write_result
from benchmarks.perplexity import run_torch, table
from benchmarks.seeds import command_line, seeded_runs
from edge_razor.planner.storage import keep_count

TITLE = "Razor forms, emulated: GPT-2 (4 × 128) on Debian's package descriptions, 600 steps of 16 × 64 tokens"
Form = Callable[[torch.Tensor], torch.Tensor]


def largest(x: torch.Tensor, sparsity: float) -> torch.Tensor:
    """x[samples, rows, columns] with all but the largest magnitudes of each sample set to 0."""
    magnitudes = x.abs().flatten(1)
    kept = magnitudes.topk(keep_count(magnitudes.shape[1], sparsity), dim=1).indices
    return x * torch.zeros_like(magnitudes).scatter_(1, kept, 1.0).view_as(x)


def plain(x: torch.Tensor, sparsity: float) -> torch.Tensor:
    return largest(x, sparsity)


def centered(x: torch.Tensor, sparsity: float, energy_of: tuple[int, ...] = (1, 2)) -> torch.Tensor:
    """Mean per sample and column plus the largest residuals r in int8 with one scale a sample.

    Args:
        energy_of: dimensions over which kept residuals are multiplied by γ = Σr² / Σr_kept² (at most 20), so that the
            product with r is that of the whole r; () leaves them as they are.
    """
    mean = x.mean(1, keepdim=True)
    residual = x - mean
    kept = largest(residual, sparsity)
    scale = kept.abs().amax((1, 2), keepdim=True).clamp_min(1e-30) / 127
    kept = (kept / scale).round() * scale
    if energy_of:
        whole, left = ((v * v).sum(energy_of, keepdim=True) for v in (residual, kept))
        kept = kept * (whole / left.clamp_min(1e-30)).clamp_max(20)
    return mean + kept


KINDS: dict[str, Callable[..., torch.Tensor]] = {
    "plain": plain,
    "centered, no energy factor": partial(centered, energy_of=()),
    "centered": centered,
    "centered, energy factor by column": partial(centered, energy_of=(1,)),
}
CASES: dict[str, Form] = {
    f"{kind} {sparsity:.2f}": partial(form, sparsity=sparsity)
    for sparsity in (0.9, 0.97)
    for kind, form in KINDS.items()
}


class CompressedLinear(torch.autograd.Function):
    """y = x W (+ b) for x[samples, rows, in], W[in, out]; dW is made from the kept form of x."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, form: Form) -> torch.Tensor:
        ctx.save_for_backward(form(x), weight)
        ctx.has_bias = bias is not None
        return x @ weight if bias is None else x @ weight + bias

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (dy,), (kept, weight) = gradients, ctx.saved_tensors
        rows = dy.flatten(0, 1)
        return dy @ weight.t(), kept.flatten(0, 1).t() @ rows, rows.sum(0) if ctx.has_bias else None, None


def compress_linear_layers(model: Any, form: Form) -> None:
    """Makes every linear layer of a transformers GPT-2 take its weight gradient from the kept form of its input."""
    from transformers.pytorch_utils import Conv1D

    for module in model.modules():
        if isinstance(module, Conv1D):
            module.forward = lambda x, m=module: CompressedLinear.apply(x, m.weight, m.bias, form)
    head = model.lm_head
    head.forward = lambda x: CompressedLinear.apply(x, head.weight.t(), None, form)


def main() -> None:
    parser = command_line(CASES)
    parser.set_defaults(seeds=1)
    options = parser.parse_args()
    if options.one:
        case, seed = options.one[0], int(options.one[1])
        result = run_torch(seed, lambda model: compress_linear_layers(model, CASES[case]))
        print(json.dumps({"case": case, "seed": seed, **result}))
        return
    runs = seeded_runs("forms", options.cases, options.seeds)
    body = table(runs, CASES) + "\nDense training: perplexity.md.\n"
    write_result("forms", TITLE, "python dev.py bench forms", body, "torch")


if __name__ == "__main__":
    main()
