"""What the training process costs before it trains: import, loaded bundle, size of wheel and library.

python dev.py bench footprint
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from benchmarks.common import markdown_table, write_result
from benchmarks.models import ROOT, bundle

IMPORT = """
import time, sys; start = time.perf_counter()
{statement}
seconds = time.perf_counter() - start
kb = [int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmRSS')][0]
print(seconds, kb / 1000 * 1.024)
"""
LOAD = """
import edge_razor
from edge_razor.memory import rss_bytes
trainer = edge_razor.Trainer({bundle!r}, batch_size=8, sparsity=0.95, optimizer="sgd", momentum=0.0, lr=1e-3)
print(0, rss_bytes() / 1e6)
"""


def measure(code: str, repeats: int = 5) -> tuple[float, float]:
    """Median seconds and resident MB that the code prints, each time in a fresh interpreter."""
    results = [
        tuple(
            map(
                float,
                subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split(),
            )
        )
        for _ in range(repeats)
    ]
    return median(r[0] for r in results), median(r[1] for r in results)


def main() -> None:
    rows = []
    for label, statement in (
        ("bare interpreter", "pass"),
        ("import numpy", "import numpy"),
        ("import edge_razor", "import edge_razor"),
        ("import edge_razor, runtime loaded", "import edge_razor.runtime as r; r.isa()"),
    ):
        seconds, megabytes = measure(IMPORT.format(statement=statement))
        rows.append((label, f"{seconds:.3f}", f"{megabytes:.1f}"))
    _, megabytes = measure(LOAD.format(bundle=str(bundle("mobilenet_v2"))), 3)
    rows.append(("Trainer on MobileNetV2 (14 MB of parameters loaded), before the first step", "–", f"{megabytes:.1f}"))
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", directory, str(ROOT)]
        subprocess.run(command, check=True)
        wheel = next(Path(directory).glob("edge_razor-*.whl"))
        size = wheel.stat().st_size
        subprocess.run([sys.executable, "-m", "zipfile", "-e", str(wheel), directory], check=True)
        library = next(Path(directory).rglob("libedge_razor.so")).stat().st_size
    body = markdown_table(("state", "seconds", "resident, MB"), rows)
    body += f"\nWheel {size / 1e6:.2f} MB; native library {library / 1e6:.2f} MB.\n"
    write_result("footprint", "Footprint before training", "python dev.py bench footprint", body)


if __name__ == "__main__":
    main()
