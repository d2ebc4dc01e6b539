"""LoRA: low-rank additions to frozen layers, their gradients, and what is written in the end."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.numpy import load_file

import edge_razor
from edge_razor.bundle import Bundle
from edge_razor.checkpoint import checkpoint_files
from edge_razor.errors import BundleError, UsageError
from edge_razor.exporters.lora import Lora, parse_lora
from tests.test_transformers import SAMPLES, errors, moves, torch_gradients, trainer_of
from tests.text_models import CAUSAL, MODELS, batch

HEADS = {"bert": "classifier.*", "gpt2": "*.ln_f.*", "llama": "*.norm.weight"}


def lora_bundle(name: str, directory: Path) -> Path:
    return edge_razor.export(
        MODELS[name]("sdpa"),
        batch(name, 2)[0],
        directory / name,
        loss="token_cross_entropy" if name in CAUSAL else "cross_entropy",
        trainable=f"lora:r=4,alpha=12,{HEADS[name]}",
        dropout=False,
    )


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    directory = tmp_path_factory.mktemp("lora")

    return cache(lambda name: lora_bundle(name, directory))


def randomize(trainer: edge_razor.Trainer) -> None:
    """B is zero at the start, which leaves A without a gradient."""
    rng = np.random.default_rng(5)
    for name in trainer.trainable:
        if "lora_B" in name:
            shape = trainer._session.read_parameter(name).shape
            trainer._session.write_parameter(name, 0.1 * rng.standard_normal(shape, dtype=np.float32))


@pytest.mark.parametrize("name", HEADS)
def test_gradients_follow_from_those_of_the_merged_weights(name: str, bundles: Callable[[str], Path]) -> None:
    """With W' = W + s·B·A: dB = s·dW'·Aᵀ and dA = s·Bᵀ·dW'."""
    inputs, target = batch(name, SAMPLES)
    with trainer_of(bundles(name)) as trainer:
        lora = trainer.bundle.manifest.lora
        assert lora is not None
        randomize(trainer)
        model = MODELS[name]("sdpa")
        model.load_state_dict({key: torch.from_numpy(value) for key, value in trainer.state_dict().items()})
        loss, full = torch_gradients(model, inputs, target)
        expected = {}
        for weight, layer in lora.layers.items():
            a, b = (trainer._session.read_parameter(n).astype(np.float64) for n in (layer.a, layer.b))
            dw = full[weight].T if layer.transposed else full[weight]
            expected[layer.b], expected[layer.a] = 3 * dw @ a.T, 3 * b.T @ dw
        expected |= {key: full[key] for key in trainer.trainable if key in full}
        assert set(expected) == set(trainer.trainable) and len(lora.layers) >= 8
        ours, found = moves(trainer, inputs, target)
    assert ours == pytest.approx(loss, rel=1e-5)
    error, worst = errors(found, expected)
    assert error <= 2e-4, f"{worst} is off by {error:.1e}"


def test_at_the_start_the_model_is_the_pretrained_one(bundles: Callable[[str], Path]) -> None:
    inputs, _ = batch("bert", SAMPLES)
    with trainer_of(bundles("bert")) as trainer, torch.no_grad():
        ours = trainer.predict([v.numpy() for v in inputs.values()])
        theirs = MODELS["bert"]("sdpa")(**inputs).logits.numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("name", HEADS)
def test_everything_written_is_the_same_model(name: str, bundles: Callable[[str], Path], tmp_path: Path) -> None:
    inputs, target = batch(name, SAMPLES)
    arrays = [v.numpy() for v in inputs.values()]
    with trainer_of(bundles(name), sparsity=0.9, lr=0.1) as trainer:
        frozen = {key: value for key, value in trainer.state_dict().items() if key not in trainer.trainable}
        for _ in range(4):
            trainer.step(arrays, target.numpy())
        ours = trainer.predict(arrays)
        trainer.save(tmp_path / "run")
        trainer.to_torch(tmp_path / "tuned.safetensors")
        trainer.to_onnx(tmp_path / "tuned.onnx")
        trainer.to_peft(tmp_path / "adapter")
        lora = trainer.bundle.manifest.lora
        assert lora is not None
        moved = [key for key, value in trainer.state_dict().items() if key in frozen and (value != frozen[key]).any()]
    assert sorted(moved) == sorted(lora.layers)
    counted = target.numpy() != -100 if name in CAUSAL else slice(None)
    model = MODELS[name]("sdpa")
    model.load_state_dict({k: torch.from_numpy(v) for k, v in load_file(tmp_path / "tuned.safetensors").items()})
    with torch.no_grad():
        expected = model(**inputs).logits.numpy()
    np.testing.assert_allclose(ours[counted], expected[counted], atol=1e-4, rtol=1e-3)
    session = onnxruntime.InferenceSession(tmp_path / "tuned.onnx")
    (stock,) = session.run(None, dict(zip([p.name for p in session.get_inputs()], arrays, strict=True)))
    np.testing.assert_allclose(stock[counted], expected[counted], atol=1e-4, rtol=1e-3)
    # The adapter by PEFT's definition, on the model as it was.
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    base = {key: value.numpy() for key, value in MODELS[name]("sdpa").state_dict().items()}
    for module in config["target_modules"]:
        a, b = (adapter[f"base_model.model.{module}.lora_{part}.weight"] for part in "AB")
        delta = b @ a * (config["lora_alpha"] / config["r"])
        base[f"{module}.weight"] = base[f"{module}.weight"] + (delta.T if config["fan_in_fan_out"] else delta)
    for key, value in adapter.items():
        if "lora_" not in key:
            base[key.removeprefix("base_model.model.")] = value
    for key, value in load_file(tmp_path / "tuned.safetensors").items():
        np.testing.assert_allclose(base[key], value, atol=1e-6, err_msg=key)
    # A resumed run is the same run.
    with edge_razor.Trainer.resume(tmp_path / "run") as again:
        np.testing.assert_array_equal(again.predict(arrays), ours)
    assert checkpoint_files(tmp_path / "run")[0].stat().st_size < 200_000


