"""The plots of the suite and of the growth curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator  # noqa: E402

# One colour and one marker a system in every plot (Okabe and Ito's palette, which colour-blind readers can tell apart).
STYLES = {
    "edge-razor, sparsity 0": ("#0072B2", "s"),
    "edge-razor, centered 0.9": ("#56B4E9", "o"),
    "edge-razor, centered": ("#D55E00", "o"),  # at several sparsities
    "edge-razor, centered 0.95": ("#D55E00", "o"),
    "edge-razor, centered 0.97": ("#E69F00", "o"),
    "edge-razor, plain 0.9": ("#009E73", "v"),
    "edge-razor, exact": ("#0072B2", "s"),
    "edge-razor, balanced": ("#D55E00", "o"),
    "edge-razor, fast": ("#009E73", "v"),
    "PyTorch eager": ("#555555", "X"),
    "PyTorch eager, channels_last": ("#000000", "P"),
    "PyTorch, torch.compile": ("#CC79A7", "D"),
    "PyTorch, activation checkpointing": ("#999999", "^"),
    "PyTorch, plain Back Razor 0.9": ("#8B6914", "v"),
    "onnxruntime-training": ("#7B4FA3", "h"),
}
SHADES = ("#9ecae1", "#2171b5", "#08306b", "#000000")  # by number of threads
SIZE = (7.2, 4.6)  # inches
DPI = 130


def _plain(value: float, _: object) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:g}"


def log_axis(axis: Any, values: Sequence[float]) -> None:
    """A logarithmic axis with plain numbers at 1, 2 and 5 of each decade that the values span, and some room."""
    low, high = min(values), max(values)
    ticks = [m * 10.0**e for e in range(-4, 8) for m in (1, 2, 5)]
    inside = [t for t in ticks if low / 1.6 <= t <= high * 1.6]
    axis.axes.set(**{f"{axis.axis_name}scale": "log", f"{axis.axis_name}lim": (low / 1.6, high * 1.6)})
    axis.set_ticks(inside)
    axis.set_major_formatter(FuncFormatter(_plain))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def exact_axis(axis: Any, values: Sequence[float]) -> None:
    """A logarithmic axis with a tick at each measured value."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_ticks(list(values))
    axis.set_major_formatter(FuncFormatter(_plain))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
    plt.close(figure)


def memory_against_time(model: str, systems: Sequence[dict[str, Any]], path: Path) -> None:
    """Peak resident set against seconds a step: one marker a system, nearer to the lower left corner is better."""
    figure, axes = plt.subplots(figsize=(8.6, 4.8))
    points = [s for s in systems if s["error"] is None and s["label"] in STYLES]
    if not points:
        return
    for system in points:
        colour, marker = STYLES[system["label"]]
        seconds = median(system["seconds"])
        low, high = seconds - min(system["seconds"]), max(system["seconds"]) - seconds
        axes.errorbar(
            seconds,
            system["peak_rss_bytes"] / 1e6,
            xerr=[[low], [high]],
            fmt=marker,
            color=colour,
            ecolor=colour,
            elinewidth=0.8,
            markersize=9,
            markeredgecolor="white",
            label=system["label"],
        )
    log_axis(axes.xaxis, [second for s in points for second in s["seconds"]])
    log_axis(axes.yaxis, [s["peak_rss_bytes"] / 1e6 for s in points])
    axes.set_xlabel("seconds a training step (median; bars: fastest to slowest)")
    axes.set_ylabel("peak resident set, MB")
    axes.set_title(f"{model}: memory against time of a training step")
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
    _save(figure, path)


