"""`train`: data, plan, training loop and its live progress, and the measured peak against the cap at the end."""

from __future__ import annotations

import errno
import platform
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from edge_razor import __version__
from edge_razor.batches import normalizes
from edge_razor.budget import resolve_budget
from edge_razor.bundle import Bundle
from edge_razor.checkpoint import BUFFER_BYTES, Checkpoint, checkpoint_files
from edge_razor.checkpointing import Every
from edge_razor.data import Augmentation, BatchRing, Loader, Source, open_source, split
from edge_razor.data.text import TextOptions
from edge_razor.errors import CheckpointError, MemoryCapError, UsageError
from edge_razor.fit import Events, FitResult, fit
from edge_razor.planner import Plan
from edge_razor.run_directory import put_in_order
from edge_razor.run_lock import run_lock
from edge_razor.runtime import isa
from edge_razor.schedule import Schedule
from edge_razor.throttle import Throttle, be_nice
from edge_razor.trainer import Trainer
from edge_razor.training_state import check_bundle, stored_extra, stored_settings
from edge_razor.units import format_bytes

from .plan import show_accounting
from .progress import Progress
from .rebudget import BudgetSignal, budget_signal
from .report import write_report
from .stopping import Stop, stop_signals
from .tables import print_table, show_damaged, show_text

__all__ = ["RunOptions", "run"]

SLOWEST_STEPS = 15  # that --profile lists one by one


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
    checkpoint_every: Every
    keep: int
    log_every: int
    profile: bool
    nice: int
    throttle: Throttle | None
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
    be_nice(options.nice)
    with stop_signals() as stop, budget_signal() as changes, ExitStack() as stack:
        if options.out.exists() and not options.out.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "is a file; --out names a directory", str(options.out))
        if options.out.is_dir():  # else `fit` makes it, once it is known that there is something to train
            stack.enter_context(run_lock(options.out))
        return _run(options, stop, changes)


