"""Texts of several lengths: a training graph and a plan for each, all on the same parameters and memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edge_razor
from edge_razor.bundle import Bundle
from edge_razor.checkpoint import checkpoint_files
from edge_razor.data import BatchRing, Loader
from edge_razor.data.order import grouped
from edge_razor.errors import BundleError, PlanError, UsageError
from edge_razor.fit import Events, fit
from edge_razor.planner import plan
from edge_razor.runtime import Session
from tests.runtime.plan_writer import encode, linear_plan
from tests.test_text import CLASSES, make_tokenizer, source, write_csv
from tests.test_transformers import errors, moves, torch_gradients
from tests.text_models import CAUSAL, MODELS, TOKENS, batch

SHORTER = (12, 30)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    directory = tmp_path_factory.mktemp("buckets")

    @cache
    def bundle(name: str) -> Path:
        options: dict[str, Any] = {"loss": "token_cross_entropy"} if name in CAUSAL else {"classes": CLASSES}
        if name == "mean_pooled":
            options["tokenizer"] = make_tokenizer(directory / "tokenizer.json")
        model, inputs = MODELS[name]("sdpa"), batch(name, 2)[0]
        return edge_razor.export(model, inputs, directory / name, dropout=False, buckets=SHORTER, **options)

    return bundle


def trainer_of(bundle: Path, **options: Any) -> edge_razor.Trainer:
    return edge_razor.Trainer(bundle, **{"batch_size": 4, "sparsity": 0, "lr": 1e-3, "threads": 2, **options})


@pytest.mark.parametrize("tokens", [12, 30, TOKENS])
@pytest.mark.parametrize("name", ["mean_pooled", "gpt2", "llama"])
def test_every_length_is_exact(name: str, tokens: int, bundles: Callable[[str], Path]) -> None:
    inputs, target = batch(name, 4)
    inputs = {key: value[:, :tokens] for key, value in inputs.items()}
    target = target[:, :tokens] if name in CAUSAL else target
    loss, expected = torch_gradients(MODELS[name]("sdpa"), inputs, target)
    with trainer_of(bundles(name)) as trainer:
        assert trainer.buckets == (*SHORTER, TOKENS)
        ours, found = moves(trainer, inputs, target)
    assert ours == pytest.approx(loss, rel=1e-5)
    error, worst = errors(found, expected)
    assert error <= 2e-4, f"{worst} is off by {error:.1e}"


def test_a_short_batch_is_exact(bundles: Callable[[str], Path]) -> None:
    """Its missing samples have no key in their mask, whose mean is 0/0; nothing of that may reach a gradient."""
    inputs, target = batch("mean_pooled", 3)
    loss, expected = torch_gradients(MODELS["mean_pooled"]("sdpa"), inputs, target)
    with trainer_of(bundles("mean_pooled")) as trainer:
        ours, found = moves(trainer, inputs, target)
    assert ours == pytest.approx(loss, rel=1e-5)
    error, worst = errors(found, expected)
    assert error <= 2e-4, f"{worst} is off by {error:.1e}"


def test_lengths_take_turns_on_one_set_of_parameters(bundles: Callable[[str], Path]) -> None:
    """Padding changes nothing, so that the same texts in any bucket train the same model."""
    inputs, target = batch("mean_pooled", 4)
    ids, mask = (v.numpy()[:, :10] for v in inputs.values())

    def padded(tokens: int) -> list[np.ndarray]:
        return [np.pad(a, ((0, 0), (0, tokens - 10))) for a in (ids, mask)]

    states, losses = [], []
    for lengths in ((TOKENS,) * 4, (12, 30, TOKENS, 12)):
        with trainer_of(bundles("mean_pooled"), momentum=0.9, lr=0.05) as trainer:
            losses.append([trainer.step(padded(tokens), target.numpy()) for tokens in lengths])
            states.append(trainer.state_dict())
            predictions = [trainer.predict(padded(tokens)) for tokens in (12, 30, TOKENS)]
        for other in predictions[1:]:
            np.testing.assert_allclose(predictions[0], other, atol=1e-5)
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    for key, value in states[0].items():
        np.testing.assert_allclose(value, states[1][key], atol=2e-5, err_msg=key)


def test_the_longest_decides_the_cap(bundles: Callable[[str], Path]) -> None:
    settings: dict[str, Any] = {
        "batch_size": 8,
        "sparsity": 0.9,
        "base_bytes": 10**7,
        "base_variation": 0,
        "threads": 2,
    }
    free = plan(bundles("llama"), mem_budget=None, **settings)
    capped = plan(bundles("llama"), mem_budget=free.predicted_peak_bytes, **settings)
    assert sorted(capped.buckets) == list(SHORTER) and capped.binary == free.binary
    with pytest.raises(edge_razor.BudgetError) as refused:
        plan(bundles("llama"), mem_budget=1, micro_batch=8, **settings)
    smallest = refused.value.smallest_budget
    least = plan(bundles("llama"), mem_budget=smallest, micro_batch=8, **settings)
    assert least.predicted_peak_bytes == smallest <= free.predicted_peak_bytes
    assert sorted(least.buckets) == list(SHORTER)
    with pytest.raises(edge_razor.BudgetError):
        plan(bundles("llama"), mem_budget=smallest - 1, micro_batch=8, **settings)


def test_checkpoints_resume_with_every_length(bundles: Callable[[str], Path], tmp_path: Path) -> None:
    inputs, target = batch("llama", 4)
    arrays = [v.numpy() for v in inputs.values()]
    short = [a[:, :12] for a in arrays]
    with trainer_of(bundles("llama"), sparsity=0.9) as trainer:
        trainer.step(short, target.numpy()[:, :12])
        trainer.save(tmp_path)
        expected = [trainer.step(arrays, target.numpy()), trainer.step(short, target.numpy()[:, :12])]
    with edge_razor.Trainer.resume(tmp_path) as again:
        found = [again.step(arrays, target.numpy()), again.step(short, target.numpy()[:, :12])]
    assert found == expected


def test_a_run_on_texts_stopped_in_the_middle_of_an_epoch_sees_the_same_batches(
    bundles: Callable[[str], Path], tmp_path: Path
) -> None:
    lengths = [3, 60, 9, 25, 28, 5, 70, 1, 2, 40, 11, 8, 33]
    rows = [(" ".join(["w1"] * n), "abcde"[i % 5]) for i, n in enumerate(lengths)]
    bundle = bundles("mean_pooled")
    data = source(bundle, write_csv(tmp_path / "d.csv", rows))
    files = []
    for stops in ((), (2,), (4, 1, 5)):  # steps after which a run stops, of 7 in an epoch
        out = tmp_path / f"run{len(stops)}"
        trainer = trainer_of(bundle, batch_size=2, threads=1, optimizer="adamw")
        for steps in (*stops, 100):
            asked = iter(range(100))  # before a step and after it
            events = Events(should_stop=lambda asked=asked, n=steps: next(asked) >= 2 * n - 1)  # type: ignore[misc]
            loader = Loader(data, np.arange(13), BatchRing(data, 2), seed=3, shuffle=True)
            result = fit(trainer, loader, epochs=2, out=out, events=events)
            trainer.close()
            if result.interrupted:
                trainer = edge_razor.Trainer.resume(out)
        assert trainer.update == 14
        files.append(checkpoint_files(out)[0].read_bytes())
    assert files[0] == files[1] == files[2]


def test_the_mask_may_come_first(tmp_path: Path) -> None:
    inputs, _ = batch("mean_pooled", 2)
    first = {name: inputs[name] for name in ("attention_mask", "input_ids")}
    path = edge_razor.export(MODELS["mean_pooled"]("sdpa"), first, tmp_path / "b", dropout=False, buckets=(12,))
    with trainer_of(path) as trainer:
        short, whole = ([v.numpy()[:, :n] for v in first.values()] for n in (12, TOKENS))
        whole[0] = np.where(np.arange(TOKENS) < 12, whole[0], 0)
        np.testing.assert_allclose(trainer.predict(short), trainer.predict(whole), atol=1e-5)


def test_info_tells_the_lengths(bundles: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    from edge_razor.cli.info import run

    run(bundles("mean_pooled"))
    shown = capsys.readouterr().out
    assert "12 or 30 or 72 tokens" in shown and "table of 97 tokens" in shown


def test_other_lengths_are_refused(bundles: Callable[[str], Path]) -> None:
    inputs, target = batch("gpt2", 4)
    arrays = [v.numpy() for v in inputs.values()]
    with trainer_of(bundles("gpt2")) as trainer:
        with pytest.raises(UsageError, match=r"has shape \[4, 13\]"):
            trainer.step([a[:, :13] for a in arrays], target.numpy()[:, :13])
        with pytest.raises(UsageError, match=r"targets have shape \[4, 72\].*\[4, 12\]"):
            trainer.step([a[:, :12] for a in arrays], target.numpy())


@pytest.mark.parametrize("buckets", [(0,), (TOKENS,), (12, 12), (TOKENS + 1,)])
def test_wrong_buckets_are_refused_at_export(buckets: tuple[int, ...], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="must be different numbers of tokens below the inputs' 72"):
        edge_razor.export(MODELS["bert"]("sdpa"), batch("bert", 2)[0], tmp_path / "b", buckets=buckets)


def test_images_have_no_buckets(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="buckets need inputs of one shape"):
        edge_razor.export(MODELS["vit"]("sdpa"), batch("vit", 2)[0], tmp_path / "b", buckets=(12,))


def test_batches_are_as_short_as_their_longest_text(bundles: Callable[[str], Path], tmp_path: Path) -> None:
    lengths = [3, 60, 9, 25, 28, 5, 70, 1, 2, 40]
    rows = [(" ".join(["w1"] * n), "abcde"[i % 5]) for i, n in enumerate(lengths)]
    data = source(bundles("mean_pooled"), write_csv(tmp_path / "d.csv", rows))
    ring = BatchRing(data, 2)
    shapes = [inputs[0].shape for inputs, _ in Loader(data, np.arange(10), ring)]
    assert shapes == [(2, 12), (2, 12), (2, 30), (2, TOKENS), (2, TOKENS)]
    seen = []
    for batch_ in Loader(data, np.arange(10), ring, seed=3, shuffle=True).batches(1):
        assert len({i.shape for i in batch_.inputs}) == 1
        seen += [int(m.sum()) - 2 for m in batch_.inputs[1]]
    assert sorted(seen) == sorted(min(n, TOKENS - 2) for n in lengths)


@pytest.mark.parametrize("count", [0, 1, 5, 64, 1000])
@pytest.mark.parametrize("seed", [None, 4])
def test_grouped_order_is_a_permutation_with_a_short_last_batch(count: int, seed: int | None) -> None:
    rng = np.random.default_rng(0)
    order, lengths = rng.permutation(count), rng.integers(1, 100, count)
    result = grouped(order, lengths, 8, seed, epoch=2)
    assert sorted(result.tolist()) == list(range(count))
    batches = [result[i : i + 8] for i in range(0, count, 8)]
    spread = np.mean([np.ptp(lengths[b]) for b in batches]) if count >= 64 else 0
    assert spread < 25
    if seed is not None and count == 1000:
        assert not np.array_equal(result, grouped(order, lengths, 8, seed, epoch=3))
        np.testing.assert_array_equal(result, grouped(order, lengths, 8, seed, epoch=2))


def test_a_session_shares_only_what_fits() -> None:
    base = Session(encode(linear_plan(threads=2)))
    again = Session(encode(linear_plan(threads=2)), base)
    base.write_parameter("fc.bias", np.arange(5, dtype=np.float32))
    np.testing.assert_array_equal(again.read_parameter("fc.bias"), np.arange(5))
    base.close()  # the memory lives as long as one of them
    again.write_parameter("fc.bias", np.ones(5, np.float32))
    base = Session(encode(linear_plan(threads=2)))
    for wrong, message in (
        ({"threads": 1}, "threads"),
        ({"threads": 2, "outputs": 6}, "lays parameters out"),
        ({"threads": 2, "pixels": (4, 4)}, "lays parameters out"),
        ({"threads": 2, "micro": 4, "batch": 4}, "bytes|lays parameters out"),
    ):
        with pytest.raises(PlanError, match=message):
            Session(encode(linear_plan(**wrong)), base)
    base.close()
    with pytest.raises(UsageError, match="closed"):
        Session(encode(linear_plan(threads=2)), base)


def test_graphs_that_disagree_are_refused(bundles: Callable[[str], Path], tmp_path: Path) -> None:
    import hashlib
    import shutil

    import onnx

    copy = shutil.copytree(bundles("gpt2"), tmp_path / "b")
    model = onnx.load(copy / "training-12.onnx", load_external_data=False)
    (bias,) = [t for t in model.graph.initializer if t.name == "transformer.h.0.ln_1.bias"]
    bias.name = "renamed"
    for node in model.graph.node:
        node.input[:] = ["renamed" if name == "transformer.h.0.ln_1.bias" else name for name in node.input]
    for output in list(model.graph.output):
        if output.name == "grad/transformer.h.0.ln_1.bias":
            model.graph.output.remove(output)
    data = model.SerializeToString()
    (copy / "training-12.onnx").write_bytes(data)
    with pytest.raises(BundleError, match=r"training-12\.onnx"):
        Bundle(copy)
    manifest = json.loads((copy / "bundle.json").read_text())
    manifest["files"]["training-12.onnx"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (copy / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="train different parameters"):
        plan(copy, mem_budget=None)
