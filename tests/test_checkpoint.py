"""Checkpoints: read back what was written, and never a mixture of old and new."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from edge_razor.checkpoint import BUFFER_BYTES, Checkpoint, write_checkpoint
from edge_razor.errors import CheckpointError, NonFiniteError
from edge_razor.tensors import TensorFile, TensorSpec, TensorWriter

FLOAT = np.dtype("<f4")
STATE: dict[str, Any] = {"update": 3, "position": [1, 2], "name": 'quotes " and ü'}


def arrays(seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    shapes: list[tuple[int, ...]] = [(3, 5), (7,), (), (2, 0, 3)]
    return {f"t{i}": generator.standard_normal(s).astype(np.float32) for i, s in enumerate(shapes)}


def save(
    path: Path, tensors: dict[str, np.ndarray], state: dict[str, Any] | None = None, update: int = 3, **options: Any
) -> Path:
    specs = {name: TensorSpec(FLOAT, a.shape) for name, a in tensors.items()}

    def parts(name: str) -> Iterator[np.ndarray]:
        flat = tensors[name].reshape(-1)
        return (flat[i : i + 4] for i in range(0, flat.size, 4))

    return write_checkpoint(path / "checkpoint", update, specs, parts, STATE if state is None else state, **options)


def names(path: Path) -> list[str]:
    return sorted(os.listdir(path / "checkpoint"))


def file_of(update: int) -> str:
    return f"checkpoint-{update:08}.safetensors"


def test_tensors_and_state_come_back(tmp_path: Path) -> None:
    file = save(tmp_path, arrays())
    for path in (tmp_path, tmp_path / "checkpoint", file):
        with Checkpoint(path) as checkpoint:
            assert checkpoint.state == STATE
            assert checkpoint.damaged == {}
            for name, array in arrays().items():
                assert np.array_equal(checkpoint.read(name), array)
                parts = [part.copy() for part in checkpoint.parts(name)]
                assert np.array_equal(np.concatenate([np.empty(0), *parts]), array.reshape(-1))
    assert {n: a.shape for n, a in load_file(file).items()} == {n: a.shape for n, a in arrays().items()}


def test_a_tensor_larger_than_the_buffer_comes_back(tmp_path: Path) -> None:
    large = {"large": np.arange(BUFFER_BYTES // 4 * 2 + 5, dtype=np.float32), "next": np.ones(3, np.float32)}
    save(tmp_path, large)
    with Checkpoint(tmp_path) as checkpoint:
        parts = [part.copy() for part in checkpoint.parts("large")]
        assert len(parts) == 3
        assert np.array_equal(np.concatenate(parts), large["large"])
        assert np.array_equal(checkpoint.read("next"), large["next"])


def test_a_failed_write_keeps_the_old_one_and_leaves_no_litter(tmp_path: Path) -> None:
    save(tmp_path, arrays())
    broken = arrays(1)
    broken["t1"][3] = np.inf
    with pytest.raises(NonFiniteError, match="t1 holds NaN or infinite"):
        save(tmp_path, broken, update=4)

    def dies(name: str) -> list[np.ndarray]:
        if name == "t1":
            raise OSError(errno.EIO, "the disk fails")
        return [arrays(1)[name].reshape(-1)]

    specs = {n: TensorSpec(FLOAT, a.shape) for n, a in arrays().items()}
    with pytest.raises(OSError, match="the disk fails") as caught:
        write_checkpoint(tmp_path / "checkpoint", 4, specs, dies, {})
    assert caught.value.filename == str(tmp_path / "checkpoint" / file_of(4))
    assert np.array_equal(Checkpoint(tmp_path).read("t0"), arrays()["t0"])
    assert names(tmp_path) == [file_of(3)]


def test_a_crash_before_the_rename_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, arrays())

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, arrays(1))
    assert np.array_equal(Checkpoint(tmp_path).read("t0"), arrays()["t0"])


def test_file_is_synced_before_the_rename_its_directory_after_and_the_old_one_goes_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, arrays(), update=2)
    calls: list[str] = []

    def noting(name: str, call: Any) -> Any:
        return lambda *arguments, **options: (calls.append(name), call(*arguments, **options))[1]

    monkeypatch.setattr(os, "fsync", noting("fsync", os.fsync))
    monkeypatch.setattr(os, "replace", noting("rename", os.replace))
    unlink = Path.unlink

    def noting_unlink(path: Path, **options: Any) -> None:
        if not path.name.startswith("."):
            calls.append(f"unlink {path.name}")
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", noting_unlink)
    save(tmp_path, arrays())
    assert calls == ["fsync", "rename", "fsync", f"unlink {file_of(2)}"]


def test_as_many_stay_as_keep_says_and_those_of_a_run_taken_back_go(tmp_path: Path) -> None:
    for update in (0, 10, 20, 30):
        save(tmp_path, arrays(), update=update, keep=3)
    assert names(tmp_path) == [file_of(10), file_of(20), file_of(30)]
    save(tmp_path, arrays(), update=15, keep=3)
    assert names(tmp_path) == [file_of(10), file_of(15)]
    save(tmp_path, arrays(), update=16)
    assert names(tmp_path) == [file_of(16)]


def test_what_a_killed_process_left_half_written_is_removed(tmp_path: Path) -> None:
    save(tmp_path, arrays())
    (tmp_path / "checkpoint" / f".{file_of(4)}.123.tmp").write_bytes(b"half")
    save(tmp_path, arrays(), update=5)
    assert names(tmp_path) == [file_of(5)]


def test_a_full_disk_makes_older_ones_but_not_the_newest_give_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for update in (1, 2, 3):
        save(tmp_path, arrays(), update=update, keep=5)
    fsync = os.fsync

    def full(room_with: int) -> Any:
        def check(descriptor: int) -> None:
            if len([n for n in names(tmp_path) if not n.startswith(".")]) > room_with:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fsync(descriptor)

        return check

    monkeypatch.setattr(os, "fsync", full(0))
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, arrays(), update=4, keep=5)
    assert names(tmp_path) == [file_of(3)]
    monkeypatch.undo()
    for update in (4, 5):
        save(tmp_path, arrays(), update=update, keep=5)
    monkeypatch.setattr(os, "fsync", full(2))
    save(tmp_path, arrays(), update=6, keep=5)
    assert names(tmp_path) == [file_of(5), file_of(6)]


def test_a_full_disk_makes_room_for_an_update_that_was_saved_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As at the end of an epoch whose last step was saved: the file of the same number is the newest old one."""
    for update in (1, 2):
        save(tmp_path, arrays(), update=update, keep=2)
    fsync = os.fsync

    def full(descriptor: int) -> None:
        if len([n for n in names(tmp_path) if not n.startswith(".")]) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    save(tmp_path, arrays(), update=2, keep=2)
    assert names(tmp_path) == [file_of(2)]


