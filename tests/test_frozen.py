"""Weights that do not train, from export to what is written in the end: read in the bundle, or in bf16 or int8."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn

import edge_razor
from edge_razor.bundle import Bundle
from edge_razor.cli.entry import main
from edge_razor.errors import BudgetError, BundleError, UsageError
from edge_razor.planner import plan
from tests.kernels.test_weight_forms import stored
from tests.test_lora import lora_bundle, randomize
from tests.test_transformers import SAMPLES, errors, moves, torch_gradients, trainer_of
from tests.text_models import MODELS, batch

ROUNDED = {"bf16": 2, "int8": 3}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    directory = tmp_path_factory.mktemp("frozen")

    @cache
    def bundle(name: str) -> Path:
        if name == "images":
            images = torch.zeros(2, 3, 12, 13)
            return edge_razor.export(Images(), (images,), directory / name, trainable="last:1,conv2.bias")
        return lora_bundle(name, directory)

    return bundle


class Images(nn.Module):
    """Convolutions of every kind: 3×3, grouped, depthwise, 1×1, with and without BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1 = nn.Conv2d(3, 36, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(36)
        self.conv2 = nn.Conv2d(36, 40, 3, padding=1)  # Winograd
        self.conv3 = nn.Conv2d(40, 24, 3, stride=2, groups=4)
        self.conv4 = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.conv5 = nn.Conv2d(24, 20, 1)
        self.head = nn.Linear(20, 5)
        self.norm.running_var.uniform_(0.5, 2)
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.conv2(torch.relu(self.norm(self.conv1(x)))))
        return self.head(self.conv5(torch.relu(self.conv4(self.conv3(x)))).mean((2, 3)))


def rounded(value: np.ndarray, form: int, transposed: bool) -> np.ndarray:
    """By the definition: a scale for each output channel."""
    matrix = np.ascontiguousarray(value.T if transposed else value).reshape(len(value.T if transposed else value), -1)
    _, expanded = stored(matrix, form)
    return expanded.T if transposed else expanded.reshape(value.shape)


@pytest.mark.parametrize(("name", "weights"), [("bert", "int8"), ("gpt2", "bf16"), ("gpt2", "int8"), ("llama", "int8")])
def test_lora_on_rounded_weights_is_exact(name: str, weights: str, bundles: Callable[[str], Path]) -> None:
    """Gradients are those of PyTorch on the model whose frozen weights are what the rounded ones stand for."""
    inputs, target = batch(name, SAMPLES)
    with trainer_of(bundles(name), frozen_weights=weights) as trainer:
        lora = trainer.bundle.manifest.lora
        assert lora is not None
        randomize(trainer)
        manifest, session, state = trainer.bundle.manifest, trainer._session, {}
        for key in manifest.state_names:
            held = manifest.aliases.get(key, key)
            known = held in trainer._parameters
            state[key] = session.read_parameter(held) if known else trainer.bundle.read_tensor(held)
        changed = {
            key for key in state if (state[key] != trainer.bundle.read_tensor(manifest.aliases.get(key, key))).any()
        }
        assert set(lora.layers) <= changed and not any("norm" in key.lower() or key.endswith("bias") for key in changed)
        assert name != "bert" or not any("embeddings" in key for key in changed), "rows are read as the file has them"
        for key, layer in lora.layers.items():
            original = trainer.bundle.read_tensor(key)
            np.testing.assert_array_equal(state[key], rounded(original, ROUNDED[weights], layer.transposed))
            a, b = (session.read_parameter(n) for n in (layer.a, layer.b))
            state[key] = state[key] + 3 * (b @ a).T if layer.transposed else state[key] + 3 * b @ a
        model = MODELS[name]("sdpa")
        model.load_state_dict({key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in state.items()})
        loss, full = torch_gradients(model, inputs, target)
        expected = {}
        for key, layer in lora.layers.items():
            a, b = (session.read_parameter(n).astype(np.float64) for n in (layer.a, layer.b))
            dw = full[key].T if layer.transposed else full[key]
            expected[layer.b], expected[layer.a] = 3 * dw @ a.T, 3 * b.T @ dw
        expected |= {key: full[key] for key in trainer.trainable if key in full}
        ours, found = moves(trainer, inputs, target)
    assert ours == pytest.approx(loss, rel=1e-5)
    error, worst = errors(found, expected)
    assert error <= 2e-4, f"{worst} is off by {error:.1e}"


