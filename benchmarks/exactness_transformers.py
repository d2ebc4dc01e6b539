"""Gradients of transformers at sparsity 0 against PyTorch in float64.

    python dev.py bench exactness_transformers [--models ViT-Tiny …]

Weights are random at the models' own sizes; texts are padded behind to different lengths. Dropout, of residuals and of
attention's probabilities, has the same masks in both (docs/plan-format.md, "Step context").
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import edge_razor
from benchmarks.common import markdown_table, write_result
from tests.parity import errors, moves, torch_gradients
from tests.reference.dropout import SameMasks

LIMIT, LOSS_LIMIT, SEED = 2e-4, 1e-5, 5
CLASSES, TOKENS = 12, 128
Row = tuple[Any, ...]


class Case(NamedTuple):
    """A configuration of transformers: class names, sizes, samples, and the names of its dropout probabilities."""

    config: str
    model: str
    sizes: dict[str, Any]
    samples: int
    dropout: tuple[str, ...]

    @property
    def causal(self) -> bool:
        return self.model.endswith(("CausalLM", "LMHeadModel"))


_BERT = ("hidden_dropout_prob", "attention_probs_dropout_prob")


def _vit(width: int, layers: int) -> dict[str, Any]:
    heads = width // 64
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
    }


CASES = {
    "ViT-Tiny, 12 layers": Case("ViTConfig", "ViTForImageClassification", _vit(192, 12), 2, _BERT),
    "MiniLM-L6 (BERT)": Case(
        "BertConfig",
        "BertForSequenceClassification",
        {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
        4,
        _BERT,
    ),
    "DistilBERT": Case(
        "DistilBertConfig",
        "DistilBertForSequenceClassification",
        {},
        2,
        ("dropout", "attention_dropout", "seq_classif_dropout"),
    ),
    "GPT-2, 6 layers": Case(
        "GPT2Config",
        "GPT2LMHeadModel",
        {"n_layer": 6, "bos_token_id": 0, "eos_token_id": 0},
        2,
        ("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    ),
    "Llama, 2 layers": Case(
        "LlamaConfig",
        "LlamaForCausalLM",
        {
            "hidden_size": 512,
            "num_hidden_layers": 2,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "intermediate_size": 1408,
        },
        2,
        ("attention_dropout",),
    ),
    "ViT-B/16, 12 layers": Case("ViTConfig", "ViTForImageClassification", _vit(768, 12), 2, _BERT),
}


def build(case: Case, ratio: float, attention: str) -> torch.nn.Module:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, case.config)(
        **case.sizes, **({} if case.causal else {"num_labels": CLASSES}), **dict.fromkeys(case.dropout, ratio)
    )
    config._attn_implementation = attention
    model: torch.nn.Module = getattr(transformers, case.model)(config).train(ratio > 0)
    return model


def batch(case: Case, samples: int) -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(1)
    if case.config == "ViTConfig":
        images = torch.randn(samples, 3, 224, 224, generator=generator)
        return {"pixel_values": images}, torch.randint(0, CLASSES, (samples,), generator=generator)
    ids = torch.randint(1, 30_000, (samples, TOKENS), generator=generator)
    lengths = torch.linspace(TOKENS, TOKENS // 3, samples).long()
    mask = (torch.arange(TOKENS) < lengths[:, None]).long()
    inputs = {"input_ids": ids, "attention_mask": mask}
    if case.causal:
        return inputs, torch.randint(0, 30_000, ids.shape, generator=generator).where(mask == 1, -100)
    return inputs, torch.randint(0, CLASSES, (samples,), generator=generator)


def measure(names: list[str], directory: Path, report: Callable[[Row], None]) -> tuple[list[Row], int]:
    """The table's rows, and how many of them are outside the limits."""
    rows: list[Row] = []
    failures = 0
    for name in names:
        case = CASES[name]
        for attention, ratio in (("sdpa", 0.0), ("eager", 0.1), ("sdpa", 0.1)):
            model, (inputs, target) = build(case, ratio, attention), batch(case, case.samples)
            loss = "token_cross_entropy" if case.causal else "cross_entropy"
            path = directory / f"{name.replace('/', '')}-{attention}-{ratio}"
            edge_razor.export(model, batch(case, 2)[0], path, loss=loss)
            masks = SameMasks(SEED, 1)
            with masks.active() if ratio else nullcontext():
                wanted, expected = torch_gradients(model, inputs, target)
            options = {"batch_size": case.samples, "sparsity": 0, "lr": 1e-3, "seed": SEED, "threads": 2}
            with edge_razor.Trainer(path, mem_budget=None, **options) as trainer:  # type: ignore[arg-type]
                ours, found = moves(trainer, inputs, target)
            error, worst = errors(found, expected)
            loss_error = abs(ours - wanted) / wanted
            good = error <= LIMIT and loss_error <= LOSS_LIMIT and set(found) == set(expected)
            failures += not good
            label = f"dropout {ratio}, {masks.stream} masks" if ratio else "no dropout"
            rows.append(
                (
                    name,
                    attention,
                    label,
                    len(found),
                    f"{loss_error:.1e}",
                    f"{error:.1e}",
                    "yes" if good else f"**no** ({worst})",
                )
            )
            report(rows[-1])
    return rows, failures


def table(rows: list[Row], failures: int) -> str:
    header = ("model", "attention", "case", "trained tensors", "loss error", "worst gradient error", "within limits")
    body = markdown_table(header, rows)
    body += f"\nLimits: loss {LOSS_LIMIT:g} relative; for each parameter max|G_ours − G_torch| ≤ {LIMIT:g}·max|G_torch|"
    body += ", which counts as at least 1e-3 of the largest of all parameters (a key's bias has a gradient of 0)."
    body += f" {len(rows) - failures} of {len(rows)} cases within them. PyTorch in float64, random weights, images"
    return body + f" 224×224, texts of up to {TOKENS} tokens padded behind.\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", default=list(CASES), choices=list(CASES))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        rows, failures = measure(options.models, Path(directory), lambda row: print(row, flush=True))
    title, command = "One step of transformers against PyTorch", "python dev.py bench exactness_transformers"
    write_result("exactness_transformers", title, command, table(rows, failures), "torch", "transformers")
    raise SystemExit(1 if failures else 0)


if __name__ == "__main__":
    main()
