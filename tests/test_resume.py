"""A stopped run and one that was never stopped end with the same bits, wherever it is stopped."""

from __future__ import annotations

import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edge_razor import DataError, NonFiniteError, Plan, Trainer, plan
from edge_razor.checkpoint import BUFFER_BYTES, Checkpoint, checkpoint_files
from edge_razor.checkpointing import Every, parse_every
from edge_razor.cli import main
from edge_razor.cli.progress import Progress
from edge_razor.data.loader import IterableLoader
from edge_razor.errors import CheckpointError, UsageError
from edge_razor.fit import Events, fit
from edge_razor.memory import rss_bytes
from edge_razor.metrics import MetricsLog
from edge_razor.training_state import SETTINGS, stored_settings
from tests.bundles import write_linear_bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_linear_bundle(tmp_path / "model.razor")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    x = generator.standard_normal((60, 6), dtype=np.float32)
    np.savez(tmp_path / "data.npz", x=x, y=(x @ generator.standard_normal((6, 3))).argmax(1))
    return tmp_path / "data.npz"


def batches(count: int = 6) -> list[tuple[np.ndarray, np.ndarray]]:
    generator = np.random.default_rng(0)
    return [(generator.standard_normal((8, 6), dtype=np.float32), np.arange(8) % 3) for _ in range(count)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """The plan of every trainer here: the bundles are the same, and planning would take most of the time."""
    bundle = write_linear_bundle(tmp_path_factory.mktemp("bundle") / "model.razor")
    return plan(bundle, mem_budget=None, sparsity=0.0, threads=1, optimizer="adamw", base_bytes=0)


def make(bundle: Path, made: Plan) -> Trainer:
    return Trainer(bundle, lr=0.1, schedule="linear", total_steps=30, plan=made)


def logged(out: Path) -> list[list[Any]]:
    keys = ("event", "update", "epoch", "loss", "lr", "validation")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [[line.get(key) for key in keys] for line in lines if line["event"] != "memory"]


class StopAfter:
    """`should_stop` that says yes from the n-th time on."""

    def __init__(self, questions: int) -> None:
        self.left = questions

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


def test_stopping_at_any_question_and_resuming_ends_with_the_same_bits_and_metrics(
    bundle: Path, made: Plan, tmp_path: Path
) -> None:
    """Between steps, while data are read, between epochs, and between the batches of an evaluation."""
    options: dict[str, Any] = {"epochs": 2, "log_every": 1, "validation": IterableLoader(batches(3))}
    with make(bundle, made) as trainer:
        fit(trainer, IterableLoader(batches()), out=tmp_path / "whole", **options)
    positions = set()
    for questions in range(100):
        out = tmp_path / f"run{questions}"
        with make(bundle, made) as trainer:
            events = Events(should_stop=StopAfter(questions))
            first = fit(trainer, IterableLoader(batches()), out=out, events=events, **options)
            positions.add(trainer.position)
        if not first.interrupted:
            break
        with Trainer.resume(out, plan=made) as trainer:
            result = fit(trainer, IterableLoader(batches()), out=out, **options)
        assert not result.interrupted
        assert checkpoint_files(out)[0].read_bytes() == checkpoint_files(tmp_path / "whole")[0].read_bytes()
        for ours, whole in zip(logged(out), logged(tmp_path / "whole"), strict=True):
            if ours[0] == "epoch" and ours[3] is None:  # the loss of an epoch of which no step was left
                whole[3] = None
            assert ours == whole
    assert questions > 20
    assert {(0, 6), (1, 0), (1, 6), (0, 3)} <= positions


def test_data_that_cannot_be_read_lose_no_step(bundle: Path, made: Plan, tmp_path: Path) -> None:
    def broken() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        yield from batches(4)
        raise DataError("photo.jpg: cannot be read")

    class Source:
        def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
            return broken()

    with make(bundle, made) as trainer, pytest.raises(DataError, match=r"photo\.jpg"):
        fit(trainer, IterableLoader(Source()), epochs=1, out=tmp_path / "run")
    assert Checkpoint(tmp_path / "run").state["position"] == [0, 4]


def test_checkpoints_come_every_so_many_steps_or_seconds_and_as_many_stay_as_asked(
    bundle: Path, made: Plan, tmp_path: Path
) -> None:
    def updates(every: Every, keep: int, on_step: Callable[[dict], None] = lambda figures: None) -> list[int]:
        out = tmp_path / f"run{time.monotonic_ns()}"
        with make(bundle, made) as trainer:
            fit(
                trainer,
                IterableLoader(batches(10)),
                epochs=1,
                out=out,
                checkpoint_every=every,
                keep=keep,
                events=Events(on_step=on_step),
            )
        return [Checkpoint(file).state["update"] for file in checkpoint_files(out)]

    assert updates(Every(steps=4), 4) == [10, 8, 4, 0]
    assert updates(Every(steps=4), 2) == [10, 8]
    now = [0.0]

    def tick(figures: dict) -> None:
        now[0] += 1.0

    assert updates(Every(seconds=3, clock=lambda: now[0]), 9, tick) == [10, 9, 6, 3, 0]


@pytest.mark.parametrize(
    ("text", "steps", "seconds"),
    [("500", 500, None), ("30s", None, 30), ("5m", None, 300), ("5min", None, 300), ("2h", None, 7200)],
)
def test_every_is_understood(text: str, steps: int | None, seconds: int | None) -> None:
    assert (parse_every(text).steps, parse_every(text).seconds) == (steps, seconds)


@pytest.mark.parametrize("text", ["0", "0s", "often", "-3", "5 days", ""])
def test_every_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="every N steps"):
        parse_every(text)


