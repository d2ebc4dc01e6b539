"""Tables and plots of the suite, from its JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.common import RESULTS, markdown_table, write_result
from benchmarks.models import LANGUAGE
from benchmarks.turns import PROFILE_STEPS, Measured
from edge_razor.profile import Line, table_cells

HEADER = (
    "system",
    "seconds a step (median)",
    "range",
    "samples/s",
    "against the better PyTorch",
    "over onnxruntime's inference",
    "peak RSS, MB",
    "kept activations, MB",
    "floor, s",
    "over the floor",
)
EAGER = ("torch", "torch-channels-last")
# Systems that must find the loss that PyTorch eager finds: they do the same arithmetic.
EXACT = ("torch-channels-last", "torch-compile", "torch-checkpoint", "onnxruntime-training")
PROFILED = ("mobilenet_v2", "resnet18")
PROFILED_LABELS = ("edge-razor, centered 0.95", "edge-razor, sparsity 0")

NOTES = """
In turns, one step each, {rounds} rounds after {warm_up} of warm-up, each system a process of its own; BatchNorm's
statistics are frozen in all.

- *Peak RSS*: highest resident set of the process, start and first step (for torch.compile the compilation) included.
- *Kept activations*: what is kept between the passes. edge-razor: packed values, bits and dense ones; beside it the
  whole arena, gradients and scratch included. PyTorch: the storages that autograd saves (for checkpointing the blocks'
  inputs), without parameters and the network's input. onnxruntime-training does not tell. Back Razor's mask is a
  PyTorch boolean: one byte an element.
- *Floor*: multiply-adds that must be done over the measured sgemm rate, plus bytes that must move over the measured
  bandwidth; `benchmarks/floor.py` defines both. The rates are the best that the same rounds found.
"""


def _format(value: float | None, pattern: str) -> str:
    return "–" if value is None else format(value, pattern)


def _kept(result: Measured) -> str:
    if result.kept_bytes is None:
        return "–"
    arena = f" (arena {result.setup['arena_bytes'] / 1e6:.0f})" if "arena_bytes" in result.setup else ""
    return f"{result.kept_bytes / 1e6:.1f}{arena}"


def floor_seconds(entry: dict[str, Any], rates: dict[str, float]) -> float | None:
    """Floor of a system's entry in the JSON; None where there is none."""
    if "work" not in entry or not rates:
        return None
    work = entry["work"]
    return work["multiply_adds"] / rates["multiply_adds_per_second"] + work["bytes"] / rates["bytes_per_second"]


def system_rows(model: dict[str, Any], batch_size: int) -> list[tuple[str, ...]]:
    """The table of one model: a row a system; one that failed has its error instead of figures."""
    results = [Measured.from_json({key: v for key, v in entry.items() if key != "work"}) for entry in model["systems"]]
    good = [r for r in results if r.error is None]
    torch = min((r.step for r in good if r.system in EAGER), default=None)
    inference = next((r.step for r in good if r.system == "onnxruntime"), None)
    rows: list[tuple[str, ...]] = []
    for result, entry in zip(results, model["systems"], strict=True):
        if result.error is not None:
            rows.append((result.label, result.error.replace("|", "/"), *["–"] * (len(HEADER) - 2)))
            continue
        step = result.step
        floor = floor_seconds(entry, model["machine"]["figures"])
        infers = result.system == "onnxruntime"
        rows.append(
            (
                result.label,
                f"{step:.3f}",
                f"{min(result.seconds):.3f}–{max(result.seconds):.3f}",
                f"{batch_size / step:.1f}",
                _format(None if torch is None or infers else torch / step, ".2f")
                + ("x" if torch and not infers else ""),
                _format(None if inference is None else step / inference, ".2f"),
                f"{result.peak_rss_bytes / 1e6:.0f}",
                _kept(result),
                _format(floor, ".3f"),
                _format(None if floor is None else step / floor, ".2f"),
            )
        )
    return rows


def loss_remarks(model: dict[str, Any]) -> list[str]:
    """Systems whose loss after one update is not PyTorch eager's though their arithmetic is: they did other work.

    Later losses do not tell: on random labels the loss can move so fast that even PyTorch's two layouts part ways.
    """
    after = {e["label"]: e["losses"][1] for e in model["systems"] if e["error"] is None and len(e["losses"]) > 1}
    exact = [e["label"] for e in model["systems"] if e["system"] in EXACT or e["label"] == "edge-razor, sparsity 0"]
    expected = next(
        (after[e["label"]] for e in model["systems"] if e["system"] == "torch" and e["label"] in after), None
    )
    if expected is None:
        return []
    return [
        f"{label} has the loss {after[label]:.5f} after one update, PyTorch eager {expected:.5f}: not the same work."
        for label in exact
        if label in after and abs(after[label] - expected) > 1e-4 * abs(expected)
    ]


def profile_table(lines: Sequence[dict[str, Any]]) -> str:
    """Time, share, GFLOP/s and GB/s by kernel."""
    parsed = [Line(**line) for line in lines]
    everything = sum(line.seconds for line in parsed)
    header = ("kernel", "calls a step", "ms a step", "ms a call", "share", "GFLOP/s", "GB/s")
    return markdown_table(
        header,
        [
            (
                line.kernel,
                line.calls // PROFILE_STEPS,
                f"{1e3 * line.seconds / PROFILE_STEPS:.2f}",
                *table_cells(line, everything),
            )
            for line in parsed
        ],
    )


def work_of(content: dict[str, Any]) -> str:
    """The size of a sample: pixels, or tokens."""
    size = content["settings"]["size"]
    return f"{size} tokens" if set(content["models"]) <= set(LANGUAGE) else f"{size}×{size}"


def write_report(content: dict[str, Any], report: str = "suite") -> None:
    """Writes results/<report>.md and a plot of memory against time for each model."""
    from benchmarks.plots import memory_against_time

    settings = content["settings"]
    body = ""
    for name, model in content["models"].items():
        memory_against_time(name, model["systems"], RESULTS / f"suite-{name}.png")
        rates = model["machine"]["figures"]
        body += f"## {name}\n\n{markdown_table(HEADER, system_rows(model, settings['batch_size']))}\n"
        if rates:
            body += (
                f"Measured beside it: {2e-9 * rates['multiply_adds_per_second']:.0f} GFLOP/s of sgemm, "
                f"{1e-9 * rates['bytes_per_second']:.1f} GB/s read and written.\n\n"
            )
        body += "".join(f"{remark}\n\n" for remark in loss_remarks(model))
        body += f"![memory against time](suite-{name}.png)\n\n"
    for name in PROFILED:
        systems = content["models"].get(name, {"systems": []})["systems"]
        for entry in systems:
            if entry["label"] in PROFILED_LABELS and entry["profile"]:
                body += f"## Kernels: {name}, {entry['label']}\n\n{profile_table(entry['profile'])}\n"
    body += "## How\n" + NOTES.format(**settings)
    optimizer = "AdamW" if settings.get("optimizer") == "adamw" else "SGD without momentum"
    write_result(
        report,
        f"Training step, {work_of(content)}, batch {settings['batch_size']}, {optimizer}, all parameters, "
        f"{settings['threads']} threads",
        "python dev.py bench suite" + ("" if report == "suite" else f" --report {report} --models … --systems …"),
        body,
        machine=content["machine"],
    )
