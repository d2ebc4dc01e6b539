"""Fuzzes everything that reads files from others: the native loaders with libFuzzer under the address and undefined-
behaviour sanitizers (clang and libclang-rt, Debian packages clang and libclang-rt-14-dev), the Python readers with
atheris (`pip install atheris`), or without it at random.

    python dev.py bench fuzz [--runs N] [--only NAME …] [--jobs 2] [--keep FOLDER]

Counts add up over calls, in results/fuzz.json (remove it to begin anew); a crash, hang, or allocation beyond the limit
stops it with status 1.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, ROOT, markdown_table, write_result
from tests.runtime.write_fuzz_seeds import TARGETS as NATIVE
from tests.runtime.write_fuzz_seeds import write_fuzz_seeds
from tests.untrusted.readers import READERS

MALLOC_LIMIT_MB, RSS_LIMIT_MB, TIMEOUT_SECONDS = 160, 1024, 60
BUILD = ROOT / "build" / "fuzz"
DICTIONARY = ROOT / "runtime" / "fuzz" / "safetensors.dict"
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # where readers are given their files
TOTALS = RESULTS / "fuzz.json"

FINDINGS = (
    ("npy", "an .npy header (format 2) that states 2 GB made numpy take them", "length checked first"),
    ("npz", "a small compressed .npz that states a huge array was allocated before it was read", "size checked first"),
    ("npz", "encrypted, LZMA- or bzip2-compressed and damaged deflate members raised other errors", "DataError"),
    ("npy", "shapes with negative numbers passed the check of the size", "refused"),
    ("bundle", "a zip64 offset beyond 2^63 raised OverflowError; members could reach past the end", "BundleError"),
    ("bundle", "shapes such as [0, 2^70] raised OverflowError in weights.safetensors", "refused"),
    ("manifest", "numbers such as 10^400 raised OverflowError, sizes beyond memory were taken", "BundleError"),
    ("checkpoint", "deeply nested state raised RecursionError; settings of any name and type reached the trainer, and "
     "a recipe of any type the data", "checked by tables of names and types"),
    ("plan_summary", "a summary without a field, or with one of another type, raised KeyError or TypeError later",
     "PlanError when it is loaded"),
    ("jsonl", "a lone surrogate in a text or label broke the tokenizer's call", "the line is refused"),
    ("jsonl", "a file of one endless line was read whole; a label of 5,000 digits raised ValueError", "bounded"),
    ("csv, jsonl", 'the label "00" counted as an index, but was in no list of them: ValueError', "a name"),
    ("graph", "values without a shape, of too few dimensions, or that nothing makes: KeyError, IndexError, ValueError",
     "BundleError"),
    ("bundle, npz", "a zip's directory of any length was made Python objects, ten times its size", "256 KB at most"),
    ("plan_summary", "a bucket whose number of tokens has 5,000 digits raised ValueError", "refused"),
    ("plan_fuzz", "the check of spills took time with the square of the transfers under way", "a search tree"),
    ("image", "IndexError, TypeError and more from inside of Pillow; its warnings were printed", "named, or left out"),
    ("tokenizer", "texts on which tokenizers raises, its panics, and a tokenizer.json that is no UTF-8", "DataError"),
    ("all", "a FIFO in the place of a file was waited for, a device read without end", "refused when it is opened"),
)  # fmt: skip


def _build() -> None:
    configure = ["cmake", "-S", "runtime", "-B", str(BUILD), "-G", "Ninja", "-DCMAKE_CXX_COMPILER=clang++"]
    configure += [f"-DPython3_EXECUTABLE={sys.executable}", "-DEDGE_RAZOR_FUZZ=ON"]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for command in (configure, ["cmake", "--build", str(BUILD), "--target", *NATIVE]):
        subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)


def _native(target: str, runs: int, seed: int, folder: Path) -> tuple[int, str]:
    """(inputs, libFuzzer's output)"""
    options = [f"-runs={runs}", f"-seed={seed}", "-max_len=8192", "-print_final_stats=1", f"-timeout={TIMEOUT_SECONDS}"]
    options += [f"-malloc_limit_mb={MALLOC_LIMIT_MB}", f"-rss_limit_mb={RSS_LIMIT_MB}"]
    if target != "plan_fuzz":
        options.append(f"-dict={DICTIONARY}")
    environment = {
        "EDGE_RAZOR_FUZZ_PLANS": ":".join(map(str, sorted((folder / "plans").glob(f"{target}-*.plan")))),
        "ASAN_OPTIONS": "allocator_may_return_null=1",
    }
    return _run([str(BUILD / target), *options, str(folder / target)], environment, folder, target)


def _python(name: str, runs: int, seed: int, folder: Path) -> tuple[int, str]:
    (folder / name).mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "benchmarks.fuzz_reader", name, str(runs), str(seed), str(folder / name)]
    with tempfile.TemporaryDirectory(prefix="edge-razor-fuzz-", dir=MEMORY) as work:
        return _run(command, {"TMPDIR": work}, ROOT, name)