def test_a_damaged_newest_checkpoint_is_said_and_the_one_before_leads_to_the_same_end(
    bundle: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(out: Path, *more: str) -> None:
        command = ["train", str(bundle), "--data", str(data), "--out", str(out), "--threads", "1", "--epochs", "3"]
        assert main([*command, "--schedule", "constant", "--checkpoint-every", "4", *more]) == 0

    train(tmp_path / "whole")
    train(tmp_path / "run", "--epochs", "1")
    newest = checkpoint_files(tmp_path / "run")[0]
    content = bytearray(newest.read_bytes())
    content[-2] ^= 16
    newest.write_bytes(content)
    capsys.readouterr()
    train(tmp_path / "run", "--resume")
    error = capsys.readouterr().err
    assert f"warning: {newest}: is damaged: tensor 'optimizer/momentum/" in error
    assert "using checkpoint-00000004.safetensors" in error
    states = [Checkpoint(tmp_path / name) for name in ("whole", "run")]
    assert all(np.array_equal(states[0].read(n), states[1].read(n)) for n in states[0].tensors)
    assert logged(tmp_path / "whole")[-1] == logged(tmp_path / "run")[-1]
    assert not newest.exists()


def test_resuming_from_python_warns_of_a_damaged_checkpoint(bundle: Path, made: Plan, tmp_path: Path) -> None:
    with make(bundle, made) as trainer:
        trainer.save(tmp_path)
        trainer.step(*batches()[0])
        trainer.save(tmp_path)
    newest = checkpoint_files(tmp_path)[0]
    newest.write_bytes(newest.read_bytes()[:-1])
    with pytest.warns(RuntimeWarning, match=str(newest)), Trainer.resume(tmp_path, plan=made) as trainer:
        assert trainer.update == 0
        trainer.step(*batches()[0])
        trainer.step(*batches()[1])
        trainer.save(tmp_path)
    assert [Checkpoint(file).state["update"] for file in checkpoint_files(tmp_path)] == [2, 0]


def test_a_resumed_run_keeps_threads_and_cap_unless_told_otherwise(bundle: Path, data: Path, tmp_path: Path) -> None:
    command = ["train", str(bundle), "--data", str(data), "--out", str(tmp_path / "run"), "--schedule", "constant"]
    cap = rss_bytes() + 200_000_000  # a process that has run other tests may hold PyTorch
    assert main([*command, "--threads", "1", "--mem-budget", str(cap), "--epochs", "1"]) == 0

    def settings(*more: str) -> tuple[Any, Any]:
        assert main([*command, "--resume", *more]) == 0
        state = Checkpoint(tmp_path / "run").state["settings"]
        return state["threads"], state["mem_budget"]

    assert settings("--epochs", "2") == (1, cap)
    assert settings("--epochs", "3", "--threads", "2", "--mem-budget", str(cap + 1_000_000)) == (2, cap + 1_000_000)


def test_every_argument_of_a_trainer_is_kept_in_checkpoints_or_said_not_to_be() -> None:
    """A new argument must be put into the table of settings, or here."""
    arguments = set(inspect.signature(Trainer.__init__).parameters) - {"self"}
    of_the_moment = {"bundle", "plan", "data_bytes", "spill_dir"}  # where things are now
    in_the_choices = {"allow_freeze", "harm"}  # the planner's choices are kept, and taken again
    assert set(SETTINGS) == arguments - of_the_moment - in_the_choices


def test_a_checkpoint_without_a_setting_is_damaged_and_an_older_one_is_not(
    bundle: Path, made: Plan, tmp_path: Path
) -> None:
    with make(bundle, made) as trainer:
        trainer.save(tmp_path)
        settings = trainer.settings()
    with Checkpoint(tmp_path) as checkpoint:
        assert stored_settings(checkpoint) == settings
        for name in SETTINGS:
            checkpoint.state["settings"] = {key: value for key, value in settings.items() if key != name}
            if name in ("attention", "frozen_weights"):  # of the first release with checkpoints there was no choice
                assert name not in stored_settings(checkpoint)
            else:
                with pytest.raises(CheckpointError, match=f"lacks the setting '{name}'"):
                    stored_settings(checkpoint)


# Each option of `train` that decides what is computed, at another value than its default.
EVERY_OPTION = {
    "--lr": "0.05", "--schedule": "linear", "--warmup": "3", "--batch-size": "4", "--sparsity": "auto",
    "--prefer": "exact", "--allow-freeze": "1", "--razor": "plain", "--attention": "probabilities",
    "--frozen-weights": "int8", "--optimizer": "adamw", "--momentum": "0.8", "--nesterov": None,
    "--weight-decay": "0.01", "--threads": "1", "--betas": "0.8 0.99", "--eps": "1e-6", "--val-split": "0.2",
    "--seed": "5", "--epochs": "2", "--checkpoint-every": "3", "--keep": "3", "--log-every": "1",
}  # fmt: skip
OF_FILES = {"--mem-budget", "--harm", "--data", "--out", "--spill-dir"}  # given below
OF_NO_EFFECT = {
    "--help", "--plan", "--resume", "--nice", "--max-cpu", "--pause-on-battery", "--max-temperature", "--profile",
    "--skip-bad", "--flip", "--random-crop", "--text-column", "--label-column", "--no-truncate",
}  # fmt: skip


# No run can have all of them: AdamW has no Nesterov momentum, kept probabilities need one sparsity for all.
@pytest.mark.parametrize(
    ("left_out", "sparsity"),
    [({"--optimizer", "--attention"}, "auto"), ({"--nesterov", "--prefer", "--allow-freeze"}, "0.5")],
    ids=["sgd", "adamw"],
)
def test_a_run_with_every_option_resumes_to_the_same_bits(
    left_out: set[str],
    sparsity: str,
    bundle: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["train", "--help"]) == 0
    options = set(re.findall(r"^  (?:-\w, )?(--[a-z-]+)", capsys.readouterr().out, re.MULTILINE))
    assert options == set(EVERY_OPTION) | OF_FILES | OF_NO_EFFECT
    errors = {"0": {"relative_error": 0.0}, "0.9": {"relative_error": 0.3}}
    table = {name: {"norm": 1.0, "errors": errors} for name in ("fc.weight", "fc.bias")}
    (tmp_path / "harm.json").write_text(json.dumps({"version": 1, "razor": "plain", "parameters": table}))
    cap = rss_bytes() + 200_000_000  # a process that has run other tests may hold PyTorch
    command = ["train", str(bundle), "--data", str(data), "--mem-budget", str(cap), "--spill-dir", str(tmp_path)]
    command += ["--harm", str(tmp_path / "harm.json")]
    for name, value in {**EVERY_OPTION, "--sparsity": sparsity}.items():
        command += [] if name in left_out else [name, *(value or "").split()]
    assert main([*command, "--out", str(tmp_path / "whole")]) == 0
    step = Progress.step

    def stop(progress: Progress, figures: dict[str, Any]) -> None:
        step(progress, figures)
        if progress.done == 5:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "step", stop)
        assert main([*command, "--out", str(tmp_path / "parts")]) == 143
    assert main([*command, "--out", str(tmp_path / "parts"), "--resume"]) == 0
    whole, parts = (checkpoint_files(tmp_path / name)[0] for name in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()
    assert Checkpoint(whole).state["settings"]["frozen_weights"] == "int8"


@pytest.mark.parametrize(
    "change", [{"epochs": 0}, {"epochs": "3"}, {"val_split": 5.0}, {"val_split": None}, {"flip": 1}]
)
def test_a_recipe_that_is_none_is_damage(
    change: dict[str, Any], bundle: Path, made: Plan, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = {"epochs": 2, "val_split": 0.1, "flip": False, "random_crop": False, **change}
    with make(bundle, made) as trainer:
        trainer.save(tmp_path / "run", recipe=recipe)
    command = ["train", str(bundle), "--data", str(data), "--out", str(tmp_path / "run"), "--resume"]
    assert main(command) == CheckpointError.exit_status
    assert "what it says of the run's data is not valid" in capsys.readouterr().err


def test_a_finished_run_that_was_killed_at_its_very_end_is_put_in_order(
    bundle: Path, data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = ["train", str(bundle), "--data", str(data), "--out", str(run), "--epochs", "1"]
    assert main(command) == 0
    log = run / "metrics.jsonl"
    whole, checkpoints = log.read_bytes(), [file.read_bytes() for file in checkpoint_files(run)]
    with log.open("ab") as file:
        file.write(b'{"event": "memory", "u')
    assert main([*command, "--resume"]) == 0
    assert log.read_bytes() == whole
    assert [file.read_bytes() for file in checkpoint_files(run)] == checkpoints


def test_a_data_set_that_has_grown_is_said(
    bundle: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", str(bundle), "--data", str(data), "--out", str(tmp_path / "run"), "--schedule", "constant"]
    assert main([*command, "--epochs", "1"]) == 0
    arrays = np.load(data)
    np.savez(data, x=np.concatenate([arrays["x"], arrays["x"][:4]]), y=np.concatenate([arrays["y"], arrays["y"][:4]]))
    assert main([*command, "--epochs", "2", "--resume"]) == 0
    assert "has 64 samples, and had 60 when the run began" in capsys.readouterr().err


def test_a_save_takes_a_fixed_buffer_and_no_copy_of_a_tensor(tmp_path: Path) -> None:
    bundle = write_linear_bundle(tmp_path / "large.razor", features=20_000, classes=100)  # 8 MB, and 16 MB of state
    program = f"""
import numpy as np
from edge_razor import Trainer
from edge_razor.memory import rss_bytes
t = Trainer({str(bundle)!r}, sparsity=0.0, threads=1, optimizer="adamw")
t.step(np.ones((8, 20000), np.float32), np.zeros(8, int))
import edge_razor.run_lock, json, zlib
t.save({str(tmp_path / "warm")!r})  # imports, and what Python keeps
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # VmHWM starts anew
before = rss_bytes()
t.save({str(tmp_path / "run")!r})
print(t.peak_rss_bytes - before)
"""
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True)
    assert int(done.stdout) <= BUFFER_BYTES + (256 << 10)
    assert checkpoint_files(tmp_path / "run")[0].stat().st_size > 24_000_000


def test_the_log_of_a_cut_off_run_is_taken_up_without_a_hole_or_a_repetition(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for update in (1, 2, 3):
        log.write("step", update, epoch=0)
    log.write("epoch", 3, epoch=0)
    log.write("step", 4, epoch=1)
    log.close()
    with open(path, "a") as file:
        file.write('{"event": "step", "upd')
    for resume_at, expected in (((4, 1), 5), ((3, 1), 4), ((3, 0), 3), ((2, 0), 2)):
        MetricsLog(path, resume_at).close()
        assert len(path.read_text().splitlines()) == expected


def test_a_loss_that_is_not_finite_is_not_saved(bundle: Path, tmp_path: Path) -> None:
    huge = [(x * np.float32(1e30), y) for x, y in batches()]
    with Trainer(bundle, sparsity=0.0, lr=1e30, threads=1) as trainer, pytest.raises(NonFiniteError):
        fit(trainer, IterableLoader(huge), epochs=1, out=tmp_path / "run")
    assert Checkpoint(tmp_path / "run").state["update"] == 0


# ---- With what decides the order and the pixels of data ----


def test_augmented_images_stopped_in_the_middle_of_an_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = np.random.default_rng(0)
    for label in ("dark", "light"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for i in range(10):
            pixels = generator.integers(0, 255, (24, 30, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / label / f"{i}.png")
    (tmp_path / "resume_nets.py").write_text(
        "import torch\n"
        "def net():\n"
        "    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, 2, 1), torch.nn.ReLU(), torch.nn.Dropout(0.3),\n"
        "        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 2))\n"
    )
    monkeypatch.chdir(tmp_path)
    command = ["export", "resume_nets:net", "-o", "net.razor", "--input", "3x16x16", "--imagenet"]
    assert main([*command, "--classes", "dark,light"]) == 0
    train = ["train", "net.razor", "--data", "photos", "--threads", "1", "--epochs", "3", "--flip", "--random-crop"]
    train += ["--batch-size", "4", "--optimizer", "adamw", "--sparsity", "0.5", "--lr", "0.01"]
    assert main([*train, "--out", "whole"]) == 0
    step = Progress.step

    def stop(progress: Progress, figures: dict[str, Any]) -> None:
        step(progress, figures)
        if progress.done == 7:  # of 18 samples, 4 at a time: the second batch of the second epoch
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "step", stop)
        assert main([*train, "--out", "parts"]) == 143
    assert Checkpoint("parts").state["position"] == [1, 2]
    assert main([*train, "--out", "parts", "--resume"]) == 0
    assert checkpoint_files("whole")[0].read_bytes() == checkpoint_files("parts")[0].read_bytes()


# ---- Signals outside of the steps ----

SLOW = """
import sys, time
import edge_razor.{module} as module
original = module.{name}
def slow(*arguments, **options):
    print("there", flush=True)
    time.sleep(60)
    return original(*arguments, **options)
module.{name} = slow
from edge_razor.cli import main
from edge_razor.cli.progress import Progress
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("module", "name"), [("cli.train", "open_source"), ("trainer", "plan_in_child")])
def test_a_signal_before_training_ends_at_once_and_leaves_nothing(
    bundle: Path, data: Path, tmp_path: Path, number: signal.Signals, module: str, name: str
) -> None:
    program = SLOW.format(module=module, name=name)
    command = [sys.executable, "-c", program, "train", str(bundle), "--data", str(data), "--out", str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert any("there" in line for line in process.stdout)
    process.send_signal(number)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert error == "error: interrupted\n"
    assert not (tmp_path / "run").exists()


def test_a_signal_while_a_checkpoint_is_written_lets_it_end(
    bundle: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync
    calls = []

    def interrupted(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 15:
            signal.raise_signal(signal.SIGINT)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", interrupted)
    command = ["train", str(bundle), "--data", str(data), "--out", str(tmp_path / "run"), "--threads", "1"]
    assert main([*command, "--checkpoint-every", "1"]) == 130
    monkeypatch.undo()
    assert Checkpoint(tmp_path / "run").damaged == {}
    assert main([*command, "--resume"]) == 0
