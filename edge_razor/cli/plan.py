"""`plan`: what the cap is spent on, item by item, and the biggest kept values."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

from edge_razor.bundle import Bundle
from edge_razor.devices import Device
from edge_razor.planner import plan
from edge_razor.units import format_bytes

from .tables import print_pairs, print_table

__all__ = ["run", "show_accounting"]

SHOWN_VALUES = 12


def run(
    bundle: Path, output: Path | None, as_json: bool, options: dict[str, Any], device: Device | None = None
) -> None:
    assumptions = None
    if device is not None:
        assumptions = device.assumptions(options["mem_budget"], options["threads"])
        options = options | {
            "mem_budget": device.free if options["mem_budget"] is None else options["mem_budget"],
            "threads": options["threads"] or device.cores,
            "base_bytes": device.base_rss,
        }
    with Bundle(bundle) as opened:  # one float32 batch of the caller's, as the trainer counts it by default
        sample = sum(prod(spec.shape) for spec in opened.manifest.inputs)
    result = plan(bundle, data_bytes=4 * options["batch_size"] * sample, **options)
    if assumptions is not None:
        result.summary["assumed"] = assumptions
    if output is not None:
        result.save(output)
    if as_json:
        print(json.dumps(result.summary, indent=2))
        return
    if assumptions is not None:
        print(f"assumed {assumptions}\n")
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
    if output is not None:
        print(f"\nwrote {', '.join(str(path) for path in result.files(output))}")


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
