"""The command line: what each command prints and writes, and one clear error with its exit status for each misuse."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from PIL import Image
from safetensors.numpy import load_file

from edge_razor.checkpoint import Checkpoint
from edge_razor.cli import main
from edge_razor.cli.progress import Progress
from edge_razor.planner import refusal
from tests.bundles import write_linear_bundle

COMMANDS = ("export", "info", "plan", "train", "fidelity", "eval", "to-onnx", "to-torch", "demo")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_linear_bundle(tmp_path / "model.razor")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    x = generator.standard_normal((60, 6), dtype=np.float32)
    np.savez(tmp_path / "data.npz", x=x, y=(x @ generator.standard_normal((6, 3))).argmax(1))
    return tmp_path / "data.npz"


def succeed(*arguments: object) -> None:
    assert main([str(a) for a in arguments]) == 0


def fail(capsys: pytest.CaptureFixture[str], status: int, *arguments: object) -> str:
    """Runs a command that must fail; returns its error, which is one or two lines and no traceback."""
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == status
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert len(error.splitlines()) <= 2
    assert "Traceback" not in error
    return error


def train(bundle: Path, data: Path, out: Path, *more: object) -> tuple[object, ...]:
    return ("train", bundle, "--data", data, "--out", out, "--lr", 0.3, "--threads", 1, *more)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shows_an_example_in_its_help(capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert main([command, "--help"]) == 0
    assert f"edge-razor {command}" in capsys.readouterr().out.partition("example:")[2]


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == "edge-razor 0.1.0\n"
    assert main(["--help"]) == 0
    assert all(command in capsys.readouterr().out for command in COMMANDS[:1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["plan"], "required: BUNDLE"),
        (["plan", "m", "--batch-size", "0"], "--batch-size: must be at least 1, not 0"),
        (["plan", "m", "--batch-size", "many"], "--batch-size: invalid whole number value: 'many'"),
        (["train", "m", "--data", "d", "--lr", "nan"], "--lr: must be at least 0"),
        (["train", "m"], "required: --data"),
        (["train", "m", "--data", "d", "--optimizer", "lion"], "invalid choice: 'lion'"),
        (["export", "m:f", "-o", "x", "--input", "3*4"], "'3[*]4' is no shape"),
        (["export", "m:f", "-o", "x", "--input", "0x4"], "'0x4' is no shape"),
        (["export", "nocolon", "-o", "x", "--input", "3x4"], "neither a .onnx file nor package.module:factory"),
        (["export", "m:f", "-o", "x", "--input", "4", "--imagenet"], "--imagenet needs --input 3x"),
        (["export", "m:f", "-o", "x", "--classes", "a,a"], "gives no names, or one twice"),
    ],
)
def test_misuse_is_status_2_and_says_what_is_wrong(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    import re

    assert re.search(message, fail(capsys, 2, *arguments))


def test_info_shows_what_the_bundle_holds(capsys: pytest.CaptureFixture[str], bundle: Path) -> None:
    succeed("info", bundle)
    shown = capsys.readouterr().out
    for text in ("N x 6", "N x 3", "cross_entropy", "all: 2 tensors, 21 values"):
        assert text in shown


def test_plan_shows_every_item_and_they_add_up(
    capsys: pytest.CaptureFixture[str], bundle: Path, tmp_path: Path
) -> None:
    succeed("plan", bundle, "--mem-budget", "400MB", "--json", "-o", tmp_path / "m.plan")
    summary = json.loads(capsys.readouterr().out)
    assert sum(summary["items"].values()) == summary["predicted_peak_bytes"] <= 400_000_000
    succeed("plan", bundle, "--mem-budget", "400MB")
    shown = capsys.readouterr().out
    assert all(item in shown for item in (*summary["items"], "predicted peak", "cap"))
    assert (tmp_path / "m.plan").read_bytes()[:8] == b"EDGERZR\n"


def test_a_cap_that_cannot_be_met_is_status_3_and_names_one_that_works(
    capsys: pytest.CaptureFixture[str], bundle: Path
) -> None:
    assert "the smallest that works" in fail(capsys, 3, "plan", bundle, "--mem-budget", "1MB")
    assert "not understood" in fail(capsys, 2, "plan", bundle, "--mem-budget", "1XB")


def test_a_refusal_lists_what_other_settings_would_bring(
    capsys: pytest.CaptureFixture[str], bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refusal, "WORTHWHILE", 1.0)  # the model is a few hundred bytes
    capsys.readouterr()
    assert main(["plan", str(bundle), "--mem-budget", "1MB", "--optimizer", "adamw", "--prefer", "exact"]) == 3
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: the cap of 1.00 MB cannot be met")
    assert all(text in captured.err for text in ("smallest cap", "gradient error", "seconds a step", "optimizer sgd"))


def test_plan_shows_preferences_and_refuses_a_bad_harm_table(
    capsys: pytest.CaptureFixture[str], bundle: Path, tmp_path: Path
) -> None:
    succeed("plan", bundle, "--mem-budget", "400MB", "--prefer", "fast", "--allow-freeze", 1)
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("gradient error", "seconds a step", "kept values"))
    assert "the linear relaxation" in shown
    succeed("plan", bundle, "--prefer", "exact")
    assert "1.00 x those of --prefer balanced" in capsys.readouterr().out
    (tmp_path / "harm.json").write_text("{}")
    assert "harm.json" in fail(capsys, 4, "plan", bundle, "--harm", tmp_path / "harm.json")
    assert "exact" in fail(capsys, 2, "plan", bundle, "--prefer", "exact", "--sparsity", 0.9)


def test_train_eval_and_both_exports(
    capsys: pytest.CaptureFixture[str], bundle: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    succeed(*train(bundle, data, out, "--epochs", 4, "--log-every", 2, "--mem-budget", "2GB", "--profile"))
    shown = capsys.readouterr().out
    for text in (
        "predicted peak",
        "54 training samples, 6 for validation, 28 steps",
        "epoch 4",
        "peak resident",
        "time by kernel",
        " slowest steps",
        "GFLOP/s",
        "sgd",
    ):
        assert text in shown
    assert sorted(p.name for p in out.iterdir()) == [
        ".lock",
        "checkpoint",
        "metrics.jsonl",
        "plan.json",
        "report.html",
    ]
    page = (out / "report.html").read_text()
    assert "error of the gradient" in page and "recompute_level" not in page
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines if line["event"] == "step"] == [1, *range(2, 29, 2)]
    epochs = [line for line in lines if line["event"] == "epoch"]
    assert [line["epoch"] for line in epochs] == [0, 1, 2, 3]
    assert epochs[-1]["validation"]["loss"] < epochs[0]["validation"]["loss"]

    succeed("eval", out, "--data", data, "--json")
    evaluated = json.loads(capsys.readouterr().out)
    succeed("to-onnx", out, "-o", tmp_path / "tuned.onnx")
    succeed("to-torch", out, "-o", tmp_path / "tuned.safetensors")
    arrays = np.load(data)
    session = onnxruntime.InferenceSession((tmp_path / "tuned.onnx").read_bytes())
    hits = session.run(None, {"input": arrays["x"]})[0].argmax(1) == arrays["y"]
    assert evaluated["accuracy"] == pytest.approx(hits.mean()) and hits.mean() > 0.7
    assert list(load_file(tmp_path / "tuned.safetensors")) and load_file(tmp_path / "tuned.safetensors")["steps"] == 7


def test_a_stopped_and_resumed_run_ends_where_an_uninterrupted_one_does(
    capsys: pytest.CaptureFixture[str], bundle: Path, data: Path, tmp_path: Path
) -> None:
    succeed(*train(bundle, data, tmp_path / "whole", "--epochs", 3, "--schedule", "constant"))
    succeed(*train(bundle, data, tmp_path / "parts", "--epochs", 1, "--schedule", "constant"))
    assert "add --resume" in fail(capsys, 2, *train(bundle, data, tmp_path / "parts"))
    changed = train(bundle, data, tmp_path / "parts", "--resume", "--momentum", 0.5)
    assert "the run has momentum 0.9, not 0.5" in fail(capsys, 2, *changed)
    succeed(*train(bundle, data, tmp_path / "parts", "--resume", "--epochs", 3))
    whole, parts = Checkpoint(tmp_path / "whole"), Checkpoint(tmp_path / "parts")
    assert whole.state["update"] == parts.state["update"] == 21
    assert all(np.array_equal(whole.read(name), parts.read(name)) for name in whole.tensors)
    lines = [json.loads(x)["update"] for x in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert lines == sorted(lines)
    capsys.readouterr()
    succeed(*train(bundle, data, tmp_path / "parts", "--resume"))
    assert "nothing is left to train" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_saves_and_resumes_without_a_seam(
    bundle: Path, data: Path, tmp_path: Path, number: signal.Signals
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    options = ("--epochs", 200, "--schedule", "constant", "--log-every", 1)
    command = [sys.executable, "-m", "edge_razor", *map(str, train(bundle, data, out, *options))]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + 60
    while not (out / "metrics.jsonl").exists() or (out / "metrics.jsonl").stat().st_size < 2000:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "go on with --resume" in error and "Traceback" not in error
    stopped = Checkpoint(out).state
    assert 0 < stopped["update"] < 1400
    epochs = stopped["position"][0] + 2
    succeed(*train(bundle, data, out, "--resume", "--epochs", epochs))
    succeed(*train(bundle, data, whole, "--epochs", epochs, "--schedule", "constant"))
    a, b = Checkpoint(whole), Checkpoint(out)
    assert all(np.array_equal(a.read(name), b.read(name)) for name in a.tensors)


def test_a_run_stopped_behind_the_last_step_of_an_epoch_goes_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, bundle: Path, data: Path, tmp_path: Path
) -> None:
    out, whole, step = tmp_path / "run", tmp_path / "whole", Progress.step

    def stop_at_the_end(progress: Progress, figures: dict[str, Any]) -> None:
        step(progress, figures)
        if progress.done == 7:  # of 54 samples, 8 at a time
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "step", stop_at_the_end)
        assert main([str(a) for a in train(bundle, data, out, "--epochs", 1)]) == 128 + signal.SIGTERM
    assert Checkpoint(out).state["position"] == [0, 7]
    capsys.readouterr()
    succeed(*train(bundle, data, out, "--resume", "--epochs", 1))
    assert "epoch 1: no step was left, validation loss" in capsys.readouterr().out
    assert Checkpoint(out).state["position"] == [1, 0]
    succeed(*train(bundle, data, whole, "--epochs", 1))
    a, b = Checkpoint(whole), Checkpoint(out)
    assert all(np.array_equal(a.read(name), b.read(name)) for name in a.tensors)


def test_a_loss_that_is_not_finite_stops_with_status_4_and_keeps_the_last_good_checkpoint(
    capsys: pytest.CaptureFixture[str], bundle: Path, data: Path, tmp_path: Path
) -> None:
    arrays = np.load(data)
    np.savez(tmp_path / "huge.npz", x=arrays["x"] * np.float32(1e30), y=arrays["y"])
    arguments = train(bundle, tmp_path / "huge.npz", tmp_path / "run", "--lr", 1e30)
    error = fail(capsys, 4, *arguments)
    assert "step" in error
    checkpoint = Checkpoint(tmp_path / "run")
    assert all(np.isfinite(checkpoint.read(name)).all() for name in checkpoint.tensors)


def test_bad_files_are_status_4_and_named(
    capsys: pytest.CaptureFixture[str], bundle: Path, data: Path, tmp_path: Path
) -> None:
    assert "no such bundle" in fail(capsys, 4, "info", tmp_path / "nowhere.razor")
    assert "no checkpoint" in fail(capsys, 4, "eval", tmp_path / "nowhere", "--data", data)
    assert "no checkpoint to resume" in fail(capsys, 4, *train(bundle, data, tmp_path / "run", "--resume"))
    assert "no such file or folder" in fail(capsys, 4, *train(bundle, tmp_path / "nothing", tmp_path / "run"))
    assert "m.plan" in fail(capsys, 4, *train(bundle, data, tmp_path / "run", "--plan", tmp_path / "m.plan"))
    (tmp_path / "file").write_text("in the way")
    assert "file" in fail(capsys, 4, *train(bundle, data, tmp_path / "file" / "run"))
    assert "file: is a file; --out names a directory" in fail(capsys, 4, *train(bundle, data, tmp_path / "file"))
    assert not (tmp_path / "run").exists()


def test_a_plan_made_ahead_is_used_and_one_for_another_bundle_refused(
    capsys: pytest.CaptureFixture[str], bundle: Path, data: Path, tmp_path: Path
) -> None:
    succeed("plan", bundle, "--batch-size", 5, "--threads", 1, "-o", tmp_path / "m.plan")
    succeed(*train(bundle, data, tmp_path / "run", "--plan", tmp_path / "m.plan", "--epochs", 1))
    assert Checkpoint(tmp_path / "run").state["settings"]["batch_size"] == 5
    other = write_linear_bundle(tmp_path / "other.razor", classes=4)
    arguments = train(other, data, tmp_path / "run2", "--plan", tmp_path / "m.plan")
    assert "another bundle" in fail(capsys, 4, *arguments)


def test_the_bundle_of_a_run_may_move(
    capsys: pytest.CaptureFixture[str], bundle: Path, data: Path, tmp_path: Path
) -> None:
    succeed(*train(bundle, data, tmp_path / "run", "--epochs", 1))
    bundle.rename(tmp_path / "moved.razor")
    assert "is gone" in fail(capsys, 4, "to-torch", tmp_path / "run", "-o", tmp_path / "t.safetensors")
    succeed("to-torch", tmp_path / "run", "-o", tmp_path / "t.safetensors", "--bundle", tmp_path / "moved.razor")


# ---- With the real exporter and images ----

MODEL = """
import torch
def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, 2, 1), torch.nn.BatchNorm2d(8), torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 2))
def broken():
    raise RuntimeError("no weights")
