"""What a cap costs: five caps for each model, from the smallest that can be met to all that exact training takes.

python dev.py bench caps [--models mobilenet_v2 …] [--parts proofs turns] [--rounds 3] [--redraw]

For each cap `edge-razor train`, with data loading, a checkpoint every two updates and an evaluation, runs in a memory
cgroup of exactly the cap with swap off. The same at centered 0.95 and at the defaults, without a cap, is set against
onnxruntime's inference. Then the plans of ``--prefer exact``, ``balanced`` and ``fast`` and PyTorch, plain and with
activation checkpointing, each with the largest batch that fits the cap, take turns, one step each; also under the caps
in which PyTorch trains one sample, and the whole batch.
Writes results/caps.md, results/caps.json (from which --redraw makes the others again) and results/caps-<model>.png.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.common import RESULTS, Worker, WorkerError, machine_line, markdown_table, write_result
from benchmarks.models import LANGUAGE, NAMES, bundle
from benchmarks.turns import Case, say, take_turns
from device_tests.cgroup import run_confined, unavailable

CAPS = 5
SIZE, TOKENS = 224, 128
PREFER = ("exact", "balanced", "fast")
PEERS = {"PyTorch eager": "torch", "PyTorch, activation checkpointing": "torch-checkpoint"}
STEP_OF_CAPS = 100_000  # bytes, to which the smallest cap is rounded up
ROOM = 5_000_000  # bytes of the largest cap beyond what `plan` says: the command line's own libraries
WORKER = 8_000_000  # bytes that a worker of the turns holds beyond the command line: its batch and its libraries
PARTS = ("proofs", "uncapped", "turns")
UNCAPPED = {"centered 0.95": ("--sparsity", "0.95"), "defaults": ()}


def batch_size(model: str) -> int:
    return 16 if model in LANGUAGE else 8


def size_of(model: str) -> int:
    return TOKENS if model in LANGUAGE else SIZE


def optimizer(model: str) -> str:
    return "adamw" if model in LANGUAGE else "sgd"


def write_data(directory: Path, model: str) -> Path:
    """Three batches for training and one held out: uint8 pixels, or texts longer than the model's tokens."""
    generator, samples = np.random.default_rng(0), 4 * batch_size(model)
    if model in LANGUAGE:
        path = directory / "texts.csv"
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("text", "label"))
            words = np.array("library tools for reading and writing files on the device of a user".split())
            writer.writerows((" ".join(generator.choice(words, TOKENS)), index) for index in range(samples))
        return path
    np.save(directory / "x.npy", generator.integers(0, 256, (samples, SIZE, SIZE, 3), dtype=np.uint8))
    np.save(directory / "y.npy", generator.integers(0, 1000, samples))
    return directory


def train_command(model: str, data: Path, run: Path, cap: int | None, *more: str) -> list[str]:
    command = [sys.executable, "-m", "edge_razor", "train", str(bundle(model, size_of(model))), "--data", str(data)]
    command += ["--out", str(run), "--batch-size", str(batch_size(model)), "--epochs", "1"]
    command += () if cap is None else ("--mem-budget", str(cap))
    command += ["--val-split", "0.25", "--checkpoint-every", "2", "--optimizer", optimizer(model), "--threads", "2"]
    return [*command, *(() if model in LANGUAGE else ("--momentum", "0")), *more]


