"""FIFOs, devices and directories in the place of files: one clear error at once, nothing hangs or reads without end."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edge_razor.bundle import Bundle
from edge_razor.checkpoint import Checkpoint
from edge_razor.cli import main
from edge_razor.data.source import open_source
from edge_razor.data.tokenize import Request, tokenize
from edge_razor.errors import BundleError, CheckpointError, DataError, EdgeRazorError, PlanError
from edge_razor.manifest import parse_manifest
from edge_razor.metrics import MetricsLog
from edge_razor.planner.harm import read_harm_table
from edge_razor.planner.plan_file import Plan
from edge_razor.runtime import Session
from edge_razor.tensors import TensorFile
from tests.bundles import write_linear_bundle
from tests.runtime.plan_writer import encode, linear_plan


def fifo(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def directory(path: Path) -> None:
    path.mkdir()


def read_bundle(path: Path) -> None:
    Bundle(path)


def read_plan(path: Path) -> None:
    Plan.load(path)


def read_summary(path: Path) -> None:
    plan = path.with_name("model.plan")
    plan.write_bytes(encode({**linear_plan(), "bundle_id": "a"}))
    path.rename(path.with_name("model.plan.json"))
    Plan.load(plan)


def read_data(suffix: str) -> Callable[[Path], None]:
    def read(path: Path) -> None:
        bundle = write_linear_bundle(path.with_name("model.razor"))
        data = path.rename(path.with_name(f"x{suffix}"))
        np.save(path.with_name("y.npy"), np.zeros(3, np.int64))
        open_source(data, parse_manifest((bundle / "bundle.json").read_bytes(), "bundle"))

    return read


def read_targets(path: Path) -> None:
    np.save(path.with_name("x.npy"), np.zeros((3, 6), np.float32))
    path.rename(path.with_name("y.npy"))
    bundle = write_linear_bundle(path.with_name("model.razor"))
    open_source(path.with_name("x.npy"), parse_manifest((bundle / "bundle.json").read_bytes(), "bundle"))


def read_texts(path: Path) -> None:
    data = path.rename(path.with_name("texts.jsonl"))
    model = {"type": "WordLevel", "vocab": {"[UNK]": 0}, "unk_token": "[UNK]"}
    tokenizer = json.dumps({"version": "1.0", "added_tokens": [], "model": model})
    tokenize(Request(str(data), str(path.parent), tokenizer, length=4, vocabulary=5, class_count=2))


def load_weights(path: Path) -> None:
    with Session(encode(linear_plan())) as session:
        session.load_weights(path)


def load_native_checkpoint(path: Path) -> None:
    with Session(encode(linear_plan())) as session:
        session.load_checkpoint(path)


READERS: dict[str, tuple[Callable[[Path], object], type[Exception]]] = {
    "bundle": (read_bundle, BundleError),
    "plan": (read_plan, PlanError),
    "plan_summary": (read_summary, PlanError),
    "checkpoint": (Checkpoint, CheckpointError),
    "npy": (read_data(".npy"), DataError),
    "npz": (read_data(".npz"), DataError),
    "targets": (read_targets, DataError),
    "texts": (read_texts, DataError),
    "harm_table": (read_harm_table, DataError),
    "safetensors": (TensorFile, OSError),
    "log": (lambda path: MetricsLog(path, (1, 0)), OSError),
    "native_weights": (load_weights, (OSError, EdgeRazorError)),  # type: ignore[dict-item]
    "native_checkpoint": (load_native_checkpoint, (OSError, EdgeRazorError)),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("make", [fifo, device, directory])
@pytest.mark.parametrize("name", READERS)
def test_what_is_no_file_is_refused_at_once(name: str, make: Callable[[Path], None], tmp_path: Path) -> None:
    read, error = READERS[name]
    make(tmp_path / "given")
    with pytest.raises(error) as refused:
        read(tmp_path / "given")
    assert str(refused.value)


@pytest.mark.parametrize("member", ["bundle.json", "training.onnx", "weights.safetensors"])
def test_a_bundle_directory_with_a_fifo_in_it_is_not_whole(member: str, tmp_path: Path) -> None:
    bundle = write_linear_bundle(tmp_path / "model.razor")
    (bundle / member).unlink()
    os.mkfifo(bundle / member)
    with pytest.raises(BundleError, match=f"{member} is missing"):
        Bundle(bundle)


@pytest.mark.parametrize("make", [fifo, directory])
def test_what_is_no_file_among_checkpoints_is_passed_over(make: Callable[[Path], None], tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    make(tmp_path / "checkpoint" / "checkpoint-00000003.safetensors")
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("make", [fifo, device])
def test_the_command_says_it_in_one_line(
    make: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "given")
    command = ["train", str(tmp_path / "given"), "--data", str(tmp_path), "--out", str(tmp_path / "run")]
    assert main(command) == BundleError.exit_status
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "is neither a directory nor a regular file" in error
