"""`plan`: what the cap is spent on, item by item, and the biggest kept values."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

from edge_razor.budget import resolve_budget
from edge_razor.bundle import Bundle
from edge_razor.planner import plan
from edge_razor.tensors import replacing
from edge_razor.units import format_bytes

from .tables import print_pairs, print_table

__all__ = ["run", "show_accounting"]

SHOWN_VALUES = 12


def run(bundle: Path, output: Path | None, html: Path | None, as_json: bool, options: dict[str, Any]) -> None:
    with Bundle(bundle) as opened:  # one float32 batch of the caller's, as the trainer counts it by default
        sample = sum(prod(spec.shape) for spec in opened.manifest.inputs)
    budget, why = resolve_budget(options["mem_budget"])
    if why is not None and not as_json:
        print(f"cap: {why}\n")
    options = {**options, "mem_budget": budget}
    result = plan(bundle, data_bytes=4 * options["batch_size"] * sample, **options)
    if output is not None:
        result.save(output)
    if html is not None:
        from edge_razor.report.plan_page import plan_page

        with replacing(html) as file:
            file.write(plan_page(bundle.name.removesuffix(".razor"), result.summary, result.binary).encode())
    if as_json:
        print(json.dumps(result.summary, indent=2))
        return
    show_accounting(result.summary)
    kept = result.summary["kept"]
    if kept:
        total, dense = sum(row["bytes"] for row in kept), sum(row["dense_bytes"] for row in kept)
        print(f"\nkept for the backward pass: {format_bytes(total)}, {dense / max(total, 1):.1f} x less than dense")
        print_table(
            ("layer", "operator", "kept as", "shape", "bytes", "dense"),
            [
                (
                    row["layer"],
                    row["operator"],
                    row["form"],
                    f"{row['samples']} x {row['rows']} x {row['cols']}",
                    format_bytes(row["bytes"]),
                    format_bytes(row["dense_bytes"]),
                )
                for row in kept[:SHOWN_VALUES]
            ],
            left=3,
        )
        if len(kept) > SHOWN_VALUES:
            print(f"… and {len(kept) - SHOWN_VALUES} smaller ones (--json shows all)")
    written = [str(path) for path in (output, html) if path is not None]
    if written:
        print(f"\nwrote {' and '.join(written)}")


def show_accounting(summary: dict[str, Any]) -> None:
    """Prints the settings that the planner chose and the item-by-item table."""
    batch, micro = summary["batch_size"], summary["micro_batch"]
    print_pairs(
        [
            ("batch", f"{batch}" + (f" in micro-batches of {micro}" if micro != batch else "")),
            ("sparsity", f"{summary['sparsity']:g}" + (f", {summary['razor']}" if summary["sparsity"] else " (exact)")),
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