def smallest_cap(model: str, data: Path, run: Path) -> int:
    """The smallest cap that the command line names when it refuses one byte, rounded up."""
    done = subprocess.run(train_command(model, data, run, 1), capture_output=True, text=True)
    found = re.search(r"smallest that works with these settings is .*?\((\d+) bytes\)", " ".join(done.stderr.split()))
    if done.returncode != 3 or found is None:
        raise SystemExit(f"{model}: no refusal with a smallest cap, status {done.returncode}\n{done.stderr[-2000:]}")
    return -(-int(found[1]) // STEP_OF_CAPS) * STEP_OF_CAPS


def exact_cap(model: str) -> int:
    """The peak that is planned for exact training without a cap, in the fastest way."""
    code = "import sys, edge_razor; print(edge_razor.plan(sys.argv[1], mem_budget=None, sparsity=0.0, threads=2, "
    code += f"batch_size={batch_size(model)}, optimizer={optimizer(model)!r}, momentum=0.0).predicted_peak_bytes)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(bundle(model, size_of(model)))], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@dataclass
class Proof:
    """A run of the command line in a cgroup of the cap."""

    cap: int
    status: int
    peak: int = 0
    predicted: int = 0
    group_peak: int = 0
    summary: dict[str, Any] = field(default_factory=dict)
    error: str = ""


def prove(model: str, data: Path, directory: Path, cap: int) -> Proof:
    run = directory / f"run-{cap}"
    done = run_confined(train_command(model, data, run, cap), cap, timeout=1800)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("error:")] or ["no message"]
        return Proof(cap, done.returncode, group_peak=done.peak_bytes, error=f"{said[0]} ({done.oom_kills} OOM kills)")
    summary = json.loads((run / "plan.json").read_text())
    peak = measured_peak(run)
    shown = ("micro_batch", "sparsity", "gradient_error", "recompute_level", "arena_bytes", "gap")
    chosen = {name: summary[name] for name in shown}
    return Proof(cap, 0, peak, summary["predicted_peak_bytes"], done.peak_bytes, chosen)


def measured_peak(run: Path) -> int:
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return max(event.get("peak_rss_bytes", 0) for event in events)


def measure_uncapped(model: str) -> dict[str, Any]:
    """Peak of a run of the command line without a cap, by its settings; JSON-able."""
    peaks = {}
    with tempfile.TemporaryDirectory() as name:
        data = write_data(Path(name), model)
        for settings, options in UNCAPPED.items():
            run = Path(name) / f"run-{len(peaks)}"
            subprocess.run(train_command(model, data, run, None, *options), check=True, stdout=subprocess.DEVNULL)
            peaks[settings] = measured_peak(run)
            say(f"{model}, {settings}: peak {peaks[settings] / 1e6:.1f} MB")
    return {"uncapped": peaks}


def peers_by_batch(model: str) -> list[dict[str, Any]]:
    """{"label", "system", "batch", "peak_rss_bytes"} of each peer at every batch from ours down to 1."""
    found = []
    for label, system in PEERS.items():
        batch = batch_size(model)
        while batch >= 1:
            try:
                worker = Worker(system, model, *common(model, batch))
                for _ in range(2):
                    worker.ask("step")
                peak = worker.ask("stop")["peak_rss_bytes"]
                found.append({"label": label, "system": system, "batch": batch, "peak_rss_bytes": peak})
            except WorkerError as error:
                found.append({"label": label, "system": system, "batch": batch, "error": str(error)})
                break
            batch //= 2
    return found


