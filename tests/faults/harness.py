"""A small training run under faults: what it must leave, and whether the resumed run ends with the same bits."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from edge_razor.checkpoint import Checkpoint, checkpoint_files
from edge_razor.cli import main
from edge_razor.errors import CheckpointError
from tests.bundles import write_linear_bundle

ROOT = Path(__file__).resolve().parents[2]
FAIL, KILL, POWER_KEEPS_NAMES, POWER_UNDOES_NAMES, POWER_AND_LYING_DISK = range(5)  # shim.c


def build_shim(directory: Path) -> Path:
    """Compiles shim.c with the system's compiler.

    Raises:
        subprocess.CalledProcessError, FileNotFoundError: it cannot be.
    """
    out = directory / "shim.so"
    source = Path(__file__).with_name("shim.c")
    command = ["cc", "-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-Werror", "-ftls-model=initial-exec"]
    subprocess.run([*command, "-o", out, source, "-ldl"], check=True)
    return out


@dataclass(frozen=True)
class Fault:
    """The n-th call of a kind fails with an error (all later ones, too, if sticky), or the process dies at it."""

    kind: str
    n: int
    error: int = errno.EIO
    sticky: bool = False
    action: int = FAIL
    least_bytes: int = 0

    def __str__(self) -> str:
        what = ("fails", "is a kill", "loses power", "loses power and names", "loses power, no sync")[self.action]
        return f"{self.kind} {self.n} {what} ({errno.errorcode[self.error]}{', sticky' if self.sticky else ''})"


# What the interpreter says of its own objects that were half made when an allocation failed (zipfile, threads)
_WITHOUT_INTERPRETER = re.compile(r"^Exception ignored in.*\n(?:Traceback.*\n)?(?: .*\n)*(?:\w+(?:: .*)?\n)?", re.M)


class Broken(AssertionError):
    """A run broke its promise."""


class Harness:
    """One workload and the server that runs it; `reference` is how an undisturbed run ends."""

    stopped_at = 0.75  # in the second epoch, with two checkpoints

    def __init__(self, directory: Path) -> None:
        self.run = directory / "run"
        self.directory = directory
        bundle = write_linear_bundle(directory / "model.razor")
        generator = np.random.default_rng(0)
        x = generator.standard_normal((36, 6), dtype=np.float32)
        np.savez(directory / "data.npz", x=x, y=(x @ generator.standard_normal((6, 3))).argmax(1))
        plan = directory / "model.plan"
        options = ["--batch-size", "8", "--threads", "1", "--optimizer", "adamw"]
        if main(["plan", str(bundle), "-o", str(plan), *options]):
            raise Broken("the workload cannot be planned")
        self.arguments = ["train", str(bundle), "--data", str(directory / "data.npz"), "--out", str(self.run)]
        self.arguments += [
            "--plan",
            str(plan),
            "--epochs",
            "2",
            "--lr",
            "0.1",
            "--log-every",
            "1",
            "--val-split",
            "0.2",
        ]
        self.arguments += ["--checkpoint-every", "3", "--schedule", "linear", "--optimizer", "adamw"]
        environment = {**os.environ, "LD_PRELOAD": str(build_shim(directory))}
        self.server = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        self.counts, self.seconds = undisturbed(self)
        self.reference = self.outcome()

    def close(self) -> None:
        assert self.server.stdin is not None and self.server.stdout is not None
        self.server.stdin.close()
        self.server.wait()
        self.server.stdout.close()

    def ask(self, arguments: list[str], fault: Fault | None = None, kill_after: float | None = None) -> dict[str, Any]:
        """Runs a command line; answers as `server` says."""
        assert self.server.stdin is not None and self.server.stdout is not None
        fault = fault or Fault("", 0)
        request = {
            "arguments": arguments,
            "directory": str(self.run),
            "kill_after": kill_after,
            "fault": {
                "kind": fault.kind,
                "n": fault.n,
                "errno": fault.error,
                "sticky": fault.sticky,
                "action": fault.action,
                "least_bytes": fault.least_bytes,
            },
        }
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def train(self, fault: Fault | None = None, kill_after: float | None = None, fresh: bool = True) -> dict[str, Any]:
        """Trains from the beginning, or goes on with what the run directory holds."""
        if fresh:
            self.clear()
        resume = ["--resume"] if checkpoint_files(self.run) else []
        return self.ask([*self.arguments, *resume], fault, kill_after)

    def clear(self) -> None:
        for path in (self.run, Path(f"{self.run}.notes")):
            shutil.rmtree(path, ignore_errors=True)
        Path(f"{self.run}.notes").mkdir()

    def has_checkpoint(self) -> bool:
        return bool(checkpoint_files(self.run))

    def outcome(self) -> tuple[bytes, list[Any]]:
        """The newest checkpoint's file, and the metrics without what depends on the machine."""
        keys = ("event", "update", "epoch", "loss", "lr", "validation")
        lines = [json.loads(line) for line in (self.run / "metrics.jsonl").read_text().splitlines()]
        metrics = [[line.get(key) for key in keys] for line in lines if line["event"] != "memory"]
        return checkpoint_files(self.run)[0].read_bytes(), metrics

    def check(self, what: object, answer: dict[str, Any], must_exist: bool) -> None:
        """What holds after any fault: the answer is one clear error, and a checkpoint is there and leads to the end.

        Args:
            must_exist: whether a checkpoint was there before, so that one must be there now.

        Raises:
            Broken: it does not hold.
        """
        status = answer["status"]
        said = _WITHOUT_INTERPRETER.sub("", answer["stderr"])
        if status >= 0:
            errors = [line for line in said.splitlines() if line.startswith("error: ")]
            if status not in (0, 2, 3, 4) or (status and len(errors) != 1) or "Traceback" in said:
                raise Broken(f"{what}: exit status {status}: {said}")
        files = checkpoint_files(self.run)
        if must_exist and not files:
            raise Broken(f"{what}: no checkpoint is left")
        if files:
            try:
                Checkpoint(self.run).close()
            except CheckpointError as error:
                if must_exist or len(files) > 1:
                    raise Broken(f"{what}: {error}") from error
                shutil.rmtree(self.run)  # the very first one: nothing had been trained, start again
        resumed = self.train(fresh=False)
        if resumed["status"]:
            raise Broken(f"{what}: the resumed run ends with {resumed['status']}: {resumed['stderr']}")
        if self.outcome() != self.reference:
            raise Broken(f"{what}: the resumed run ends with other bits or metrics")