@pytest.mark.parametrize("weights", ["fp32", *ROUNDED])
def test_frozen_convolutions(weights: str, bundles: Callable[[str], Path]) -> None:
    x = torch.randn(SAMPLES, 3, 12, 13, generator=torch.Generator().manual_seed(1))
    target = torch.arange(SAMPLES) % 5
    model = Images()
    state = {key: value.numpy().copy() for key, value in model.state_dict().items()}
    for key in ("conv1.weight", "conv2.weight", "conv3.weight", "conv5.weight"):
        if weights in ROUNDED:
            state[key] = rounded(state[key], ROUNDED[weights], False)
    model.load_state_dict({key: torch.from_numpy(value) for key, value in state.items()})
    loss, full = torch_gradients(model, {"x": x}, target)
    with trainer_of(bundles("images"), frozen_weights=weights) as trainer:
        kernels = {key: trainer._session.read_parameter(key) for key in state if key in trainer._parameters}
        for key, value in kernels.items():
            np.testing.assert_array_equal(value, state[key], err_msg=key)
        assert set(trainer.trainable) == {"head.weight", "head.bias", "conv2.bias"}
        ours, found = moves(trainer, {"x": x}, target)
        mapped = trainer.plan.summary["mapped_bytes"]
    assert ours == pytest.approx(loss, rel=1e-5)
    error, worst = errors(found, {key: full[key] for key in found})
    assert error <= 2e-4, f"{worst} is off by {error:.1e}"
    # In the file: BatchNorm's vectors and biases; in float32 the 1×1 weight, too. Larger kernels have another order.
    small = 4 * (4 * 36 + 24 + 24 + 20)
    assert mapped == small + (4 * 24 * 20 if weights == "fp32" else 0)


def test_what_is_written_adds_to_the_bundles_own_weights(bundles: Callable[[str], Path], tmp_path: Path) -> None:
    inputs, target = batch("bert", SAMPLES)
    arrays = [v.numpy() for v in inputs.values()]
    with trainer_of(bundles("bert"), frozen_weights="int8", lr=0.1) as trainer:
        trainer.step(arrays, target.numpy())
        trainer.step(arrays, target.numpy())
        trainer.to_torch(tmp_path / "tuned.safetensors")
        trainer.save(tmp_path / "run")
        ours = trainer.predict(arrays)
        lora, session = trainer.bundle.manifest.lora, trainer._session
        assert lora is not None
        added = {
            key: 3 * session.read_parameter(layer.b) @ session.read_parameter(layer.a)
            for key, layer in lora.layers.items()
        }
    tuned, base = load_file(tmp_path / "tuned.safetensors"), MODELS["bert"]("sdpa").state_dict()
    for key, value in base.items():
        if not key.startswith("classifier."):
            np.testing.assert_allclose(tuned[key], value.numpy() + added.get(key, 0), atol=1e-6, err_msg=key)
    assert main(["to-torch", str(tmp_path / "run"), "-o", str(tmp_path / "again.safetensors")]) == 0
    for key, value in load_file(tmp_path / "again.safetensors").items():
        np.testing.assert_array_equal(value, tuned[key], err_msg=key)
    # A resumed run, and `eval`, hold the weights as the run did.
    with edge_razor.Trainer.resume(tmp_path / "run") as again:
        assert again.plan.summary["frozen_weights"] == "int8"
        np.testing.assert_array_equal(again.predict(arrays), ours)


def test_memory_of_frozen_weights(bundles: Callable[[str], Path]) -> None:
    """In the file they have an item of their own; rounded they take a half and a quarter of it in memory.

    Tables of which only rows are read stay in the file with every choice, and count nowhere.
    """
    path = bundles("bert")
    sizes = {}
    for weights in ("fp32", *ROUNDED):
        summary = plan(path, mem_budget=None, base_bytes=0, frozen_weights=weights).summary
        assert summary["items"]["frozen weights in the file"] == summary["mapped_bytes"]
        assert sum(summary["items"].values()) == summary["predicted_peak_bytes"]
        sizes[weights] = (summary["mapped_bytes"], summary["params_bytes"])
    with Bundle(path) as bundle:
        frozen = {
            n: s for n, s in bundle.tensors.items() if n not in bundle.manifest.trainable and s.dtype == np.float32
        }
        tables = sum(s.end - s.begin for n, s in frozen.items() if "word_embeddings" in n)
        matrices = sum(s.end - s.begin for n, s in frozen.items() if len(s.shape) == 2) - tables
    for weights, share in (("bf16", 2), ("int8", 4)):
        saved, added = (sizes["fp32"][0] - sizes[weights][0]), sizes[weights][1] - sizes["fp32"][1]
        assert 0.8 * matrices <= saved <= matrices
        rounded = saved / share
        assert rounded <= added <= 1.35 * rounded  # scales, and 64 bytes' alignment of small matrices