def test_little_trains_and_little_is_kept(bundles: Callable[[str], Path]) -> None:
    """No gradient of a frozen table, and the optimizer state of the adapter alone."""
    with Bundle(bundles("bert")) as bundle:
        names = bundle.manifest.trainable
    assert {"lora_A" in n or "lora_B" in n or n.startswith("classifier.") for n in names} == {True}
    with trainer_of(bundles("bert"), optimizer="adamw") as trainer:
        summary = trainer.plan.summary
    adapted = sum(int(np.prod(trainer._parameters[n].shape)) for n in names)
    assert summary["state_bytes"] <= 8 * adapted + 128 * len(names)
    assert not any("embedding_grad" in row["operator"] for row in summary["kept"])


def test_loading_a_state_dict_replaces_weight_and_addition(bundles: Callable[[str], Path]) -> None:
    inputs, _ = batch("bert", SAMPLES)
    with trainer_of(bundles("bert")) as trainer:
        randomize(trainer)
        state = trainer.state_dict()
        before = trainer.predict([v.numpy() for v in inputs.values()])
        trainer.load_state_dict(state)
        after = trainer.predict([v.numpy() for v in inputs.values()])
    np.testing.assert_allclose(before, after, atol=1e-5)


def test_specs() -> None:
    assert parse_lora("all") is None and parse_lora("lora.*") is None
    assert parse_lora("lora") == Lora(8, 8.0)
    assert parse_lora("lora:r=4,alpha=16,targets=*.query|*.value,head,norm") == Lora(
        4, 16.0, ("*.query", "*.value"), "head,norm"
    )


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lora:r=0", "r=0 must be a positive whole number"),
        ("lora:r=1.5", "r=1.5 must be a positive whole number"),
        ("lora:alpha=-1", "alpha=-1 must be a positive number"),
        ("lora:rank=4", "'rank=4' is not known; options are r=, alpha= and targets="),
        ("lora:targets=nothing.*", "no linear layer fits nothing"),
        ("lora:r=1000", "r=1000 is larger than layer"),
        ("lora:r=4,nonsense", "'nonsense' selects no parameter"),
    ],
)
def test_wrong_specs_are_refused(spec: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        edge_razor.export(MODELS["bert"]("sdpa"), batch("bert", 2)[0], tmp_path / "b", trainable=spec)


def test_targets_by_the_last_part_of_a_name(tmp_path: Path) -> None:
    path = edge_razor.export(
        MODELS["bert"]("sdpa"), batch("bert", 2)[0], tmp_path / "b", trainable="lora:r=2,targets=query|value"
    )
    with Bundle(path) as bundle:
        assert bundle.manifest.lora is not None
        assert {name.split(".")[-2] for name in bundle.manifest.lora.layers} == {"query", "value"}
        assert len(bundle.manifest.trainable) == 8


def test_an_adapter_needs_lora(tmp_path: Path) -> None:
    path = edge_razor.export(MODELS["bert"]("sdpa"), batch("bert", 2)[0], tmp_path / "b")
    with edge_razor.Trainer(path) as trainer, pytest.raises(UsageError, match="no LoRA layers"):
        trainer.to_peft(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    "damage", [{"rank": 0}, {"alpha": -1}, {"layers": []}, {"layers": {"w": {"a": "x", "b": "y"}}}, {"rank": "8"}]
)
def test_a_damaged_manifest_is_refused(damage: dict[str, object], bundles: Callable[[str], Path]) -> None:
    from edge_razor.manifest import parse_manifest

    with Bundle(bundles("bert")) as bundle:
        raw = json.loads(json.dumps(bundle.manifest.raw))
    raw["lora"] |= damage
    with pytest.raises(BundleError, match="lora"):
        parse_manifest(json.dumps(raw).encode(), "bundle")


def test_images_too(tmp_path: Path) -> None:
    """LoRA is for every model with linear layers."""
    inputs, target = batch("vit", SAMPLES)
    model = MODELS["vit"]("sdpa")
    path = edge_razor.export(model, inputs, tmp_path / "b", trainable="lora:r=2,head", dropout=False)
    with trainer_of(path, sparsity=0.9, lr=0.05) as trainer:
        (images,) = (v.numpy() for v in inputs.values())
        losses = [trainer.step(images, target.numpy()) for _ in range(25)]
    assert losses[-1] < 0.7 * losses[0]
