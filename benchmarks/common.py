"""What the benchmarks share: the machine line, Markdown tables, the data sets, and workers that take turns."""

from __future__ import annotations

import gzip
import json
import platform
import subprocess
import sys
from collections.abc import Iterable, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # Debian package dataset-fashion-mnist


def machine_line(*packages: str) -> str:
    """Processor, cores, kernel, versions and date, for the foot of a table."""
    processor = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            processor = line.split(":", 1)[1].strip()
            break
    flags = "AVX-512" if "avx512f" in Path("/proc/cpuinfo").read_text() else "no AVX-512"
    cores = len([line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("processor")])
    versions = []
    for package in ("edge-razor", "numpy", *packages):
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            versions.append(f"{package} (source tree)")
    python = f"Python {platform.python_version()}"
    return f"{processor} ({flags}), {cores} cores, {platform.system()} {platform.release()}, {python}, " + (
        ", ".join(versions) + f", {date.today().isoformat()}"
    )


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def write_result(name: str, title: str, command: str, body: str, *packages: str) -> None:
    """Writes ``results/<name>.md`` and prints it."""
    RESULTS.mkdir(exist_ok=True)
    text = f"# {title}\n\n`{command}`\n\n{body}\n{machine_line(*packages)}\n"
    (RESULTS / f"{name}.md").write_text(text)
    print(text)


def fashion_mnist(split: str, count: int, size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """``count`` random images of a split (``train`` | ``t10k``), as (uint8 [n, size, size, 3], int64 [n])."""
    from PIL import Image

    if not FASHION_MNIST.is_dir():
        raise SystemExit(f"{FASHION_MNIST} is missing: install the Debian package dataset-fashion-mnist")
    with gzip.open(FASHION_MNIST / f"{split}-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(FASHION_MNIST / f"{split}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8).astype(np.int64)
    chosen = np.random.default_rng(seed).permutation(len(labels))[:count]
    scaled = [np.asarray(Image.fromarray(images[i]).resize((size, size), Image.Resampling.BILINEAR)) for i in chosen]
    return np.repeat(np.stack(scaled)[..., None], 3, axis=3), labels[chosen]


class Worker:
    """A process that sets one system up and then does one training step whenever it is told to.

    Systems are measured in turns, one step each, so that what else the machine does hits all alike.
    """

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.setup = self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a benchmark worker ended with status {self.process.wait()}")
        return json.loads(line)

    def ask(self, command: str) -> dict[str, Any]:
        """``step`` → {"seconds", "loss"}; ``stop`` → {"peak_rss_bytes", …} and the process ends."""
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        answer = self._answer()
        if command == "stop":
            self.process.wait()
        return answer
