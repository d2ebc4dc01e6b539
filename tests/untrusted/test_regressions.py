"""Files that once made a reader fail otherwise than it may, hang, or take memory that they do not justify."""

from __future__ import annotations

import copy
import io
import json
import struct
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import onnx
import pytest

from edge_razor.bundle import Bundle
from edge_razor.checkpoint import Checkpoint, checkpoint_files, write_checkpoint
from edge_razor.data import tokenize as texts
from edge_razor.data.arrays import ArraySource, find_arrays
from edge_razor.errors import BundleError, CheckpointError, DataError, PlanError
from edge_razor.manifest import parse_manifest
from edge_razor.planner.graph import Graph, Node, Shape
from edge_razor.planner.plan_file import Plan
from edge_razor.planner.planning import plan_graph
from edge_razor.planner.program import Buffer, Step
from edge_razor.planner.schedule import insert_updates
from edge_razor.planner.segments import Forward
from edge_razor.runtime import Session
from edge_razor.tensors import TensorFile, TensorSpec
from edge_razor.training_state import SETTINGS, bundle_of, stored_extra, stored_progress, stored_settings
from edge_razor.zipped import open_zip
from tests.bundles import write_linear_bundle
from tests.planner.conftest import mobile_network
from tests.planner.conftest import settings as planner_settings
from tests.runtime.plan_writer import encode, linear_plan

MOBILE = mobile_network()[1]


@contextmanager
def memory_below(limit: int) -> Iterator[None]:
    """Bytes that Python and numpy may take inside."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


def as_json(value: Any) -> bytes:
    """JSON with numbers as long as `str` writes none."""
    return json.dumps(value).replace('"LONG"', "1" + "0" * 400).encode()


# ---- Arrays ----


def npy(array: np.ndarray, shape: bytes | None = None) -> bytes:
    """An .npy file, perhaps one that states another shape."""
    stream = io.BytesIO()
    np.save(stream, array)
    data = stream.getvalue()
    if shape is None:
        return data
    header = data[10:].split(b"\n", 1)[0]
    begin, end = header.index(b"(", header.index(b"shape")), header.index(b")")
    other = (header[:begin] + shape + header[end + 1 :].rstrip()).ljust(len(header))
    assert len(other) == len(header)
    return data[:10] + other + data[10 + len(header) :]


X, Y = np.ones((4, 6), np.float32), np.zeros(4, np.int64)


def read_arrays(folder: Path, manifest: dict[str, Any], name: str, data: bytes) -> None:
    (folder / name).write_bytes(data)
    if name == "x.npy":
        np.save(folder / "y.npy", Y)
    found = find_arrays(folder / name)
    assert found is not None
    ArraySource(*found, parse_manifest(json.dumps(manifest).encode(), "bundle"), memory_limit=1 << 30).close()


def test_a_header_that_states_gigabytes_takes_no_memory(tmp_path: Path, manifest: dict[str, Any]) -> None:
    data = b"\x93NUMPY\x02\x00" + struct.pack("<I", 2_000_000_000) + b"{"
    with memory_below(1 << 20), pytest.raises(DataError, match="header is too long"):
        read_arrays(tmp_path, manifest, "x.npy", data)


@pytest.mark.parametrize("shape", [b"(-4, -6)", b"(2**60,)", b"(4, True)", b"(4, -6)", b"(1180591620717411303424,)"])
def test_impossible_shapes_are_refused(shape: bytes, tmp_path: Path, manifest: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="is no whole array file"):
        read_arrays(tmp_path, manifest, "x.npy", npy(X, shape))


def npz(x: bytes, compression: int) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        archive.writestr("x.npy", x)
        archive.writestr("y.npy", npy(Y))
    return stream.getvalue()


def test_a_compressed_array_that_states_more_than_it_holds_takes_no_memory(
    tmp_path: Path, manifest: dict[str, Any]
) -> None:
    data = npz(npy(X, b"(50000000, 6)"), zipfile.ZIP_DEFLATED)
    with memory_below(1 << 20), pytest.raises(DataError, match="its size does not match its shape"):
        read_arrays(tmp_path, manifest, "data.npz", data)


@pytest.mark.parametrize("compression", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_other_compressions_are_refused(compression: int, tmp_path: Path, manifest: dict[str, Any]) -> None:
    """LZMA's dictionary may ask for gigabytes."""
    with pytest.raises(DataError, match="compressed in another way"):
        read_arrays(tmp_path, manifest, "data.npz", npz(npy(X), compression))


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_an_encrypted_array_is_refused(compression: int, tmp_path: Path, manifest: dict[str, Any]) -> None:
    data = bytearray(npz(npy(X), compression))
    data[data.index(b"PK\1\2") + 8] |= 1
    with pytest.raises(DataError, match="encrypted"):
        read_arrays(tmp_path, manifest, "data.npz", bytes(data))


