"""Bundles: what is written is read back, and every kind of damage is one clear BundleError."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file

from edge_razor.bundle import Bundle, write_bundle
from edge_razor.errors import BundleError
from tests.bundles import linear_manifest, linear_models, linear_tensors, write_linear_bundle

FILES = ("bundle.json", "training.onnx", "inference.onnx", "weights.safetensors")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_linear_bundle(tmp_path / "model.razor")


def zip_bundle(directory: Path, target: Path, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(target, "w", compression) as archive:
        for name in FILES:
            archive.write(directory / name, name)
    return target


@pytest.mark.parametrize("zipped", [False, True])
def test_everything_written_is_read_back(bundle: Path, tmp_path: Path, zipped: bool) -> None:
    path = zip_bundle(bundle, tmp_path / "zipped.razor") if zipped else bundle
    with Bundle(path) as opened:
        for name, array in linear_tensors().items():
            read = opened.read_tensor(name)
            assert read.dtype == array.dtype
            assert np.array_equal(read, array)
        assert opened.manifest.inputs[0].shape == (6,)
        assert opened.manifest.trainable == ("fc.weight", "fc.bias")
        assert opened.read_file("training.onnx") == (bundle / "training.onnx").read_bytes()
        with pytest.raises(BundleError, match="no tensor 'missing'"):
            opened.read_tensor("missing")


def test_weights_are_valid_safetensors(bundle: Path) -> None:
    loaded = load_file(bundle / "weights.safetensors")
    assert {n: a.shape for n, a in loaded.items()} == {"fc.weight": (3, 6), "fc.bias": (3,), "steps": ()}


@pytest.mark.parametrize("name", ["training.onnx", "inference.onnx"])
def test_onnx_reads_the_external_data(bundle: Path, name: str) -> None:
    model = onnx.load(bundle / name)
    weight = onnx.numpy_helper.to_array(model.graph.initializer[0])
    assert np.array_equal(weight, linear_tensors()["fc.weight"])


def test_a_bundle_is_replaced_whole_and_leaves_nothing_beside_it(bundle: Path) -> None:
    write_linear_bundle(bundle, classes=4)
    assert Bundle(bundle).manifest.output.shape == (4,)
    assert [p.name for p in bundle.parent.iterdir()] == ["model.razor"]


def test_a_failed_write_keeps_the_old_bundle(bundle: Path) -> None:
    training, inference = linear_models()
    tensors = linear_tensors()
    del tensors["fc.bias"]
    with pytest.raises(BundleError, match=r"'fc\.bias' has no tensor"):
        write_bundle(bundle, training, inference, tensors, linear_manifest())
    assert np.array_equal(Bundle(bundle).read_tensor("fc.bias"), linear_tensors()["fc.bias"])
    assert [p.name for p in bundle.parent.iterdir()] == ["model.razor"]


def test_writing_never_replaces_something_that_is_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    with pytest.raises(BundleError, match="is not a bundle"):
        write_linear_bundle(tmp_path / "photos")


def test_a_tensor_of_another_shape_than_its_initializer_is_refused(tmp_path: Path) -> None:
    training, inference = linear_models()
    tensors = {**linear_tensors(), "fc.bias": np.zeros(4, np.float32)}
    with pytest.raises(BundleError, match=r"shape \[3\], its tensor \[4\]"):
        write_bundle(tmp_path / "m.razor", training, inference, tensors, linear_manifest())


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    with pytest.raises(BundleError, match=name):
        Bundle(bundle)


@pytest.mark.parametrize("name", FILES)
def test_truncation_is_found(bundle: Path, name: str) -> None:
    data = (bundle / name).read_bytes()
    (bundle / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(BundleError, match=name):
        Bundle(bundle)


@pytest.mark.parametrize("name", FILES[1:])
def test_one_flipped_bit_is_found(bundle: Path, name: str) -> None:
    data = bytearray((bundle / name).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / name).write_bytes(data)
    with pytest.raises(BundleError, match=f"{name} does not match its checksum"):
        Bundle(bundle)


def test_a_newer_format_version_asks_for_an_upgrade(bundle: Path) -> None:
    manifest = json.loads((bundle / "bundle.json").read_text())
    (bundle / "bundle.json").write_text(json.dumps({**manifest, "format_version": 2}))
    with pytest.raises(BundleError, match="upgrade edge-razor"):
        Bundle(bundle)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("format_version", "1"),
        ("format_version", 0),
        ("format_version", True),
        ("inputs", []),
        ("inputs", [{"name": "x", "shape": [None, 0], "perm": [0, 1]}]),
        ("inputs", [{"name": "x", "shape": [4, 4], "perm": [0, 1]}]),
        ("inputs", [{"name": "x", "shape": [None, 4], "perm": [1, 0]}]),
        ("inputs", [{"name": "x", "shape": [None, 4], "perm": [0, 2]}]),
        ("output", None),
        ("loss", {"name": "hinge"}),
        ("trainable", {"spec": "all", "parameters": "fc.weight"}),
        ("trainable", {"spec": "all", "parameters": ["nowhere"]}),
        ("state_dict", [1]),
        ("state_dict", ["nowhere"]),
        ("aliases", {"tied.weight": "nowhere"}),
        ("classes", [1, 2]),
        ("preprocessing", {"resize": 2, "crop": 4, "mean": [0], "std": [1]}),
        ("preprocessing", {"resize": 4, "crop": 4, "mean": [0], "std": [0]}),
        ("preprocessing", {"resize": 4, "crop": 4, "mean": [0], "std": [1], "interpolation": "magic"}),
        ("files", {}),
        ("producer", 7),
    ],
)
def test_a_wrong_manifest_field_is_refused(bundle: Path, field: str, value: object) -> None:
    manifest = json.loads((bundle / "bundle.json").read_text())
    (bundle / "bundle.json").write_text(json.dumps({**manifest, field: value}))
    with pytest.raises(BundleError, match=r"bundle\.json|weights\.safetensors has no tensor"):
        Bundle(bundle)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "[" * 100_000])
def test_a_manifest_that_is_no_json_object_is_refused(bundle: Path, text: str) -> None:
    (bundle / "bundle.json").write_text(text)
    with pytest.raises(BundleError, match=r"bundle\.json"):
        Bundle(bundle)


def test_a_path_without_a_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no such bundle"):
        Bundle(tmp_path / "nowhere.razor")
    (tmp_path / "photo.razor").write_bytes(b"\x89PNG" * 100)
    with pytest.raises(BundleError, match="neither a bundle directory nor a whole zip"):
        Bundle(tmp_path / "photo.razor")


def test_a_truncated_zip_is_refused(bundle: Path, tmp_path: Path) -> None:
    zipped = zip_bundle(bundle, tmp_path / "zipped.razor")
    data = zipped.read_bytes()
    for cut in (1, 22, len(data) // 2, len(data) - 4):
        zipped.write_bytes(data[:-cut])
        with pytest.raises(BundleError):
            Bundle(zipped)


def test_a_compressed_zip_is_refused_before_anything_is_inflated(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is compressed; bundles are zipped with 'zip -0'"):
        Bundle(zip_bundle(bundle, tmp_path / "zipped.razor", zipfile.ZIP_DEFLATED))


def test_zip_members_with_other_names_are_never_touched(bundle: Path, tmp_path: Path) -> None:
    zipped = zip_bundle(bundle, tmp_path / "zipped.razor")
    with zipfile.ZipFile(zipped, "a") as archive:
        archive.writestr("../escape.txt", "out")
    before = sorted(p for p in tmp_path.parent.rglob("escape.txt"))
    assert Bundle(zipped).manifest.producer == "edge-razor tests"
    assert sorted(p for p in tmp_path.parent.rglob("escape.txt")) == before == []


def test_a_zip_with_a_file_twice_is_refused(bundle: Path, tmp_path: Path) -> None:
    zipped = zip_bundle(bundle, tmp_path / "zipped.razor")
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(zipped, "a") as archive:
        archive.writestr("bundle.json", "{}")
    with pytest.raises(BundleError, match="twice"):
        Bundle(zipped)


def test_weights_truncated_after_opening_are_an_error_not_garbage(bundle: Path) -> None:
    opened = Bundle(bundle)
    (bundle / "weights.safetensors").write_bytes(b"")
    with pytest.raises(BundleError, match="truncated"):
        opened.read_tensor("fc.weight")
    shutil.rmtree(bundle)