def harness_directory() -> Path:
    """A directory for a harness, in memory if that can be: what is tested is the order of calls, not the disk."""
    memory = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="edge-razor-faults-", dir=memory if os.access(memory, os.W_OK) else None))


# ---- Sweeps ----

# (kind, error, sticky): what may go wrong with each kind of call
FAILURES = (
    ("write", errno.ENOSPC, True),
    ("write", errno.ENOSPC, False),
    ("write", errno.EIO, False),
    ("fsync", errno.EIO, False),
    ("fsync", errno.ENOSPC, True),
    ("rename", errno.EACCES, True),
    ("rename", errno.EIO, False),
    ("open", errno.EACCES, True),
    ("open", errno.ENOSPC, False),
    ("unlink", errno.EACCES, True),
    ("mkdir", errno.EROFS, True),
    ("mmap", errno.ENOMEM, False),
)
DEATHS = (KILL, POWER_KEEPS_NAMES, POWER_UNDOES_NAMES)


@dataclass
class Sweep:
    """Figures of one sweep: runs until one passed untouched, and how they ended."""

    runs: int = 0
    survived: int = 0  # the fault did not stop the run
    refused: int = 0  # it ended with one clear error
    died: int = 0  # by a signal
    problems: tuple[str, ...] = ()


class Workload(Protocol):
    """What `sweep` puts under faults.

    Attributes:
        counts, seconds: calls and duration of an undisturbed run.
        stopped_at: share of its calls on files after which `stopped_run` ends it.
    """

    stopped_at: float
    directory: Path
    run: Path
    counts: dict[str, int]
    seconds: float

    def clear(self) -> None: ...

    def has_checkpoint(self) -> bool: ...

    def train(
        self, fault: Fault | None = None, kill_after: float | None = None, fresh: bool = True
    ) -> dict[str, Any]: ...

    def check(self, what: object, answer: dict[str, Any], must_exist: bool) -> None: ...

    def close(self) -> None: ...


def sweep(harness: Workload, fault: Fault, start: Path | None = None, step: int = 1) -> Sweep:
    """Applies `fault` at every `step`-th n from `fault.n` on, until a run passes untouched.

    Args:
        start: a run directory to resume from; None: from the beginning.
    """
    done, problems, n = Sweep(), [], fault.n
    while True:
        harness.clear()
        if start is not None:
            shutil.copytree(start, harness.run, dirs_exist_ok=True)
        this = Fault(fault.kind, n, fault.error, fault.sticky, fault.action, fault.least_bytes)
        answer = harness.train(this, fresh=False)
        done.runs += 1
        if answer["fired"]:
            done.survived += answer["status"] == 0
            done.refused += answer["status"] > 0
            done.died += answer["status"] < 0
            if answer["status"] < 0 and (fault.action == FAIL or answer["status"] != -9):
                problems.append(f"{this}: ended by signal {-answer['status']}: {answer['stderr'][-300:]}")
        try:
            harness.check(this, answer, start is not None)
            if fault.kind != "unlink" and (litter := [p.name for p in harness.run.rglob("*.tmp")]):
                raise Broken(f"{this}: left {litter}")
        except Broken as error:
            problems.append(str(error))
        if not answer["fired"]:
            break
        n += step
    done.problems = tuple(problems)
    return done


def undisturbed(workload: Workload) -> tuple[dict[str, int], float]:
    """Calls by kind and seconds of a run without a fault."""
    answer = workload.train()
    if answer["status"]:
        raise Broken(f"the undisturbed run failed: {answer['stderr']}")
    return answer["counts"], answer["seconds"]


def stopped_run(harness: Workload, directory: Path) -> Path:
    """A run directory that was left in the middle, with checkpoints."""
    harness.train(Fault("any", int(harness.counts["any"] * harness.stopped_at), action=KILL))
    shutil.copytree(harness.run, directory / "stopped")
    return directory / "stopped"
