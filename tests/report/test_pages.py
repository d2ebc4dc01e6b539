"""The pages: what they hold, that nothing from a bundle can act in them, and how a real browser shows them."""

from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from edge_razor.fidelity import Fidelity, Sums
from edge_razor.planner import Plan
from edge_razor.planner.planning import plan_graph
from edge_razor.planner.timeline import read_timeline
from edge_razor.report.chart import Chart, Series, ticks
from edge_razor.report.fidelity_page import fidelity_page
from edge_razor.report.markup import element
from edge_razor.report.plan_page import plan_page
from edge_razor.report.run_page import POINTS, run_page, smoothed, thinned
from tests.planner.conftest import mobile_network, settings
from tests.report.browser import CHROMIUM, examine, load

EVIL = "</script><script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)>\"'&"


@pytest.fixture(scope="module")
def plan() -> Plan:
    built = mobile_network(32)[1]
    items = {"process_bytes": 2_000_000, "data_bytes": 300_000, "growth_bytes": 100_000}
    return plan_graph(built.training, built.manifest, settings(sparsity=0.9, **items), 4_000_000)


def events() -> list[dict[str, Any]]:
    steps = [
        {
            "event": "step",
            "update": i,
            "loss": 2 / i + 0.1 * (i % 2),
            "samples_per_second": 50.0,
            "rss_bytes": 3_000_000,
        }
        for i in range(1, 41)
    ]
    epochs = [
        {"event": "epoch", "update": u, "validation": {"loss": 2.2 / u, "accuracy": 0.5}, "peak_rss_bytes": 3_100_000}
        for u in (20, 40)
    ]
    memory = [
        {
            "event": "memory",
            "update": u,
            "peak_rss_bytes": 3_200_000,
            "samples": [[t / 10, 2_900_000 + t] for t in range(9)],
        }
        for u in (20, 40)
    ]
    return [*steps, *epochs, *memory]


def run_text(plan: Plan, **changes: Any) -> str:
    arguments: dict[str, Any] = {"events": events(), "settings": {"lr": 0.1, "betas": [0.9, 0.99], "cap": None}}
    return run_page("flowers", plan.summary, plan.binary, **(arguments | changes))


def fidelity_text() -> str:
    sums = {name: {s: Sums(1, 1, 1 - s / 9, s / 4) for s in (0.5, 0.9)} for name in ("a.weight", "a.bias", "b.weight")}
    curves = {0.0: [2.0, 1.5, 1.0], 0.9: [2.0, 1.6, 1.2]}
    return fidelity_page("flowers", Fidelity("centered", 2, 8, 8, 1.5, 10**7, sums, curves))