def _run(command: list[str], environment: dict[str, str], folder: Path, name: str) -> tuple[int, str]:
    result = subprocess.run(
        command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, errors="replace"
    )
    output = result.stdout + result.stderr
    if result.returncode:
        print(output[-6000:])
        raise RuntimeError(f"{name}: found something (status {result.returncode}); the input is in the corpus folder")
    match = re.search(r"stat::number_of_executed_units:\s*(\d+)", output)
    return int(match[1]) if match else int(json.loads(result.stdout.splitlines()[0])["inputs"]), output


def _fuzz(name: str, runs: int, seed: int, folder: Path) -> tuple[str, int, int, float]:
    """(name, inputs, most edges covered, seconds)"""
    begin = time.monotonic()
    inputs, output = (_native if name in NATIVE else _python)(name, runs, seed, folder)
    edges = max((int(found) for found in re.findall(r"\bcov: (\d+)", output)), default=0)
    return name, inputs, edges, time.monotonic() - begin


def _report(readers: dict[str, dict[str, float]], commands: list[str]) -> None:
    totals = {name: readers[name] for name in (*NATIVE, *READERS) if name in readers}
    rows = [
        (name, "native" if name in NATIVE else "Python", f"{int(t['inputs']):,}", int(t["edges"]) or "not guided",
         f"{t['inputs'] / t['seconds']:,.0f}", 0)
        for name, t in totals.items()
    ]  # fmt: skip
    for kind, names in (("native", NATIVE), ("Python", tuple(READERS)), ("", (*NATIVE, *READERS))):
        count = sum(int(t["inputs"]) for name, t in totals.items() if name in names)
        rows.append((f"all {kind}".strip(), kind, f"{count:,}", "", "", 0))
    body = markdown_table(
        ("reader", "kind", "inputs", "edges covered", "inputs a second", "crashes, hangs, too much memory"), rows
    )
    body += (
        f"\nLimits: an allocation of {MALLOC_LIMIT_MB} MB (native), {RSS_LIMIT_MB} MB resident, {TIMEOUT_SECONDS} s an "
        "input; the first finding ends a run. Native: Clang's address and undefined-behaviour sanitizers, edges of the "
        "whole library; plans that are accepted and whose memory is small are given weights, trained on, evaluated and "
        "predicted with, and weights and checkpoints that are accepted are saved and loaded again. Python: any "
        "exception that is none of the package's is a crash; edges of the package's Python code. Rates are of a "
        "machine with other work.\n\nFixed before: found by these targets, by the property tests in "
        "`tests/untrusted`, or by reading the readers; `tests/untrusted/test_regressions.py` has a case of each.\n\n"
    )
    body += markdown_table(("reader", "what happened", "now"), FINDINGS)
    write_result("fuzz", "Fuzzing of what reads files", "`, `".join(commands), body, "atheris")


def main() -> None:
    names = (*NATIVE, *READERS)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1_000_000, help="inputs in all: 3 of 5 native")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="readers")
    parser.add_argument("--keep", type=Path, default=BUILD / "corpus", help="folder of the corpora")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="readers at a time")
    options = parser.parse_args()
    native = [name for name in options.only if name in NATIVE]
    python = [name for name in options.only if name in READERS]
    share = {name: options.runs * (3 if python else 5) // 5 // len(native) for name in native}
    share |= {name: options.runs * (2 if native else 5) // 5 // len(python) for name in python}
    folder = options.keep.resolve()
    if native:
        _build()
        write_fuzz_seeds(folder)
    totals: dict[str, Any] = json.loads(TOTALS.read_text()) if TOTALS.exists() else {"commands": [], "readers": {}}
    only = "" if len(options.only) == len(names) else f" --only {' '.join(options.only)}"
    totals["commands"].append(f"python3 dev.py bench fuzz --runs {options.runs} --seed {options.seed}{only}")
    with ThreadPoolExecutor(options.jobs) as pool:
        for done in as_completed([pool.submit(_fuzz, *item, options.seed, folder) for item in share.items()]):
            name, inputs, edges, seconds = done.result()
            total = totals["readers"].setdefault(name, {"inputs": 0, "edges": 0, "seconds": 0.0})
            total["inputs"] += inputs
            total["edges"] = max(total["edges"], edges)
            total["seconds"] += seconds
            TOTALS.write_text(json.dumps(totals, indent=1) + "\n")
            _report(totals["readers"], totals["commands"])


if __name__ == "__main__":
    main()
