"""Pauses for power and heat, with sensors and a clock of the test's own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from edge_razor import Trainer, UsageError
from edge_razor.checkpoint import Checkpoint
from edge_razor.data.loader import IterableLoader
from edge_razor.fit import Events, fit
from edge_razor.throttle import SystemSensors, Throttle, parse_share
from tests.bundles import write_linear_bundle


class World:
    """A clock that moves when somebody sleeps, and sensors that follow a script of (until second, value)."""

    def __init__(self, degrees: object = None, battery: object = None) -> None:
        self.now = 0.0
        self.degrees = degrees or [(1e9, 20.0)]
        self.battery = battery or [(1e9, False)]

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def temperature(self) -> float | None:
        return next(value for until, value in self.degrees if self.now < until)  # type: ignore[attr-defined]

    def on_battery(self) -> bool:
        return next(value for until, value in self.battery if self.now < until)  # type: ignore[attr-defined]

    def throttle(self, **options: object) -> Throttle:
        return Throttle(sensors=self, clock=self.clock, sleep=self.sleep, **options)  # type: ignore[arg-type]


def test_a_share_of_the_time_is_kept_step_by_step() -> None:
    world = World()
    throttle = world.throttle(max_cpu=0.25)
    for _ in range(10):
        world.now += 2.0
        throttle.between_steps()
    assert world.now == pytest.approx(80.0)
    assert throttle.paused_seconds == pytest.approx(60.0)


def test_heat_pauses_once_with_the_reason_and_ends_only_well_below_the_limit() -> None:
    world = World(degrees=[(10, 79.0), (20, 81.0), (40, 77.0), (60, 76.0), (1e9, 74.9)])
    throttle = world.throttle(max_temperature=80.0)
    said: list[str] = []
    for _ in range(6):
        world.now += 3.0
        throttle.between_steps(on_pause=said.append, on_resume=said.append)
    assert said == ["81 degrees, the limit is 80", "going on after a pause of 48 s"]
    assert throttle.paused_seconds == pytest.approx(48.0, abs=2.1)
    said.clear()
    world.degrees = [(1e9, 79.0)]  # below the limit again: no pause
    world.now += 10
    throttle.between_steps(on_pause=said.append)
    assert said == []


def test_a_battery_pauses_until_the_plug_is_back_and_heat_below_its_limit_does_not_prolong_it() -> None:
    world = World(battery=[(50, True), (1e9, False)], degrees=[(1e9, 78.0)])
    throttle = world.throttle(pause_on_battery=True, max_temperature=80.0)
    said: list[str] = []
    throttle.between_steps(on_pause=said.append, on_resume=said.append)
    assert said == ["running on battery", "going on after a pause of 50 s"]


def test_a_request_to_stop_ends_a_pause_at_once() -> None:
    world = World(battery=[(1e9, True)])
    throttle = world.throttle(pause_on_battery=True)
    throttle.between_steps(should_stop=lambda: world.now > 7)
    assert world.now == pytest.approx(7.1, abs=0.2)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"max_cpu": 0.0}, "max_cpu"), ({"max_cpu": 1.5}, "max_cpu"), ({"max_temperature": float("nan")}, "degrees")],
)
def test_values_out_of_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        World().throttle(**options)


def test_a_temperature_that_nothing_measures_is_refused() -> None:
    world = World(degrees=[(1e9, None)])
    with pytest.raises(UsageError, match="reports no temperature; leave --max-temperature out"):
        world.throttle(max_temperature=80.0)


@pytest.mark.parametrize("text", ["0%", "101%", "half", "-5%", "nan", ""])
def test_a_share_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="share of the time"):
        parse_share(text)


def write(root: Path, files: dict[str, str]) -> SystemSensors:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return SystemSensors(root)


@pytest.mark.skipif(sys.platform != "linux", reason="/sys is Linux's")
def test_linux_sensors_are_read_and_broken_ones_left_out(tmp_path: Path) -> None:
    assert SystemSensors(tmp_path).temperature() is None
    assert not SystemSensors(tmp_path).on_battery()
    sensors = write(
        tmp_path,
        {
            "thermal/thermal_zone0/temp": "45500",
            "thermal/thermal_zone1/temp": "-273000",
            "thermal/thermal_zone2/temp": "none",
            "hwmon/hwmon0/temp1_input": "61000",
            "hwmon/hwmon0/temp2_input": "127500",
        },
    )
    assert sensors.temperature() == 61.0


@pytest.mark.skipif(sys.platform != "linux", reason="/sys is Linux's")
@pytest.mark.parametrize(
    ("status", "plugged", "scope", "expected"),
    [
        ("Discharging", "0", "", True),
        ("Discharging", "1", "", False),
        ("Charging", "1", "", False),
        ("Full", "0", "", False),
        ("Discharging", "0", "Device", False),
    ],
)
def test_linux_batteries(tmp_path: Path, status: str, plugged: str, scope: str, expected: bool) -> None:
    sensors = write(
        tmp_path,
        {
            "power_supply/BAT0/type": "Battery",
            "power_supply/BAT0/status": status,
            "power_supply/BAT0/scope": scope,
            "power_supply/AC/type": "Mains",
            "power_supply/AC/online": plugged,
        },
    )
    assert sensors.on_battery() is expected


# ---- In a training run ----


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_linear_bundle(tmp_path / "model.razor")


def batches(count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    generator = np.random.default_rng(0)
    return [(generator.standard_normal((8, 6), dtype=np.float32), np.arange(8) % 3) for _ in range(count)]


def test_pauses_are_said_saved_and_in_the_metrics_but_not_in_the_throughput(bundle: Path, tmp_path: Path) -> None:
    world = World(battery=[(3, False), (1000, True), (1e9, False)])
    throttle, said, saved = world.throttle(pause_on_battery=True), [], []
    out = tmp_path / "run"

    def say(text: str) -> None:
        said.append((text, Checkpoint(out).state["update"] if out.exists() else None))

    def step(figures: dict) -> None:
        world.now += 1.0
        saved.append(figures["paused_seconds"])

    with Trainer(bundle, sparsity=0.0, threads=1) as trainer:
        events = Events(on_step=step, on_message=say)
        result = fit(
            trainer, IterableLoader(batches(8)), epochs=1, out=out, log_every=1, throttle=throttle, events=events
        )
    texts = [text for text, _ in said]
    assert texts == ["paused: running on battery", "going on after a pause of 998 s"]
    assert said[1][1] == 3  # the checkpoint of the step before the pause was there when it ended
    assert result.paused_seconds == pytest.approx(997, abs=3)
    assert result.steps == 8 and result.samples == 64
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["paused_seconds"] for line in lines[:3]] == [0.0, 0.0, 0.0]
    ends = [line for line in lines if line["event"] == "epoch"]
    assert len(ends) == 1 and ends[0]["paused_seconds"] == pytest.approx(997, abs=3)


def test_a_pause_does_not_change_a_bit(bundle: Path) -> None:
    states = []
    for throttle in (None, World(battery=[(5, True), (1e9, False)]).throttle(pause_on_battery=True, max_cpu=0.1)):
        with Trainer(bundle, sparsity=0.0, threads=1) as trainer:
            fit(trainer, IterableLoader(batches(6)), epochs=1, throttle=throttle)
            states.append(trainer.state_dict())
    assert all(np.array_equal(states[0][name], states[1][name]) for name in states[0])


def test_an_evaluation_pauses_too(bundle: Path) -> None:
    world = World()
    throttle = world.throttle(max_cpu=0.5)
    paused: list[float] = []
    with Trainer(bundle, sparsity=0.0, threads=1) as trainer:
        trainer_predict = trainer.predict

        def predict(inputs: object) -> np.ndarray:
            world.now += 1.0
            return trainer_predict(inputs)  # type: ignore[arg-type]

        trainer.predict = predict  # type: ignore[method-assign]
        fit(trainer, IterableLoader(batches(1)), epochs=1, validation=IterableLoader(batches(4)), throttle=throttle)
        paused.append(throttle.paused_seconds)
    assert paused == [pytest.approx(4.0)]


def test_nice_lowers_the_priority_and_the_command_line_takes_all_of_it(bundle: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=np.ones((40, 6), np.float32), y=np.arange(40) % 3)
    command = [sys.executable, "-m", "edge_razor", "train", str(bundle), "--data", str(tmp_path / "data.npz")]
    command += ["--out", str(tmp_path / "run"), "--threads", "1", "--nice", "7", "--max-cpu", "5%", "--epochs", "200"]
    command += ["--pause-on-battery"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    waited = threading.Event()
    for _ in range(1200):
        if process.poll() is not None or (metrics.exists() and metrics.stat().st_size):
            break
        waited.wait(0.05)
    before = os.getpriority(os.PRIO_PROCESS, 0)
    assert os.getpriority(os.PRIO_PROCESS, process.pid) == min(19, before + 7)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    assert process.stderr is not None
    assert "go on with --resume" in process.stderr.read()
