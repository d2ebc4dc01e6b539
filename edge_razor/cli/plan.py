"""`plan`: what the cap is spent on, item by item, and the biggest kept values."""

from __future__ import annotations

import json
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

from edge_razor.budget import AUTO, resolve_budget
from edge_razor.bundle import Bundle
from edge_razor.devices import Device
from edge_razor.errors import BudgetError
from edge_razor.planner import plan
from edge_razor.planner.summary import PLACES, error_text, solver_text
from edge_razor.tensors import replacing
from edge_razor.units import format_bytes

from .tables import print_pairs, print_table

__all__ = ["run", "show_accounting", "show_refusal"]

SHOWN_VALUES = 12


def run(
    bundle: Path,
    output: Path | None,
    html: Path | None,
    as_json: bool,
    options: dict[str, Any],
    device: Device | None = None,
) -> None:
    assumptions = None
    if device is not None:
        # "auto" is the device's free memory: this machine's is no matter.
        asked = None if options["mem_budget"] == AUTO else options["mem_budget"]
        assumptions = device.assumptions(asked, options["threads"])
        options = options | {
            "mem_budget": device.free if asked is None else asked,
            "threads": options["threads"] or device.cores,
            "base_bytes": device.base_rss,
            "calibrated": False,
        }
    with Bundle(bundle) as opened:  # one float32 batch of the caller's, as the trainer counts it by default
        sample = sum(prod(spec.shape) for spec in opened.manifest.inputs)
    budget, why = resolve_budget(options["mem_budget"])
    if why is not None and not as_json:
        print(f"cap: {why}\n")
    options = {**options, "mem_budget": budget}
    result = plan(bundle, data_bytes=4 * options["batch_size"] * sample, **options)
    if assumptions is not None:
        result.summary["assumed"] = assumptions
    if output is not None:
        result.save(output)
    if html is not None:
        from edge_razor.report.plan_page import plan_page

        with replacing(html) as file:
            file.write(plan_page(bundle.name.removesuffix(".razor"), result.summary, result.binary).encode())
    if as_json:
        print(json.dumps(result.summary, indent=2))
        return
    if assumptions is not None:
        print(f"assumed {assumptions}\n")
    show_accounting(result.summary)
    kept = result.summary["kept"]
    if kept:
        total, dense = sum(row["bytes"] for row in kept), sum(row["dense_bytes"] for row in kept)
        less = f", {dense / total:.1f} x less than dense" if total else f" in memory, {format_bytes(dense)} if dense"
        print(f"\nkept for the backward pass: {format_bytes(total)}{less}")
        print_table(
            ("layer", "operator", "kept as", "shape", "harm", "bytes", "dense"),
            [
                (
                    row["layer"],
                    row["operator"],
                    PLACES.get(row["place"], row["form"]),
                    f"{row['samples']} x {row['rows']} x {row['cols']}",
                    f"{row['harm']:.1e}" if row["harm"] else "0",
                    format_bytes(row["bytes"]),
                    format_bytes(row["dense_bytes"]),
                )
                for row in kept[:SHOWN_VALUES]
            ],
            left=3,
        )
        if len(kept) > SHOWN_VALUES:
            print(f"… and {len(kept) - SHOWN_VALUES} smaller ones (--json shows all)")
    written = [str(path) for path in (*(result.files(output) if output else ()), html) if path is not None]
    if written:
        print(f"\nwrote {', '.join(written)}")


def _kept_as(summary: dict[str, Any]) -> str:
    """How the kept values are stored, in one line: all alike, or the counts of each form."""
    elsewhere = Counter(row["place"] for row in summary["kept"] if row["place"] != "memory")
    told = []
    if summary["choices"] is None:
        told.append(f"sparsity {summary['sparsity']:g}" + (f", {summary['razor']}" if summary["sparsity"] else ""))
    else:
        counts = Counter(row["form"] for row in summary["kept"] if row["place"] == "memory")
        told += [f"{count} {form}" for form, count in counts.most_common()]
    return ", ".join(told + [f"{count} {PLACES[place]}" for place, count in elsewhere.items()])


def _seconds(summary: dict[str, Any]) -> str:
    text = f"{summary['predicted_seconds']:.3g} expected"
    if summary["prefer"] == "exact" and summary["slowdown"] is not None:
        text += f", {summary['slowdown']:.2f} x those of --prefer balanced"
    return text


def show_refusal(error: BudgetError) -> None:
    """Prints what each change of settings would bring, on standard error."""
    from rich.console import Console
    from rich.table import Table

    table = Table("change", "smallest cap", "gradient error", "seconds a step", title="what would help")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in error.table:
        lost = error_text(row.gradient_error)
        table.add_row(row.change, format_bytes(row.smallest_budget), lost, f"{row.seconds:.3g}")
    Console(stderr=True).print(table)


def show_accounting(summary: dict[str, Any]) -> None:
    """Prints the settings that the planner chose and the item-by-item table."""
    batch, micro = summary["batch_size"], summary["micro_batch"]
    print_pairs(
        [
            ("batch", f"{batch}" + (f" in micro-batches of {micro}" if micro != batch else "")),
            ("kept values", _kept_as(summary)),
            *([("frozen", ", ".join(summary["frozen"]))] if summary["frozen"] else []),
            (
                "gradient error",
                f"{error_text(summary['gradient_error'])} expected" if summary["harm"] else "none (exact)",
            ),
            ("seconds a step", _seconds(summary)),
            *([("chosen by", solver)] if (solver := solver_text(summary)) is not None else []),
            ("optimizer", str(summary["optimizer"]["name"])),
            ("threads", str(summary["threads"])),
        ]
    )
    print()
    total, cap = summary["predicted_peak_bytes"], summary["mem_budget"]
    rows = [(name, format_bytes(size), f"{size / (cap or total):.1%}") for name, size in summary["items"].items()]
    rows.append(("predicted peak", format_bytes(total), f"{total / (cap or total):.1%}"))
    if cap is not None:
        rows.append(("cap", format_bytes(cap), "100.0%"))
    print_table(("resident memory", "bytes", "of the cap" if cap is not None else "of the peak"), rows)
