"""`eval`: loss and accuracy of a run's model on a data set."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from edge_razor.budget import resolve_budget
from edge_razor.bundle import Bundle
from edge_razor.checkpoint import Checkpoint
from edge_razor.data import BatchRing, Loader, open_source
from edge_razor.data.text import TextOptions
from edge_razor.memory import peak_rss_bytes
from edge_razor.trainer import Trainer
from edge_razor.training_state import bundle_of, stored_extra, stored_settings
from edge_razor.units import format_bytes

from .tables import show_damaged, show_text

__all__ = ["run"]


def run(
    run_directory: Path,
    data: Path,
    bundle: Path | None,
    mem_budget: str | None,
    threads: int | None,
    skip_bad: bool,
    as_json: bool,
    text: TextOptions,
) -> None:
    budget = resolve_budget(mem_budget).bytes
    with Checkpoint(run_directory) as checkpoint:
        show_damaged(checkpoint)
        path = bundle_of(checkpoint, bundle)
        classes = stored_extra(checkpoint).get("classes")
        batch_size = stored_settings(checkpoint)["batch_size"]
    with Bundle(path) as opened:
        source = open_source(
            data,
            opened.manifest,
            skip_bad=skip_bad,
            classes=classes,
            memory_limit=budget,
            bundle=opened,
            text=text,
        )
    data_bytes = BatchRing.bytes_for(source, batch_size)
    options = {"mem_budget": budget, "threads": threads, "data_bytes": data_bytes}
    with Trainer.resume(checkpoint.path, bundle, **options) as trainer:
        result = trainer.evaluate(Loader(source, np.arange(len(source)), BatchRing(source, batch_size)))
    if as_json:
        print(json.dumps({**result, "left_out": len(source.bad), "peak_rss_bytes": peak_rss_bytes()}))
        return
    accuracy = "" if result["accuracy"] is None else f", accuracy {result['accuracy']:.2%}"
    perplexity = f", perplexity {result['perplexity']:.2f}" if "perplexity" in result else ""
    show_text(source)
    print(f"{result['samples']} samples: loss {result['loss']:.4f}{accuracy}{perplexity}")
    if source.bad:
        print(f"{len(source.bad)} unreadable samples were left out", file=sys.stderr)
    print(f"peak resident memory: {format_bytes(peak_rss_bytes())}")
