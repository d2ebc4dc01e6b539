"""`train`: data, plan, training loop and its live progress, and the measured peak against the cap at the end."""

from __future__ import annotations

import platform
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from edge_razor import __version__
from edge_razor.batches import normalizes
from edge_razor.budget import resolve_budget
from edge_razor.bundle import Bundle
from edge_razor.checkpoint import Checkpoint, checkpoint_file
from edge_razor.data import Augmentation, BatchRing, Loader, Source, open_source, split
from edge_razor.data.text import TextOptions
from edge_razor.errors import CheckpointError, MemoryCapError, UsageError
from edge_razor.fit import Events, FitResult, fit
from edge_razor.planner import Plan
from edge_razor.runtime import isa
from edge_razor.schedule import Schedule
from edge_razor.trainer import Trainer, check_bundle
from edge_razor.units import format_bytes

from .plan import show_accounting
from .progress import Progress
from .rebudget import budget_signal
from .report import write_report
from .tables import print_table, show_text

__all__ = ["RunOptions", "run"]

SLOWEST_STEPS = 15  # that --profile lists one by one
# Signal → exit status, as shells expect: 128 + its number.
_STOPPING = {signal.SIGINT: 130, signal.SIGTERM: 143}


@dataclass(frozen=True, slots=True)
class RunOptions:
    """The command line of `train`. `settings` go to the trainer; `given` are the options that the user wrote."""

    bundle: Path
    data: Path
    out: Path
    mem_budget: str | None
    threads: int | None
    epochs: int
    val_split: float
    flip: bool
    random_crop: bool
    skip_bad: bool
    plan_file: Path | None
    spill_dir: Path | None
    resume: bool
    save_every: int | None
    log_every: int
    profile: bool
    text: TextOptions
    settings: dict[str, Any]
    given: frozenset[str]

    @property
    def recipe(self) -> dict[str, Any]:
        """What decides which data come when; kept in the checkpoint, so that a resumed run sees the same."""
        return {
            "epochs": self.epochs,
            "val_split": self.val_split,
            "flip": self.flip,
            "random_crop": self.random_crop,
        }


