"""Accuracy on real texts: all-MiniLM-L6-v2 learns the section of Debian's packages from their descriptions.

    python dev.py bench accuracy_text [--seeds 3]

12 sections, 6,000 training and 3,000 test texts, 32 tokens, 2 epochs, batch 16, AdamW 1e-4 (LoRA 1e-3) with a cosine
schedule, no weight decay, no dropout. The same seed gives every system the same new head and the same order of texts.
Finished runs are kept in ``results/accuracy_text.jsonl``, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import json

import numpy as np

from benchmarks import minilm
from benchmarks.classification import Data, bundle_for, cosine_steps, table, train_edge_razor, train_torch
from benchmarks.common import write_result
from benchmarks.seeds import command_line, seeded_runs
from benchmarks.texts import SECTIONS, TRAIN, section_data

TOKENS, EPOCHS, BATCH = 32, 2, 16
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


def data() -> list[Data]:
    """Training and test data: token indices and mask, section."""
    parts = section_data()
    names = sorted({label for _, label in parts[0]})
    return [
        (list(minilm.tokenized([t for t, _ in pairs], TOKENS)), np.array([names.index(y) for _, y in pairs]))
        for pairs in parts
    ]


def one(case: str, seed: int) -> None:
    system, sparsity, form, trainable, rate = CASES[case]
    train, test = data()
    steps = cosine_steps(seed, TRAIN, EPOCHS, BATCH, rate)
    if system == "torch":
        result = train_torch(minilm.classifier(SECTIONS, seed), train, test, steps)
    else:
        bundle = bundle_for("accuracy_text", str(seed), trainable)
        result = train_edge_razor(bundle, train, test, steps, sparsity, form)
    print(json.dumps({"case": case, "seed": seed, **result}))


def main() -> None:
    options = command_line(CASES, "SEED", "TRAINABLE", "PATH").parse_args()
    if options.export:
        import edge_razor

        seed, trainable, path = options.export
        model = minilm.classifier(SECTIONS, int(seed))
        edge_razor.export(model, minilm.example(TOKENS), path, trainable=trainable, dropout=False)
        return
    if options.one:
        return one(options.one[0], int(options.one[1]))
    runs = seeded_runs("accuracy_text", options.cases, options.seeds)
    title = "Accuracy: all-MiniLM-L6-v2 → sections of Debian packages, 6,000 texts of 32 tokens, 2 epochs"
    write_result("accuracy_text", title, "python dev.py bench accuracy_text", table(runs, CASES), "torch")


if __name__ == "__main__":
    main()
