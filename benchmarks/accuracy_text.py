"""Accuracy on real texts: all-MiniLM-L6-v2 learns the section of Debian's packages from their descriptions.

    python dev.py bench accuracy_text [--seeds 3]

12 sections, 6,000 training and 3,000 test texts, 32 tokens, 2 epochs, batch 16, AdamW 1e-4 (LoRA 1e-3) with a cosine
schedule, no weight decay, no dropout. The same seed gives every system the same new head and the same order of texts.
Finished runs are kept in ``results/accuracy_text.jsonl``, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean

import numpy as np

from benchmarks import minilm
from benchmarks.accuracy import table
from benchmarks.common import write_result
from benchmarks.seeds import seeded_runs
from benchmarks.texts import SECTIONS, TEST, TRAIN, section_data

TOKENS, EPOCHS, BATCH, THREADS = 32, 2, 16, 1
LORA = "lora:r=8,alpha=16,head"
CASES: dict[str, tuple[str, float, str, str, float]] = {
    # name: system, sparsity, form, trainable, learning rate
    "PyTorch, dense": ("torch", 0.0, "", "all", 1e-4),
    "edge-razor, 0": ("edge-razor", 0.0, "centered", "all", 1e-4),
    "edge-razor, plain 0.90": ("edge-razor", 0.9, "plain", "all", 1e-4),
    "edge-razor, centered 0.90": ("edge-razor", 0.9, "centered", "all", 1e-4),
    "edge-razor, centered 0.97": ("edge-razor", 0.97, "centered", "all", 1e-4),
    "edge-razor, centered 0.99": ("edge-razor", 0.99, "centered", "all", 1e-4),
    "edge-razor, LoRA r = 8, 0": ("edge-razor", 0.0, "centered", LORA, 1e-3),
    "edge-razor, LoRA r = 8, centered 0.97": ("edge-razor", 0.97, "centered", LORA, 1e-3),
}


def data() -> tuple[tuple[list[np.ndarray], np.ndarray], tuple[list[np.ndarray], np.ndarray]]:
    """Training and test data: ([ids, mask], labels)."""
    parts = section_data()
    names = sorted({label for _, label in parts[0]})
    train, test = (
        (list(minilm.tokenized([t for t, _ in pairs], TOKENS)), np.array([names.index(y) for _, y in pairs]))
        for pairs in parts
    )
    return train, test


def schedule(seed: int, rate: float) -> list[tuple[np.ndarray, float]]:
    """Indices and learning rate of every step."""
    generator = np.random.default_rng(seed)
    orders = [generator.permutation(TRAIN) for _ in range(EPOCHS)]
    chosen = [order[i : i + BATCH] for order in orders for i in range(0, TRAIN - BATCH + 1, BATCH)]
    rates = [rate * 0.5 * (1 + math.cos(math.pi * step / len(chosen))) for step in range(len(chosen))]
    return list(zip(chosen, rates, strict=True))


def run_torch(seed: int, rate: float) -> dict[str, float]:
    import torch

    torch.set_num_threads(THREADS)
    model = minilm.classifier(SECTIONS, seed)
    (inputs, labels), (test, expected) = data()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    losses = []
    for chosen, lr in schedule(seed, rate):
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        logits = model(*(torch.from_numpy(x[chosen]) for x in inputs))
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels[chosen]))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    hits = 0
    with torch.no_grad():
        for i in range(0, TEST, 100):
            logits = model(*(torch.from_numpy(x[i : i + 100]) for x in test))
            hits += int((logits.argmax(1).numpy() == expected[i : i + 100]).sum())
    return {"loss": mean(losses[-100:]), "accuracy": 100 * hits / TEST}


def run_edge_razor(seed: int, sparsity: float, form: str, trainable: str, rate: float) -> dict[str, float]:
    import edge_razor

    trainer = edge_razor.Trainer(
        bundle_for(seed, trainable),
        batch_size=BATCH,
        sparsity=sparsity,
        razor=form,
        optimizer="adamw",
        lr=rate,
        threads=THREADS,
    )
    (inputs, labels), (test, expected) = data()
    losses = []
    for chosen, lr in schedule(seed, rate):
        trainer.lr = lr
        losses.append(trainer.step([x[chosen] for x in inputs], labels[chosen]))
    logits = trainer.predict(test)
    return {"loss": mean(losses[-100:]), "accuracy": 100 * float((logits.argmax(1) == expected).mean())}


def bundle_for(seed: int, trainable: str) -> Path:
    path = Path(tempfile.gettempdir()) / f"edge-razor-sections-{seed}-{trainable[:4]}.razor"
    if not path.exists():
        command = [sys.executable, "-m", "benchmarks.accuracy_text", "--export", str(seed), trainable, str(path)]
        subprocess.run(command, check=True)
    return path


def one(case: str, seed: int) -> None:
    system, sparsity, form, trainable, rate = CASES[case]
    result = run_torch(seed, rate) if system == "torch" else run_edge_razor(seed, sparsity, form, trainable, rate)
    print(json.dumps({"case": case, "seed": seed, **result}))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--one", nargs=2, metavar=("CASE", "SEED"), help=argparse.SUPPRESS)
    parser.add_argument("--export", nargs=3, metavar=("SEED", "TRAINABLE", "PATH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.export:
        import edge_razor

        seed, trainable, path = options.export
        model = minilm.classifier(SECTIONS, int(seed))
        edge_razor.export(model, minilm.example(TOKENS), path, trainable=trainable, dropout=False)
        return
    if options.one:
        return one(options.one[0], int(options.one[1]))
    runs = seeded_runs("accuracy_text", options.cases, options.seeds)
    body = (
        table(runs, CASES)
        + "\nFinal training loss: mean of the last 100 steps. ± is the standard deviation over seeds.\n"
    )
    title = "Accuracy: all-MiniLM-L6-v2 → sections of Debian packages, 6,000 texts of 32 tokens, 2 epochs"
    write_result("accuracy_text", title, "python dev.py bench accuracy_text", body, "torch")


if __name__ == "__main__":
    main()
