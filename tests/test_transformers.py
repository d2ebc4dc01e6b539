"""Hugging Face's language and vision models, export → plan → native step, equal PyTorch; with padding, in every
spelling of attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import edge_razor
from edge_razor.bundle import Bundle
from edge_razor.errors import UnsupportedOpError, UsageError
from tests.parity import errors, moves, torch_gradients
from tests.reference.dropout import SameMasks
from tests.reference.graph_backward import run_training_graph
from tests.text_models import CAUSAL, MODELS, TOKENS, VOCABULARY, MeanPooled, batch

SAMPLES = 5


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    directory = tmp_path_factory.mktemp("transformers")

    @cache
    def bundle(name: str, attention: str) -> Path:
        loss = "token_cross_entropy" if name in CAUSAL else "cross_entropy"
        inputs = batch(name, 2)[0]
        path = directory / f"{name}-{attention}"
        return edge_razor.export(MODELS[name](attention), inputs, path, loss=loss, dropout=False)

    return bundle


def trainer_of(bundle: Path, **options: object) -> edge_razor.Trainer:
    settings = {"batch_size": SAMPLES, "sparsity": 0, "lr": 1e-3, "momentum": 0.9, "threads": 2} | options
    return edge_razor.Trainer(bundle, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_one_step_at_sparsity_0_equals_pytorch(name: str, attention: str, bundles: Callable[[str, str], Path]) -> None:
    inputs, target = batch(name, SAMPLES)
    loss, expected = torch_gradients(MODELS[name](attention), inputs, target)
    with trainer_of(bundles(name, attention)) as trainer:
        assert set(trainer.trainable) == set(expected)
        ours, found = moves(trainer, inputs, target)
    assert ours == pytest.approx(loss, rel=1e-5)
    error, worst = errors(found, expected)
    assert error <= 2e-4, f"{worst} is off by {error:.1e}"


DROPOUT = {
    "bert": (MODELS["bert"], {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.3}, 8),
    "gpt2": (MODELS["gpt2"], {"resid_pdrop": 0.2, "embd_pdrop": 0.1, "attn_pdrop": 0.4}, 7),
    "vit": (MODELS["vit"], {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.3}, 7),
    "llama": (MODELS["llama"], {"attention_dropout": 0.25}, 2),
}


@pytest.mark.parametrize(
    ("attention", "name", "micro_batch"),
    [("sdpa", "bert", 5), ("eager", "gpt2", 1), ("sdpa", "vit", 5), ("sdpa", "llama", 5)],
)
def test_dropout_of_residuals_and_of_attention_equals_pytorch_with_the_same_masks(
    attention: str, name: str, micro_batch: int, tmp_path: Path
) -> None:
    make, changes, streams = DROPOUT[name]
    model = make(attention, **changes)
    inputs, target = batch(name, SAMPLES)
    loss = "token_cross_entropy" if name in CAUSAL else "cross_entropy"
    path = edge_razor.export(model, batch(name, 2)[0], tmp_path / "b", loss=loss)
    masks = SameMasks(seed=2**40 + 9, update=1)
    with masks.active():
        wanted, expected = torch_gradients(model.train(), inputs, target)
    assert masks.stream == streams
    with trainer_of(path, seed=masks.seed, micro_batch=micro_batch) as trainer:
        ours, found = moves(trainer, inputs, target)
        assert ours == pytest.approx(wanted, rel=1e-5)
        error, worst = errors(found, expected)
        assert error <= 2e-4, f"{worst} is off by {error:.1e}"
    with Bundle(path) as bundle:
        inference = onnx.load_model_from_string(bundle.read_file("inference.onnx")).graph
    assert not any("Dropout" in node.op_type for node in inference.node)


@pytest.mark.parametrize(
    ("name", "form", "attention"),
    [
        *((name, form, "recompute") for name in MODELS for form in ("centered", "plain")),
        *(
            (name, form, "probabilities")
            for name, form in (("bert", "plain"), ("llama", "centered"), ("vit", "centered"))
        ),
    ],
)
def test_one_step_at_sparsity_90_equals_the_definition(
    name: str, form: str, attention: str, bundles: Callable[[str, str], Path]
) -> None:
    """The training graph in float64 with everything kept as design.md defines it. An element on a threshold may fall on
    either side in float32, so single elements may differ, but not the whole."""
    inputs, target = batch(name, SAMPLES)
    path = bundles(name, "sdpa")
    with Bundle(path) as bundle:
        model = onnx.load_model_from_string(bundle.read_file("training.onnx"))
        parameters = {tensor: bundle.read_tensor(tensor) for tensor in bundle.tensors}
        orders = [(spec.name, spec.perm) for spec in bundle.manifest.inputs]
    arrays = {}
    for (label, order), value in zip(orders, inputs.values(), strict=True):
        indices = label == "input_ids"
        arrays[label] = np.transpose(value.numpy() if indices else value.numpy().astype(np.float32), order)
    expected = run_training_graph(model, arrays, target, parameters, sparsity=0.9, form=form, attention=attention)  # type: ignore[arg-type]
    with trainer_of(path, sparsity=0.9, razor=form, attention=attention) as trainer:
        kept = {row["form"] for row in trainer.plan.summary["kept"] if row["operator"] == "Attention"}
        assert kept == ({"rows"} if attention == "probabilities" else set())
        loss, found = moves(trainer, inputs, target)
    assert loss == pytest.approx(float(expected.loss), rel=1e-5)
    norm = sum(float((g**2).sum()) for g in expected.gradients.values()) ** 0.5
    difference = sum(float(((found[n] - g.numpy()) ** 2).sum()) for n, g in expected.gradients.items()) ** 0.5
    assert difference <= 5e-3 * norm, difference / norm


@pytest.mark.parametrize("name", ["mean_pooled", "gpt2", "llama"])
def test_micro_batches_give_the_update_of_the_whole_batch(name: str, bundles: Callable[[str, str], Path]) -> None:
    """The mean is over the targets that count, though micro-batches have different numbers of them."""
    inputs, target = batch(name, 6)
    states = []
    for micro in (6, 2, 1):
        with trainer_of(bundles(name, "sdpa"), batch_size=6, micro_batch=micro, momentum=0.0, lr=1.0) as trainer:
            states.append((trainer.step([v.numpy() for v in inputs.values()], target.numpy()), trainer.state_dict()))
    for loss, state in states[1:]:
        assert loss == pytest.approx(states[0][0], rel=1e-5)
        for key, value in state.items():
            np.testing.assert_allclose(value, states[0][1][key], rtol=1e-4, atol=2e-5, err_msg=key)


@pytest.mark.parametrize("name", MODELS)
def test_the_tuned_model_runs_in_onnxruntime_and_in_torch(
    name: str, bundles: Callable[[str, str], Path], tmp_path: Path
) -> None:
    inputs, target = batch(name, SAMPLES)
    arrays = [v.numpy() for v in inputs.values()]
    with trainer_of(bundles(name, "sdpa"), sparsity=0.9, lr=0.05) as trainer:
        for _ in range(3):
            trainer.step(arrays, target.numpy())
        ours = trainer.predict(arrays)
        trainer.to_onnx(tmp_path / "tuned.onnx")
        tuned = {key: torch.from_numpy(value) for key, value in trainer.state_dict().items()}
    session = onnxruntime.InferenceSession(tmp_path / "tuned.onnx")
    names = [port.name for port in session.get_inputs()]
    assert names == list(inputs)
    (stock,) = session.run(None, dict(zip(names, arrays, strict=True)))
    model = MODELS[name]("sdpa")
    model.load_state_dict(tuned)
    with torch.no_grad():
        result = model(**inputs)
    logits = (result if isinstance(result, Tensor) else result.logits).numpy()
    counted = target.numpy() != -100 if name in CAUSAL else slice(None)
    np.testing.assert_allclose(ours[counted], logits[counted], atol=2e-5, rtol=1e-4)
    np.testing.assert_allclose(stock[counted], logits[counted], atol=2e-5, rtol=1e-4)


def test_padding_does_not_matter(bundles: Callable[[str, str], Path]) -> None:
    """Neither what stands there, nor how the text before it is classified."""
    inputs, _ = batch("mean_pooled", SAMPLES)
    ids, mask = (v.numpy() for v in inputs.values())
    with trainer_of(bundles("mean_pooled", "sdpa")) as trainer:
        first = trainer.predict([ids, mask])
        again = trainer.predict([np.where(mask == 1, ids, 7), mask])
    np.testing.assert_array_equal(first, again)


def test_a_causal_model_computes_no_upper_blocks_and_no_masks(bundles: Callable[[str, str], Path]) -> None:
    for name in CAUSAL:
        with Bundle(bundles(name, "eager")) as bundle:
            graph = onnx.load_model_from_string(bundle.read_file("training.onnx")).graph
        nodes = [n for n in graph.node if n.op_type == "Attention"]
        assert len(nodes) == 2 and "Transpose" not in {n.op_type for n in graph.node}
        for node in nodes:
            assert node.input[3] == "attention_mask" and len(node.input) == 4  # no bias
            assert next(a.i for a in node.attribute if a.name == "causal") == 1
            assert next(a.i for a in node.attribute if a.name == "kv_heads") == (2 if name == "llama" else 4)


def test_one_kept_copy_for_the_three_projections(bundles: Callable[[str, str], Path]) -> None:
    with Bundle(bundles("bert", "sdpa")) as bundle:
        graph = onnx.load_model_from_string(bundle.read_file("training.onnx")).graph
    readers: dict[str, int] = {}
    for node in graph.node:
        if node.op_type == "LinearGradWeight" and ".attention.self." in str(node.output):
            readers[node.input[0]] = readers.get(node.input[0], 0) + 1
    assert sorted(readers.values()) == [3, 3]


def test_wrong_tokens_and_targets_are_refused_by_name(bundles: Callable[[str, str], Path]) -> None:
    inputs, target = batch("gpt2", SAMPLES)
    ids, mask = (v.numpy() for v in inputs.values())
    with trainer_of(bundles("gpt2", "sdpa")) as trainer:
        before = trainer.state_dict()
        high = ids.copy()
        high[3, 2] = VOCABULARY
        with pytest.raises(UsageError, match=r"'input_ids' has the index 97 in sample 3; the table has 0 to 96"):
            trainer.step([high, mask], target.numpy())
        with pytest.raises(UsageError, match="whole numbers"):
            trainer.step([ids.astype(np.float32), mask], target.numpy())
        with pytest.raises(UsageError, match=r"\[samples, 72\]"):
            trainer.predict([ids[:, :5], mask[:, :5]])
        with pytest.raises(UsageError, match="every target"):
            trainer.step([ids, mask], np.full_like(target.numpy(), -100))
        with pytest.raises(UsageError, match="label 97"):
            trainer.step([ids, mask], np.where(target.numpy() >= 0, VOCABULARY, -100))
        after = trainer.state_dict()
    assert all(np.array_equal(before[key], after[key]) for key in before)


def test_evaluation_gives_perplexity_over_the_targets_that_count(bundles: Callable[[str, str], Path]) -> None:
    inputs, target = batch("gpt2", SAMPLES)
    expected, _ = torch_gradients(MODELS["gpt2"]("sdpa"), inputs, target)
    arrays = [v.numpy() for v in inputs.values()]
    halves = [([a[:2] for a in arrays], target[:2].numpy()), ([a[2:] for a in arrays], target[2:].numpy())]
    with trainer_of(bundles("gpt2", "sdpa")) as trainer:
        result = trainer.evaluate(halves)
    assert result["loss"] == pytest.approx(expected, rel=1e-5)
    assert result["perplexity"] == pytest.approx(np.exp(expected), rel=1e-5)


def test_tied_embeddings_are_one_parameter(bundles: Callable[[str, str], Path]) -> None:
    with trainer_of(bundles("gpt2", "sdpa")) as trainer:
        names = [name for name in trainer.trainable if trainer.read_tensor(name).shape == (VOCABULARY, 32)]
        assert len(names) == 1
        state = trainer.state_dict()
    np.testing.assert_array_equal(state["lm_head.weight"], state["transformer.wte.weight"])


def test_models_are_as_before_after_export(tmp_path: Path) -> None:
    model = MODELS["llama"]("sdpa").train()
    edge_razor.export(model, batch("llama", 2)[0], tmp_path / "b", loss="token_cross_entropy")
    assert model.training and model.config.use_cache


class OwnMask(nn.Module):
    """Padding found in the tokens themselves: there is no key mask that could be an input."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        hidden = (x @ x.transpose(1, 2)).masked_fill((ids == 0)[:, None], -1e9)
        return self.head((hidden.softmax(-1) @ x).mean(1))