class Outline(HTMLParser):
    """Counts elements, and collects text and whatever points outside of the page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: dict[str, int] = {}
        self.outside: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.outside += [f"{tag} {name}" for name, _ in attributes if name in ("src", "href") or name.startswith("on")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_plan_page_holds_memory_arena_kept_values_and_accounting(plan: Plan) -> None:
    page = Outline(plan_page("flowers", plan.summary, plan.binary))
    for text in ("Plan of flowers", "Memory over the steps", "Arena map", "Kept for the backward pass", "cap 4.00 MB"):
        assert text in page.text
    assert all(item in page.text for item, size in plan.summary["items"].items() if size)
    assert page.tags["rect"] == len(read_timeline(plan.binary).stays) + 1
    assert page.tags["tr"] > len(plan.summary["kept"])
    assert all(row["layer"] in page.text for row in plan.summary["kept"])
    assert page.outside == []


def test_harm_and_place_are_shown_where_the_summary_has_them(plan: Plan) -> None:
    summary = copy.deepcopy(plan.summary)
    for row in summary["kept"]:
        row.pop("harm", None)
    assert ">harm<" not in plan_page("m", summary, plan.binary)
    summary["kept"][0] |= {"harm": 0.0123, "place": "recompute", "bytes": 0}
    text = plan_page("m", summary, plan.binary)
    assert ">harm<" in text and "0.0123" in text and "made again" in text


def test_what_is_nearly_exact_is_not_called_exact(plan: Plan) -> None:
    summary = plan.summary | {"sparsity": 0.0, "choices": {}, "harm": 1e-8, "gradient_error": 1e-4}
    summary |= {"solver": "HiGHS 1.16.0", "gap": 0.25, "objective": "harm", "slowdown": 1.5}
    text = Outline(plan_page("m", summary, plan.binary)).text
    assert "kept exactly" not in text and "storage chosen for each value" in text and "< 0.001" in text
    assert "bound on harm is 25.0% lower" in text and "1.50× those of balanced" in text
    exact = summary | {"harm": 0.0, "gradient_error": 0.0, "solver": "none", "kept": []}
    assert "kept exactly" in Outline(plan_page("m", exact, plan.binary)).text


def test_a_plan_that_keeps_nothing_in_memory_says_what_it_would_be_dense(plan: Plan) -> None:
    row = plan.summary["kept"][0] | {"bytes": 0, "place": "spill", "dense_bytes": 10**6}
    text = Outline(plan_page("m", plan.summary | {"kept": [row]}, plan.binary)).text
    assert "1.00 MB if dense" in text and "in the spill file" in text


def test_the_run_page_adds_what_was_measured(plan: Plan) -> None:
    page = Outline(run_text(plan))
    for text in ("Loss", "Throughput", "Measured memory", "measured peak 3.20 MB", "resumed", "0.9, 0.99", "50.0%"):
        assert text in page.text
    assert page.outside == []


@pytest.mark.parametrize("lines", [[], events()[:1], [e for e in events() if e["event"] == "epoch"]])
def test_a_run_that_ended_early_has_a_page_all_the_same(plan: Plan, lines: list[dict[str, Any]]) -> None:
    page = Outline(run_text(plan, events=lines))
    assert "Arena map" in page.text


@pytest.mark.parametrize("cap", [None, 100])
def test_no_cap_or_one_far_off_does_not_spoil_the_scale(plan: Plan, cap: int | None) -> None:
    budget = None if cap is None else cap * plan.predicted_peak_bytes
    page = plan_page("m", plan.summary | {"mem_budget": budget}, plan.binary)
    assert 'class="rule cap"' not in page and 'class="rule plan"' in page


def test_names_from_a_bundle_are_text_and_nothing_else(plan: Plan) -> None:
    summary = copy.deepcopy(plan.summary)
    for row in summary["kept"]:
        row |= {"layer": EVIL, "operator": EVIL, "form": EVIL}
    summary["items"][EVIL] = 5
    clean, evil = (
        Outline(text) for text in (plan_page("m", plan.summary, plan.binary), plan_page(EVIL, summary, plan.binary))
    )
    assert evil.tags["script"] == clean.tags["script"]
    assert "img" not in evil.tags and evil.outside == []
    assert EVIL in evil.text
    run = Outline(run_text(plan, settings={EVIL: EVIL}))
    assert "img" not in run.tags and run.outside == []


def test_labels_of_a_plan_cannot_leave_the_data_island(plan: Plan) -> None:
    label = plan_label(plan)
    binary = renamed(plan.binary, label, ("</script>" + "x" * len(label))[: len(label)])
    page = plan_page("m", plan.summary, binary)
    islands = re.findall(r'<script type="application/json">(.*?)</script>', page, re.DOTALL)
    assert islands and all(json.loads(island) for island in islands)
    assert "\\u003c/script" in page


def plan_label(plan: Plan) -> str:
    return next(label for label in read_timeline(plan.binary).labels if len(label) >= 10)


def renamed(binary: bytes, old: str, new: str) -> bytes:
    """The plan file with one label exchanged for another of the same length."""
    import struct
    import zlib

    payload = binary[24:].replace(old.encode(), new.encode(), 1)
    return (
        binary[:8]
        + struct.pack("<IIQ", struct.unpack_from("<I", binary, 8)[0], zlib.crc32(payload), len(payload))
        + payload
    )


def test_the_measured_peak_is_that_of_the_present_cap(plan: Plan) -> None:
    cap = plan.summary["mem_budget"]
    part: dict[str, Any] = {"event": "memory", "update": 9, "peak_rss_bytes": 9_100_000, "mem_budget": 3 * cap}
    part["samples"] = [[0.1 * t, 9_000_000] for t in range(9)]
    larger_before = Outline(run_text(plan, events=[part, *events()])).text
    assert "3.20 MBmeasured peak" in larger_before
    part |= {"peak_rss_bytes": 3_300_000, "mem_budget": cap, "changes": [[0.4, cap]]}
    changed = run_text(plan, events=[*events(), part])
    assert "3.30 MBmeasured peak" in Outline(changed).text and "cap 4.00 MB" in Outline(changed).text


def test_curves_are_thinned_and_smoothed_without_losing_their_ends() -> None:
    rows = list(range(5 * POINTS + 3))
    thin = thinned(rows)
    assert len(thin) <= POINTS + 2 and thin[0] == 0 and thin[-1] == rows[-1]
    assert thinned([]) == []
    assert smoothed([3.0] * 100) == pytest.approx([3.0] * 100)
    assert len(smoothed([1.0])) == 1


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 128e6), (0.98, 1), (2.3e-9, 7e-9), (1, 540), (5, 5)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 1 <= len(found) <= 12
    assert all(low - 1e-9 * high <= t <= high * (1 + 1e-9) for t in found)


def test_ticks_of_a_nearly_flat_curve_can_be_told_apart() -> None:
    text = Outline(
        str(Chart("loss", "", [1, 2], "step", low=6.9071, high=6.9109).lines([Series("a", "s1", [6.908, 6.91])]))
    ).text
    assert "6.9086.9096.91" in text  # one tick behind the other


def test_elements_escape_attributes_and_text() -> None:
    assert (
        element("b", {"title": '"<&', "id": None}, "<i>", element("br"))
        == '<b title="&quot;&lt;&amp;">&lt;i&gt;<br></b>'
    )


# ---- In a browser ----

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian package chromium)")

LOOK = r"""
  const box = (e) => { const r = e.getBoundingClientRect(); return [r.left, r.top, r.width, r.height]; };
  const charts = [...page.querySelectorAll('figure.chart')].map((figure) => {
    const canvas = figure.querySelector('.canvas');
    const frame = canvas.getBoundingClientRect();
    const target = figure.querySelector('rect.box') || canvas;
    const at = figure.querySelector('rect.box') ? target.getBoundingClientRect() : frame;
    target.dispatchEvent(new view.PointerEvent('pointermove', {
      clientX: at.left + at.width / 2, clientY: at.top + at.height / 2, bubbles: true }));
    const tip = page.getElementById('tip');
    const shown = tip.hidden ? '' : tip.textContent;
    canvas.dispatchEvent(new view.PointerEvent('pointerleave'));
    return { title: figure.querySelector('figcaption').firstChild.textContent, frame: box(canvas), tip: shown,
             gone: tip.hidden,
             shapes: [...figure.querySelectorAll('.area, .box, .line')].filter((s) => box(s)[2] > 0).length,
             cap: [...figure.querySelectorAll('line.cap')].map((l) =>
               [...box(l), view.getComputedStyle(l).stroke, view.getComputedStyle(l).strokeWidth]) };
  });
  const table = page.querySelector('table.sortable');
  const column = [...table.tHead.rows[0].cells].findIndex((c) => c.textContent === 'bytes');
  const values = () => [...table.tBodies[0].rows].map((r) => Number(r.cells[column].dataset.value));
  const before = values();
  table.tHead.rows[0].cells[column].querySelector('button').click();
  const requests = view.performance.getEntriesByType('resource').map((e) => e.name);
  return { charts, requests, before, after: values(), overflow: page.documentElement.scrollWidth - view.innerWidth,
           background: view.getComputedStyle(page.body).backgroundColor,
           font: Math.min(...[...page.querySelectorAll('.y-axis span, .legend li, td')].map((e) =>
             parseFloat(view.getComputedStyle(e).fontSize))) };
