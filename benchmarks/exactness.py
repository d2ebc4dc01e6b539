"""One optimizer step against PyTorch, every family: at sparsity 0 against autograd, at s against the definition.

python dev.py bench exactness
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import markdown_table, write_result
from tests.models import FAMILIES
from tests.parity import Comparison, compare_step, export_model, randomize_norms

IMAGE, CLASSES = (3, 64, 64), 10
CASES: list[tuple[str, dict[str, Any]]] = [("sparsity 0", {"sparsity": 0.0})]
CASES += [
    (f"{form} {sparsity}", {"sparsity": sparsity, "form": form})
    for form in ("plain", "centered")
    for sparsity in (0.5, 0.9, 0.97)
]
CASES += [
    ("AdamW (eps 1e-3), 2 steps", {"optimizer": "adamw", "steps": 2, "eps": 1e-3}),
    ("SGD with momentum, micro-batch 1, 3 steps", {"momentum": 0.9, "micro_batch": 1, "steps": 3, "lr": 1.0}),
    ("micro-batch 2, 0", {"micro_batch": 2}),
    ("trainable: last:2", {"trainable": "last:2"}),
    ("trainable: bias", {"trainable": "bias"}),
    ("trainable: norm", {"trainable": "norm"}),
]
LOSS_LIMIT, UPDATE_LIMIT = 1e-5, 1e-3


def build(family: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return randomize_norms(FAMILIES[family](num_classes=CLASSES))


def has_norm(model: torch.nn.Module) -> bool:
    return any(isinstance(m, torch.nn.BatchNorm2d | torch.nn.LayerNorm | torch.nn.GroupNorm) for m in model.modules())


def measure(families: list[str], directory: Path) -> tuple[list[tuple[Any, ...]], int]:
    """The table's rows, and how many of them are outside the limits."""
    rows: list[tuple[Any, ...]] = []
    failures = 0
    for family in families:
        for label, settings in CASES:
            trainable = settings.get("trainable", "all")
            rest = {key: value for key, value in settings.items() if key != "trainable"}
            outcome: Comparison | str
            if trainable == "norm" and not has_norm(build(family)):
                rows.append((family, label, "–", "–", "–", "–", "–", "the family has no normalization"))
                continue
            try:
                path = directory / f"{family}-{trainable.replace(':', '')}.razor"
                if not path.exists():
                    export_model(build(family), path, IMAGE, trainable)
                outcome = compare_step(build(family), path, image=IMAGE, classes=CLASSES, **rest)
            except Exception as error:  # a family that cannot run a case is a row of the table, not the end of it
                outcome = f"{type(error).__name__}: {error}".splitlines()[0][:120]
            if isinstance(outcome, str):
                failures += 1
                rows.append((family, label, "–", "–", "–", "–", "–", outcome))
            else:
                good = outcome.loss_error <= LOSS_LIMIT and max(outcome.excess, outcome.norm_error) <= UPDATE_LIMIT
                failures += not good
                rows.append(
                    (
                        family,
                        label,
                        outcome.parameters,
                        f"{outcome.loss_error:.1e}",
                        f"{outcome.update_error:.1e}",
                        f"{outcome.norm_error:.1e}",
                        f"{max(outcome.excess, 0):.1e}",
                        "yes" if good else f"**no** ({outcome.worst})",
                    )
                )
            print(rows[-1], flush=True)
    return rows, failures


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        rows, failures = measure(options.families, Path(directory))
    header = (
        "family",
        "case",
        "trained tensors",
        "loss error",
        "worst update error",
        "norm error",
        "excess",
        "within limits",
    )
    body = markdown_table(header, rows)
    body += f"\nLimits: loss {LOSS_LIMIT:g} relative;"
    body += f" for each parameter max|Δ_ours − Δ_torch| ≤ {UPDATE_LIMIT:g}·max|Δ_torch| (column excess); norm error"
    body += f" {UPDATE_LIMIT:g}. Excess is the worst update error less the parameter's own float32 rounding and twice"
    body += (
        " what the oracle moves when rounding noise of 3e-6 is put on what it packs: selection and int8 rounding are"
    )
    body += " discontinuous. "
    body += f"{len(rows) - failures} of {len(rows)} cases within them. Input 64×64, batch 4.\n"
    write_result("exactness", "One step against PyTorch", "python dev.py bench exactness", body, "torch")
    raise SystemExit(1 if failures else 0)


if __name__ == "__main__":
    main()