def test_a_refusal_names_rounded_weights_if_they_help(bundles: Callable[[str], Path]) -> None:
    with pytest.raises(BudgetError) as refused:
        plan(bundles("bert"), mem_budget=1, base_bytes=0)
    advice = dict(refused.value.advice)
    with pytest.raises(BudgetError) as rounded:
        plan(bundles("bert"), mem_budget=1, base_bytes=0, frozen_weights="int8")
    assert advice["frozen weights int8"] == rounded.value.smallest_budget < refused.value.smallest_budget
    assert "frozen weights int8" not in dict(rounded.value.advice)


@pytest.mark.parametrize("padding", range(2))
def test_a_zipped_bundle_at_any_alignment(padding: int, bundles: Callable[[str], Path], tmp_path: Path) -> None:
    path, zipped = bundles("bert"), tmp_path / "model.razor"
    with zipfile.ZipFile(zipped, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("p" * (padding + 1), b"")
        for file in sorted(path.iterdir()):
            archive.write(file, file.name)
    inputs, target = batch("bert", SAMPLES)
    arrays = [v.numpy() for v in inputs.values()]
    results = []
    for source in (path, zipped):
        with trainer_of(source) as trainer:
            results.append((trainer.step(arrays, target.numpy()), trainer.predict(arrays)))
    assert results[0][0] == results[1][0]
    np.testing.assert_array_equal(results[0][1], results[1][1])


def copied(path: Path, to: Path) -> Path:
    to.mkdir()
    for file in path.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def test_a_bundle_that_is_cut_short_under_a_trainer_is_an_error(bundles: Callable[[str], Path], tmp_path: Path) -> None:
    path = copied(bundles("bert"), tmp_path / "b")
    inputs, target = batch("bert", SAMPLES)
    arrays = [v.numpy() for v in inputs.values()]
    with trainer_of(path) as trainer:
        trainer.step(arrays, target.numpy())
        os.truncate(path / "weights.safetensors", 1000)
        with pytest.raises(BundleError, match="was changed while a session reads its weights there"):
            trainer.step(arrays, target.numpy())


def test_a_bundle_that_changes_while_it_is_opened_is_refused(bundles: Callable[[str], Path], tmp_path: Path) -> None:
    path = copied(bundles("bert"), tmp_path / "b")
    with Bundle(path) as bundle:
        bundle.check_unchanged()
        data = (path / "weights.safetensors").read_bytes()
        (path / "other").write_bytes(data)
        os.replace(path / "other", path / "weights.safetensors")
        with pytest.raises(BundleError, match="altered while the bundle was open"):
            bundle.check_unchanged()


def test_another_state_dict_replaces_frozen_weights(bundles: Callable[[str], Path]) -> None:
    inputs, _ = batch("bert", SAMPLES)
    model = MODELS["bert"]("sdpa")
    with torch.no_grad():
        for value in model.parameters():
            value += 0.01
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    with trainer_of(bundles("bert")) as trainer, torch.no_grad():
        trainer.load_state_dict(state)
        ours = trainer.predict([v.numpy() for v in inputs.values()])
        np.testing.assert_allclose(ours, model(**inputs).logits.numpy(), atol=2e-5)
        for key, value in trainer.state_dict().items():
            np.testing.assert_array_equal(value, state[key], err_msg=key)


def test_the_command_line(bundles: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", str(bundles("bert")), "--json", "--frozen-weights"]
    assert main([*command, "int8"]) == 0
    assert json.loads(capsys.readouterr().out)["frozen_weights"] == "int8"
    assert main([*command, "int4"]) == 2
    assert "choose from" in capsys.readouterr().err
    with pytest.raises(UsageError, match="fp32, bf16, int8, not 'int4'"):
        edge_razor.Trainer(bundles("bert"), frozen_weights="int4")
