"""Checkpoints: read back what was written, and never a mixture of old and new."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from edge_razor.checkpoint import Checkpoint, write_checkpoint
from edge_razor.errors import CheckpointError, NonFiniteError
from edge_razor.tensors import TensorFile, TensorSpec, TensorWriter

FLOAT = np.dtype("<f4")
STATE: dict[str, Any] = {"update": 3, "position": [1, 2], "name": 'quotes " and ü'}


def arrays(seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    shapes: list[tuple[int, ...]] = [(3, 5), (7,), (), (2, 0, 3)]
    return {f"t{i}": generator.standard_normal(s).astype(np.float32) for i, s in enumerate(shapes)}


def save(path: Path, tensors: dict[str, np.ndarray], state: dict[str, Any] | None = None) -> Path:
    file = path / "checkpoint" / "checkpoint.safetensors"
    specs = {name: TensorSpec(FLOAT, a.shape) for name, a in tensors.items()}
    write_checkpoint(file, specs, tensors.__getitem__, STATE if state is None else state)
    return file


def test_tensors_and_state_come_back(tmp_path: Path) -> None:
    file = save(tmp_path, arrays())
    for path in (tmp_path, tmp_path / "checkpoint", file):
        with Checkpoint(path) as checkpoint:
            assert checkpoint.state == STATE
            assert all(np.array_equal(checkpoint.read(n), a) for n, a in arrays().items())
    assert {n: a.shape for n, a in load_file(file).items()} == {n: a.shape for n, a in arrays().items()}


def test_a_failed_write_keeps_the_old_one_and_leaves_no_litter(tmp_path: Path) -> None:
    file = save(tmp_path, arrays())
    broken = arrays(1)
    broken["t1"][3] = np.inf
    with pytest.raises(NonFiniteError, match="t1 holds NaN or infinite"):
        save(tmp_path, broken)

    def dies(name: str) -> np.ndarray:
        if name == "t1":
            raise OSError("disk full")
        return arrays(1)[name]

    with pytest.raises(OSError, match="disk full"):
        write_checkpoint(file, {n: TensorSpec(FLOAT, a.shape) for n, a in arrays().items()}, dies, {})
    assert np.array_equal(Checkpoint(tmp_path).read("t0"), arrays()["t0"])
    assert os.listdir(file.parent) == ["checkpoint.safetensors"]


def test_a_crash_before_the_rename_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, arrays())

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, arrays(1))
    assert np.array_equal(Checkpoint(tmp_path).read("t0"), arrays()["t0"])


def test_file_is_synced_before_the_rename_and_its_directory_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("rename"), replace(a, b))[1])
    save(tmp_path, arrays())
    assert calls == ["fsync", "rename", "fsync"]


def test_every_single_flipped_byte_and_every_truncation_is_found(tmp_path: Path) -> None:
    file = save(tmp_path, arrays())
    whole = file.read_bytes()
    for position in range(0, len(whole), 7):
        data = bytearray(whole)
        data[position] ^= 0x41
        file.write_bytes(data)
        with pytest.raises(CheckpointError):
            Checkpoint(tmp_path)
    for cut in range(0, len(whole), 13):
        file.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError):
            Checkpoint(tmp_path)
    file.write_bytes(whole)
    Checkpoint(tmp_path).close()


def test_a_missing_one_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="give the run directory"):
        Checkpoint(tmp_path / "nowhere")


def test_a_foreign_safetensors_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    with open(file, "wb") as stream:
        TensorWriter(stream, {})
    with pytest.raises(CheckpointError, match="is no edge-razor checkpoint"):
        Checkpoint(file)


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,-4]}}',
        b'{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[1]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b'{"__metadata__":{"x":1}}',
        b"\xff\xff",
    ],
)
def test_a_header_that_breaks_the_format_is_refused(tmp_path: Path, header: bytes) -> None:
    file = tmp_path / "t.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(ValueError):  # noqa: PT011  (each case has a message of its own)
        TensorFile(file)


def test_a_header_longer_than_the_file_is_refused_without_reading_it(tmp_path: Path) -> None:
    file = tmp_path / "t.safetensors"
    file.write_bytes((2**63).to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match="truncated"):
        TensorFile(file)


def test_the_writer_holds_callers_to_the_order_and_shape_of_its_header(tmp_path: Path) -> None:
    with open(tmp_path / "t", "wb") as stream:
        writer = TensorWriter(stream, {"a": TensorSpec(FLOAT, (2,)), "b": TensorSpec(FLOAT, (2,))})
        with pytest.raises(ValueError, match="comes next"):
            writer.write("b", np.zeros(2, np.float32))