"""


@needs_browser
def test_a_browser_opens_the_run_page_without_an_error_or_a_request(plan: Plan, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(run_text(plan), encoding="utf-8")
    loaded = load(page, tmp_path)
    assert loaded.console == []
    assert "Training of flowers" in loaded.dom


@needs_browser
def test_a_browser_draws_every_chart_wide_and_on_a_phone_in_the_dark(plan: Plan, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(run_text(plan), encoding="utf-8")
    found = examine(page, tmp_path, LOOK, "--blink-settings=preferredColorScheme=0")
    for size, seen in found.items():
        titles = [chart["title"] for chart in seen["charts"]]
        assert titles == [
            "Loss",
            "Throughput",
            "Measured memory against the plan",
            "Memory over the steps of one iteration",
            "Arena map",
        ]
        for chart in seen["charts"]:
            left, _, width, height = chart["frame"]
            assert chart["shapes"] >= 1, chart
            assert height >= 200 and left + width <= (1200 if size == "wide" else 390)
            assert chart["tip"] and chart["gone"], chart
        for index in (2, 3):
            ((_, top, width, _, stroke, thickness),) = seen["charts"][index]["cap"]
            frame = seen["charts"][index]["frame"]
            assert frame[1] <= top <= frame[1] + frame[3] and width == pytest.approx(frame[2], abs=1)
            assert stroke == "rgb(255, 92, 102)" and float(thickness.removesuffix("px")) >= 2
        assert seen["before"] == sorted(seen["before"], reverse=True)
        assert seen["after"] == sorted(seen["before"])
        assert seen["overflow"] <= 0
        assert seen["requests"] == []
        assert seen["font"] >= 11
        assert seen["background"] == "rgb(15, 18, 23)"
    assert "together" in found["wide"]["charts"][3]["tip"]
    assert "address" in found["phone"]["charts"][4]["tip"]


@needs_browser
def test_a_page_that_did_request_something_or_failed_would_be_noticed(plan: Plan, tmp_path: Path) -> None:
    """What the two tests around this one rely on."""
    page = tmp_path / "report.html"
    page.write_text(run_text(plan).replace("</main>", "<img src='http://evil.example/x'></main>"), encoding="utf-8")
    assert any("Content Security Policy" in line for line in load(page, tmp_path).console)


@needs_browser
def test_a_browser_opens_the_fidelity_page_without_an_error_or_a_request(tmp_path: Path) -> None:
    page = tmp_path / "fidelity.html"
    page.write_text(fidelity_text(), encoding="utf-8")
    loaded = load(page, tmp_path)
    assert loaded.console == []
    assert loaded.dom.count("<figure") == 3
