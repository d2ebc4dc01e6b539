"""The fidelity probe: exact gradients are PyTorch's, errors are those of an independent definition of what is kept."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import edge_razor
from edge_razor import BudgetError, UsageError
from edge_razor.bundle import Bundle
from edge_razor.cli import main
from edge_razor.fidelity import Probe, Sums, harm, training_curves
from tests.reference.razor import razor
from tests.reference.torch_model import KeptModel
from tests.small import IMAGE, small_bundle, small_data, small_model, write_small_data


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_bundle(tmp_path_factory.mktemp("fidelity") / "small.razor")


def torch_gradients(x: np.ndarray, y: np.ndarray, sparsity: float, form: str) -> dict[str, np.ndarray]:
    model = small_model().eval()

    def keep(rows: Tensor) -> Tensor:
        return torch.as_tensor(razor(rows, sparsity, form))

    forward = KeptModel(model, keep) if sparsity else model
    nn.functional.cross_entropy(forward(torch.from_numpy(x)), torch.from_numpy(y)).backward()
    return {name: p.grad.numpy().astype(np.float64) for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("form", "samples"), [("centered", 4), ("plain", 3)])
def test_errors_are_those_of_the_definition(bundle: Path, form: str, samples: int) -> None:
    x, y = small_data(samples)
    with Probe(bundle, sparsities=(0.5, 0.9), razor=form, batch_size=4, threads=2) as probe:
        result = probe.run([(x, y)])
    exact = torch_gradients(x, y, 0.0, form)
    assert set(result.parameters) == set(exact)
    for sparsity in (0.5, 0.9):
        kept = torch_gradients(x, y, sparsity, form)
        for name, sums in result.parameters.items():
            e, c = exact[name].ravel(), kept[name].ravel()
            assert sums[sparsity].exact == pytest.approx(e @ e, rel=1e-4)
            assert sums[sparsity].relative_error == pytest.approx(
                np.linalg.norm(c - e) / np.linalg.norm(e), rel=0.02, abs=1e-4
            )
            assert sums[sparsity].cosine == pytest.approx(e @ c / np.sqrt((e @ e) * (c @ c)), abs=2e-3)
    assert result.whole()[0.9].relative_error > result.whole()[0.5].relative_error > 1e-3


def test_the_probe_changes_no_parameter_and_adds_micro_batches_up(bundle: Path) -> None:
    batches = [small_data(128, seed) for seed in range(2)]
    with Probe(bundle, sparsities=(0.9,), batch_size=128, threads=1) as probe:
        assert probe.plans[0.0].micro_batch == 128
        whole = probe.run(batches)
        session, stored = probe._memory(), Bundle(bundle)
        for name in session.parameters():
            np.testing.assert_array_equal(session.read_parameter(name), stored.read_tensor(name))
        again = probe.run(batches)
        cap = probe.predicted_peak_bytes
    assert again == whole  # the same bits: nothing of the first run is left
    with pytest.raises(BudgetError) as refused:
        Probe(bundle, sparsities=(0.9,), batch_size=128, threads=1, mem_budget=cap // 3)
    smallest = refused.value.smallest_budget + 400_000  # compressing takes scratch, too
    with Probe(bundle, sparsities=(0.9,), batch_size=128, threads=1, mem_budget=smallest) as probe:
        assert probe.predicted_peak_bytes <= smallest < cap  # in micro-batches, or with other levers
        parts = probe.run(batches)
    for name, sums in whole.parameters.items():
        assert parts.parameters[name][0.9].exact == pytest.approx(sums[0.9].exact, rel=1e-4)
        assert parts.parameters[name][0.9].difference == pytest.approx(sums[0.9].difference, rel=0.05, abs=1e-12)


def test_texts_of_two_lengths_are_measured_exactly(tmp_path: Path) -> None:
    from tests.test_text import make_tokenizer
    from tests.test_transformers import torch_gradients as of_texts
    from tests.text_models import MODELS, TOKENS, batch

    model, (inputs, target) = MODELS["mean_pooled"]("sdpa"), batch("mean_pooled", 4)
    tokenizer = make_tokenizer(tmp_path / "tokenizer.json")
    path = tmp_path / "texts.razor"
    edge_razor.export(
        model,
        batch("mean_pooled", 2)[0],
        path,
        dropout=False,
        buckets=(12,),
        classes=list("abcde"),
        tokenizer=tokenizer,
    )
    batches, expected = [], {}
    for tokens in (12, TOKENS):
        short = {key: value[:, :tokens] for key, value in inputs.items()}
        for name, gradient in of_texts(MODELS["mean_pooled"]("sdpa"), short, target)[1].items():
            expected[name] = expected.get(name, 0.0) + float((gradient.astype(np.float64) ** 2).sum())
        batches.append(([np.ascontiguousarray(v) for v in short.values()], np.asarray(target)))
    with Probe(path, sparsities=(0.9,), batch_size=4, threads=2) as probe:
        result = probe.run(batches)
    assert result.parameters.keys() == expected.keys()
    for name, sums in result.parameters.items():
        assert sums[0.9].exact == pytest.approx(expected[name], rel=2e-3, abs=1e-10), name


def test_sums_at_the_edges() -> None:
    zero, one = np.zeros(3, np.float32), np.ones(3, np.float32)
    same, gone, unexpected = Sums(), Sums(), Sums()
    same.add(zero, zero)
    gone.add(one, zero)
    unexpected.add(zero, one)
    assert (same.relative_error, same.cosine) == (0.0, 1.0)
    assert (gone.relative_error, gone.cosine) == (1.0, 0.0)
    assert (unexpected.relative_error, unexpected.cosine) == (float("inf"), 0.0)


@pytest.mark.parametrize("sparsities", [(), (0.0,), (1.0,), (0.9, 0.9), (float("nan"),)])
def test_senseless_sparsities_are_refused(bundle: Path, sparsities: tuple[float, ...]) -> None:
    with pytest.raises(UsageError, match="between 0 and 1"):
        Probe(bundle, sparsities=sparsities)


def test_curves_start_alike_and_exact_ones_equal_torch(bundle: Path) -> None:
    data = [small_data(4, seed) for seed in range(6)]
    options = {"batch_size": 4, "threads": 2, "lr": 0.05, "momentum": 0.9, "seed": 0}
    curves = training_curves(bundle, lambda: (b for b in data), steps=6, sparsities=(0.95,), options=options)
    model = small_model().eval()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, 0.9)
    for step, (x, y) in enumerate(data):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(torch.from_numpy(x)), torch.from_numpy(y))
        loss.backward()
        optimizer.step()
        assert curves[0.0][step] == pytest.approx(loss.item(), rel=1e-4)
    assert curves[0.95][0] == curves[0.0][0]
    assert curves[0.95][-1] != curves[0.0][-1]


def test_the_command_prints_a_table_and_writes_json_and_page(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_small_data(tmp_path / "d.npz", 20)
    arguments = ["fidelity", bundle, "--data", data, "--batch-size", 4, "--batches", 3, "--sparsities", "0.9,0.5"]
    files = ["--harm", tmp_path / "harm.json", "--html", tmp_path / "f.html", "--train-steps", 7]
    assert main([str(a) for a in (*arguments, *files, "--threads", 1, "--mem-budget", "2GB")]) == 0
    shown = capsys.readouterr().out
    for text in ("all parameters", "3.classifier", "3 batches of 4", "memory of the probe", "training loss", "exact"):
        assert text in shown
    written = json.loads((tmp_path / "harm.json").read_text())
    assert (written["version"], written["razor"]) == (1, "centered")
    names = {name for name, _ in small_model().named_parameters()}
    assert set(written["parameters"]) == names
    for entry in written["parameters"].values():
        assert entry["norm"] > 0
        assert list(entry["errors"]) == ["0.5", "0.9"]
        assert all(set(e) == {"relative_error", "cosine"} for e in entry["errors"].values())
    page = (tmp_path / "f.html").read_text()
    assert "Training loss" in page and "3.classifier" in page and "sparsity 0.9" in page
    assert not re.search(r"(src|href)=", page)


def test_harm_holds_the_root_mean_square_norm(bundle: Path) -> None:
    x, y = small_data(4)
    with Probe(bundle, sparsities=(0.9,), batch_size=4, threads=1) as probe:
        once, twice = probe.run([(x, y)]), probe.run([(x, y), (x, y)])
    for name, entry in harm(twice)["parameters"].items():
        assert entry["norm"] == pytest.approx(harm(once)["parameters"][name]["norm"], rel=1e-6)
        error = harm(once)["parameters"][name]["errors"]["0.9"]["relative_error"]
        assert entry["errors"]["0.9"]["relative_error"] == pytest.approx(error, rel=1e-6)


def test_bad_lists_and_wrong_shapes_are_one_line_errors(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_small_data(tmp_path / "d.npz", 8)
    for value in ("0.9;0.5", "0.9,0.9", "1.5"):
        assert main(["fidelity", str(bundle), "--data", str(data), "--sparsities", value]) == 2
        assert "--sparsities must be" in capsys.readouterr().err
    with Probe(bundle, sparsities=(0.9,), batch_size=4, threads=1) as probe:
        with pytest.raises(UsageError, match="no batches"):
            probe.run([])
        with pytest.raises(UsageError):
            probe.run([(np.zeros((2, 3, 8, 8), np.float32), np.zeros(2, int))])
    assert IMAGE == (3, 16, 16)
