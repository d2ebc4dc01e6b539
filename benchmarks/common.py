"""What the benchmarks share: the machine line, Markdown tables, the data sets, and workers that take turns."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import platform
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
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


def write_result(name: str, title: str, command: str, body: str, *packages: str, machine: str | None = None) -> None:
    """Writes ``results/<name>.md`` and prints it. ``machine``: the line at its foot; None: this machine, now."""
    RESULTS.mkdir(exist_ok=True)
    text = f"# {title}\n\n`{command}`\n\n{body}\n{machine or machine_line(*packages)}\n"
    (RESULTS / f"{name}.md").write_text(text)
    print(text)


def fashion_mnist(
    split: str, count: int, size: int, seed: int = 0, classes: Sequence[int] = range(10)
) -> tuple[np.ndarray, np.ndarray]:
    """``count`` random images of a split (``train`` | ``t10k``) and their classes, as (uint8 [n, size, size, 3], int64
    [n]); only of ``classes``."""
    from PIL import Image

    if not FASHION_MNIST.is_dir():
        raise SystemExit(f"{FASHION_MNIST} is missing: install the Debian package dataset-fashion-mnist")
    with gzip.open(FASHION_MNIST / f"{split}-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(FASHION_MNIST / f"{split}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8).astype(np.int64)
    order = np.random.default_rng(seed).permutation(len(labels))
    chosen = order[np.isin(labels[order], classes)][:count]
    scaled = [np.asarray(Image.fromarray(images[i]).resize((size, size), Image.Resampling.BILINEAR)) for i in chosen]
    return np.repeat(np.stack(scaled)[..., None], 3, axis=3), labels[chosen]


class WorkerError(RuntimeError):
    """A worker could not do what it was asked; the text is its error, one line."""


class Worker:
    """A process that sets one system up and then does one training step whenever it is told to.

    Systems are measured in turns, one step each, so that what else the machine does hits all alike.

    Args:
        arguments: of ``benchmarks.worker``: system, model, options.
        python: interpreter to run it with, for a system in an environment of its own.
        timeout: seconds to wait for an answer.
        environment: what the process has besides this one's.

    Raises:
        WorkerError: the system could not be set up.
    """

    def __init__(
        self,
        *arguments: str,
        python: str | Path = sys.executable,
        timeout: float = 900.0,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.timeout = timeout
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [str(python), "-m", "benchmarks.worker", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
        )
        self.setup = self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], self.timeout)[0]:
            self.close()
            raise WorkerError(f"no answer within {self.timeout:.0f} s")
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            self.errors.seek(0)
            said = [text.strip() for text in self.errors.read().splitlines() if text.strip()]
            raise WorkerError(f"ended with status {status}" + (f": {said[-1]}" if said else ""))
        answer = json.loads(line)
        if "error" in answer:
            self.close()
            raise WorkerError(answer["error"])
        return answer

    def ask(self, command: str) -> dict[str, Any]:
        """``step`` → {"seconds", "loss"}; ``profile N`` → {"lines"}; ``stop`` → {"peak_rss_bytes", …}, then it ends.

        Raises:
            WorkerError: it failed, died or takes too long.
        """
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(command + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it is dead; the answer says why
        answer = self._answer()
        if command == "stop":
            self.close()
        return answer

    def close(self) -> None:
        """Ends the process, whatever it does."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.errors):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
