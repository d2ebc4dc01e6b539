"""A small causal language model trained on Debian's package descriptions: perplexity on texts that it has not seen.

    python dev.py bench perplexity [--seeds 3]

GPT-2 of 4 layers and 128 channels from scratch, a byte-pair vocabulary of 2,048, samples of 64 tokens, batch 16, 600
steps, AdamW 1e-3 with a cosine schedule. The same seed gives every system the same weights and the same samples.
Finished runs are kept in ``results/perplexity.jsonl``.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from benchmarks.common import markdown_table, write_result
from benchmarks.seeds import by_case, command_line, seeded_runs, spread
from benchmarks.texts import package_descriptions

VOCABULARY, TOKENS, BATCH, STEPS, RATE, THREADS, HELD_OUT = 2048, 64, 16, 600, 1e-3, 1, 200
CASES: dict[str, tuple[str, float, str, str]] = {
    "PyTorch, dense": ("torch", 0.0, "", ""),
    "edge-razor, 0": ("edge-razor", 0.0, "centered", "recompute"),
    "edge-razor, plain 0.90": ("edge-razor", 0.9, "plain", "recompute"),
    "edge-razor, plain 0.90, probabilities": ("edge-razor", 0.9, "plain", "probabilities"),
    "edge-razor, centered 0.90": ("edge-razor", 0.9, "centered", "recompute"),
    "edge-razor, centered 0.97": ("edge-razor", 0.97, "centered", "recompute"),
}


def samples() -> tuple[np.ndarray, np.ndarray]:
    """Training and held-out pieces of the texts, int64 [samples, TOKENS + 1]; no text is in both."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    texts = [text for text, _ in package_descriptions()]
    texts = [texts[i] for i in np.random.default_rng(0).permutation(len(texts))]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    stream = np.array([i for e in tokenizer.encode_batch(texts) for i in (*e.ids, 0)])
    pieces = stream[: len(stream) // (TOKENS + 1) * (TOKENS + 1)].reshape(-1, TOKENS + 1)
    return pieces[:-HELD_OUT], pieces[-HELD_OUT:]


def model_for(seed: int) -> Any:
    import torch
    import transformers

    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=128,
        n_layer=4,
        n_head=4,
        n_positions=TOKENS,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    return transformers.GPT2LMHeadModel(config).eval()


def schedule(seed: int, count: int) -> list[tuple[np.ndarray, float]]:
    """Samples and learning rate of every step."""
    rng = np.random.default_rng(seed)
    rates = [RATE * min(1.0, (i + 1) / 30) * 0.5 * (1 + math.cos(math.pi * i / STEPS)) for i in range(STEPS)]
    return [(rng.integers(0, count, BATCH), rate) for rate in rates]


def run_torch(seed: int, prepare: Callable[[Any], None] | None = None) -> dict[str, float]:
    """Trains and evaluates in PyTorch; `prepare` may change the model before."""
    import torch

    torch.set_num_threads(THREADS)
    model, (train, test) = model_for(seed), samples()
    if prepare:
        prepare(model)

    def loss_of(pieces: np.ndarray) -> torch.Tensor:
        ids = torch.from_numpy(pieces)
        return torch.nn.functional.cross_entropy(model(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())

    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0), []
    for chosen, rate in schedule(seed, len(train)):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss = loss_of(train[chosen])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        held_out = mean(loss_of(test[i : i + 20]).item() for i in range(0, len(test), 20))
    return {"loss": mean(losses[-50:]), "perplexity": math.exp(held_out)}


def run_edge_razor(seed: int, sparsity: float, form: str, attention: str) -> dict[str, float]:
    import edge_razor

    path = Path(tempfile.gettempdir()) / f"edge-razor-perplexity-{seed}.razor"
    if not path.exists():
        subprocess.run([sys.executable, "-m", "benchmarks.perplexity", "--export", str(seed), str(path)], check=True)
    train, test = samples()
    with edge_razor.Trainer(
        path,
        batch_size=BATCH,
        sparsity=sparsity,
        razor=form,
        attention=attention,
        optimizer="adamw",
        lr=RATE,
        threads=THREADS,
    ) as trainer:
        losses = []
        for chosen, rate in schedule(seed, len(train)):
            trainer.lr = rate
            losses.append(trainer.step(train[chosen][:, :-1].copy(), train[chosen][:, 1:].copy()))
        batches = [(test[i : i + 20, :-1].copy(), test[i : i + 20, 1:].copy()) for i in range(0, len(test), 20)]
        return {"loss": mean(losses[-50:]), "perplexity": trainer.evaluate(batches)["perplexity"]}


def table(runs: list[dict[str, Any]], cases: Iterable[str]) -> str:
    rows = []
    for case, mine in by_case(runs, cases):
        loss, perplexity = [run["loss"] for run in mine], [run["perplexity"] for run in mine]
        each = ", ".join(f"{value:.0f}" for value in perplexity)
        rows.append((case, len(mine), spread(loss, 3), spread(perplexity, 1), each))
    header = ("system", "seeds", "final training loss", "perplexity, held out", "each seed")
    note = "\nFinal training loss: mean of the last 50 steps. ± is the standard deviation over seeds.\n"
    return markdown_table(header, rows) + note


def main() -> None:
    options = command_line(CASES, "SEED", "PATH").parse_args()
    if options.export:
        import torch

        import edge_razor

        ids = torch.zeros(2, TOKENS, dtype=torch.int64)
        model, path = model_for(int(options.export[0])), options.export[1]
        edge_razor.export(model, {"input_ids": ids}, path, loss="token_cross_entropy", dropout=False)
        return
    if options.one:
        case, seed = options.one[0], int(options.one[1])
        system, *settings = CASES[case]
        result = run_torch(seed) if system == "torch" else run_edge_razor(seed, *settings)
        print(json.dumps({"case": case, "seed": seed, **result}))
        return
    runs = seeded_runs("perplexity", options.cases, options.seeds)
    body = table(runs, CASES)
    title = "Perplexity: GPT-2 (4 layers, 128 channels) on Debian's package descriptions, 600 steps of 16 × 64 tokens"
    write_result("perplexity", title, "python dev.py bench perplexity", body, "torch")


if __name__ == "__main__":
    main()