def peer_caps(peers: list[dict[str, Any]], batch: int) -> list[int]:
    """The smallest caps under which a peer trains one sample, and `batch`: in bytes, as turns count them."""
    found = []
    for size in (1, batch):
        peaks = [p["peak_rss_bytes"] for p in peers if p["batch"] == size and "peak_rss_bytes" in p]
        found += [-(-min(peaks) // STEP_OF_CAPS) * STEP_OF_CAPS - WORKER] if peaks else []
    return found


def common(model: str, batch: int) -> tuple[str, ...]:
    options = ("--threads", "2", "--size", str(size_of(model)), "--optimizer", optimizer(model))
    return (*options, "--batch-size", str(batch))


def take_turns_under(model: str, cap: int, peers: list[dict[str, Any]], rounds: int) -> list[dict[str, Any]]:
    """Seconds of a step and images a second of every way to train under a cap that there is."""
    cap += WORKER
    ours = ("--bundle", str(bundle(model, size_of(model))), "--mem-budget", str(cap), "--sparsity", "auto")
    cases, batches = [], []
    for prefer in PREFER:
        options = (*common(model, batch_size(model)), *ours, "--prefer", prefer)
        cases.append(Case(f"edge-razor, {prefer}", "edge-razor", options))
        batches.append(batch_size(model))
    for label in PEERS:
        fitting = [p for p in peers if p["label"] == label and p.get("peak_rss_bytes", cap + 1) <= cap]
        if fitting:
            best = max(fitting, key=lambda p: p["batch"])
            cases.append(Case(label, best["system"], common(model, best["batch"])))
            batches.append(best["batch"])
    found = []
    for result, batch in zip(take_turns(cases, model, (), rounds, 1), batches, strict=True):
        entry: dict[str, Any] = {"label": result.label, "batch": batch, "error": result.error}
        if result.error is None:
            entry |= {"seconds": result.seconds, "peak_rss_bytes": result.peak_rss_bytes}
            entry |= {"gradient_error": result.setup.get("gradient_error", 0.0)}
        found.append(entry)
    return found


def measure_proofs(model: str) -> dict[str, Any]:
    """The caps, a run of the command line under each, and onnxruntime's peak; JSON-able."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        data = write_data(directory, model)
        low = smallest_cap(model, data, directory / "refused")
        high = max(exact_cap(model) + ROOM, low)
        caps = [round(low * (high / low) ** (i / (CAPS - 1))) for i in range(CAPS)]
        path = str(bundle(model, size_of(model)))
        inference = Worker("onnxruntime", model, "--bundle", path, *common(model, batch_size(model)))
        for _ in range(3):
            inference.ask("step")
        inference_peak = inference.ask("stop")["peak_rss_bytes"]
        say(f"{model}: inference {inference_peak / 1e6:.1f} MB")
        proofs = []
        for cap in caps:
            proof = prove(model, data, directory, cap)
            say(f"    {cap / 1e6:.1f} MB: status {proof.status} {proof.error}, peak {proof.peak / 1e6:.1f} MB")
            proofs.append(asdict(proof))
    return {"inference_peak": inference_peak, "proofs": proofs}


def measure_turns(model: str, caps: list[int], rounds: int) -> dict[str, Any]:
    """Every way to train under each of the caps, in turns; JSON-able."""
    # With LoRA PyTorch's worker would train all parameters: other work.
    peers = [] if model == "minilm_lora" else peers_by_batch(model)
    curves = []
    for cap in sorted({*caps, *peer_caps(peers, batch_size(model))}):
        say(f"{model}: {cap / 1e6:.1f} MB")
        curves.append({"cap": cap, "systems": take_turns_under(model, cap, peers, rounds)})
    return {"peers": peers, "curves": curves}


def mb(count: float) -> str:
    return f"{count / 1e6:.1f}"


def proof_table(models: dict[str, Any]) -> str:
    rows = []
    for model, found in models.items():
        for p in (Proof(**values) for values in found["proofs"]):
            if p.status:
                rows.append((model, mb(p.cap), "–", "–", "–", "–", "–", f"status {p.status}: {p.error}"))
                continue
            off = f"{mb(p.predicted)} ({100 * (p.predicted / p.peak - 1):+.1f} %)"
            error = p.summary["gradient_error"]
            rows.append(
                (
                    model,
                    mb(p.cap),
                    mb(p.peak),
                    off,
                    p.summary["micro_batch"],
                    p.summary["recompute_level"],
                    "exact" if not error else "< 0.001" if error < 0.0005 else f"{error:.3f}",
                    "finished",
                )
            )
    header = ("model", "cap, MB", "peak RSS, MB", "predicted, MB", "micro-batch", "recomputation", "gradient error")
    return markdown_table((*header, "in a cgroup of the cap"), rows)


def inference_table(models: dict[str, Any]) -> str:
    """Peak of training, in brackets over that of onnxruntime's inference, and the smallest that PyTorch trains in."""
    rows = []
    for model, found in models.items():
        peaks = [p["peak"] for p in found["proofs"] if not p["status"]]
        if peaks:
            inference = found["inference_peak"]
            torch = [peer["peak_rss_bytes"] for peer in found.get("peers", []) if not peer.get("error")]
            least = mb(min(torch)) if torch else "–"
            at = [min(peaks), *(found.get("uncapped", {}).get(name) for name in UNCAPPED)]
            against = ["–" if peak is None else f"{mb(peak)} ({peak / inference:.2f})" for peak in at]
            rows.append((model, mb(inference), *against, least))
    header = ("model", "onnxruntime inference, MB", "training at the smallest cap, MB (ratio)")
    header += (*(f"at {name}, without a cap" for name in UNCAPPED), "PyTorch, training on one sample, MB")
    return markdown_table(header, rows)


def throughput_table(models: dict[str, Any]) -> str:
    """Samples a second at equal caps; in brackets PyTorch's batch."""
    rows = []
    for model, found in models.items():
        for point in found.get("curves", []):
            cells = []
            for label in (*(f"edge-razor, {p}" for p in PREFER), *PEERS):
                entry = next((s for s in point["systems"] if s["label"] == label and not s["error"]), None)
                if entry is None:
                    cells.append("–")
                    continue
                rate = f"{entry['batch'] / median(entry['seconds']):.1f}"
                cells.append(f"{rate} (batch {entry['batch']})" if label in PEERS else rate)
            rows.append((model, mb(point["cap"]), *cells))
    return markdown_table(("model", "cap, MB", *PREFER, *PEERS), rows)


def write_report(content: dict[str, Any]) -> None:
    """Writes results/caps.md and the plots."""
    from benchmarks.plots import cap_curves

    models, pictures = content["models"], ""
    for model, found in models.items():
        if "curves" in found:
            path = RESULTS / f"caps-{model}.png"
            cap_curves(model, found, path)
            pictures += f"![{model}]({path.name})\n\n"
    body = "## Proof\n\n" + proof_table(models)
    body += "\n`--prefer balanced`; data loading, checkpoints and an evaluation included, swap off.\n"
    body += "\n## Against running the model\n\n" + inference_table(models)
    body += "\nWithout a cap the defaults keep everything exactly, in the fastest way.\n"
    body += "\n## Samples a second under the same cap\n\n" + throughput_table(models)
    body += (
        f"\nIn turns, {content['rounds']} rounds after one of warm-up, medians. PyTorch: the largest batch whose peak "
    )
    body += "fits the cap; a dash: not even one sample does, or (`exact`) the cap needs other levers. "
    body += (
        "Beyond the proofs' caps there are those in which PyTorch trains one sample, and the whole batch. Workers hold "
    )
    body += f"{WORKER // 10**6} MB more than the command line; all got that much beside the cap. Caps are those of the "
    body += "proofs at the time: proofs that are run again alone may have others.\n\n" + pictures
    errors = [
        f"- {model}, {entry['label']}, batch {entry['batch']}: {entry['error']}\n"
        for model, found in models.items()
        for entry in (*found.get("peers", []), *(s for p in found.get("curves", []) for s in p["systems"]))
        if entry.get("error")
    ]
    title = (
        "What a cap costs: images 224×224, batch 8, SGD; texts of 128 tokens, batch 16, AdamW; all parameters, or LoRA"
    )
    others: dict[str, list[str]] = {}  # whose samples a second were measured elsewhere, or at another time
    for model, found in content["models"].items():
        if (where := found.get("turns_machine", content["machine"])) != content["machine"]:
            others.setdefault(where, []).append(model)
    notes = "".join(f"\nSamples a second of {', '.join(names)}: {where}\n" for where, names in others.items())
    write_result("caps", title, "python dev.py bench caps", body + "".join(errors) + notes, machine=content["machine"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(NAMES), choices=NAMES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--parts", nargs="+", default=list(PARTS), choices=PARTS, help="the others need proofs, made before"
    )
    parser.add_argument("--redraw", action="store_true", help="measure nothing: tables and plots from caps.json")
    options = parser.parse_args()
    file = RESULTS / "caps.json"
    if not options.redraw:
        reason = unavailable()
        if reason is not None:
            raise SystemExit(reason)
        models = json.loads(file.read_text())["models"] if file.exists() else {}
        machine = machine_line("torch", "onnxruntime")
        for part in options.parts:
            for model in options.models:
                if part == "proofs":
                    models[model] = models.get(model, {}) | measure_proofs(model)
                elif part == "uncapped":
                    models[model] |= measure_uncapped(model)
                else:
                    caps = [proof["cap"] for proof in models[model]["proofs"]]
                    models[model] |= measure_turns(model, caps, options.rounds) | {"turns_machine": machine}
                content = {"machine": machine, "rounds": options.rounds, "models": models}
                file.write_text(json.dumps(content, indent=1) + "\n")
    write_report(json.loads(file.read_text()))


if __name__ == "__main__":
    main()