def test_a_mask_that_is_no_input_is_refused_with_the_node(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedOpError, match="mask"):
        edge_razor.export(OwnMask(), {"ids": torch.ones(2, TOKENS, dtype=torch.int64)}, tmp_path / "b")


def test_positional_arguments_and_a_boolean_mask(tmp_path: Path) -> None:
    model = MeanPooled()
    inputs, target = batch("mean_pooled", SAMPLES)
    ids, mask = inputs.values()
    path = edge_razor.export(model, (ids, mask), tmp_path / "b", dropout=False)
    loss, expected = torch_gradients(model, inputs, target)
    with trainer_of(path) as trainer:
        ours, found = moves(trainer, inputs, target)
        assert ours == pytest.approx(loss, rel=1e-5) and errors(found, expected)[0] <= 2e-4
        np.testing.assert_array_equal(
            trainer.predict([ids.numpy(), mask.numpy()]), trainer.predict([ids.numpy(), mask.bool().numpy()])
        )


class OtherAttention(nn.Module):
    """Attention that is none of the usual: linear (no softmax), then with a trained bias of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.bias = nn.Parameter(0.1 * torch.randn(1, 2, 10, 10))
        self.head = nn.Linear(8, 5)

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (2, 4)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.heads(f(x)) for f in (self.q, self.k, self.v))
        x = (q @ (k.transpose(2, 3) @ v) / 10).transpose(1, 2).flatten(2)
        y = self.heads(self.out(x))
        y = ((y @ y.transpose(2, 3) + self.bias).softmax(-1) @ v).transpose(1, 2).flatten(2)
        return self.head(y.mean(1))


@pytest.mark.parametrize("micro_batch", [5, 1])
def test_products_of_two_computed_values(micro_batch: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = OtherAttention(), torch.randn(SAMPLES, 10, 8)
    target = torch.arange(SAMPLES) % 5
    path = edge_razor.export(model, x, tmp_path / "b")
    with Bundle(path) as bundle:
        graph = onnx.load_model_from_string(bundle.read_file("training.onnx")).graph
    assert sum(n.op_type == "BatchMatMul" for n in graph.node) == 12  # four, and two gradients of each
    loss, expected = torch_gradients(model, {"x": x}, target)
    with trainer_of(path, micro_batch=micro_batch) as trainer:
        found_loss = trainer.step(x.numpy(), target.numpy())
        found = {name: trainer._session.read_state(name, 0) for name in trainer.trainable}
    assert found_loss == pytest.approx(loss, rel=1e-5)
    error, worst = errors(found, expected)
    assert error <= 2e-4, f"{worst} is off by {error:.1e}"


def test_products_of_other_shapes_are_refused_by_name(tmp_path: Path) -> None:
    class Broadcast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return (self.a(x)[:, None] @ self.b(x)[:, None].transpose(2, 3).expand(-1, 3, -1, -1)).flatten(1)

    with pytest.raises(UnsupportedOpError, match="Expand|not of one batch"):
        edge_razor.export(Broadcast(), torch.randn(2, 6, 4), tmp_path / "b")
