"""Rates of the device: measured once, cached, and never a reason to fail."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edge_razor.planner import calibrate as module
from edge_razor.planner.cost import (
    CLASSES,
    DEFAULT_RATES,
    Rates,
    program_seconds,
    shape_class,
    step_bytes,
    step_seconds,
)
from edge_razor.planner.program import Buffer, Step
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


def test_two_rates_are_found_and_neither_is_beyond_what_was_seen() -> None:
    points = [(work, moved, work / 60e9 + moved / 10e9) for work, moved in ((3e8, 6e6), (4e7, 1e7), (2e7, 1e6))]
    assert module._two_rates(points) == pytest.approx((60e9, 10e9))
    # Only bytes matter: multiply-adds get a twentieth of the step that has most of them for its time.
    only = [(work, moved, moved / 10e9) for work, moved in ((1e7, 1e7), (1e8, 1e7))]
    rate, bytes_rate = module._two_rates(only)
    assert rate == pytest.approx(1e8 / 0.05e-3) and 10e9 < bytes_rate < 10.6e9
    for work, moved, seconds in only:
        assert work / rate + moved / bytes_rate == pytest.approx(seconds, rel=0.05)


@pytest.mark.parametrize(
    ("conv", "expected"),
    [
        ([2, 14, 14, 64, 14, 14, 32, 1, 1, 1, 1, 0, 0, 1, 1, 1], "product"),
        ([2, 14, 14, 64, 14, 14, 32, 3, 3, 1, 1, 1, 1, 1, 1, 1], "winograd"),
        ([2, 14, 14, 3, 14, 14, 32, 3, 3, 1, 1, 1, 1, 1, 1, 1], "convolution"),
        ([2, 14, 14, 64, 7, 7, 32, 3, 3, 2, 2, 1, 1, 1, 1, 1], "convolution"),
        ([2, 14, 14, 64, 14, 14, 64, 3, 3, 1, 1, 1, 1, 1, 1, 64], "depthwise"),
    ],
)
def test_a_convolution_costs_its_work_and_what_it_moves(conv: list[int], expected: str) -> None:
    n, ih, iw, ic, oh, ow, oc, kh, kw, *_, group = conv
    x, w, y = (4 * s for s in (n * ih * iw * ic, kh * kw * ic // group * oc, n * oh * ow * oc))
    step = Step("conv", "", [*conv, 0, 0], [], [Buffer("", x), Buffer("", w), None, None, Buffer("", y), None])
    assert shape_class(step) == expected
    patches = 4 * n * oh * ow * kh * kw * ic if expected == "convolution" else 0
    free = Rates(dict.fromkeys(CLASSES, 1e30))
    once = Rates({**free.rates, expected: 1e9, f"{expected} bytes": 2e9})
    spent = n * oh * ow * oc * kh * kw * (ic // group) / 1e9 + (x + w + y + patches) / 2e9
    assert step_seconds(step, once) - step_seconds(step, free) == pytest.approx(spent)


def test_an_embedding_reads_rows_and_not_its_table() -> None:
    def step(vocabulary: int) -> Step:
        operands: list[Buffer | None] = [Buffer("", s) for s in (4 * 6, 4 * vocabulary * 8, 4 * 6 * 8)]
        return Step("embedding", "", [6, vocabulary, 8, 0], [], operands)

    assert step_bytes(step(10)) == step_bytes(step(10_000)) == 4 * 6 + 2 * 4 * 6 * 8


def test_a_device_is_measured_once_for_each_number_of_threads(cache: Path, counted: list[int]) -> None:
    first = module.device_rates(1)
    assert module.device_rates(1) == first and first.source == "calibrated"
    module.device_rates(2)
    assert counted == [1, 2] and len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"version": 3, "rates": {}}', "nan", "other device", "binary"])
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