def test_a_full_disk_makes_damaged_ones_give_way_and_not_the_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for update in (1, 2, 3):
        save(tmp_path, arrays(), update=update, keep=3)
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, arrays(), update=4, keep=3, damaged=[tmp_path / "checkpoint" / file_of(3)])
    assert names(tmp_path) == [file_of(2)]


def test_a_damaged_one_is_replaced_by_a_whole_one_of_the_same_update(tmp_path: Path) -> None:
    for update in (1, 2):
        save(tmp_path, arrays(), update=update, keep=2)
    file = tmp_path / "checkpoint" / file_of(2)
    file.write_bytes(file.read_bytes()[:-1])
    save(tmp_path, arrays(), update=2, keep=2, damaged=[file])
    assert names(tmp_path) == [file_of(1), file_of(2)]
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.path == file and not checkpoint.damaged


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


def test_a_damaged_tensor_is_named_with_its_file_and_the_checkpoint_before_is_taken(tmp_path: Path) -> None:
    save(tmp_path, arrays(), update=3, keep=2)
    file = save(tmp_path, arrays(1), update=4, keep=2)
    data = bytearray(file.read_bytes())
    data[-5] ^= 1  # in t1: t2 is the last 4 bytes, t3 is empty
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"{file}: is damaged: tensor 't1' does not match its checksum"):
        Checkpoint(file)
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.path.name == file_of(3)
        assert np.array_equal(checkpoint.read("t1"), arrays()["t1"])
        assert list(checkpoint.damaged) == [file]
    save(tmp_path, arrays(2), update=5, keep=2, damaged=[file])
    assert names(tmp_path) == [file_of(3), file_of(5)]


def test_only_if_none_is_whole_it_fails_and_the_newest_is_named(tmp_path: Path) -> None:
    for update in (3, 4):
        save(tmp_path, arrays(), update=update, keep=2).write_bytes(b"")
    with pytest.raises(CheckpointError, match=f"{file_of(4)}: is damaged: "):
        Checkpoint(tmp_path)


def test_a_checkpoint_of_another_format_version_is_refused_with_the_remedy(tmp_path: Path) -> None:
    file = save(tmp_path, arrays())
    whole = file.read_bytes()
    for version, remedy in ((b"1", "use the edge-razor that wrote it"), (b"3", "upgrade it")):
        file.write_bytes(whole.replace(b'"format_version":"2"', b'"format_version":"%s"' % version))
        with pytest.raises(CheckpointError, match=remedy):
            Checkpoint(tmp_path)


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
