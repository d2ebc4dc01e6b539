"""Cases that train several times with different seeds, each in a process of its own; what is finished is kept."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from statistics import mean, stdev
from typing import Any

from benchmarks.common import RESULTS

__all__ = ["by_case", "command_line", "seeded_runs", "spread"]


def command_line(cases: Iterable[str], *export: str) -> argparse.ArgumentParser:
    """--seeds and --cases for users; --one for a single run and --export of these arguments for its own processes."""
    cases = list(cases)
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cases", nargs="+", default=cases, choices=cases)
    parser.add_argument("--one", nargs=2, metavar=("CASE", "SEED"), help=argparse.SUPPRESS)
    if export:
        parser.add_argument("--export", nargs=len(export), metavar=export, help=argparse.SUPPRESS)
    return parser


def seeded_runs(name: str, cases: Iterable[str], seeds: int) -> list[dict[str, Any]]:
    """Everything in ``results/<name>.jsonl`` after each case has run with each of the first ``seeds`` seeds.

    A run is ``python -m benchmarks.<name> --one CASE SEED``, whose last line is a JSON object with case and seed.
    """
    RESULTS.mkdir(exist_ok=True)
    log = RESULTS / f"{name}.jsonl"
    runs: list[dict[str, Any]] = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    cases = list(cases)
    for seed in range(seeds):
        for case in cases:
            if any(run["case"] == case and run["seed"] == seed for run in runs):
                continue
            command = [sys.executable, "-m", f"benchmarks.{name}", "--one", case, str(seed)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            runs.append(json.loads(done.stdout.splitlines()[-1]))
            with log.open("a") as file:
                file.write(json.dumps(runs[-1]) + "\n")
            print(runs[-1], flush=True)
    return runs


def by_case(runs: Sequence[dict[str, Any]], cases: Iterable[str]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Each case that has run, with its runs."""
    for case in cases:
        mine = [run for run in runs if run["case"] == case]
        if mine:
            yield case, mine


def spread(values: Sequence[float], digits: int) -> str:
    """Mean ± standard deviation."""
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")
