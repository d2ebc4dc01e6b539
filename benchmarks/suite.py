"""All systems on the same work: a training step of each network, seconds and memory, in one table with plots.

python dev.py bench suite [--models mobilenet_v2 …] [--systems "PyTorch eager" …] [--rounds 12] [--report suite]
    [--redraw]

Writes results/<report>.md, results/<report>.json (from which --redraw makes the others again) and
results/suite-<model>.png.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from benchmarks.common import RESULTS, machine_line
from benchmarks.floor import bundle_work
from benchmarks.models import CONVOLUTIONAL, NAMES, bundle
from benchmarks.suite_report import write_report
from benchmarks.turns import Case, say, take_turns

MACHINE = Case("machine", "machine")
CASES = (
    Case("edge-razor, sparsity 0", "edge-razor", ("--sparsity", "0")),
    Case("edge-razor, centered 0.9", "edge-razor", ("--sparsity", "0.9")),
    Case("edge-razor, centered 0.95", "edge-razor", ("--sparsity", "0.95")),
    Case("edge-razor, centered 0.97", "edge-razor", ("--sparsity", "0.97")),
    Case("edge-razor, plain 0.9", "edge-razor", ("--sparsity", "0.9", "--razor", "plain")),
    Case("PyTorch eager", "torch"),
    Case("PyTorch eager, channels_last", "torch-channels-last"),
    Case("PyTorch, torch.compile", "torch-compile"),
    Case("PyTorch, activation checkpointing", "torch-checkpoint"),
    Case("PyTorch, plain Back Razor 0.9", "torch-back-razor", ("--sparsity", "0.9")),
    Case("onnxruntime-training", "onnxruntime-training"),
    Case("onnxruntime, inference only", "onnxruntime"),
)
WARM_UP = 2


def measure(model: str, cases: list[Case], options: argparse.Namespace) -> dict[str, Any]:
    """JSON-able results of one model."""
    path = bundle(model, options.size)
    common = ("--bundle", str(path), "--threads", str(options.threads), "--size", str(options.size))
    common += ("--batch-size", str(options.batch_size), "--optimizer", options.optimizer)
    machine, *results = take_turns([MACHINE, *cases], model, common, options.rounds, WARM_UP, profile=True)
    systems = []
    for result in results:
        entry = result.to_json()
        if result.system == "edge-razor" and result.error is None:
            work = bundle_work(path, options.batch_size, result.setup["sparsity"], result.setup["razor"])
            entry["work"] = {"multiply_adds": work.multiply_adds, "bytes": work.bytes}
        systems.append(entry)
    return {"machine": machine.to_json(), "systems": systems}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(CONVOLUTIONAL), choices=NAMES)
    labels = [case.label for case in CASES]
    parser.add_argument("--systems", nargs="+", default=labels, choices=labels, metavar="LABEL", help=", ".join(labels))
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--size", type=int, default=224, help="pixels, or tokens of a model of texts")
    parser.add_argument("--optimizer", default="sgd", choices=("sgd", "adamw"))
    parser.add_argument("--report", default="suite", help="name of the files in results (default: suite)")
    parser.add_argument("--redraw", action="store_true", help="measure nothing: tables and plots from suite.json")
    options = parser.parse_args()
    file = RESULTS / f"{options.report}.json"
    if not options.redraw:
        settings = {name: getattr(options, name) for name in ("rounds", "threads", "batch_size", "size", "optimizer")}
        models: dict[str, Any] = {}
        for number, model in enumerate(options.models):
            say(f"{model} ({number + 1} of {len(options.models)})")
            models[model] = measure(model, [c for c in CASES if c.label in options.systems], options)
            versions = machine_line("torch", "onnxruntime") + ", onnxruntime-training-cpu 1.19.2"
            content = {"machine": versions, "settings": settings | {"warm_up": WARM_UP}, "models": models}
            file.write_text(json.dumps(content, indent=1) + "\n")
    write_report(json.loads(file.read_text()), options.report)


if __name__ == "__main__":
    main()
