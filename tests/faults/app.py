"""A C program that trains, saves and resumes (examples/embed_c) under faults: the same promises, without Python."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import struct
import subprocess
import time
from pathlib import Path
from typing import Any

import edge_razor
from device_tests.toolchain import digits_bundle
from edge_razor.runtime import library_path
from tests.faults.harness import ROOT, Broken, Fault, build_shim, undisturbed
from tests.faults.server import HANG_SECONDS, KINDS

UPDATES = 60  # with checkpoints at 50 and 60


class AppHarness:
    """`digits train`, then `digits weights`, in a directory of its own; `reference` is how they end undisturbed."""

    stopped_at = 0.5  # while the second checkpoint is written

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.run = directory / "app"
        bundle, plan = digits_bundle(directory), directory / "single.plan"
        edge_razor.plan(bundle, mem_budget=None, batch_size=16, sparsity=0.9, threads=1).save(plan)
        program, library = directory / "digits", library_path().parent
        command = ["cc", "-O1", f"-I{ROOT}/runtime/include", ROOT / "examples/embed_c/digits.c", f"-L{library}"]
        subprocess.run([*command, "-ledge_razor", f"-Wl,-rpath,{library}", "-o", program], check=True)
        files = [str(plan), str(bundle / "weights.safetensors"), str(self.run / "checkpoint")]
        self.commands = (
            [str(program), "train", *files, str(UPDATES)],
            [str(program), "weights", *files, str(self.run / "tuned.safetensors")],
        )
        self.evaluation = [str(program), "eval", *files]
        self.shim, self.state = build_shim(directory), directory / "state"
        self.counts, self.seconds = undisturbed(self)
        self.reference = self.outcome()

    def close(self) -> None:
        pass

    def clear(self) -> None:
        for path in (self.run, Path(f"{self.run}.notes")):
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir()

    def has_checkpoint(self) -> bool:
        return (self.run / "checkpoint").exists()

    def train(self, fault: Fault | None = None, kill_after: float | None = None, fresh: bool = True) -> dict[str, Any]:
        """Runs both commands, the second unless the first fails; answers as `Harness.train`, and with `stdout`."""
        if fresh:
            self.clear()
        fault = fault or Fault("", 0)
        kind = KINDS.index(fault.kind) if fault.kind else -1
        numbers = (kind, fault.n, fault.error, int(fault.sticky), fault.action, fault.least_bytes)
        self.state.write_bytes(bytes(8 * (len(KINDS) + 1)))
        environment = {
            "LD_PRELOAD": str(self.shim),
            "EDGE_RAZOR_FAULT": f"{' '.join(map(str, numbers))} {self.run}",
            "EDGE_RAZOR_FAULT_STATE": str(self.state),
        }
        begin, status, out, err = time.monotonic(), 0, "", ""
        limit = HANG_SECONDS if kill_after is None else kill_after
        grace = HANG_SECONDS if kill_after is None else 0.0  # this process and that may both have been stopped so long
        for command in self.commands:
            if status:
                break
            with subprocess.Popen(command, stdout=-1, stderr=-1, text=True, env=os.environ | environment) as process:
                for seconds in (max(0.0, begin + limit - time.monotonic()), grace, None):
                    if seconds is None:
                        process.send_signal(signal.SIGABRT if kill_after is None else signal.SIGKILL)
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        said = process.communicate(timeout=seconds)
                        break
            status, out, err = process.returncode, out + said[0], err + said[1]
        *counts, fired = struct.unpack(f"{len(KINDS)}qi4x", self.state.read_bytes())
        return {
            "status": status,
            "stdout": out,
            "stderr": err,
            "counts": dict(zip(KINDS, counts, strict=True)),
            "fired": bool(fired),
            "seconds": time.monotonic() - begin,
        }

    def outcome(self) -> tuple[bytes, bytes, str]:
        """Checkpoint and tuned weights, byte for byte, and what the program says of them."""
        said = subprocess.run(self.evaluation, check=True, capture_output=True, text=True).stdout
        return (self.run / "checkpoint").read_bytes(), (self.run / "tuned.safetensors").read_bytes(), said

    def check(self, what: object, answer: dict[str, Any], must_exist: bool) -> None:
        """What holds after any fault: one clear error, and a whole checkpoint, or none yet, that leads to the end.

        Args:
            must_exist: whether a checkpoint was there before, so that one must be there now.

        Raises:
            Broken: it does not hold.
        """
        status, said = answer["status"], answer["stderr"]
        if status > 0 and (status != 1 or len(said.splitlines()) != 1):
            raise Broken(f"{what}: exit status {status}: {said}")
        if status == 0 and must_exist and not re.search(r"^resumed after", answer["stdout"], re.M):
            raise Broken(f"{what}: it started over, though there was a checkpoint")
        if must_exist and not self.has_checkpoint():
            raise Broken(f"{what}: no checkpoint is left")
        there = self.has_checkpoint()
        resumed = self.train(fresh=False)
        if resumed["status"]:
            raise Broken(f"{what}: the resumed run ends with {resumed['status']}: {resumed['stderr']}")
        if there and "resumed after" not in resumed["stdout"]:
            raise Broken(f"{what}: the resumed run started over")
        if self.outcome() != self.reference:
            raise Broken(f"{what}: the resumed run ends with other bits")
