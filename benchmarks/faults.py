"""Training under faults: every call that may fail fails once, power is lost at every call, and the process is killed.

python dev.py bench faults [--parts calls allocations app-calls app-allocations] [--kills 200] [--app-kills 100]
    [--allocation-step 1] [--seed 0] [--jobs 2]

A part's rows stay in results/faults.json until it is measured again.
"""

from __future__ import annotations

import argparse
import errno
import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, markdown_table, write_result
from tests.faults.app import UPDATES, AppHarness
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
    Workload,
    harness_directory,
    stopped_run,
    sweep,
)

ROWS = RESULTS / "faults.json"
DEATH_NAMES = {
    KILL: "kill -9 at the call",
    POWER_KEEPS_NAMES: "power lost: unsynced data",
    POWER_UNDOES_NAMES: "power lost: unsynced data and names",
}


Row = tuple[str, str, Sweep]  # what happens, to a new or a resumed run, and how it ended


def cells(what: str, start: str, figures: Sweep) -> tuple[Any, ...]:
    faults = figures.survived + figures.refused + figures.died
    return (what, start, faults, figures.survived, figures.refused, figures.died, len(figures.problems))


def in_harness(make: Callable[[Path], Workload], measure: Callable[[Workload], list[Row]]) -> list[Row]:
    directory = harness_directory()
    harness = make(directory)
    try:
        return measure(harness)
    finally:
        harness.close()
        shutil.rmtree(directory)


def starts(harness: Workload) -> tuple[tuple[str, Path | None], ...]:
    return (("new", None), ("resumed", stopped_run(harness, harness.directory)))


def noted(what: str, start: str, figures: Sweep) -> Row:
    print(what, start, figures, flush=True)
    return what, start, figures


def allocation_rows(harness: Workload, step: int) -> list[Row]:
    fault = Fault("alloc", 1, errno.ENOMEM)
    what = "allocation: ENOMEM" + (f", one in {step}" if step > 1 else "")
    return [noted(what, name, sweep(harness, fault, start, step)) for name, start in starts(harness)]


def file_rows(harness: Workload) -> list[Row]:
    rows = []
    for name, start in starts(harness):
        for kind, error, sticky in FAILURES:
            if not harness.counts[kind]:
                continue
            figures = sweep(harness, Fault(kind, 1, error, sticky), start)
            rows.append(noted(f"{kind}: {errno.errorcode[error]}{', and ever after' if sticky else ''}", name, figures))
        for action in DEATHS:
            figures = sweep(harness, Fault("any", 1, action=action), start)
            rows.append(noted(DEATH_NAMES[action], name, figures))
    return rows


def call_and_kill_rows(harness: Workload, options: argparse.Namespace) -> list[Row]:
    generator = random.Random(options.seed)
    rows = file_rows(harness)
    rows.append(noted("kill -9 at a random moment", "both", random_kills(harness, options.kills, generator)))
    assert isinstance(harness, Harness)
    rows.append(noted("kill -9 of a whole process", "new", process_kills(harness, options.processes, generator)))
    return rows


def app_rows(harness: Workload, options: argparse.Namespace) -> list[Row]:
    rows = file_rows(harness)
    kills = random_kills(harness, options.app_kills, random.Random(options.seed))
    rows.append(noted("kill -9 at a random moment", "both", kills))
    return rows


# Parts of the benchmark, each with a harness of its own, and what they measure.
PARTS: dict[str, tuple[Callable[[Path], Workload], Callable[[Workload, argparse.Namespace], list[Row]]]] = {
    "calls": (Harness, call_and_kill_rows),
    "allocations": (Harness, lambda harness, options: allocation_rows(harness, options.allocation_step)),
    "app-calls": (AppHarness, app_rows),
    "app-allocations": (AppHarness, lambda harness, options: allocation_rows(harness, options.allocation_step)),
}


def random_kills(harness: Workload, count: int, generator: random.Random) -> Sweep:
    """Kills runs at random moments, several times in a row, then lets them end."""
    done = Sweep()
    problems: list[str] = []
    harness.clear()
    while done.died < count:
        had = harness.has_checkpoint()
        answer = harness.train(kill_after=generator.uniform(0, 1.1 * harness.seconds), fresh=False)
        done.runs += 1
        done.died += answer["status"] < 0
        done.survived += answer["status"] == 0
        if had and not harness.has_checkpoint():
            problems.append(f"kill {done.died} left no checkpoint")
        if answer["status"] == 0 or generator.random() < 0.3:
            try:
                harness.check(f"kill {done.died}", answer, had)
            except Broken as error:
                problems.append(str(error))
            harness.clear()
    done.problems = tuple(problems)
    return done


