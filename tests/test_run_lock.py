"""One process at a time in a run directory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from edge_razor import RunLockedError, Trainer
from edge_razor.checkpoint import checkpoint_files
from edge_razor.cli import main
from edge_razor.run_lock import run_lock
from tests.bundles import write_linear_bundle

HOLDER = """
import sys, time
from pathlib import Path
from edge_razor.run_lock import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def holder(run: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(run)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_refused_and_told_who_has_it(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = write_linear_bundle(tmp_path / "model.razor")
    np.savez(tmp_path / "data.npz", x=np.ones((20, 6), np.float32), y=np.zeros(20, np.int64))
    with holder(run) as process:
        with pytest.raises(RunLockedError, match=f"process {process.pid} is training in it"), run_lock(run):
            pass
        assert main(["train", str(bundle), "--data", str(tmp_path / "data.npz"), "--out", str(run)]) == 4
        error = capsys.readouterr().err
        assert f"error: {run}: process {process.pid} is training in it; wait" in error
        with Trainer(bundle, sparsity=0.0, threads=1) as trainer, pytest.raises(RunLockedError):
            trainer.save(run)
        assert checkpoint_files(run) == []
        process.kill()


def test_the_lock_of_a_dead_process_is_no_obstacle(run: Path) -> None:
    with holder(run) as process:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    with run_lock(run):
        assert (run / ".lock").read_text() == f"{os.getpid()}\n"


def test_a_thread_may_take_it_again_and_another_thread_may_not(run: Path) -> None:
    seen: list[BaseException] = []

    def other() -> None:
        try:
            with run_lock(run):
                pass
        except RunLockedError as error:
            seen.append(error)

    with run_lock(run):
        with run_lock(run / ".." / "run"):
            pass
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert "of this process" in str(seen[0])
    other()
    assert len(seen) == 1