"""


@pytest.fixture
def images(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for label, level in (("dark", 60), ("light", 190)):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for i in range(12):
            pixels = (level + generator.integers(-50, 50, (20, 24, 3))).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / label / f"{i}.png")
    return tmp_path / "photos"


@pytest.fixture
def exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "nets.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    succeed("export", "nets:net", "-o", "net.razor", "--input", "3x16x16", "--imagenet", "--classes", "dark,light")
    return tmp_path / "net.razor"


def test_images_from_export_to_tuned_onnx(
    capsys: pytest.CaptureFixture[str], exported: Path, images: Path, tmp_path: Path
) -> None:
    options = ("--flip", "--random-crop", "--epochs", 12, "--sparsity", 0.5, "--val-split", 0.25)
    succeed(*train(exported, images, tmp_path / "run", *options))
    succeed("eval", tmp_path / "run", "--data", images, "--json")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["accuracy"] == 1.0
    succeed("to-onnx", tmp_path / "run", "-o", tmp_path / "tuned.onnx")
    session = onnxruntime.InferenceSession((tmp_path / "tuned.onnx").read_bytes())
    assert session.run(None, {session.get_inputs()[0].name: np.zeros((3, 3, 16, 16), np.float32)})[0].shape == (3, 2)


def test_a_corrupt_image_stops_or_is_skipped_and_counted(
    capsys: pytest.CaptureFixture[str], exported: Path, images: Path, tmp_path: Path
) -> None:
    bad = images / "dark" / "3.png"
    bad.write_bytes(bad.read_bytes()[:100])
    assert "3.png: cannot be read" in fail(capsys, 4, *train(exported, images, tmp_path / "a", "--epochs", 1))
    succeed(*train(exported, images, tmp_path / "b", "--epochs", 1, "--skip-bad"))
    assert "1 unreadable samples were left out" in capsys.readouterr().err


def test_a_factory_that_fails_is_one_clear_error(capsys: pytest.CaptureFixture[str], exported: Path) -> None:
    error = fail(capsys, 2, "export", "nets:broken", "-o", "x.razor", "--input", "3x16x16")
    assert "no weights" in error
    assert "has no 'missing'" in fail(capsys, 2, "export", "nets:missing", "-o", "x.razor", "--input", "3x16x16")
    assert "needs --input" in fail(capsys, 2, "export", "nets:net", "-o", "x.razor")
    assert not Path("x.razor").exists()


def test_the_live_display_needs_a_terminal_and_works_on_one(bundle: Path, data: Path, tmp_path: Path) -> None:
    pty = pytest.importorskip("pty", reason="pseudo-terminals are POSIX")
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "edge_razor", *map(str, train(bundle, data, tmp_path / "run", "--epochs", 2))]
    environment: dict[str, Any] = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen(command, stdout=follower, stderr=follower, env=environment)
    os.close(follower)
    shown = b""
    while True:
        try:
            part = os.read(leader, 4096)
        except OSError:  # how Linux reports that the other side has closed
            break
        if not part:
            break
        shown += part
    os.close(leader)
    assert process.wait(timeout=60) == 0
    assert b"samples/s" in shown and b"14/14" in shown and b"epoch 2" in shown
