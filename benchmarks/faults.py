"""Training under faults: every call that may fail fails once, power is lost at every call, and the process is killed.

python dev.py bench faults [--kills 200] [--allocation-step 1] [--seed 0]
"""

from __future__ import annotations

import argparse
import errno
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.common import markdown_table, write_result
from edge_razor.checkpoint import checkpoint_files
from tests.faults.harness import (
    DEATHS,
    FAILURES,
    KILL,
    POWER_KEEPS_NAMES,
    POWER_UNDOES_NAMES,
    Broken,
    Fault,
    Harness,
    Sweep,
    harness_directory,
    stopped_run,
    sweep,
)

DEATH_NAMES = {
    KILL: "kill -9 at the call",
    POWER_KEEPS_NAMES: "power lost: unsynced data",
    POWER_UNDOES_NAMES: "power lost: unsynced data and names",
}


Row = tuple[str, str, Sweep]  # what happens, to a new or a resumed run, and how it ended


def cells(what: str, start: str, figures: Sweep) -> tuple[Any, ...]:
    faults = figures.survived + figures.refused + figures.died
    return (what, start, faults, figures.survived, figures.refused, figures.died, len(figures.problems))


def in_harness(measure: Callable[[Harness], list[Row]]) -> list[Row]:
    directory = harness_directory()
    harness = Harness(directory)
    try:
        return measure(harness)
    finally:
        harness.close()
        shutil.rmtree(directory)


def starts(harness: Harness) -> tuple[tuple[str, Path | None], ...]:
    return (("new", None), ("resumed", stopped_run(harness, harness.directory)))


def noted(what: str, start: str, figures: Sweep) -> Row:
    print(what, start, figures, flush=True)
    return what, start, figures


def allocation_rows(harness: Harness, step: int) -> list[Row]:
    fault = Fault("alloc", 1, errno.ENOMEM)
    return [noted("allocation: ENOMEM", name, sweep(harness, fault, start, step)) for name, start in starts(harness)]


def other_rows(harness: Harness, options: argparse.Namespace) -> list[Row]:
    rows = []
    for name, start in starts(harness):
        for kind, error, sticky in FAILURES:
            figures = sweep(harness, Fault(kind, 1, error, sticky), start)
            rows.append(noted(f"{kind}: {errno.errorcode[error]}{', and ever after' if sticky else ''}", name, figures))
        for action in DEATHS:
            figures = sweep(harness, Fault("any", 1, action=action), start)
            rows.append(noted(DEATH_NAMES[action], name, figures))
    forked, whole = kills(harness, options.kills, random.Random(options.seed), options.processes)
    rows.append(noted("kill -9 at a random moment", "both", forked))
    rows.append(noted("kill -9 of a whole process", "new", whole))
    return rows


def kills(harness: Harness, count: int, generator: random.Random, processes: int) -> tuple[Sweep, Sweep]:
    """Kills runs at random moments, several times in a row, then lets them end: forked ones, and whole processes."""
    forked, whole = Sweep(), Sweep()
    problems: list[str] = []
    harness.clear()
    while forked.died < count:
        had = bool(checkpoint_files(harness.run))
        answer = harness.train(kill_after=generator.uniform(0, 1.1 * harness.seconds), fresh=False)
        forked.runs += 1
        forked.died += answer["status"] < 0
        forked.survived += answer["status"] == 0
        if had and not checkpoint_files(harness.run):
            problems.append(f"kill {forked.died} left no checkpoint")
        if answer["status"] == 0 or generator.random() < 0.3:
            try:
                harness.check(f"kill {forked.died}", answer, had)
            except Broken as error:
                problems.append(str(error))
            harness.clear()
    forked.problems = tuple(problems)
    problems = []
    begin = time.monotonic()
    command = [sys.executable, "-m", "edge_razor", *harness.arguments]
    harness.clear()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = time.monotonic() - begin
    while whole.died < processes:
        harness.clear()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        time.sleep(generator.uniform(0.4, 1) * seconds)  # the first part of it is imports
        process.kill()
        said = process.communicate()[1]
        whole.runs += 1
        whole.died += process.returncode < 0
        whole.survived += process.returncode == 0
        try:
            harness.check(f"process {whole.runs}", {"status": process.returncode, "stderr": said}, False)
        except Broken as error:
            problems.append(str(error))
    whole.problems = tuple(problems)
    return forked, whole


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=200, help="kills of forked runs at random moments")
    parser.add_argument("--processes", type=int, default=20, help="kills of whole processes")
    parser.add_argument("--allocation-step", type=int, default=1, help="every how manieth allocation fails")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with ThreadPoolExecutor(2) as pool:  # each with a harness of its own
        allocations = pool.submit(in_harness, lambda harness: allocation_rows(harness, options.allocation_step))
        rest = pool.submit(in_harness, lambda harness: other_rows(harness, options))
        rows = [*rest.result(), *allocations.result()]
    problems = [problem for _, _, figures in rows for problem in figures.problems]
    header = ("fault", "run", "faults", "run went on", "refused with one clear error", "died", "promises broken")
    body = f"""A run of 8 steps in 2 epochs with evaluation, AdamW, a checkpoint every 3 steps, two kept. The fault
comes at the first such call, at the second, and so on until a run passes untouched. After each: there is a whole
checkpoint if there was one before, and the resumed run ends with the same checkpoint file, byte for byte, and the same
metrics as a run that was never disturbed. Losing power takes half of the data that were not synced, and undoes, or
does not, the changes of directories that were not synced (docs/checkpoints.md).

{markdown_table(header, [cells(*row) for row in rows])}
"""
    if problems:
        body += "Broken promises:\n\n" + "\n".join(f"- {problem}" for problem in problems[:50]) + "\n\n"
    write_result("faults", "Training under faults", "python dev.py bench faults", body)
    raise SystemExit(bool(problems))


if __name__ == "__main__":
    main()
