"""What a checkpoint costs: time beside a training step, bytes on disk, memory while it is written.

python dev.py bench checkpointing [--models mobilenet_v2 minilm]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile

from benchmarks.common import markdown_table, write_result
from benchmarks.models import LANGUAGE, NAMES, bundle

TOKENS, TEXTS, IMAGES = 128, 16, 8

# In a process of its own: its high-water mark is of the training alone.
_PROGRAM = """
import json, sys, time
from pathlib import Path
from statistics import median
import numpy as np
from benchmarks.models import workload
from edge_razor import Trainer
from edge_razor.checkpoint import BUFFER_BYTES, Checkpoint, checkpoint_files
from edge_razor.memory import rss_bytes
path, name, batch, size, optimizer, saves, directory = sys.argv[1:]
inputs, labels = workload(name, int(batch), int(size), 2 if optimizer == "adamw" else 1000)
trainer = Trainer(path, batch_size=int(batch), sparsity=0.95, optimizer=optimizer, threads=2)

def timed(function):
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin

steps = [timed(lambda: trainer.step(inputs, labels)) for _ in range(8)][2:]
trainer.save(directory)
Path("/proc/self/clear_refs").write_text("5")
before = rss_bytes()
write = [timed(lambda: trainer.save(directory)) for _ in range(int(saves))]
extra = trainer.peak_rss_bytes - before
steps += [timed(lambda: trainer.step(inputs, labels)) for _ in range(6)]
file = checkpoint_files(directory)[0]

def load():
    with Checkpoint(directory) as checkpoint:
        trainer.load_checkpoint(checkpoint)

largest = max(4 * int(np.prod(trainer.read_tensor(name).shape)) for name in trainer.trainable)
print(json.dumps({"step": median(steps), "save": median(write), "slowest": max(write), "bytes": file.stat().st_size,
    "extra": extra, "load": median(timed(load) for _ in range(3)), "largest": largest, "buffer": BUFFER_BYTES}))
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", choices=NAMES, default=["mobilenet_v2", "resnet18", "minilm"])
    parser.add_argument("--saves", type=int, default=9)
    options = parser.parse_args()
    rows = []
    for model in options.models:
        text = model in LANGUAGE
        size, batch, optimizer = (TOKENS, TEXTS, "adamw") if text else (224, IMAGES, "sgd")
        path = bundle(model, TOKENS) if text else bundle(model)
        with tempfile.TemporaryDirectory(prefix="edge-razor-save-", dir=".") as directory:
            arguments = [str(path), model, str(batch), str(size), optimizer, str(options.saves), directory]
            command = [sys.executable, "-c", _PROGRAM, *arguments]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        figures = json.loads(done.stdout)
        rows.append(
            (
                f"{model}, {optimizer}",
                f"{figures['step']:.3f}",
                f"{figures['save']:.3f} ({figures['slowest']:.3f})",
                f"{figures['load']:.3f}",
                f"{figures['bytes'] / 1e6:.1f}",
                f"{figures['bytes'] / figures['save'] / 1e6:.0f}",
                f"{figures['extra'] / 1e3:.0f}",
                f"{figures['largest'] / 1e6:.2f}",
                f"{100 * figures['save'] / 600:.3f} %",
            )
        )
        print(rows[-1], flush=True)
    header = (
        "model",
        "step, s",
        "save, s (slowest)",
        "verify and load, s",
        "file, MB",
        "MB/s",
        "extra memory, kB",
        "largest tensor, MB",
        "of a run, every 10 min",
    )
    body = f"""Parameters and optimizer state, written through one buffer of 262 kB with checksums, synced and renamed.
Medians; memory is the highest resident set while saving, less that before.

{markdown_table(header, rows)}
"""
    write_result("checkpointing", "What a checkpoint costs", "python dev.py bench checkpointing", body)


if __name__ == "__main__":
    main()
