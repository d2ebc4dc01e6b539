"""Plans as files, from bundles, in the native session, and from a child process."""

from __future__ import annotations

import hashlib
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from edge_razor.bundle import write_bundle
from edge_razor.errors import BudgetError, BundleError, EdgeRazorError, OutOfMemoryError, PlanError, UsageError
from edge_razor.planner import Plan, plan, plan_in_child
from edge_razor.planner.accounting import measure_base
from edge_razor.planner.graph import read_graph
from edge_razor.planner.interface import read_interface
from edge_razor.planner.planning import plan_graph
from edge_razor.runtime import Session

from .conftest import settings
from .networks import Built, Network


@pytest.fixture(scope="module")
def bundle(mobile: tuple[Network, Built], tmp_path_factory: pytest.TempPathFactory) -> Path:
    net, built = mobile
    training = onnx.load_model_from_string(built.training)
    graph = onnx.helper.make_graph([], "inference", [], [])
    manifest = built.manifest | {
        "producer": "test",
        "trainable": {"spec": "all", "parameters": net.trainable},
        "state_dict": list(built.parameters),
        "aliases": {},
        "classes": None,
    }
    path = tmp_path_factory.mktemp("bundle") / "mobile.razor"
    return write_bundle(path, training, onnx.helper.make_model(graph), built.parameters, manifest)


def test_a_plan_survives_saving_and_loading(bundle: Path, tmp_path: Path) -> None:
    made = plan(bundle, mem_budget="2GB", sparsity=0.9, base_bytes=0)
    made.save(tmp_path / "m.plan")
    assert Plan.load(tmp_path / "m.plan") == made
    assert made.bundle_id == hashlib.sha256((bundle / "training.onnx").read_bytes()).hexdigest()


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "magic", "version", "no summary", "other summary"])
def test_damaged_plan_files_are_plan_errors(bundle: Path, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "m.plan"
    plan(bundle, mem_budget=None, base_bytes=0, threads=1).save(path)
    data = bytearray(path.read_bytes())
    if damage == "truncate":
        data = data[:-1]
    elif damage == "flip":
        data[200] ^= 1
    elif damage == "empty":
        data = bytearray()
    elif damage == "magic":
        data[0] ^= 1
    elif damage == "version":
        struct.pack_into("<I", data, 8, 1)
    elif damage == "no summary":
        (tmp_path / "m.plan.json").unlink()
    else:
        (tmp_path / "m.plan.json").write_text("{}")
    path.write_bytes(bytes(data))
    with pytest.raises(PlanError):
        Plan.load(path)


def test_the_header_states_version_length_and_checksum(bundle: Path) -> None:
    binary = plan(bundle, mem_budget=None, base_bytes=0).binary
    magic, version, crc, size = struct.unpack_from("<8sIIQ", binary)
    assert (magic, version, size) == (b"EDGERZR\n", 5, len(binary) - 24)
    assert crc == zlib.crc32(binary[24:])


@pytest.mark.parametrize("micro_batch", [8, 2])
@pytest.mark.parametrize("sparsity", [0.0, 0.9])
def test_the_native_session_trains_a_plan(
    mobile: tuple[Network, Built], bundle: Path, sparsity: float, micro_batch: int
) -> None:
    net, built = mobile
    made = plan(bundle, mem_budget="2GB", sparsity=sparsity, micro_batch=micro_batch, base_bytes=0, threads=2)
    rng = np.random.default_rng(0)
    x, target = rng.normal(size=(8, 16, 16, 3)).astype(np.float32), rng.integers(0, 10, 8).astype(np.int32)
    with Session(made.binary) as session:
        assert (session.info.arena_bytes, session.info.micro_batch) == (made.arena_bytes, micro_batch)
        for name in session.parameters():
            session.write_parameter(name, built.parameters[name])
        loss = session.train_step([x], target, learning_rate=1.0, update=1, seed=0)
        expected, gradients = net.reference_step(x, target, built.parameters)
        assert loss == pytest.approx(expected, rel=1e-5)  # packing leaves the forward pass exact
        if sparsity == 0:
            for name, gradient in gradients.items():
                change = built.parameters[name] - session.read_parameter(name)
                np.testing.assert_allclose(change, gradient, rtol=0, atol=2e-5 * np.abs(gradient).max() + 3e-7)


def test_the_child_gives_the_same_plan_and_imports_no_onnx_here(bundle: Path) -> None:
    arguments: dict[str, Any] = {"mem_budget": "2GB", "sparsity": 0.9, "base_bytes": 1, "threads": 2}
    assert plan_in_child(bundle, **arguments) == plan(bundle, **arguments)
    program = (
        "import sys; from edge_razor.planner import plan_in_child; "
        f"plan_in_child({str(bundle)!r}, mem_budget=None, base_bytes=0); "
        "assert not {'onnx', 'google.protobuf', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_errors_cross_from_the_child(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BudgetError) as here:
        plan(bundle, mem_budget=1, base_bytes=0, threads=1)
    with pytest.raises(BudgetError) as there:
        plan_in_child(bundle, mem_budget=1, base_bytes=0, threads=1)
    assert there.value.smallest_budget == here.value.smallest_budget
    assert there.value.advice == here.value.advice and str(there.value) == str(here.value)
    with pytest.raises(BundleError):
        plan_in_child(tmp_path / "missing.razor", mem_budget=None)
    with pytest.raises(UsageError, match="12 parsecs"):
        plan_in_child(bundle, mem_budget="12 parsecs")
    with pytest.raises(EdgeRazorError, match="unexpected keyword"):
        plan_in_child(bundle, mem_budget=None, no_such_argument=1)


def test_a_planner_that_is_killed_is_want_of_memory(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = subprocess.CompletedProcess([], -signal.SIGKILL, "", "")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: killed)
    with pytest.raises(OutOfMemoryError, match=r"planning was killed.*memory ran out; .*--plan") as error:
        plan_in_child(bundle, mem_budget=None)
    assert error.value.exit_status == 3


def test_sparsity_may_be_text(bundle: Path) -> None:
    assert plan(bundle, mem_budget=None, sparsity="0.9", base_bytes=0).sparsity == 0.9
    with pytest.raises(UsageError, match="sparsity"):
        plan(bundle, mem_budget=None, sparsity="much", base_bytes=0)


def test_the_training_process_is_measured_in_a_plausible_range() -> None:
    assert 15_000_000 < measure_base() < 150_000_000


def change_manifest(built: Built, path: list[Any], value: object) -> dict[str, Any]:
    import copy

    manifest = copy.deepcopy(built.manifest)
    at: Any = manifest
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return manifest


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["inputs", 0, "name"], "other"),
        (["inputs", 0, "shape"], [None, 16, 15, 3]),
        (["inputs", 0, "shape"], [8, 16, 16, 3]),
        (["inputs", 0, "perm"], [0, 1, 1, 2]),
        (["inputs", 0, "perm"], [1, 0, 2, 3]),
        (["output", "shape"], [None, 11]),
        (["output"], {"name": "nothing"}),
        (["output"], None),
        (["loss"], {"name": "mse"}),
        (["preprocessing"], {"mean": [0.5], "std": [0.0]}),
        (["preprocessing"], {"mean": [0.5], "std": [0.5, 0.5]}),
    ],
)
def test_a_manifest_that_contradicts_the_graph_is_a_bundle_error(
    mobile: tuple[Network, Built], path: list[Any], value: object
) -> None:
    built = mobile[1]
    with pytest.raises(BundleError):
        plan_graph(built.training, change_manifest(built, path, value), settings(), None)


