"""A long training run of the command line: resident memory, threads and open files from its warm-up to its end.

python dev.py bench long_run [--steps 20000]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.common import markdown_table, write_result
from tests.bundles import write_linear_bundle

WARM_UP = 0.1  # share of the steps before memory must be flat
BATCH = 8


@dataclass(frozen=True)
class Course:
    """What a run took after its warm-up: (lowest, highest) bytes, threads and file descriptors; and all readings."""

    rss: tuple[int, int]
    threads: tuple[int, int]
    files: tuple[int, int]
    readings: list[tuple[int, int]]  # (step, resident bytes)


def write_arrays(path: Path, samples: int, shape: tuple[int, ...], classes: int) -> Path:
    generator = np.random.default_rng(0)
    x = generator.standard_normal((samples, *shape), dtype=np.float32)
    np.savez(path, x=x, y=np.arange(samples) % classes)
    return path


def observe(bundle: Path, data: Path, out: Path, epochs: int, steps: int, *options: str) -> Course:
    """Runs `edge-razor train` with checkpoints, evaluation and metrics, and looks at it from outside."""
    command = [sys.executable, "-m", "edge_razor", "train", str(bundle), "--data", str(data), "--out", str(out)]
    command += ["--epochs", str(epochs), "--batch-size", str(BATCH), "--threads", "2", "--log-every", "5", *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    seen: list[tuple[int, int, int]] = []  # bytes of metrics.jsonl then, threads, files
    metrics, folder = out / "metrics.jsonl", Path(f"/proc/{process.pid}")
    while process.poll() is None:
        time.sleep(0.02)
        try:
            threads, files = len(os.listdir(folder / "task")), len(os.listdir(folder / "fd"))
            if files and metrics.exists():  # without any file it is just ending
                seen.append((metrics.stat().st_size, threads, files))
        except OSError:  # it has ended
            continue
    if process.returncode:
        raise SystemExit(f"training ended with status {process.returncode}")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    readings = [(line["update"], line["rss_bytes"]) for line in lines if line["event"] == "step"]
    assert readings[-1][0] >= steps - 5, "the run was shorter than asked for"
    rss = [value for update, value in readings if update > WARM_UP * steps]
    late = [entry for entry in seen if entry[0] > WARM_UP * metrics.stat().st_size]
    threads_late, files_late = [entry[1] for entry in late], [entry[2] for entry in late]
    return Course(
        (min(rss), max(rss)),
        (min(threads_late), max(threads_late)),
        (min(files_late), max(files_late)),
        readings,
    )


def _images(directory: Path, samples: int) -> Path:
    from PIL import Image

    generator = np.random.default_rng(0)
    for index in range(samples):
        folder = directory / "photos" / ("dark", "light")[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 255, (40, 48, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.jpg")
    return directory / "photos"


_EXPORT = """
import sys, torch, edge_razor
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3, 2, 1), torch.nn.BatchNorm2d(16), torch.nn.ReLU(),
    torch.nn.Conv2d(16, 32, 3, 2, 1), torch.nn.GELU(), torch.nn.Dropout(0.2), torch.nn.AdaptiveAvgPool2d(1),
    torch.nn.Flatten(), torch.nn.Linear(32, 2)).eval()
edge_razor.export(net, (torch.zeros(2, 3, 32, 32),), sys.argv[1])
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20_000)
    steps = parser.parse_args().steps
    rows, course = [], []
    with tempfile.TemporaryDirectory(prefix="edge-razor-long-") as name:
        directory = Path(name)
        network = directory / "network.razor"
        subprocess.run([sys.executable, "-c", _EXPORT, str(network)], check=True)
        linear = write_linear_bundle(directory / "linear.razor")
        cases = {
            "convolutional network on an image folder, augmented": (network, _images(directory, 890), 890),
            "linear model on arrays": (linear, write_arrays(directory / "d.npz", 890, (6,), 3), 890),
        }
        for number, (what, (bundle, data, samples)) in enumerate(cases.items()):
            an_epoch = -(-(samples - round(0.1 * samples)) // BATCH)
            options = ["--checkpoint-every", "500", "--optimizer", "adamw", "--max-cpu", "99%"]
            options += ["--flip", "--random-crop", "--sparsity", "0.9"] if data.is_dir() else []
            run = observe(bundle, data, directory / f"run{number}", -(-steps // an_epoch), steps, *options)
            growth = run.rss[1] - run.rss[0]
            rows.append(
                (
                    what,
                    run.readings[-1][0],
                    f"{run.rss[0] / 1e6:.2f} to {run.rss[1] / 1e6:.2f}",
                    f"{growth / 1e3:.0f}",
                    f"{run.threads[0]} to {run.threads[1]}",
                    f"{run.files[0]} to {run.files[1]}",
                )
            )
            print(rows[-1], flush=True)
            course.append(
                [f"{run.readings[i][1] / 1e6:.2f}" for i in np.linspace(0, len(run.readings) - 1, 11, dtype=int)]
            )
    header = ("run", "steps", "resident memory, MB", "difference, kB", "threads", "open files")
    parts = ("first", *(f"{tenth}0 %" for tenth in range(1, 10)), "last")
    body = f"""`edge-razor train` with evaluation and a checkpoint after each epoch and every 500 steps. Lowest to
highest after the first tenth of the steps; threads and files as seen from outside, 50 times a second (the thread that
reads data comes and goes with each epoch).

{markdown_table(header, rows)}
Resident memory in the course of the run, MB:

{markdown_table(("run", *parts), [(row[0], *values) for row, values in zip(rows, course, strict=True)])}
"""
    write_result("long_run", "A long run", "python dev.py bench long_run", body)


if __name__ == "__main__":
    main()