def _run(options: RunOptions, stop: Stop, changes: BudgetSignal) -> int:
    checkpoint = _checkpoint(options)
    recipe, settings = options.recipe, dict(options.settings)
    if checkpoint is not None:
        recipe, settings = _resumed(options, checkpoint)
    if options.mem_budget is not None:
        settings["mem_budget"], why = resolve_budget(options.mem_budget)
        if why is not None:
            print(f"cap: {why}")
    if options.threads is not None:
        settings["threads"] = options.threads
    budget = settings.get("mem_budget")
    plan = None if options.plan_file is None else Plan.load(options.plan_file)
    batch_size = plan.batch_size if plan is not None else settings["batch_size"]
    with Bundle(options.bundle) as bundle:
        manifest = bundle.manifest
        if checkpoint is not None:
            check_bundle(checkpoint, bundle)
        source = open_source(
            options.data,
            manifest,
            augmentation=Augmentation(recipe["flip"], recipe["random_crop"]),
            skip_bad=options.skip_bad,
            classes=None if checkpoint is None else stored_extra(checkpoint).get("classes"),
            memory_limit=budget,
            bundle=bundle,
            text=options.text,
        )
    show_text(source)
    samples = len(source)
    if checkpoint is not None and samples != stored_extra(checkpoint).get("samples", samples):
        print(
            f"warning: {options.data} has {samples} samples, and had {stored_extra(checkpoint)['samples']} when the "
            "run began: which of them are held out, and their order, differ from then",
            file=sys.stderr,
        )
    training, held_out = split(samples, recipe["val_split"], settings["seed"])
    data_bytes = BatchRing.bytes_for(source, batch_size)
    if source.input_dtype == "uint8" and not normalizes(manifest.inputs[0]):
        data_bytes += 2 * 4 * batch_size * prod(source.input_shape)  # x/255 in float32, and its unscaled copy
    data_bytes += BUFFER_BYTES  # a checkpoint passes through it
    steps = -(-len(training) // batch_size) * recipe["epochs"]
    settings["total_steps"] = steps
    Schedule(settings["schedule"], settings["warmup_steps"], steps)
    if checkpoint is None and checkpoint_files(options.out):
        raise UsageError(f"{options.out}: holds a run already; add --resume to go on with it, or choose another --out")
    progress = Progress(steps, budget)  # its libraries belong to the base that the planner is told
    trainer = Trainer(
        options.bundle,
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
            put_in_order(options.out, trainer.update, trainer.position[0])
            print(f"{options.out}: all {recipe['epochs']} epochs are done; nothing is left to train")
            return 0
        ring = BatchRing(source, batch_size)
        trainer.data_resident = lambda: ring.bytes
        if options.profile:
            trainer.profile(True)
        with stop.gracefully(), progress:
            progress.start_at(trainer.update)
            result = fit(
                trainer,
                Loader(source, training, ring, seed=settings["seed"], shuffle=True),
                epochs=recipe["epochs"],
                validation=Loader(source, held_out, ring) if len(held_out) else None,
                out=options.out,
                log_every=options.log_every,
                checkpoint_every=options.checkpoint_every,
                keep=options.keep,
                throttle=options.throttle,
                events=Events(
                    progress.step,
                    progress.epoch,
                    on_message=progress.say,
                    between_steps=lambda: changes.apply(trainer, options.out, options.mem_budget, progress),
                    should_stop=lambda: stop.signal is not None,
                ),
                extra={
                    "recipe": recipe,
                    "classes": source.classes and list(source.classes),
                    "samples": samples,
                },
            )
        _report(options, trainer, source, result)
        plan, alarm = trainer.plan, result.alarm
        listed = _listed(options, trainer, recipe)
    write_report(options.out, plan, listed, options.bundle)  # now that the arena is gone, a child has room beside this
    print(f"wrote {options.out}")
    if alarm is not None:
        whole = f"the checkpoint in {options.out} is whole, go on with --resume and a larger --mem-budget"
        raise MemoryCapError(f"{alarm}\nstopped between steps; {whole}", alarm.parts)
    if result.interrupted and stop.signal is not None:
        print(f"interrupted; the checkpoint in {options.out} is whole, go on with --resume", file=sys.stderr)
        return 128 + stop.signal
    return 0


def _checkpoint(options: RunOptions) -> Checkpoint | None:
    if not options.resume:
        return None
    if not checkpoint_files(options.out):
        raise CheckpointError(f"{options.out}: there is no checkpoint to resume; leave --resume out to start")
    checkpoint = Checkpoint(options.out)
    show_damaged(checkpoint)
    return checkpoint


def _resumed(options: RunOptions, checkpoint: Checkpoint) -> tuple[dict[str, Any], dict[str, Any]]:
    """Recipe and settings of the checkpoint. Options that the user repeats must agree; --epochs may grow.

    Raises:
        CheckpointError: it was not written by `train`.
        UsageError: an option differs from the run's.
    """
    recipe = stored_extra(checkpoint).get("recipe")
    if not isinstance(recipe, dict) or recipe.keys() != options.recipe.keys():
        raise CheckpointError(f"{checkpoint.path}: was not written by 'edge-razor train'; resume it from Python")
    if (
        any(type(recipe[name]) is not type(value) for name, value in options.recipe.items())
        or not 0 <= recipe["val_split"] < 1
        or recipe["epochs"] < 1
    ):
        raise CheckpointError(f"{checkpoint.path}: what it says of the run's data is not valid; it is damaged")
    stored = stored_settings(checkpoint)
    wanted = {**options.settings, **options.recipe}
    for name, old in {**stored, **recipe}.items():
        if name not in options.given or name in ("epochs", "threads", "mem_budget"):
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


def _listed(options: RunOptions, trainer: Trainer, recipe: dict[str, Any]) -> dict[str, Any]:
    """What the report lists as settings and versions."""
    manifest = trainer.bundle.manifest
    return {
        **{name: value for name, value in trainer.settings().items() if name != "choices"},  # the table has them
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
        paused = f" and {result.paused_seconds:.1f} s of pauses" if result.paused_seconds else ""
        print(
            f"{result.steps} steps in {result.seconds:.1f} s{paused}, {rate:.1f} samples/s, "
            f"last loss {result.last_loss:.4f}"
        )
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
