"""Rates of the device: measured once, cached, and never a reason to fail."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edge_razor.planner import calibrate as module
from edge_razor.planner.cost import CLASSES, DEFAULT_RATES, Rates, program_seconds
from edge_razor.planner.search import Search

from .conftest import graph_of, settings
from .networks import Built, Network


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv(module.SWITCH, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "edge-razor"


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Calibrations that were run, which take no time here."""
    runs: list[int] = []

    def measured(threads: int) -> dict[str, float]:
        runs.append(threads)
        return {name: 1e9 * (1 + len(runs)) for name in CLASSES}

    monkeypatch.setattr(module, "calibrate", measured)
    return runs


def test_every_class_gets_a_rate_above_zero() -> None:
    rates = module.calibrate(1)
    assert rates.keys() == set(CLASSES) and all(rate > 0 for rate in rates.values())


def test_a_device_is_measured_once_for_each_number_of_threads(cache: Path, counted: list[int]) -> None:
    first = module.device_rates(1)
    assert module.device_rates(1) == first and first.source == "calibrated"
    module.device_rates(2)
    assert counted == [1, 2] and len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"version": 2, "rates": {}}', "nan", "other device", "binary"])
def test_a_damaged_cache_is_measured_again(cache: Path, counted: list[int], damage: str) -> None:
    module.device_rates(1)
    (path,) = cache.iterdir()
    data = json.loads(path.read_text())
    if damage == "nan":
        path.write_text(json.dumps(data | {"rates": data["rates"] | {"bytes": float("nan")}}))
    elif damage == "other device":
        path.write_text(json.dumps(data | {"device": "another"}))
    elif damage == "binary":
        path.write_bytes(b"\xff\x00")
    else:
        path.write_text(damage)
    again = module.device_rates(1)
    assert counted == [1, 1] and again.rates["bytes"] == 3e9
    assert module.device_rates(1) == again and len(counted) == 2


def test_a_cache_that_cannot_be_written_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: list[int]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.delenv(module.SWITCH, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert module.device_rates(1).source == "calibrated"


def test_calibration_can_be_switched_off(cache: Path, counted: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(module.SWITCH, "off")
    rates = module.device_rates(2)
    assert rates.source == "default" and not counted and not cache.exists()
    assert rates.rates == {name: 2 * rate for name, rate in DEFAULT_RATES.items()}


def test_faster_kernels_make_a_plan_shorter(mobile: tuple[Network, Built]) -> None:
    train = Search(graph_of(mobile[1]), settings()).candidate(0.9, 8).train.steps
    assert program_seconds(train, Rates.default(4)) < program_seconds(train, Rates.default(1))