def process_kills(harness: Harness, count: int, generator: random.Random) -> Sweep:
    """Kills whole processes of the command line, which `random_kills` forks from one that has everything loaded."""
    done = Sweep()
    problems: list[str] = []
    begin = time.monotonic()
    command = [sys.executable, "-m", "edge_razor", *harness.arguments]
    harness.clear()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = time.monotonic() - begin
    while done.died < count:
        harness.clear()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        time.sleep(generator.uniform(0.4, 1) * seconds)  # the first part of it is imports
        process.kill()
        said = process.communicate()[1]
        done.runs += 1
        done.died += process.returncode < 0
        done.survived += process.returncode == 0
        try:
            harness.check(f"process {done.runs}", {"status": process.returncode, "stderr": said}, False)
        except Broken as error:
            problems.append(str(error))
    done.problems = tuple(problems)
    return done


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=tuple(PARTS))
    parser.add_argument("--kills", type=int, default=200, help="kills of forked runs at random moments")
    parser.add_argument("--app-kills", type=int, default=100, help="kills of the C program at random moments")
    parser.add_argument("--processes", type=int, default=20, help="kills of whole processes")
    parser.add_argument("--allocation-step", type=int, default=1, help="every how manieth allocation fails")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="workloads at a time")
    options = parser.parse_args()
    kept: dict[str, Any] = json.loads(ROWS.read_text()) if ROWS.exists() else {}
    only = "" if len(options.parts) == len(PARTS) else f" --parts {' '.join(options.parts)}"
    step = f" --allocation-step {options.allocation_step}" if options.allocation_step > 1 else ""
    command = f"python dev.py bench faults{only}{step}"
    with ThreadPoolExecutor(options.jobs) as pool:
        running = {
            name: pool.submit(
                in_harness, PARTS[name][0], lambda harness, measure=PARTS[name][1]: measure(harness, options)
            )
            for name in options.parts
        }
        for name, result in running.items():
            rows = [[what, start, asdict(figures)] for what, start, figures in result.result()]
            kept[name] = {"command": command, "rows": rows}
            ROWS.write_text(json.dumps(kept, indent=1) + "\n")
    raise SystemExit(bool(report(kept)))


def report(kept: dict[str, Any]) -> list[str]:
    """Writes faults.md from the rows of all parts; returns the broken promises."""
    rows = {
        name: [(what, start, Sweep(**figures)) for what, start, figures in kept[name]["rows"]] if name in kept else []
        for name in PARTS
    }
    problems = [problem for part in rows.values() for _, _, figures in part for problem in figures.problems]
    commands = list(dict.fromkeys(kept[name]["command"] for name in PARTS if name in kept))
    command_line, program = rows["calls"] + rows["allocations"], rows["app-calls"] + rows["app-allocations"]
    header = ("fault", "run", "faults", "run went on", "refused with one clear error", "died", "promises broken")
    body = f"""The fault comes at the first such call, at the second, and so on until a run passes untouched. After
each: there is a whole checkpoint if there was one before, and the resumed run ends with the same checkpoint file, byte
for byte, as a run that was never disturbed. Losing power takes half of the data that were not synced, and undoes, or
does not, the changes of directories that were not synced (docs/checkpoints.md).

## `edge-razor train`

A run of 8 steps in 2 epochs with evaluation, AdamW, a checkpoint every 3 steps, two kept. The metrics, too, are those
of the undisturbed run.

{markdown_table(header, [cells(*row) for row in command_line])}
## A C program

`examples/embed_c` trains {UPDATES} updates with SGD and momentum, a checkpoint after 50 and {UPDATES}, then writes
its weights; these, too, are the same bytes. No run starts over while there is a checkpoint.

{markdown_table(header, [cells(*row) for row in program])}
"""
    if problems:
        body += "Broken promises:\n\n" + "\n".join(f"- {problem}" for problem in problems[:50]) + "\n\n"
    write_result("faults", "Training under faults", "`, `".join(commands), body)
    return problems


if __name__ == "__main__":
    main()