def test_damaged_compressed_bytes_are_refused(tmp_path: Path, manifest: dict[str, Any]) -> None:
    data = npz(npy(X), zipfile.ZIP_DEFLATED)
    start = 30 + len("x.npy")
    with pytest.raises(DataError, match="is no whole array file"):
        read_arrays(tmp_path, manifest, "data.npz", data[:start] + b"\xff" * 20 + data[start + 20 :])


# ---- Zips and safetensors ----


def zipped(bundle: Path) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for file in sorted(bundle.iterdir()):
            archive.write(file, file.name)
    return stream.getvalue()


def test_a_member_that_begins_beyond_every_file_is_refused(tmp_path: Path) -> None:
    data = bytearray(zipped(write_linear_bundle(tmp_path / "model.razor")))
    at = data.index(b"PK\1\2")
    name = struct.unpack_from("<H", data, at + 28)[0]
    struct.pack_into("<I", data, at + 42, 0xFFFFFFFF)  # the offset is in the extra field
    struct.pack_into("<H", data, at + 30, 12)
    data[at + 46 + name : at + 46 + name] = struct.pack("<HHQ", 1, 8, 2**64 - 5)
    end = data.index(b"PK\5\6")
    struct.pack_into("<I", data, end + 12, struct.unpack_from("<I", data, end + 12)[0] + 12)
    (tmp_path / "bundle.zip").write_bytes(data)
    with pytest.raises(BundleError, match="neither a bundle directory nor a whole zip"):
        Bundle(tmp_path / "bundle.zip")


def test_a_member_that_reaches_past_the_end_is_refused(tmp_path: Path) -> None:
    data = bytearray(zipped(write_linear_bundle(tmp_path / "model.razor")))
    at = data.index(b"PK\1\2")
    struct.pack_into("<II", data, at + 20, 1 << 30, 1 << 30)
    (tmp_path / "bundle.zip").write_bytes(data)
    with memory_below(1 << 20), pytest.raises(BundleError, match="reaches past the end of the file"):
        Bundle(tmp_path / "bundle.zip")


def test_a_directory_of_very_many_members_is_not_read(tmp_path: Path) -> None:
    """One of 46 bytes an entry takes more than ten times that as Python objects."""
    entry = struct.pack("<4s6H3I5H2I", b"PK\1\2", 20, 20, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0) + b"x"
    directory = entry * 100_000
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 65535, 65535, len(directory), 0, 0)
    path = tmp_path / "bundle.zip"
    path.write_bytes(directory + end)
    with memory_below(2 << 20):
        with pytest.raises(BundleError, match="its directory is too long"):
            Bundle(path)
        with pytest.raises(zipfile.BadZipFile, match="too long"), open_zip(path):
            pass


def test_names_that_lead_elsewhere_are_not_followed(tmp_path: Path) -> None:
    bundle = write_linear_bundle(tmp_path / "inside" / "model.razor")
    path = tmp_path / "inside" / "bundle.zip"
    path.write_bytes(zipped(bundle))
    with zipfile.ZipFile(path, "a") as archive:
        for name in ("../escape", str(tmp_path / "escape"), "a/../../escape", "..\\escape", "../weights.safetensors"):
            archive.writestr(name, "out")
    with Bundle(path) as opened:
        assert {name: opened.read_tensor(name).shape for name in opened.tensors}["fc.weight"] == (3, 6)
    assert [file.name for file in tmp_path.iterdir()] == ["inside"]


@pytest.mark.parametrize("shape", [[0, 2**70], [2**40, 2**40], [1] * 40, [-1, -1], [True], [10**400]])
def test_impossible_tensors_are_refused(shape: list[int], tmp_path: Path) -> None:
    header = as_json({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}})
    (tmp_path / "w").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match="impossible shape"):
        TensorFile(tmp_path / "w")


# ---- Manifests ----


