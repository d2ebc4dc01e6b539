"""The options of every command, each with an example in its help.

argparse, because the parser stays in the process that trains under the cap: typer with its pydantic takes 14 MB there.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from edge_razor.errors import UsageError

if TYPE_CHECKING:
    from edge_razor.data.text import TextOptions

__all__ = ["build_parser"]


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line as every other error; remembers which options were written (`given`)."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see '{self.prog} --help')")


class _Written(argparse.Action):
    """Stores a value and notes that the option was written."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, values)
        namespace.given = {*getattr(namespace, "given", ()), self.dest}


class _WrittenFlag(_Written):
    def __init__(self, option_strings: Any, dest: str, **options: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **{"default": False, **options})

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        super().__call__(parser, namespace, True, option_string)


def _at_least(kind: Callable[[str], Any], least: float) -> Callable[[str], Any]:
    """A number that is not below `least`."""

    def convert(text: str) -> Any:
        value = kind(text)
        if not value >= least:  # also refuses NaN
            raise argparse.ArgumentTypeError(f"must be at least {least}, not {text}")
        return value

    convert.__name__ = "number" if kind is float else "whole number"  # for argparse's "invalid … value"
    return convert


_COUNT = _at_least(int, 1)


def build_parser() -> argparse.ArgumentParser:
    """The parser; a parsed namespace has `run`, the command's function of the namespace."""
    from edge_razor import __version__

    parser = _Parser(prog="edge-razor", description="Fine-tune a network on the device that uses it, in a memory cap.")
    parser.add_argument("--version", action="version", version=f"edge-razor {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], int | None], text: str, example: str) -> _Parser:
        made = commands.add_parser(
            name,
            help=text,
            description=text,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        made.set_defaults(run=run, given=frozenset())
        return made

    _add_export(
        command(
            "export",
            _export,
            "Make a bundle from a torch or ONNX model (workstation; needs the extra 'export').",
            "edge-razor export my_models:resnet18 -o model.razor --input 3x224x224 --trainable last:2",
        )
    )
    info = command("info", _info, "Show what a bundle holds.", "edge-razor info model.razor")
    info.add_argument("bundle", type=Path, metavar="BUNDLE", help="model bundle that 'export' made")
    _add_plan(
        command(
            "plan",
            _plan,
            "Place every byte of training under a cap, and show what the cap is spent on.",
            "edge-razor plan model.razor --mem-budget 128MB --batch-size 8\n"
            "  edge-razor plan model.razor --device raspberry-pi-4 -o model.plan",
        )
    )
    _add_train(
        command(
            "train",
            _train,
            "Fine-tune a model inside a memory cap.",
            "edge-razor train model.razor --data photos --mem-budget 128MB --epochs 3 --out runs/first\n"
            "  (to go on after an interruption: the same with --resume)",
        )
    )
    _add_evaluate(
        command(
            "eval", _evaluate, "Loss and accuracy of a tuned model.", "edge-razor eval runs/first --data photos/test"
        )
    )
    _add_fidelity(
        command(
            "fidelity",
            _fidelity,
            "Measure what compression costs: compressed gradients against exact ones, on your data.",
            "edge-razor fidelity model.razor --data photos --batch-size 8 --train-steps 100 --html fidelity.html",
        )
    )
    for name, run, text, file in (
        ("to-onnx", _to_onnx, "Write the tuned model as an ONNX file that stock onnxruntime runs.", "tuned.onnx"),
        ("to-torch", _to_torch, "Write the tuned weights as your own torch state dict.", "tuned.safetensors"),
        ("to-peft", _to_peft, "Write a LoRA adapter alone, as a directory that PEFT loads.", "adapter"),
    ):
        convert = command(name, run, text, f"edge-razor {name} runs/first -o {file}")
        _add_run(convert)
        convert.add_argument("--output", "-o", type=Path, required=True, metavar="FILE", help="file to write")
    _add_demo(
        command(
            "demo",
            _demo,
            "The main job on real data: EfficientNet-Lite0 learns handwritten digits (extra 'demo').",
            "edge-razor demo --mem-budget 160MB",
        )
    )
    return parser


def _add_export(parser: _Parser) -> None:
    add = parser.add_argument
    add("spec", metavar="SPEC", help="package.module:factory of an nn.Module, a .onnx file, or hf:DIRECTORY")
    add("--output", "-o", type=Path, required=True, metavar="BUNDLE", help="bundle to write")
    add("--input", dest="input_shape", metavar="SHAPE", help="without the batch: 3x224x224; needed for a torch model")
    add("--text", dest="tokens", type=_COUNT, metavar="TOKENS", help="a model of texts of at most so many tokens")
    add("--buckets", metavar="TOKENS", help="shorter texts, by commas (default: a half and a quarter); none")
    add("--tokenizer", type=Path, metavar="FILE", help="tokenizer.json (default: the one in hf:DIRECTORY)")
    add("--loss", default="cross_entropy", help="cross_entropy (default), token_cross_entropy, mse, bce_with_logits")
    add("--label-smoothing", type=_at_least(float, 0), default=0.0, help="of cross_entropy (default 0)")
    add(
        "--trainable",
        default="all",
        help="all (default), head, last:N, bias, norm, globs on names, by commas; lora:r=8,head",
    )
    add("--classes", help="class names in order: by commas, or a file with one a line")
    add("--preprocessing", type=Path, metavar="JSON", help="resize, crop, mean, std, interpolation (docs/bundle.md)")
    add("--imagenet", action="store_true", help="prepare images as ImageNet models expect")
    add("--no-dropout", dest="dropout", action="store_false", help="drop the model's dropout layers")


def _add_planning(parser: _Parser) -> None:
    """Options that `plan` and `train` share."""

    def add(*names: str, **options: Any) -> None:
        parser.add_argument(*names, action=_Written, **options)

    add("--mem-budget", metavar="SIZE", help="cap on the process's resident memory: 128MB, 512MiB, auto")
    add("--batch-size", type=_COUNT, default=8, metavar="N", help="samples of one optimizer update (default 8)")
    add(
        "--sparsity",
        default="auto",
        help="share of each kept activation dropped, or auto (default): chosen for each, see --prefer",
    )
    add(
        "--prefer",
        default="balanced",
        choices=("exact", "balanced", "fast"),
        help="no error of the gradient; the least that fits (default); or the least time within a bound",
    )
    add(
        "--allow-freeze", type=_at_least(int, 0), default=0, metavar="N", help="so many early layers may stay untrained"
    )
    add("--harm", type=Path, metavar="FILE", help="harm table of 'fidelity' (default: usual errors of each form)")
    add("--razor", default="centered", choices=("centered", "plain"), help="how they are kept (default centered)")
    add(
        "--attention",
        default="recompute",
        choices=("recompute", "probabilities"),
        help="what its backward pass works from: probabilities made again exactly (default), or the largest, kept",
    )
    add(
        "--frozen-weights",
        default="fp32",
        choices=("fp32", "bf16", "int8"),
        help="weights that do not train: read in the bundle (fp32, default), or rounded in memory",
    )
    add("--optimizer", default="sgd", choices=("sgd", "adamw"), help="default sgd")
    add("--momentum", type=_at_least(float, 0), default=0.9, metavar="M", help="SGD (default 0.9); 0 needs no state")
    parser.add_argument("--nesterov", action=_WrittenFlag, help="SGD: Nesterov momentum")
    add("--weight-decay", type=_at_least(float, 0), default=0.0, metavar="W", help="SGD: L2; AdamW: decoupled")
    add("--threads", type=_COUNT, metavar="N", help="worker threads (default: all processors)")


def _add_plan(parser: _Parser) -> None:
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="model bundle that 'export' made")
    _add_planning(parser)
    parser.add_argument(
        "--micro-batch", type=_COUNT, metavar="N", help="samples at a time (default: the most that fits)"
    )
    parser.add_argument("--spill", action="store_true", help="kept values may lie in a file ('train --spill-dir')")
    parser.add_argument("--output", "-o", type=Path, metavar="FILE", help="write the plan, for 'train --plan' and C")
    parser.add_argument("--device", metavar="NAME", help="plan for this device: its memory and cores are the defaults")
    parser.add_argument(
        "--devices", type=Path, metavar="JSON", help="your own devices beside the known (docs/devices.md)"
    )
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="write the plan as a page: memory, arena, kept values"
    )
    parser.add_argument("--json", dest="as_json", action="store_true", help="print the summary as JSON")