def growth_curves(
    title: str,
    x_label: str,
    curves: dict[str, list[tuple[float, float, float]]],
    path: Path,
    x_scale: str,
) -> None:
    """Seconds a step and peak memory against one setting, side by side.

    Args:
        curves: by system, (setting, seconds, peak bytes) in ascending order of the setting.
        x_scale: "log", or "sparsity" (logarithmic in the kept share 1 − s).
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.6))
    settings = sorted({point[0] for points in curves.values() for point in points})
    for axes, column, scale, y_label in (
        (left, 1, 1.0, "seconds a training step (median)"),
        (right, 2, 1e6, "peak resident set, MB"),
    ):
        for label, points in curves.items():
            colour, marker = STYLES[label]
            x, y = [p[0] for p in points], [p[column] / scale for p in points]
            axes.plot(x, y, color=colour, marker=marker, markersize=6, label=label)
        if x_scale == "log":
            exact_axis(axes.xaxis, settings)
        else:
            # Logarithmic in the kept share, so that 0.9, 0.95 and 0.97 have room; cut off short of 1.
            axes.set_xscale("function", functions=(lambda s: -np.log1p(-np.minimum(s, 0.99)), lambda t: -np.expm1(-t)))
            axes.set_xlim(-0.1, 0.975)
            axes.set_xticks(settings, [f"{s:g}" for s in settings])
        log_axis(axes.yaxis, [p[column] / scale for points in curves.values() for p in points])
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(alpha=0.3)
    handles, labels = left.get_legend_handles_labels()
    figure.suptitle(title)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.legend(handles, labels, loc="lower center", ncols=max(len(labels), 1), frameon=False, fontsize=9)
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
    plt.close(figure)


def thread_bars(title: str, bars: dict[str, list[tuple[int, float]]], path: Path) -> None:
    """Seconds a step by system and threads; the figure under each group is the gain from the fewest to the most."""
    figure, axes = plt.subplots(figsize=SIZE)
    counts = sorted({threads for points in bars.values() for threads, _ in points})
    width = 0.8 / max(len(counts), 1)
    for index, threads in enumerate(counts):
        found = [
            (group, dict(points)[threads]) for group, points in enumerate(bars.values()) if threads in dict(points)
        ]
        places = [group + (index - (len(counts) - 1) / 2) * width for group, _ in found]
        name = f"{threads} thread" + ("s" if threads > 1 else "")
        shown = axes.bar(places, [seconds for _, seconds in found], width * 0.94, color=SHADES[index], label=name)
        axes.bar_label(shown, fmt="%.2f", fontsize=8, padding=2)
    names = []
    for label, points in bars.items():
        times = dict(points)
        gain = f"\n({times[counts[0]] / times[counts[-1]]:.2f}x)" if {counts[0], counts[-1]} <= set(times) else ""
        names.append(label.replace(", ", ",\n") + gain)
    axes.set_xticks(range(len(bars)), names, fontsize=9)
    axes.set_ylabel("seconds a training step (median)")
    axes.set_title(title)
    axes.margins(y=0.12)
    axes.legend(frameon=False)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    _save(figure, path)


def cap_curves(model: str, found: dict[str, Any], path: Path) -> None:
    """Time of a step, and the expected error of the gradient, against the cap. Of a system whose batch is smaller
    it is the time of as many steps as make the whole one.

    Args:
        found: of ``benchmarks.caps``: "inference_peak" in bytes, and "curves", [{"cap", "systems"}].
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.6))
    lines: dict[str, list[tuple[float, float, float]]] = {}
    whole = max(system["batch"] for point in found["curves"] for system in point["systems"])
    for point in found["curves"]:
        for system in point["systems"]:
            if not system["error"]:
                seconds = median(system["seconds"]) * whole / system["batch"]
                lines.setdefault(system["label"], []).append((point["cap"] / 1e6, seconds, system["gradient_error"]))
    for label, points in lines.items():
        colour, marker = STYLES[label]
        left.plot([p[0] for p in points], [p[1] for p in points], color=colour, marker=marker, label=label)
        if label.startswith("edge-razor"):
            right.plot([p[0] for p in points], [p[2] for p in points], color=colour, marker=marker, label=label)
    caps: list[float] = []  # whose labels do not overlap
    for point in found["curves"]:
        if not caps or point["cap"] / 1e6 > 1.07 * caps[-1]:
            caps.append(point["cap"] / 1e6)
    for axes, y_label in ((left, f"seconds for {whole} samples (median)"), (right, "expected error of the gradient")):
        exact_axis(axes.xaxis, caps)
        axes.axvline(found["inference_peak"] / 1e6, color="#999999", linestyle=":", label="onnxruntime, inference only")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("cap on the whole process, MB")
        axes.set_ylabel(y_label)
        axes.grid(alpha=0.3)
    handles, labels = left.get_legend_handles_labels()
    figure.suptitle(f"{model}: what a cap costs")
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    figure.legend(handles, labels, loc="lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
    plt.close(figure)