def wrong_manifests() -> dict[str, Callable[[dict[str, Any]], None]]:
    return {
        "long": lambda m: m["loss"].update(label_smoothing="LONG"),
        "nan": lambda m: m["loss"].update(label_smoothing=float("nan")),
        "bytes": lambda m: m["files"]["training.onnx"].update(bytes="LONG"),
        "beyond": lambda m: m["files"]["training.onnx"].update(bytes=2**63),
        "large": lambda m: m["inputs"][0].update(shape=[None, 2**31 + 1]),
        "product": lambda m: m["output"].update(shape=[None, 2**20, 2**20], perm=[0, 1, 2]),
    }


@pytest.mark.parametrize("name", wrong_manifests())
def test_numbers_beyond_reason_are_refused(name: str, manifest: dict[str, Any]) -> None:
    parse_manifest(as_json(manifest), "bundle")
    wrong_manifests()[name](manifest)
    with pytest.raises(BundleError):
        parse_manifest(as_json(manifest), "bundle")


def test_a_manifest_beyond_its_limit_is_not_read(tmp_path: Path) -> None:
    bundle = write_linear_bundle(tmp_path / "model.razor")
    (bundle / "bundle.json").write_bytes(b"[" + b"[]," * 2_000_000 + b"[]]")
    with memory_below(1 << 20), pytest.raises(BundleError, match=r"bundle\.json"):
        Bundle(bundle)


# ---- Training graphs ----


def without_each_shape(graph: Any) -> Iterator[Any]:
    for index in range(len(graph.value_info)):
        changed = copy.deepcopy(graph)
        del changed.value_info[index]
        yield changed


def with_a_dimension_less(graph: Any) -> Iterator[Any]:
    for index in range(len(graph.value_info)):
        changed = copy.deepcopy(graph)
        if dims := changed.value_info[index].type.tensor_type.shape.dim:
            del dims[-1]
            yield changed


def without_each_node(graph: Any) -> Iterator[Any]:
    for index in range(len(graph.node)):
        changed = copy.deepcopy(graph)
        del changed.node[index]
        yield changed


def with_each_node_in_another_phase(graph: Any) -> Iterator[Any]:
    for index, node in enumerate(graph.node):
        for phase in {"forward", "loss", "backward"} - {p.value for p in node.metadata_props}:
            changed = copy.deepcopy(graph)
            next(p for p in changed.node[index].metadata_props if p.key == "phase").value = phase
            yield changed


def with_each_parameter_unread(graph: Any) -> Iterator[Any]:
    for output in [o.name for o in graph.output if o.name.startswith("grad/")]:
        changed = copy.deepcopy(graph)
        for node in changed.node:
            node.input[:] = ["" if name == output.removeprefix("grad/") else name for name in node.input]
        yield changed


@pytest.mark.parametrize(
    "alter",
    [
        without_each_shape, with_a_dimension_less, without_each_node, with_each_node_in_another_phase,
        with_each_parameter_unread,
    ],
)  # fmt: skip
def test_a_graph_that_lacks_something_is_planned_or_a_bundle_error(alter: Callable[[Any], Iterator[Any]]) -> None:
    model = onnx.load_model_from_string(MOBILE.training)
    count = 0
    for graph in alter(model.graph):
        altered = onnx.ModelProto()
        altered.CopyFrom(model)
        altered.graph.CopyFrom(graph)
        count += 1
        with suppress(BundleError):
            plan_graph(altered.SerializeToString(), MOBILE.manifest, planner_settings(micro_batch=4), None)
    assert count > 5


def test_a_parameter_that_nothing_reads_is_updated_after_its_gradient_which_must_be_made() -> None:
    weight, gradient = Buffer("w", 4), Buffer("grad/w", 4)
    make = Step("fill", "fc:fill", [1], [0.0], [gradient], True)
    update = Step("sgd", "fc:sgd", [1, 0], [0.0, 0.0], [weight, gradient, None, None], True)
    assert insert_updates([make], [update]) == [make, update]
    with pytest.raises(BundleError, match="no step makes the gradient of 'w'"):
        insert_updates([], [update])


def test_a_product_of_matrices_that_are_none_is_a_bundle_error() -> None:
    node = Node("product", "BatchMatMul", "ai.edge_razor", ["a", "b"], ["c"], {}, "forward", "layer")
    graph = Graph(["a", "b"], "c", [node], {name: Shape(1, ()) for name in "abc"}, {}, {})
    with pytest.raises(BundleError, match="'a' has 0 dimensions beside the batch, 2 are needed"):
        Forward(graph).work(node)