def _add_train(parser: _Parser) -> None:
    def add(*names: str, **options: Any) -> None:
        parser.add_argument(*names, action=_Written, **options)

    def flag(name: str, text: str) -> None:
        parser.add_argument(name, action=_WrittenFlag, help=text)

    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="model bundle that 'export' made")
    add(
        "--data", type=Path, required=True, metavar="PATH", help="image folder, .npz, x.npy; .csv, .jsonl or .txt texts"
    )
    add("--out", type=Path, metavar="RUN", help="run directory (default runs/<bundle>)")
    add("--epochs", type=_COUNT, default=3, metavar="N", help="passes over the data (default 3)")
    add("--lr", type=_at_least(float, 0), default=1e-3, help="learning rate (default 1e-3)")
    add("--schedule", default="cosine", choices=("constant", "cosine", "linear"), help="default cosine")
    add("--warmup", dest="warmup_steps", type=_at_least(int, 0), default=0, metavar="STEPS", help="linear warm-up")
    _add_planning(parser)
    add("--betas", type=float, nargs=2, default=[0.9, 0.999], metavar=("B1", "B2"), help="AdamW (default 0.9 0.999)")
    add("--eps", type=_at_least(float, 0), default=1e-8, help="AdamW (default 1e-8)")
    add("--val-split", type=_at_least(float, 0), default=0.1, metavar="SHARE", help="held out data (default 0.1)")
    add("--seed", type=_at_least(int, 0), default=0, help="of split, order, augmentation, dropout (default 0)")
    _add_text(parser)
    flag("--flip", "mirror half of the training images")
    flag("--random-crop", "crop training images at random places")
    flag("--skip-bad", "leave unreadable samples out and count them")
    add("--plan", dest="plan_file", type=Path, metavar="FILE", help="plan of 'plan -o'; fixes batch size to threads")
    add("--spill-dir", type=Path, metavar="DIR", help="let the plan keep tensors in a file there until they are needed")
    flag("--resume", "go on from the checkpoint in the run directory")
    add(
        "--checkpoint-every",
        default="10m",
        metavar="N|TIME",
        help="steps (500) or time (30s, 5m) between checkpoints, beside the one after each epoch (default 10m)",
    )
    add("--keep", type=_COUNT, default=2, metavar="N", help="checkpoints that stay (default 2: one to fall back to)")
    add("--log-every", type=_COUNT, default=10, metavar="STEPS", help="lines of metrics.jsonl (default 10)")
    add("--nice", type=int, default=0, metavar="N", help="lower the process's priority: 0 to 19 (default 0)")
    add("--max-cpu", default="100%", metavar="SHARE", help="share of the time spent training: 50%% (default 100%%)")
    flag("--pause-on-battery", "train only while the machine is plugged in")
    add("--max-temperature", type=float, metavar="C", help="pause above so many degrees Celsius, until it is 5 cooler")
    flag("--profile", "show time, GFLOP/s and GB/s by kernel, and the slowest steps, at the end")


