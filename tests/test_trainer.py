"""The trainer on a real plan and the native runtime: steps, checks of what callers hand over, resuming, export back."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file

from edge_razor import CheckpointError, NonFiniteError, PlanError, Trainer, UsageError, export, plan
from edge_razor.memory import rss_bytes
from edge_razor.metrics import correct_count, loss_sum
from edge_razor.schedule import Schedule
from tests.bundles import linear_tensors, write_linear_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_linear_bundle(tmp_path_factory.mktemp("bundle") / "model.razor")


def batch(count: int = 8, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    return generator.standard_normal((count, 6), dtype=np.float32), generator.integers(0, 3, count)


def trainer(bundle: Path, **options: object) -> Trainer:
    return Trainer(bundle, **{"sparsity": 0.0, "lr": 0.1, "threads": 1, **options})  # type: ignore[arg-type]


class Reference(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(6, 3)
        self.register_buffer("steps", torch.tensor(0))
        self.tied = torch.nn.Module()
        self.tied.weight = self.fc.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


@pytest.fixture
def reference() -> Reference:
    model = Reference()
    tensors = {n: torch.from_numpy(a) for n, a in linear_tensors().items()}
    model.load_state_dict({**tensors, "tied.weight": tensors["fc.weight"]})
    return model


def test_pixels_mean_x_over_255_where_the_bundle_names_no_normalization(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4 * 3 * 4, 2))
    export(model, (torch.zeros(1, 3, 5, 6),), tmp_path / "pixels.razor")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 5, 6), dtype=np.uint8)
    expected = model(torch.from_numpy(pixels) / 255).detach().numpy()
    with trainer(tmp_path / "pixels.razor") as ours:
        for given in (pixels, pixels.transpose(0, 2, 3, 1)):
            np.testing.assert_allclose(ours.predict(given), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("ours", "make"),
    [
        ({"momentum": 0.0}, lambda p: torch.optim.SGD(p, 0.1)),
        ({"momentum": 0.9, "weight_decay": 0.01}, lambda p: torch.optim.SGD(p, 0.1, 0.9, weight_decay=0.01)),
        ({"momentum": 0.9, "nesterov": True}, lambda p: torch.optim.SGD(p, 0.1, 0.9, nesterov=True)),
        (
            {"optimizer": "adamw", "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1},
            lambda p: torch.optim.AdamW(p, 0.1, (0.8, 0.9), 1e-6, 0.1),
        ),
    ],
)
def test_training_follows_torch_and_its_schedule(bundle: Path, reference: Reference, ours: dict, make: object) -> None:
    optimizer = make(reference.parameters())  # type: ignore[operator]
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
    with trainer(bundle, schedule="cosine", total_steps=6, **ours) as t:
        for step in range(6):
            x, y = batch(5 if step == 3 else 8, step)  # a short batch in the middle
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(reference(torch.from_numpy(x)), torch.from_numpy(y))
            loss.backward()
            optimizer.step()
            scheduler.step()
            assert t.step(x, y) == pytest.approx(loss.item(), rel=1e-5)
        for name, tensor in reference.named_parameters():
            # six float32 updates: a few rounding errors of values around 1
            np.testing.assert_allclose(t.state_dict()[name], tensor.detach().numpy(), atol=3e-6)


def test_predict_and_evaluate_take_any_number_of_samples(bundle: Path, reference: Reference) -> None:
    x, y = batch(37)
    with torch.no_grad():
        logits = reference(torch.from_numpy(x))
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(y)).item()
    with trainer(bundle) as t:
        np.testing.assert_allclose(t.predict(x), logits.numpy(), atol=1e-6)
        result = t.evaluate([(x[:30], y[:30]), (x[30:], y[30:])])
        assert result["samples"] == 37
        assert result["loss"] == pytest.approx(loss, rel=1e-6)
        assert result["accuracy"] == pytest.approx(float((logits.argmax(1).numpy() == y).mean()))
        with pytest.raises(UsageError, match="nothing to evaluate"):
            t.evaluate([])


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.int64, np.uint64])
def test_labels_of_any_integer_type_are_the_same(bundle: Path, dtype: type) -> None:
    x, y = batch()
    with trainer(bundle) as a, trainer(bundle) as b:
        assert a.step(x, y) == b.step(x.astype(np.float64), y.astype(dtype))


def wrong_batches() -> list[tuple[object, object, str]]:
    x, y = batch()
    nan, infinite = x.copy(), x.copy()
    nan[5, 1], infinite[0, 0] = np.nan, -np.inf
    return [
        (x[:, :5], y, r"'input' has shape \[8, 5\], the model needs \[samples, 6\]"),
        (x[0], y[0], r"has shape \[6\]"),
        (np.float32(1), y, r"has shape \[\]"),
        (x[:0], y[:0], "no samples"),
        (x.astype(int), y, "has type int64; give float32"),
        (x.astype(complex), y, "has type complex128"),
        ([x, x], y, r"the model has 1 inputs \(input\), not 2"),
        (nan, y, "NaN or infinity in sample 5"),
        (infinite, y, "NaN or infinity in sample 0"),
        (x, y[:7], r"targets have shape \[7\], cross_entropy needs \[8\]"),
        (x, y.astype(np.float32), "needs whole numbers"),
        (x, y > 1, "needs whole numbers"),
        (x, np.where(np.arange(8) == 6, 3, y), "label 3 of sample 6 is out of range: the model has classes 0 to 2"),
        (x, np.where(np.arange(8) == 2, -1, y), "label -1 of sample 2"),
        (x, np.where(np.arange(8) == 2, 2**40, y), f"label {2**40} of sample 2"),
        (*batch(9), "a batch of 9 samples, but the plan is for at most 8"),
    ]


@pytest.mark.parametrize(("inputs", "targets", "message"), wrong_batches())
def test_a_wrong_batch_is_refused_and_changes_nothing(
    bundle: Path, inputs: object, targets: object, message: str
) -> None:
    with trainer(bundle) as t:
        before = t.state_dict()
        with pytest.raises(UsageError, match=message):
            t.step(inputs, targets)  # type: ignore[arg-type]
        assert t.update == 0
        assert all(np.array_equal(before[n], a) for n, a in t.state_dict().items())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": -1.0}, UsageError, "learning rate"),
        ({"lr": math.nan}, UsageError, "learning rate"),
        ({"seed": -1}, UsageError, "seed"),
        ({"schedule": "step"}, UsageError, "constant, cosine, linear"),
        ({"schedule": "cosine"}, UsageError, "needs total_steps"),
        ({"warmup_steps": 5, "total_steps": 5}, UsageError, "must exceed"),
        ({"optimizer": "lion"}, UsageError, "lion"),
        ({"sparsity": 1.5}, UsageError, "sparsity"),
        ({"razor": "round"}, UsageError, "round"),
        ({"batch_size": 0}, UsageError, "atch"),
    ],
)
def test_wrong_settings_are_refused(bundle: Path, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        trainer(bundle, **options)


def test_a_loss_that_is_not_finite_names_the_step_and_keeps_the_weights(bundle: Path) -> None:
    with trainer(bundle, lr=1e30) as t:
        x, y = batch()
        t.step(x, y)
        t.lr = 1e38
        with pytest.raises(NonFiniteError, match=r"training stopped at step \d"):
            for _ in range(5):
                t.step(x * 1e20, (y + 1) % 3)


def test_a_checkpoint_with_infinite_weights_never_replaces_a_good_one(bundle: Path, tmp_path: Path) -> None:
    with trainer(bundle) as t:
        t.save(tmp_path)
        t.load_state_dict({**t.state_dict(), "fc.bias": np.array([1, np.inf, 0], np.float32)})
        with pytest.raises(NonFiniteError, match=r"fc\.bias"):
            t.save(tmp_path)
        with Trainer.resume(tmp_path, threads=1) as resumed:
            assert np.array_equal(resumed.read_tensor("fc.bias"), linear_tensors()["fc.bias"])


@pytest.mark.parametrize("options", [{"momentum": 0.0}, {"momentum": 0.9}, {"optimizer": "adamw"}])
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(bundle: Path, tmp_path: Path, options: dict) -> None:
    with trainer(bundle, schedule="linear", total_steps=9, warmup_steps=2, seed=4, **options) as whole:
        losses = []
        for step in range(8):
            if step == 4:
                whole.position = (1, 2)
                whole.save(tmp_path, note="kept")
            losses.append(whole.step(*batch(seed=step)))
        with Trainer.resume(tmp_path, threads=1) as resumed:
            assert (resumed.update, resumed.position) == (4, (1, 2))
            assert [resumed.step(*batch(seed=step)) for step in range(4, 8)] == losses[4:]
            for name, array in whole.state_dict().items():
                assert np.array_equal(resumed.state_dict()[name], array)


def test_a_resumed_run_keeps_the_planners_choices(bundle: Path, tmp_path: Path) -> None:
    cap = rss_bytes() + 300_000_000  # this process holds what earlier tests loaded
    with trainer(bundle, sparsity="auto", prefer="fast", mem_budget=cap) as first:
        first.step(*batch())
        first.save(tmp_path)
        choices = first.plan.summary["choices"]
    assert choices is not None
    with Trainer.resume(tmp_path, threads=1, mem_budget=cap + 300_000_000) as resumed:
        assert resumed.plan.summary["choices"] == choices
        assert resumed.plan.summary["prefer"] == "fast"


def test_a_checkpoint_of_another_bundle_is_refused(bundle: Path, tmp_path: Path) -> None:
    other = write_linear_bundle(tmp_path / "other.razor", classes=4)
    with trainer(bundle) as t:
        t.save(tmp_path / "run")
    with pytest.raises(CheckpointError, match="belongs to another bundle"):
        Trainer.resume(tmp_path / "run", other)


def test_a_moved_bundle_can_be_named(tmp_path: Path) -> None:
    made = write_linear_bundle(tmp_path / "a.razor")
    with trainer(made) as t:
        t.save(tmp_path / "run")
    made.rename(tmp_path / "b.razor")
    with pytest.raises(CheckpointError, match="is gone; name the bundle's present path"):
        Trainer.resume(tmp_path / "run")
    Trainer.resume(tmp_path / "run", tmp_path / "b.razor").close()


def test_a_plan_for_another_bundle_is_refused(bundle: Path, tmp_path: Path) -> None:
    other = write_linear_bundle(tmp_path / "other.razor", classes=4)
    made = plan(other, mem_budget=None, base_bytes=0)
    with pytest.raises(PlanError, match="made for another bundle"):
        Trainer(bundle, plan=made)
    with Trainer(other, plan=made) as t:
        assert t.plan is made


def test_to_torch_loads_strictly_with_buffers_and_tied_weights(
    bundle: Path, tmp_path: Path, reference: Reference
) -> None:
    with trainer(bundle) as t:
        t.step(*batch())
        t.to_torch(tmp_path / "tuned.safetensors")
        tuned = load_file(tmp_path / "tuned.safetensors")
        reference.load_state_dict(tuned, strict=True)
        assert reference.steps.item() == 7  # type: ignore[operator]
        assert torch.equal(tuned["tied.weight"], tuned["fc.weight"])
        assert not np.array_equal(tuned["fc.weight"].numpy(), linear_tensors()["fc.weight"])


def test_to_onnx_runs_in_stock_onnxruntime_from_one_file(bundle: Path, tmp_path: Path) -> None:
    with trainer(bundle) as t:
        t.step(*batch())
        t.to_onnx(tmp_path / "tuned.onnx")
        session = onnxruntime.InferenceSession((tmp_path / "tuned.onnx").read_bytes())
        x, _ = batch(3)
        np.testing.assert_allclose(session.run(None, {"input": x})[0], t.predict(x), atol=1e-6)
        with pytest.raises(Exception, match="to-onnx: .*nowhere"):
            t.to_onnx(tmp_path / "nowhere" / "tuned.onnx")


def test_load_state_dict_checks_before_it_changes_anything(bundle: Path) -> None:
    with trainer(bundle) as t:
        good = t.state_dict()
        with pytest.raises(UsageError, match=r"has no 'fc\.bias'"):
            t.load_state_dict({"fc.weight": good["fc.weight"] + 1})
        with pytest.raises(UsageError, match=r"'fc\.bias' has shape \[4\], the model needs \[3\]"):
            t.load_state_dict({**good, "fc.weight": good["fc.weight"] + 1, "fc.bias": np.zeros(4)})
        assert all(np.array_equal(good[n], a) for n, a in t.state_dict().items())
        with pytest.raises(UsageError, match="no tensor 'nothing'"):
            t.read_tensor("nothing")


def test_training_loads_neither_onnx_nor_torch_and_stays_under_its_cap(bundle: Path, tmp_path: Path) -> None:
    program = f"""