# ---- Checkpoints ----


def checkpoint(folder: Path, state: Any) -> Path:
    specs = {"w": TensorSpec(np.dtype("<f4"), (2,))}
    return write_checkpoint(folder, 3, specs, lambda name: [np.ones(2, np.float32)], state)


def test_deeply_nested_state_is_damage(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, {"mark": 1})
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] |= {"state": "[" * 200_000, "crc32": "0" * 8}
    text = json.dumps(header, separators=(",", ":")).encode()
    head = len(text).to_bytes(8, "little") + text
    checksum = f'"crc32":"{zlib.crc32(head):08x}"'.encode()
    path.write_bytes(head.replace(b'"crc32":"00000000"', checksum, 1) + data[8 + size :])
    with pytest.raises(CheckpointError, match="is damaged: maximum recursion depth"):
        Checkpoint(path)


VALID: dict[str, Any] = {
    "batch_size": 4, "sparsity": 0.5, "prefer": "balanced", "razor": "plain", "attention": "recompute",
    "frozen_weights": "fp32", "optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": False, "weight_decay": 0.0,
    "betas": [0.9, 0.999], "eps": 1e-8, "schedule": "constant", "warmup_steps": 0, "seed": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        None, [], {"batch_size": "8"}, {"batch_size": True}, {"batch_size": -1}, {"batch_size": 2**64},
        {"bundle": "/elsewhere"}, {"plan": {}}, {"lr": "fast"},
        {"lr": 1e300}, {"betas": [0.9]}, {"betas": 0.9},
        {"choices": []}, {"nesterov": 1}, {"razor": None},
        {"frozen_weights": 3}, {"attention": []},
        {"spill_dir": "/x"},
    ],
)  # fmt: skip
def test_settings_of_other_names_or_types_reach_no_trainer(change: Any, tmp_path: Path) -> None:
    good = {name: VALID.get(name) for name in SETTINGS}
    with Checkpoint(checkpoint(tmp_path, {"settings": good})) as opened:
        assert stored_settings(opened) == good
    settings = {**good, **change} if isinstance(change, dict) else change
    with Checkpoint(checkpoint(tmp_path, {"settings": settings})) as opened, pytest.raises(CheckpointError):
        stored_settings(opened)


@pytest.mark.parametrize(
    "change",
    [
        {"update": -1}, {"update": 2**63}, {"update": "3"}, {"update": 1.5}, {"update": None}, {"position": [0]},
        {"position": [0, -1]}, {"position": 3}, {"position": [0, "1"]}, {"position": [0, True]},
        {"asked": {"sparsity": []}}, {"asked": {"base_bytes": 1}}, {"asked": [1]}, {"asked": {"micro_batch": "x"}},
    ],
)  # fmt: skip
def test_a_step_or_position_that_is_none_is_damage(change: dict[str, Any], tmp_path: Path) -> None:
    good = {"update": 3, "position": [0, 3], "asked": {"sparsity": "auto", "micro_batch": None}}
    with Checkpoint(checkpoint(tmp_path, good)) as opened:
        assert stored_progress(opened).position == (0, 3)
    with Checkpoint(checkpoint(tmp_path, {**good, **change})) as opened, pytest.raises(CheckpointError):
        stored_progress(opened)


@pytest.mark.parametrize("extra", [[], None, 3, {"classes": "abc"}, {"classes": [1]}, {"classes": {"a": 1}}])
def test_what_is_said_of_the_run_has_its_types(extra: Any, tmp_path: Path) -> None:
    with Checkpoint(checkpoint(tmp_path, {"extra": extra})) as opened, pytest.raises(CheckpointError):
        stored_extra(opened)


@pytest.mark.parametrize("path", ["a\0b", 3, None, ["x"], "/does/not/exist"])
def test_a_bundle_that_cannot_be_is_said_to_be_gone(path: Any, tmp_path: Path) -> None:
    with Checkpoint(checkpoint(tmp_path, {"bundle": path})) as opened:
        with pytest.raises(CheckpointError, match="is gone"):
            bundle_of(opened, None)


def test_a_directory_with_the_name_of_a_checkpoint_is_none(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, {})
    (tmp_path / "checkpoint-00000009.safetensors").mkdir()
    assert checkpoint_files(tmp_path) == [path]


# ---- Plans and their summaries ----