def _add_text(parser: _Parser) -> None:
    add = parser.add_argument
    add("--text-column", default="text", metavar="NAME", help="of a .csv or .jsonl (default text)")
    add("--label-column", default="label", metavar="NAME", help="of a .csv or .jsonl (default label)")
    add("--no-truncate", dest="truncate", action="store_false", help="refuse texts that are too long, do not cut them")


def _text(o: argparse.Namespace) -> TextOptions:
    from edge_razor.data.text import TextOptions

    return TextOptions(o.text_column, o.label_column, o.truncate)


def _add_run(parser: _Parser) -> None:
    parser.add_argument("run_directory", type=Path, metavar="RUN", help="run directory that 'train --out' wrote")
    parser.add_argument("--bundle", type=Path, help="where the run's bundle is now, if it was moved")


def _add_evaluate(parser: _Parser) -> None:
    _add_run(parser)
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="PATH", help="as for 'train'")
    _add_text(parser)
    add("--mem-budget", metavar="SIZE", help="cap on the process's resident memory")
    add("--threads", type=_COUNT, metavar="N", help="worker threads (default: all processors)")
    add("--skip-bad", action="store_true", help="leave unreadable images out and count them")
    add("--json", dest="as_json", action="store_true", help="print the figures as JSON")


def _add_fidelity(parser: _Parser) -> None:
    add = parser.add_argument
    add("bundle", type=Path, metavar="BUNDLE", help="model bundle that 'export' made")
    add("--data", type=Path, required=True, metavar="PATH", help="as for 'train'")
    add("--batch-size", type=_COUNT, default=8, metavar="N", help="samples of a batch (default 8)")
    add("--batches", type=_COUNT, default=1, metavar="N", help="batches that the errors are averaged over (default 1)")
    add("--sparsities", metavar="LIST", help="by commas: 0.9,0.95 (default: the planner's, 0.5 to 0.99)")
    add("--razor", default="centered", choices=("centered", "plain"), help="how values are kept (default centered)")
    add("--mem-budget", metavar="SIZE", help="cap on the process's resident memory: 512MB, auto (default: none)")
    add("--threads", type=_COUNT, metavar="N", help="worker threads (default: all processors)")
    add("--seed", type=_at_least(int, 0), default=0, help="of order and dropout (default 0)")
    add("--skip-bad", action="store_true", help="leave unreadable samples out")
    _add_text(parser)
    add("--harm", type=Path, metavar="FILE", help="write the errors of every parameter as JSON, for the planner")
    add("--html", type=Path, metavar="FILE", help="write a page with plots and tables")
    add("--train-steps", type=_COUNT, metavar="N", help="train N steps, exact and compressed, and compare the losses")
    add("--optimizer", default="sgd", choices=("sgd", "adamw"), help="of --train-steps (default sgd)")
    add("--lr", type=_at_least(float, 0), default=1e-3, help="of --train-steps (default 1e-3)")
    add("--momentum", type=_at_least(float, 0), default=0.9, metavar="M", help="of --train-steps (default 0.9)")
    add("--weight-decay", type=_at_least(float, 0), default=0.0, metavar="W", help="of --train-steps (default 0)")


