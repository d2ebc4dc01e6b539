"""Fuzzes everything that reads files from others: the native loaders with libFuzzer under the address and undefined-
behaviour sanitizers (clang and libclang-rt, Debian packages clang and libclang-rt-14-dev), the Python readers with
atheris (`pip install atheris`), or without it at random.

    python dev.py bench fuzz [--runs N] [--only NAME …] [--keep FOLDER]

Counts add up over calls, in results/fuzz.json; a crash, hang, or allocation beyond the limit stops it with status 1.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.common import RESULTS, ROOT, markdown_table, write_result
from tests.untrusted.readers import READERS

NATIVE = ("plan_fuzz", "weights_fuzz")
MALLOC_LIMIT_MB, RSS_LIMIT_MB, TIMEOUT_SECONDS = 160, 1024, 60
BUILD = ROOT / "build" / "fuzz"
TOTALS = RESULTS / "fuzz.json"

FINDINGS = (
    ("npy", "an .npy header (format 2) that states 2 GB made numpy take them", "length checked first"),
    ("npz", "a small compressed .npz that states a huge array was allocated before it was read", "size checked first"),
    ("npz", "encrypted, LZMA- or bzip2-compressed and damaged deflate members raised other errors", "DataError"),
    ("npy", "shapes with negative numbers passed the check of the size", "refused"),
    ("bundle", "a zip64 offset beyond 2^63 raised OverflowError; members could reach past the end", "BundleError"),
    ("bundle", "shapes such as [0, 2^70] raised OverflowError in weights.safetensors", "refused"),
    ("manifest", "numbers such as 10^400 raised OverflowError, sizes beyond memory were taken", "BundleError"),
    ("checkpoint", "deeply nested state raised RecursionError; settings of any name and type reached the trainer",
     "checked by a table of names and types"),
    ("plan_summary", "a summary without a field, or with one of another type, raised KeyError or TypeError later",
     "PlanError when it is loaded"),
    ("jsonl", "a lone surrogate in a text or label broke the tokenizer's call", "the line is refused"),
    ("jsonl", "a file of one endless line was read whole; a label of 5,000 digits raised ValueError", "bounded"),
)  # fmt: skip


def _build() -> None:
    configure = ["cmake", "-S", "runtime", "-B", str(BUILD), "-G", "Ninja", "-DCMAKE_CXX_COMPILER=clang++"]
    configure += [f"-DPython3_EXECUTABLE={sys.executable}", "-DEDGE_RAZOR_FUZZ=ON"]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for command in (configure, ["cmake", "--build", str(BUILD), "--target", *NATIVE]):
        subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)


def _seeds(folder: Path) -> None:
    """Valid plans and weights files."""
    import numpy as np
    from safetensors.numpy import save

    from edge_razor.runtime import Session
    from tests.runtime.write_plans import write_plans

    for target in NATIVE:
        (folder / target).mkdir(parents=True, exist_ok=True)
    write_plans(folder / "plan_fuzz")
    session = Session((folder / "plan_fuzz" / "linear.plan").read_bytes())
    tensors = {name: np.ones(p.shape, np.float32) for name, p in session.parameters().items()}
    (folder / "weights_fuzz" / "seed").write_bytes(save(tensors))
    more = {**tensors, "other": np.zeros(3, np.int64)}
    (folder / "weights_fuzz" / "seed-more").write_bytes(save(more, metadata={"format": "pt"}))


def _native(target: str, runs: int, seed: int, folder: Path) -> tuple[int, str]:
    """(inputs, libFuzzer's output)"""
    options = [f"-runs={runs}", f"-seed={seed}", "-max_len=8192", "-print_final_stats=1", f"-timeout={TIMEOUT_SECONDS}"]
    options += [f"-malloc_limit_mb={MALLOC_LIMIT_MB}", f"-rss_limit_mb={RSS_LIMIT_MB}"]
    environment = {
        "EDGE_RAZOR_FUZZ_PLAN": str(folder / "plan_fuzz" / "linear.plan"),
        "OPENBLAS_NUM_THREADS": "1",
        "ASAN_OPTIONS": "allocator_may_return_null=1:detect_leaks=0",  # OpenBLAS keeps its buffers
    }
    return _run([str(BUILD / target), *options, str(folder / target)], environment, folder, target)


def _python(name: str, runs: int, seed: int, folder: Path) -> tuple[int, str]:
    (folder / name).mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "benchmarks.fuzz_reader", name, str(runs), str(seed), str(folder / name)]
    return _run(command, {}, ROOT, name)


def _run(command: list[str], environment: dict[str, str], folder: Path, name: str) -> tuple[int, str]:
    result = subprocess.run(
        command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, errors="replace"
    )
    output = result.stdout + result.stderr
    if result.returncode:
        print(output[-6000:])
        raise SystemExit(f"{name}: found something (status {result.returncode}); the input is in the corpus folder")
    match = re.search(r"stat::number_of_executed_units:\s*(\d+)", output)
    return int(match[1]) if match else int(json.loads(result.stdout.splitlines()[0])["inputs"]), output


def _report(totals: dict[str, dict[str, float]]) -> None:
    rows = [
        (name, f"{int(t['inputs']):,}", int(t["edges"]) or "not guided", f"{t['seconds']:.0f}")
        for name, t in totals.items()
    ]
    rows.append(("all", f"{int(sum(t['inputs'] for t in totals.values())):,}", "", ""))
    body = markdown_table(("reader", "inputs", "edges covered", "seconds"), rows)
    body += (
        f"\nLimits: an allocation of {MALLOC_LIMIT_MB} MB (native), {RSS_LIMIT_MB} MB resident, {TIMEOUT_SECONDS} s an "
        "input. Inputs that the loader of plans accepts and whose memory is small are also trained on and predicted "
        "with. Seconds are of the clock, on a machine with other work.\n\nFixed before: the first was found by the "
        "property tests in `tests/untrusted`, the others by reading the readers:\n\n"
    )
    body += markdown_table(("reader", "what happened", "now"), FINDINGS)
    write_result("fuzz", "Fuzzing of what reads files", "python dev.py bench fuzz", body)


def main() -> None:
    names = (*NATIVE, *READERS)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1_000_000, help="inputs in all: 4 of 5 native")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="readers")
    parser.add_argument("--keep", type=Path, default=BUILD / "corpus", help="folder of the corpora")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    native = [name for name in options.only if name in NATIVE]
    python = [name for name in options.only if name in READERS]
    share = {name: options.runs * (4 if python else 5) // 5 // len(native) for name in native}
    share |= {name: options.runs * (1 if native else 5) // 5 // len(python) for name in python}
    folder = options.keep.resolve()
    if native:
        _build()
        _seeds(folder)
    totals: dict[str, dict[str, float]] = json.loads(TOTALS.read_text()) if TOTALS.exists() else {}
    for name, runs in share.items():
        begin = time.monotonic()
        inputs, output = (_native if name in NATIVE else _python)(name, runs, options.seed, folder)
        edges = [int(found) for found in re.findall(r"\bcov: (\d+)", output)]
        total = totals.setdefault(name, {"inputs": 0, "edges": 0, "seconds": 0.0})
        total["inputs"] += inputs
        total["edges"] = max(total["edges"], *edges, 0)
        total["seconds"] += time.monotonic() - begin
        TOTALS.write_text(json.dumps(totals, indent=1) + "\n")
        _report(totals)


if __name__ == "__main__":
    main()
