"""Tables and plots from figures that were measured before: no measuring here."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest

from benchmarks import common, growth, suite_report, turns
from benchmarks.growth import SPARSITIES, curves_of, errors_of, point, table
from benchmarks.instruction_sets import cases as isa_cases
from benchmarks.instruction_sets import row
from benchmarks.plots import STYLES, growth_curves, memory_against_time, thread_bars
from benchmarks.suite import CASES
from benchmarks.suite_report import HEADER, floor_seconds, loss_remarks, profile_table, system_rows
from benchmarks.turns import Case, Measured, take_turns

RATES = {"multiply_adds_per_second": 1e11, "bytes_per_second": 2e10}


def entry(label: str, system: str, *seconds: float, loss: float = 6.9, **more: Any) -> dict[str, Any]:
    work = {"work": more.pop("work")} if "work" in more else {}
    measured = Measured(label, system, list(seconds), [7.0, loss], peak_rss_bytes=123_400_000, **more)
    return measured.to_json() | work


def model() -> dict[str, Any]:
    kernels = [
        {"phase": "train", "kernel": "conv", "label": "", "calls": 10, "seconds": 0.03, "multiply_adds": 3 * 10**9,
         "bytes": 6 * 10**8},
        {"phase": "train", "kernel": "pack", "label": "", "calls": 5, "seconds": 0.01, "multiply_adds": 0,
         "bytes": 10**8},
    ]  # fmt: skip
    ours = entry(
        "edge-razor, centered 0.95", "edge-razor", 0.1, 0.3, 0.2, setup={"kept_bytes": 18_000_000, "arena_bytes": 59e6},
        profile=kernels, work={"multiply_adds": 5 * 10**9, "bytes": 10**9},
    )  # fmt: skip
    return {
        "machine": entry("machine", "machine", 1.0, figures=RATES),
        "systems": [
            ours,
            entry("PyTorch eager", "torch", 0.6, figures={"kept_bytes": 625_700_000}),
            entry("PyTorch eager, channels_last", "torch-channels-last", 0.4),
            entry("PyTorch, torch.compile", "torch-compile", error="InductorError: no C++ | compiler"),
            entry("onnxruntime-training", "onnxruntime-training", 0.8, loss=5.0),
            entry("onnxruntime, inference only", "onnxruntime", 0.05, loss=-0.01),
        ],
    }


def test_a_row_a_system_and_its_error_for_one_that_failed() -> None:
    rows = system_rows(model(), 8)
    assert {len(row) for row in rows} == {len(HEADER)}
    ours, eager, last, compiled, _, inference = rows
    assert ours == (
        "edge-razor, centered 0.95", "0.200", "0.100–0.300", "40.0", "2.00x", "4.00", "123", "18.0 (arena 59)", "0.100",
        "2.00",
    )  # fmt: skip
    assert eager[4:8] == ("0.67x", "12.00", "123", "625.7") and last[4] == "1.00x"
    assert compiled[:3] == ("PyTorch, torch.compile", "InductorError: no C++ / compiler", "–")
    assert inference[4:6] == ("–", "1.00") and inference[8:] == ("–", "–")


def test_rows_without_the_systems_that_others_are_compared_with() -> None:
    alone = model() | {"systems": model()["systems"][:1]}
    assert system_rows(alone, 8)[0][4:6] == ("–", "–")
    assert floor_seconds(model()["systems"][0], {}) is None


def test_a_system_that_found_another_loss_is_named() -> None:
    (remark,) = loss_remarks(model())
    assert (
        remark
        == "onnxruntime-training has the loss 5.00000 after one update, PyTorch eager 6.90000: not the same work."
    )


def test_the_kernel_table() -> None:
    lines = profile_table(model()["systems"][0]["profile"]).splitlines()
    assert lines[2] == "| conv | 2 | 6.00 | 3.000 | 75.0% | 200.0 | 20.0 |"
    assert lines[3] == "| pack | 1 | 2.00 | 2.000 | 25.0% | – | 10.0 |"


def test_the_suite_report_is_written_from_json_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (common, suite_report):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    settings = {"rounds": 3, "warm_up": 2, "threads": 2, "batch_size": 8, "size": 224}
    suite_report.write_report({"machine": "a machine, a date", "settings": settings, "models": {"resnet18": model()}})
    text = (tmp_path / "suite.md").read_text()
    for part in ("## resnet18", "200 GFLOP/s of sgemm, 20.0 GB/s", "## Kernels: resnet18", "a machine, a date"):
        assert part in text
    assert (tmp_path / "suite-resnet18.png").read_bytes()[:4] == b"\x89PNG"


def test_every_system_that_trains_has_a_colour_and_no_two_are_the_same() -> None:
    assert {case.label for case in CASES} - {"onnxruntime, inference only"} <= set(STYLES)
    marks = [STYLES[case.label] for case in CASES if case.label in STYLES]
    assert len(set(marks)) == len(marks)


# ---- Growth ----


def points() -> list[dict[str, Any]]:
    failed, eager = entry("PyTorch eager", "torch", error="MemoryError: x"), entry("PyTorch eager", "torch", 2)
    return [
        {"value": 1, "systems": [entry("edge-razor, sparsity 0", "edge-razor", 0.1), failed]},
        {"value": 8, "systems": [entry("edge-razor, sparsity 0", "edge-razor", 0.5), eager]},
    ]


def test_curves_leave_out_what_failed() -> None:
    assert curves_of("batch", points()) == {
        "edge-razor, sparsity 0": [(1, 0.1, 123_400_000), (8, 0.5, 123_400_000)],
        "PyTorch eager": [(8, 2, 123_400_000)],
    }
    assert errors_of(points()) == ["PyTorch eager at 1: MemoryError: x"]
    assert table("batch", points()).splitlines()[2:] == [
        "| edge-razor, sparsity 0 | s | 0.100 | 0.500 |",
        "|  | MB | 123 | 123 |",
        "| PyTorch eager | s | – | 2.000 |",
        "|  | MB | – | 123 |",
    ]


def test_sparsity_is_one_curve_beside_a_level_line() -> None:
    systems = [entry(f"{s:g}", "edge-razor", 1 + s, setup={"kept_bytes": 10**6}) for s in SPARSITIES]
    entries = [{"value": 0, "systems": [*systems, entry("PyTorch eager", "torch", 3)]}]
    curves = curves_of("sparsity", entries)
    assert [x for x, _, _ in curves["edge-razor, centered"]] == list(SPARSITIES)
    assert [p[:2] for p in curves["PyTorch eager"]] == [(0.0, 3), (0.97, 3)]
    assert "| edge-razor, 0.97 | 1.970 | 123 | 1.0 |" in table("sparsity", entries)


def test_the_default_point_is_the_same_on_every_axis() -> None:
    assert point("batch", 8) == point("resolution", 224) == point("threads", 2) == point("sparsity", 0.9)
    assert point("batch", 4) != point("batch", 8)


def test_the_growth_report_is_written_from_json_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (common, growth):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    content = {"machine": "a machine", "rounds": 5, "models": {"resnet18": {"batch": points(), "threads": points()}}}
    growth.write_report(content)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "growth-resnet18-batch.png", "growth-resnet18-threads.png", "growth.md",
    ]  # fmt: skip
    assert "- PyTorch eager at 1: MemoryError: x" in (tmp_path / "growth.md").read_text()


def test_plots_of_few_or_no_systems(tmp_path: Path) -> None:
    memory_against_time("m", [], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    growth_curves("t", "x", {"PyTorch eager": [(8, 2.0, 1e9)]}, tmp_path / "one.png", "log")
    thread_bars("t", {"PyTorch eager": [(2, 2.0)]}, tmp_path / "bar.png")
    assert (tmp_path / "one.png").stat().st_size > 1000 and (tmp_path / "bar.png").stat().st_size > 1000


def test_a_system_that_cannot_run_does_not_stop_the_others(tmp_path: Path) -> None:
    # Neither has a bundle, so that neither loads anything large; the model is never built.
    cases = [Case("no bundle", "edge-razor"), Case("no file", "onnxruntime")]
    results = take_turns(cases, "resnet18", ("--size", "8", "--bundle", str(tmp_path / "absent")), 1, 0)
    assert [r.label for r in results] == ["no bundle", "no file"]
    assert results[0].error is not None and "absent" in results[0].error and "\n" not in results[0].error
    assert results[1].error is not None and results[1].error != results[0].error


def test_a_case_has_its_own_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"  # stands in for the interpreter: its setup is what it finds in the environment
    python.write_text('#!/bin/sh\necho "{\\"error\\": \\"isa $EDGE_RAZOR_ISA\\"}"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setenv("EDGE_RAZOR_ISA", "inherited")
    own = Case("own", "edge-razor", (), (("EDGE_RAZOR_ISA", "avx2"),))
    assert [r.error for r in take_turns([own, Case("none", "torch")], "m", (), 1, 0)] == ["isa avx2", "isa inherited"]


def test_a_row_of_instruction_sets() -> None:
    ours, exact, eager, last = (Measured("", "", [seconds]) for seconds in (0.2, 0.25, 0.5, 0.4))
    assert row("m", "avx2", [ours, exact, eager, last])[1:] == ("AVX2", "0.200", "0.250", "0.400", "2.00x", "1.60x")
    lacking = Measured("", "", error="avx512: not | here")
    assert row("m", "avx512", [lacking, exact, eager, last]) == ("m", "AVX-512", "avx512: not / here", *4 * "–")
    assert [dict(case.environment).get("EDGE_RAZOR_ISA") for case in isa_cases("avx2")] == ["avx2", "avx2", None, None]


@pytest.mark.parametrize(("settle", "counted"), [(0.0, [3.0, 4.0]), (2.5, [4.0, 6.0])])
def test_of_short_steps_the_second_of_a_turn_counts(
    monkeypatch: pytest.MonkeyPatch, settle: float, counted: list[float]
) -> None:
    class Numbered:
        """A worker whose first step takes 2 seconds, the next one 3, and so on."""

        setup: ClassVar[dict[str, Any]] = {}

        def __init__(self) -> None:
            self.steps = 1.0

        def ask(self, command: str) -> dict[str, Any]:
            if command == "stop":
                return {"peak_rss_bytes": 1}
            self.steps += 1
            return {"seconds": self.steps, "loss": 0.0}

        def close(self) -> None:
            pass

    monkeypatch.setattr(turns, "_start", lambda *_: Numbered())
    monkeypatch.setattr(turns, "PAUSE", 0.0)
    (result,) = take_turns([Case("one", "torch")], "resnet18", (), rounds=2, warm_up=1, settle=settle)
    assert result.seconds == counted
    assert result.error is None