SUMMARY = {
    "bundle_id": "a", "batch_size": 4, "micro_batch": 2, "threads": 1, "sparsity": 0.5, "arena_bytes": 64,
    "predicted_peak_bytes": 9, "mem_budget": None,
}  # fmt: skip


def saved_plan(folder: Path) -> Path:
    plan = encode({**linear_plan(), "bundle_id": "a"})
    Plan(plan, dict(SUMMARY), {4: plan}).save(folder / "model.plan")
    return folder / "model.plan"


@pytest.mark.parametrize("name", ["batch_size", "micro_batch", "threads", "sparsity", "predicted_peak_bytes"])
@pytest.mark.parametrize("value", ["missing", None, [], "x", "LONG"])
def test_a_summary_without_a_figure_is_damaged(name: str, value: Any, tmp_path: Path) -> None:
    path = saved_plan(tmp_path)
    Plan.load(path)
    summary = json.loads(path.with_name("model.plan.json").read_text())
    if value == "missing":
        del summary[name]
    else:
        summary[name] = value
    path.with_name("model.plan.json").write_bytes(as_json(summary))
    if name != "sparsity" and value == "LONG":
        assert getattr(Plan.load(path), name) == 10**400  # a number like any other: the runtime reads the plan alone
        return
    with pytest.raises(PlanError, match=f"no valid {name}"):
        Plan.load(path)


@pytest.mark.parametrize("buckets", [[], {"9" * 5000: "x"}, {"../x": "x"}, {"-4": "x"}, {"٤": "x"}, {"4": None}])
def test_buckets_that_are_no_numbers_of_tokens_are_refused(buckets: Any, tmp_path: Path) -> None:
    path = saved_plan(tmp_path)
    summary = json.loads(path.with_name("model.plan.json").read_text()) | {"buckets_sha256": buckets}
    path.with_name("model.plan.json").write_text(json.dumps(summary))
    with pytest.raises(PlanError):
        Plan.load(path)


def test_a_summary_beyond_its_limit_is_not_read(tmp_path: Path) -> None:
    path = saved_plan(tmp_path)
    with open(path.with_name("model.plan.json"), "r+b") as file:
        file.truncate(1 << 30)
    with memory_below(1 << 20), pytest.raises(PlanError, match="more than"):
        Plan.load(path)


def spill_plan(operations: list[tuple[str, int, int, int]]) -> dict[str, Any]:
    """A plan with steps (kernel, slot, first byte, bytes) on a part of the arena that it uses for nothing else."""
    plan = linear_plan()
    base = plan["arena_bytes"]
    plan["arena_bytes"] += 1 << 16
    steps = []
    for kernel, slot, begin, size in operations:
        ints = [slot] if kernel == "spill_wait" else [slot, slot << 16]
        steps.append(
            {"kernel": kernel, "label": "s", "ints": ints, "floats": [], "operands": [(1, base + begin, size)]}
        )
    plan["train"] = [*steps, *plan["train"]]
    return plan


def test_of_many_transfers_those_that_touch_are_refused_and_no_others() -> None:
    """The checker's search among what is under way against the plain definition: any two spans that overlap."""
    random, seen = Random(3), set()
    for _ in range(300):
        slots = random.randint(1, 5)
        spans = [
            (64 * random.randint(0, 12), random.choice((1, 64, 65, 128, 300))) for _ in range(slots)
        ]  # fmt: skip
        order = [slot for slot in range(slots) for _ in range(4)]
        random.shuffle(order)
        done, busy, valid, operations = [0] * slots, set[int](), True, []
        for slot in order:
            kernel = ("spill_write", "spill_wait", "spill_read", "spill_wait")[done[slot]]
            done[slot] += 1
            begin, size = spans[slot]
            operations.append((kernel, slot, begin, size))
            if kernel == "spill_wait":
                busy.discard(slot)
            valid &= not any(
                begin < spans[other][0] + spans[other][1] and spans[other][0] < begin + size for other in busy
            )
            if kernel != "spill_wait":
                busy.add(slot)
        seen.add(valid)
        plan = encode(spill_plan(operations))
        if valid:
            Session(plan).close()
        else:
            with pytest.raises(PlanError, match="touches memory that is being spilled"):
                Session(plan)
    assert seen == {True, False}


# ---- Texts ----


def request(path: Path, **more: Any) -> texts.Request:
    vocabulary = {"[UNK]": 0, "good": 1}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"},
    }
    made = texts.Request(
        str(path), str(path.parent), json.dumps(tokenizer), length=4, vocabulary=5, class_count=2, **more
    )
    return made