def _add_demo(parser: _Parser) -> None:
    add = parser.add_argument
    add("--mem-budget", default="160MB", metavar="SIZE", help="cap on the training process (default 160MB)")
    add("--sparsity", default="auto", help="as for 'train' (default auto)")
    add("--directory", type=Path, help="keep data, bundle and run here (default: a temporary directory)")
    add("--threads", type=_COUNT, default=2, metavar="N", help="worker threads (default 2)")
    add("--no-compare", dest="compare", action="store_false", help="leave the PyTorch comparison out")


# ---- The commands; each module is imported when its command runs ----


def _export(o: argparse.Namespace) -> None:
    from .export import run

    run(
        o.spec,
        o.output,
        o.input_shape,
        o.loss,
        o.label_smoothing,
        o.trainable,
        o.classes,
        o.preprocessing,
        o.imagenet,
        o.dropout,
        o.tokens,
        o.tokenizer,
        o.buckets,
    )


def _info(o: argparse.Namespace) -> None:
    from .info import run

    run(o.bundle)


_PLANNING = (
    *("batch_size", "sparsity", "razor", "attention", "frozen_weights"),
    *("optimizer", "momentum", "nesterov", "weight_decay"),
    *("prefer", "allow_freeze", "harm"),
)


def _plan(o: argparse.Namespace) -> None:
    from edge_razor.devices import find_device

    from .plan import run

    names = (*_PLANNING, "mem_budget", "micro_batch", "threads", "spill")
    if o.devices is not None and o.device is None:
        raise UsageError("--devices adds devices to choose from: name one with --device")
    device = None if o.device is None else find_device(o.device, o.devices)
    run(o.bundle, o.output, o.html, o.as_json, {name: getattr(o, name) for name in names}, device)


def _train(o: argparse.Namespace) -> int:
    from edge_razor.checkpointing import parse_every
    from edge_razor.throttle import Throttle, parse_share

    from .train import RunOptions, run

    names = (*_PLANNING, "lr", "schedule", "warmup_steps", "betas", "eps", "seed")
    settings = {name: getattr(o, name) for name in names}
    out = o.out or Path("runs") / o.bundle.name.removesuffix(".razor")
    data = ("bundle", "data", "mem_budget", "threads", "epochs", "val_split", "flip", "random_crop", "skip_bad")
    run_names = ("plan_file", "spill_dir", "resume", "keep", "log_every", "profile", "nice")
    options = {name: getattr(o, name) for name in (*data, *run_names)}
    throttle = None
    if {"max_cpu", "pause_on_battery", "max_temperature"} & set(o.given):
        throttle = Throttle(parse_share(o.max_cpu), o.pause_on_battery, o.max_temperature)
    every = parse_every(o.checkpoint_every)
    return run(
        RunOptions(
            out=out,
            settings=settings,
            given=frozenset(o.given),
            text=_text(o),
            checkpoint_every=every,
            throttle=throttle,
            **options,
        )
    )


def _evaluate(o: argparse.Namespace) -> None:
    from .evaluate import run

    run(o.run_directory, o.data, o.bundle, o.mem_budget, o.threads, o.skip_bad, o.as_json, _text(o))


def _fidelity(o: argparse.Namespace) -> None:
    from .fidelity import FidelityOptions, run

    names = (
        "bundle",
        "data",
        "batch_size",
        "batches",
        "sparsities",
        "razor",
        "mem_budget",
        "threads",
        "seed",
        "skip_bad",
    )
    training = {name: getattr(o, name) for name in ("optimizer", "lr", "momentum", "weight_decay")}
    options = {name: getattr(o, name) for name in (*names, "harm", "html", "train_steps")}
    run(FidelityOptions(**options, text=_text(o), training=training))


def _to_onnx(o: argparse.Namespace) -> None:
    from .convert import to_onnx

    to_onnx(o.run_directory, o.output, o.bundle)


def _to_torch(o: argparse.Namespace) -> None:
    from .convert import to_torch

    to_torch(o.run_directory, o.output, o.bundle)


def _to_peft(o: argparse.Namespace) -> None:
    from .convert import to_peft

    to_peft(o.run_directory, o.output, o.bundle)


def _demo(o: argparse.Namespace) -> None:
    from edge_razor.demo import run

    run(budget=o.mem_budget, sparsity=o.sparsity, directory=o.directory, threads=o.threads, compare=o.compare)