def run(options: RunOptions) -> int:
    """Returns the exit status: 0, or 128 + signal after an interrupt (the checkpoint is written)."""
    budget, why = resolve_budget(options.mem_budget)
    if why is not None:
        print(f"cap: {why}")
    checkpoint = _checkpoint(options)
    recipe, settings = options.recipe, dict(options.settings)
    if checkpoint is not None:
        recipe, settings = _resumed(options, checkpoint)
    plan = None if options.plan_file is None else Plan.load(options.plan_file)
    batch_size = plan.batch_size if plan is not None else settings["batch_size"]
    with Bundle(options.bundle) as bundle:
        manifest = bundle.manifest
        largest_tensor = max((bundle.tensors[n].end - bundle.tensors[n].begin for n in manifest.trainable), default=0)
        if checkpoint is not None:
            check_bundle(checkpoint, bundle)
        source = open_source(
            options.data,
            manifest,
            augmentation=Augmentation(recipe["flip"], recipe["random_crop"]),
            skip_bad=options.skip_bad,
            classes=None if checkpoint is None else checkpoint.state["extra"].get("classes"),
            memory_limit=budget,
            bundle=bundle,
            text=options.text,
        )
    show_text(source)
    training, held_out = split(len(source), recipe["val_split"], settings["seed"])
    data_bytes = BatchRing.bytes_for(source, batch_size)
    if source.input_dtype == "uint8" and not normalizes(manifest.inputs[0], manifest):
        data_bytes += 2 * 4 * batch_size * prod(source.input_shape)  # x/255 in float32, and its unscaled copy
    data_bytes += largest_tensor  # a checkpoint copies one at a time
    steps = -(-len(training) // batch_size) * recipe["epochs"]
    settings["total_steps"] = steps
    Schedule(settings["schedule"], settings["warmup_steps"], steps)
    if checkpoint is None and checkpoint_file(options.out).is_file() and not options.resume:
        raise UsageError(f"{options.out}: holds a run already; add --resume to go on with it, or choose another --out")
    progress = Progress(steps, budget)  # its libraries belong to the base that the planner is told
    trainer = Trainer(
        options.bundle,
        mem_budget=budget,
        threads=options.threads,
        plan=plan,
        data_bytes=data_bytes,
        spill_dir=options.spill_dir,
        **settings,
    )
    alarm = None
    with trainer:
        if checkpoint is not None:
            trainer.load_checkpoint(checkpoint)
            checkpoint.close()
        show_accounting(trainer.plan.summary)
        print(f"\n{len(training)} training samples, {len(held_out)} for validation, {steps} steps")
        if trainer.position[0] >= recipe["epochs"]:
            print(f"{options.out}: all {recipe['epochs']} epochs are done; nothing is left to train")
            return 0
        ring = BatchRing(source, batch_size)
        trainer.data_resident = lambda: ring.bytes
        if options.profile:
            trainer.profile(True)
        with _stop_flag() as stop, budget_signal() as changes, progress:
            progress.start_at(trainer.update)
            result = fit(
                trainer,
                Loader(source, training, ring, seed=settings["seed"], shuffle=True),
                epochs=recipe["epochs"],
                validation=Loader(source, held_out, ring) if len(held_out) else None,
                out=options.out,
                log_every=options.log_every,
                save_every=options.save_every,
                events=Events(
                    progress.step,
                    progress.epoch,
                    between_steps=lambda: changes.apply(trainer, options.out, options.mem_budget, progress),
                    should_stop=lambda: stop.signal is not None,
                ),
                extra={"recipe": recipe, "classes": source.classes and list(source.classes)},
            )
        _report(options, trainer, source, result)
        plan, alarm = trainer.plan, result.alarm
        listed = _listed(options, trainer, recipe)
    write_report(options.out, plan, listed, options.bundle)  # now that the arena is gone, a child has room beside this
    print(f"wrote {options.out}")
    if alarm is not None:
        whole = f"the checkpoint in {options.out} is whole, go on with --resume and a larger --mem-budget"
        raise MemoryCapError(f"{alarm}\nstopped between steps; {whole}", alarm.parts)
    if stop.signal is not None:
        print(f"interrupted; the checkpoint in {options.out} is whole, go on with --resume", file=sys.stderr)
        return _STOPPING[stop.signal]
    return 0


def _checkpoint(options: RunOptions) -> Checkpoint | None:
    if not options.resume:
        return None
    if not checkpoint_file(options.out).is_file():
        raise CheckpointError(f"{options.out}: there is no checkpoint to resume; leave --resume out to start")
    return Checkpoint(options.out)


def _resumed(options: RunOptions, checkpoint: Checkpoint) -> tuple[dict[str, Any], dict[str, Any]]:
    """Recipe and settings of the checkpoint. Options that the user repeats must agree; --epochs may grow.

    Raises:
        CheckpointError: it was not written by `train`.
        UsageError: an option differs from the run's.
    """
    stored, recipe = checkpoint.state.get("settings"), checkpoint.state.get("extra", {}).get("recipe")
    if not isinstance(stored, dict) or not isinstance(recipe, dict) or recipe.keys() != options.recipe.keys():
        raise CheckpointError(f"{checkpoint.path}: was not written by 'edge-razor train'; resume it from Python")
    wanted = {**options.settings, **options.recipe}
    for name, old in {**stored, **recipe}.items():
        if name not in options.given or name == "epochs":
            continue
        new = list(wanted[name]) if isinstance(wanted[name], tuple) else wanted[name]
        if name == "sparsity" and new != "auto":
            new = _number(str(new))
        if new != old and not (name == "sparsity" and new == "auto"):
            raise UsageError(f"{options.out}: the run has {name} {old}, not {new}; leave the option out to resume it")
    recipe = dict(recipe)
    if "epochs" in options.given:
        recipe["epochs"] = options.epochs
    settings = dict(stored)
    return recipe, settings


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UsageError(f'--sparsity must be "auto" or a number, not {text!r}') from None


class _Stop:
    signal: signal.Signals | None = None


@contextmanager
def _stop_flag() -> Iterator[_Stop]:
    """Turns the first SIGINT or SIGTERM into a flag, so that training stops between steps; a second one kills."""
    stop = _Stop()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.signal is not None:
            raise KeyboardInterrupt
        stop.signal = signal.Signals(number)

    previous = {number: signal.signal(number, handle) for number in _STOPPING}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _listed(options: RunOptions, trainer: Trainer, recipe: dict[str, Any]) -> dict[str, Any]:
    """What the report lists as settings and versions."""
    manifest = trainer.bundle.manifest
    return {
        **trainer.settings(),
        **recipe,
        "data": str(options.data),
        "cap": options.mem_budget,
        "trainable": f"{manifest.trainable_spec}, {len(manifest.trainable)} tensors",
        "loss": manifest.loss,
        "bundle": f"{options.bundle}, {trainer.bundle.id[:16]}",
        "edge-razor": __version__,
        "Python": platform.python_version(),
        "system": platform.platform(),
        "instruction set": isa(),
        "numpy": np.__version__,
    }


def _report(options: RunOptions, trainer: Trainer, source: Source, result: FitResult) -> None:
    if source.bad:
        print(f"{len(source.bad)} unreadable samples were left out:", file=sys.stderr)
        for name, reason in list(source.bad.items())[:5]:
            print(f"  {name}: {reason}", file=sys.stderr)
    if result.seconds:
        rate = result.samples / result.seconds
        print(f"{result.steps} steps in {result.seconds:.1f} s, {rate:.1f} samples/s, last loss {result.last_loss:.4f}")
    if result.evaluation is not None:
        accuracy = result.evaluation["accuracy"]
        shown = "" if accuracy is None else f", accuracy {accuracy:.2%}"
        if "perplexity" in result.evaluation:
            shown += f", perplexity {result.evaluation['perplexity']:.2f}"
        print(f"validation: loss {result.evaluation['loss']:.4f}{shown}")
    predicted, budget = trainer.plan.predicted_peak_bytes, trainer.plan.summary["mem_budget"]
    cap = "" if budget is None else f", cap {format_bytes(budget)}"
    print(f"peak resident memory: {format_bytes(result.peak_rss_bytes)} (predicted {format_bytes(predicted)}{cap})")
    spill = trainer.spill_info()
    if spill.file_bytes:
        print(
            f"spill file: {format_bytes(spill.written_bytes)} written, {format_bytes(spill.read_bytes)} read, "
            f"waited {spill.waited_seconds:.1f} s for it"
        )
    if options.profile:
        _show_profile(trainer)


def _show_profile(trainer: Trainer) -> None:
    from edge_razor.profile import by_kernel, profile_lines, slowest, table_cells

    lines = [line for binary, entries in trainer.profiles() for line in profile_lines(binary, entries)]
    everything = sum(line.seconds for line in lines)
    print("\ntime by kernel")
    print_table(
        ("phase", "kernel", "calls", "seconds", "ms a call", "share", "GFLOP/s", "GB/s"),
        [
            (line.phase, line.kernel, str(line.calls), f"{line.seconds:.3f}", *table_cells(line, everything))
            for line in by_kernel(lines)
        ],
        left=2,
    )
    print(f"\nthe {min(SLOWEST_STEPS, len(lines))} slowest steps")
    print_table(
        ("phase", "kernel", "step", "ms a call", "share", "GFLOP/s", "GB/s"),
        [
            (line.phase, line.kernel, line.label, *table_cells(line, everything))
            for line in slowest(lines, SLOWEST_STEPS)
        ],
        left=3,
    )