@pytest.mark.parametrize("entry", [r'{"text": "a \ud800", "label": 1}', r'{"text": "good", "label": "\udfff"}'])
def test_half_a_surrogate_pair_is_no_text(entry: str, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "good", "label": 0}\n' + entry + "\n")
    with pytest.raises(DataError, match=r"t\.jsonl:2: .* half of a surrogate pair"):
        texts.tokenize(request(path))
    assert list(texts.tokenize(request(path, skip_bad=True)).bad) == [f"{path}:2"]


def test_an_endless_line_is_refused_before_it_is_whole_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "_FIELD_LIMIT", 1 << 20)
    path = tmp_path / "t.jsonl"
    with open(path, "wb") as file:
        file.truncate(64 << 20)
    with memory_below(8 << 20), pytest.raises(DataError, match=r"t\.jsonl:1: has a line of more than 1 MiB"):
        texts.tokenize(request(path))


def test_a_label_of_very_many_digits_is_a_label(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(f'{{"text": "good", "label": "{"9" * 5000}"}}\n')
    with pytest.raises(DataError, match="class"):
        texts.tokenize(request(path))


@pytest.mark.parametrize("label", ["00", "01", "+1", "１"])
def test_a_label_that_is_no_index_as_it_is_written_is_a_name(label: str, tmp_path: Path) -> None:
    """Found by fuzzing: "00" counted as an index, but was in no list of them."""
    path = tmp_path / "t.jsonl"
    path.write_text(f'{{"text": "good", "label": "{label}"}}\n{{"text": "good", "label": 1}}\n')
    assert texts.tokenize(request(path)).classes == sorted([label, "1"])


def test_more_classes_than_fit_in_memory_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "good", "label": 0}\n')
    with memory_below(4 << 20), pytest.raises(DataError, match="2147483647 classes"):
        texts.tokenize(replace(request(path), class_count=2**31 - 1))


def test_a_token_beyond_every_table_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "good", "label": 0}\n')
    damaged = request(path).tokenizer.replace('"good": 1', '"good": 4294967295')
    with pytest.raises(DataError, match="token 4294967295 of the tokenizer is outside of the model's table"):
        texts.tokenize(replace(request(path), tokenizer=damaged))


# ---- Tokenizers ----


def empty_matches(tokenizer: dict[str, Any]) -> None:
    """A pattern that matches nothing, everywhere: tokenizers panics, which is no Exception."""
    replace_all = {"type": "Replace", "pattern": {"Regex": ""}, "content": " "}
    tokenizer["normalizer"] = {"type": "Sequence", "normalizers": [replace_all, {"type": "NFKC"}]}


def prefix_beyond_the_merge(tokenizer: dict[str, Any]) -> None:
    """A prefix longer than a merge's second half: another panic, when it is read."""
    vocabulary = {"a": 0, "b": 1, "ab": 2}
    tokenizer["model"] = {
        "type": "BPE",
        "vocab": vocabulary,
        "merges": [["a", "b"]],
        "continuing_subword_prefix": "###",
    }


def without_unknown(tokenizer: dict[str, Any]) -> None:
    """Found when the first unknown word is."""
    del tokenizer["model"]["vocab"]["[UNK]"]


def nested(tokenizer: dict[str, Any]) -> None:
    for _ in range(200):
        tokenizer["normalizer"] = {"type": "Sequence", "normalizers": [tokenizer.get("normalizer")]}


@pytest.mark.parametrize("damage", [empty_matches, prefix_beyond_the_merge, without_unknown, nested])
def test_a_tokenizer_that_fails_in_any_way_is_one_error_that_names_it(
    damage: Callable[[dict[str, Any]], None], tmp_path: Path
) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "good  film", "label": 0}\n')
    good = request(path)
    tokenizer = json.loads(good.tokenizer)
    damage(tokenizer)
    with pytest.raises(DataError, match=r"the bundle's tokenizer\.json cannot be used: .*; export the model again"):
        texts.tokenize(replace(good, tokenizer=json.dumps(tokenizer)))


def test_a_tokenizer_that_is_no_utf8_is_refused() -> None:
    with pytest.raises(DataError, match=r"model\.razor: its tokenizer\.json is no UTF-8 \(byte 1\)"):
        texts.tokenizer_text(b'{\xff"', "model.razor")