import sys
import numpy as np
import edge_razor
t = edge_razor.Trainer({os.fspath(bundle)!r}, mem_budget="100MB", threads=1)
x, y = np.ones((8, 6), np.float32), np.zeros(8, int)
for _ in range(3):
    t.step(x, y)
t.evaluate([(x, y)]); t.save({os.fspath(tmp_path)!r}); t.to_onnx({os.fspath(tmp_path / "m.onnx")!r})
heavy = [m for m in ("torch", "onnx", "google.protobuf", "PIL", "rich") if m in sys.modules]
print(heavy, t.peak_rss_bytes <= t.plan.predicted_peak_bytes <= 100_000_000)
"""
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout == "[] True\n"


# ---- Schedules and metrics ----


def test_schedules_are_torchs() -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], 1.0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    ours = Schedule("cosine", 0, 10)
    for update in range(1, 11):
        assert ours.factor(update) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        cosine.step()


def test_warm_up_rises_to_the_full_rate_and_no_update_has_rate_zero() -> None:
    for kind in ("constant", "cosine", "linear"):
        factors = [Schedule(kind, 3, 10).factor(t) for t in range(1, 13)]
        assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
        assert min(factors) > 0
        assert factors[3:] == sorted(factors[3:], reverse=True)
    assert Schedule("linear", 0, 4).factor(4) == 0.25
    assert Schedule().factor(10**9) == 1.0


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 3, 2)])
def test_cross_entropy_of_evaluation_is_torchs(smoothing: float, shape: tuple[int, ...]) -> None:
    generator = np.random.default_rng(0)
    outputs = generator.standard_normal(shape, dtype=np.float32) * 10
    targets = generator.integers(0, 4, (shape[0], *shape[2:]))
    expected = torch.nn.functional.cross_entropy(
        torch.from_numpy(outputs), torch.from_numpy(targets), label_smoothing=smoothing
    ).item()
    assert np.divide(*loss_sum("cross_entropy", outputs, targets, smoothing)) == pytest.approx(expected, rel=1e-5)
    last = loss_sum("cross_entropy", np.moveaxis(outputs, 1, -1), targets, smoothing, class_axis=outputs.ndim - 1)
    assert np.divide(*last) == pytest.approx(expected, rel=1e-5)


def test_other_losses_of_evaluation_are_torchs() -> None:
    generator = np.random.default_rng(0)
    outputs = generator.standard_normal((5, 4), dtype=np.float32) * 50
    targets = generator.random((5, 4), dtype=np.float32)
    x, y = torch.from_numpy(outputs), torch.from_numpy(targets)
    assert np.divide(*loss_sum("mse", outputs, targets)) == pytest.approx(
        torch.nn.functional.mse_loss(x, y).item(), rel=1e-5
    )
    expected = torch.nn.functional.binary_cross_entropy_with_logits(x, y).item()
    assert np.divide(*loss_sum("bce_with_logits", outputs, targets)) == pytest.approx(expected, rel=1e-5)
    assert correct_count("mse", outputs, targets) == (0, 0)
    assert correct_count("bce_with_logits", outputs, (outputs > 0).astype(np.float32)) == (5, 5)
