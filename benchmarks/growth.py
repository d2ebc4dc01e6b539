"""How time and memory of a training step grow with batch, resolution, sparsity and threads, beside PyTorch's.

python dev.py bench growth [--models mobilenet_v2 …] [--axes batch resolution sparsity threads] [--rounds 5] [--redraw]

Writes results/growth.md, results/growth.json (from which --redraw makes the others again) and
results/growth-<model>-<axis>.png.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.common import RESULTS, machine_line, markdown_table, write_result
from benchmarks.models import NAMES, bundle
from benchmarks.turns import Case, Measured, say, take_turns

OURS = (
    Case("edge-razor, sparsity 0", "edge-razor", ("--sparsity", "0")),
    Case("edge-razor, centered 0.95", "edge-razor", ("--sparsity", "0.95")),
)
PYTORCH = (Case("PyTorch eager", "torch"), Case("PyTorch eager, channels_last", "torch-channels-last"))
SPARSITIES = (0.0, 0.5, 0.8, 0.9, 0.95, 0.97)
DEFAULT = {"batch": 8, "resolution": 224, "threads": 2}  # where another axis varies
WARM_UP = 1
SETTLE = 0.1  # seconds: two steps a turn, the second of which counts, where the fastest system's takes less


@dataclass(frozen=True)
class Axis:
    """One setting that varies: its values, how the plot calls it, and how the plot scales it ("" is no curve)."""

    values: tuple[float, ...]
    label: str
    scale: str = "log"


AXES = {
    "batch": Axis((1, 2, 4, 8, 16, 32, 64), "batch size, images"),
    "resolution": Axis((96, 128, 160, 192, 224, 288, 384), "resolution, pixels a side"),
    "sparsity": Axis(SPARSITIES, "sparsity of the kept activations (centered)", "sparsity"),
    "threads": Axis((1, 2), "threads", ""),
}


def point(axis: str, value: float) -> tuple[tuple[str, int], ...]:
    """The settings of a point, as a key: points of different axes that are the same are measured once."""
    return tuple(sorted((DEFAULT | ({} if axis == "sparsity" else {axis: int(value)})).items()))


def measure(model: str, axis: str, value: float, rounds: int) -> list[Measured]:
    settings = dict(point(axis, value))
    path = bundle(model, settings["resolution"])
    common = ("--bundle", str(path), "--batch-size", str(settings["batch"]), "--size", str(settings["resolution"]))
    cases: Sequence[Case] = (*OURS, *PYTORCH)
    if axis == "sparsity":
        cases = [Case(f"{s:g}", "edge-razor", ("--sparsity", f"{s:g}")) for s in SPARSITIES]
        cases += PYTORCH  # in the same turns, so that the curves of one plot compare
    return take_turns(cases, model, (*common, "--threads", str(settings["threads"])), rounds, WARM_UP, settle=SETTLE)


def measure_model(model: str, axes: Sequence[str], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """By axis, [{"value", "systems": [as `Measured`]}]. Sparsity has one entry, whose systems are the sparsities."""
    done: dict[tuple[tuple[str, int], ...], list[dict[str, Any]]] = {}
    results: dict[str, list[dict[str, Any]]] = {}
    for axis in axes:
        values = AXES[axis].values if axis != "sparsity" else (0.0,)
        for value in values:
            key = (*point(axis, value), *((("sparsity", 1),) if axis == "sparsity" else ()))
            if key not in done:
                say(f"{model}: {axis}" + (f" {value:g}" if axis != "sparsity" else ""))
                done[key] = [_slim(result) for result in measure(model, axis, value, rounds)]
            results.setdefault(axis, []).append({"value": value, "systems": done[key]})
    return results


def _slim(result: Measured) -> dict[str, Any]:
    entry = result.to_json()
    for name in ("setup", "profile", "losses"):
        entry.pop(name)
    return entry | {"figures": {"kept_bytes": result.kept_bytes}}


def curves_of(axis: str, points: Sequence[dict[str, Any]]) -> dict[str, list[tuple[float, float, float]]]:
    """By system, (setting, median seconds, peak bytes) of the points that were measured."""
    found: dict[str, list[tuple[float, float, float]]] = {}
    for entry in points:
        for values in entry["systems"]:
            result = Measured.from_json(values)
            if result.error is not None:
                continue
            if axis != "sparsity":
                found.setdefault(result.label, []).append((entry["value"], result.step, result.peak_rss_bytes))
            elif result.system == "edge-razor":
                mine = found.setdefault("edge-razor, centered", [])
                mine.append((float(result.label), result.step, result.peak_rss_bytes))
            else:  # PyTorch knows no sparsity: a level line
                ends = (SPARSITIES[0], SPARSITIES[-1])
                found[result.label] = [(s, result.step, result.peak_rss_bytes) for s in ends]
    return found


def table(axis: str, points: Sequence[dict[str, Any]]) -> str:
    """Seconds and peak MB of every system (rows) at every value (columns); a dash where it failed."""
    if axis == "sparsity":
        systems = [Measured.from_json(values) for values in points[0]["systems"]]
        rows = [
            (
                f"edge-razor, {r.label}" if r.system == "edge-razor" else r.label,
                *(("–", "–", "–") if r.error else (f"{r.step:.3f}", f"{r.peak_rss_bytes / 1e6:.0f}", _kept(r))),
            )
            for r in systems
        ]
        return markdown_table(("system", "seconds a step", "peak RSS, MB", "kept activations, MB"), rows)
    labels = [values["label"] for values in points[0]["systems"]]
    header = ("system", "", *(f"{entry['value']:g}" for entry in points))
    rows = []
    for index, label in enumerate(labels):
        results = [Measured.from_json(entry["systems"][index]) for entry in points]
        rows.append((label, "s", *("–" if r.error else f"{r.step:.3f}" for r in results)))
        rows.append(("", "MB", *("–" if r.error else f"{r.peak_rss_bytes / 1e6:.0f}" for r in results)))
    return markdown_table(header, rows)


def _kept(result: Measured) -> str:
    return "–" if result.kept_bytes is None else f"{result.kept_bytes / 1e6:.1f}"


def errors_of(points: Sequence[dict[str, Any]]) -> list[str]:
    return [
        f"{values['label']} at {entry['value']:g}: {values['error']}"
        for entry in points
        for values in entry["systems"]
        if values["error"]
    ]


def write_report(content: dict[str, Any]) -> None:
    """Writes results/growth.md and the plots."""
    from benchmarks.plots import growth_curves, thread_bars

    body = ""
    for model, axes in content["models"].items():
        for axis, points in axes.items():
            others = ", ".join(f"{name} {value}" for name, value in DEFAULT.items() if name != axis)
            title = f"{model}: {axis} ({others})"
            path = RESULTS / f"growth-{model}-{axis}.png"
            curves = curves_of(axis, points)
            if axis == "threads":
                thread_bars(title, {label: [(int(p[0]), p[1]) for p in ps] for label, ps in curves.items()}, path)
            else:
                growth_curves(title, AXES[axis].label, curves, path, AXES[axis].scale)
            body += f"## {title}\n\n![{axis}]({path.name})\n\n{table(axis, points)}\n"
            body += "".join(f"- {text}\n" for text in errors_of(points)) + ("\n" if errors_of(points) else "")
    body += (
        f"Each point: the systems in turns, one step each (the second of two where the fastest takes less than "
        f"{SETTLE:g} s), {content['rounds']} rounds after {WARM_UP} of warm-up, "
        "medians; peak RSS of the whole process.\n"
    )
    write_result(
        "growth",
        "How time and memory of a training step grow: SGD without momentum, all parameters",
        "python dev.py bench growth",
        body,
        machine=content["machine"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["mobilenet_v2"], choices=NAMES)
    parser.add_argument("--axes", nargs="+", default=list(AXES), choices=list(AXES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--redraw", action="store_true", help="measure nothing: tables and plots from growth.json")
    options = parser.parse_args()
    file = RESULTS / "growth.json"
    if not options.redraw:
        content: dict[str, Any] = {"machine": machine_line("torch"), "rounds": options.rounds, "models": {}}
        for model in options.models:
            content["models"][model] = measure_model(model, options.axes, options.rounds)
            file.write_text(json.dumps(content, indent=1) + "\n")
    write_report(json.loads(file.read_text()))


if __name__ == "__main__":
    main()