def test_channels_first_bindings_and_normalization(mobile: tuple[Network, Built]) -> None:
    built = mobile[1]
    manifest = built.manifest | {
        "inputs": [{"name": "input", "shape": [None, 3, 16, 16], "perm": [0, 2, 3, 1]}],
        "preprocessing": {"mean": [0.5, 0.25, 0.0], "std": [0.5, 0.25, 1.0]},
    }
    graph = read_graph(built.training, built.manifest["output"]["name"])
    interface = read_interface(graph, manifest)
    image, target = interface.inputs
    assert image.at(8) == (8, 3, 16, 16) and image.perm == (0, 2, 3, 1)
    np.testing.assert_allclose(255 * np.array(image.mul) + image.add, [1.0, 3.0, 1.0])
    np.testing.assert_allclose(image.add, [-1.0, -1.0, 0.0])
    assert target.classes and target.at(8) == (8,) and target.perm == (0,)


@pytest.mark.parametrize("preprocessing", [None, {"mean": [0.5], "std": [0.5]}], ids=["none", "other channels"])
def test_pixels_without_a_normalization_become_x_over_255(
    mobile: tuple[Network, Built], preprocessing: dict[str, Any] | None
) -> None:
    """In the runtime, so that no float32 copy of a batch is in the data pipeline."""
    built = mobile[1]
    graph = read_graph(built.training, built.manifest["output"]["name"])
    image = read_interface(graph, built.manifest | {"preprocessing": preprocessing}).inputs[0]
    assert image.mul == (1 / 255,) * 3 and image.add == (0.0,) * 3


def test_the_target_of_a_channels_first_map_lacks_the_class_dimension() -> None:
    net = Network((5, 4, 3))
    built = net.build(net.conv(net.input, 6))
    manifest = built.manifest | {
        "output": {"name": built.manifest["output"]["name"], "shape": [None, 6, 5, 4], "perm": [0, 3, 1, 2]}
    }
    target = read_interface(read_graph(built.training, manifest["output"]["name"]), manifest).inputs[-1]
    assert target.shape == (0, 5, 4) and target.perm == (0, 1, 2)
