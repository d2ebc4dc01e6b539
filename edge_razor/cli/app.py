"""The typer application: options of every command, each with an example in its help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["app"]

app = typer.Typer(
    name="edge-razor",
    help="Fine-tune a network on the device that uses it, inside a memory cap.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

BundleArgument = Annotated[Path, typer.Argument(metavar="BUNDLE", help="Model bundle that 'export' made.")]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Run directory that 'train --out' wrote.")]
OutOption = Annotated[Path, typer.Option("--output", "-o", help="File to write.")]
BudgetOption = Annotated[
    str | None, typer.Option("--mem-budget", help="Cap on the process's resident memory: 128MB, 512MiB, bytes.")
]
BatchOption = Annotated[int, typer.Option("--batch-size", min=1, help="Samples of one optimizer update.")]
SparsityOption = Annotated[
    str, typer.Option("--sparsity", help="Share of each kept activation that is dropped, or auto: the least that fits.")
]
RazorOption = Annotated[str, typer.Option("--razor", help="How activations are kept: centered or plain.")]
OptimizerOption = Annotated[str, typer.Option("--optimizer", help="sgd or adamw.")]
MomentumOption = Annotated[float, typer.Option("--momentum", help="SGD: momentum; 0 needs no optimizer state.")]
NesterovOption = Annotated[bool, typer.Option("--nesterov", help="SGD: Nesterov momentum.")]
DecayOption = Annotated[float, typer.Option("--weight-decay", help="SGD: L2; AdamW: decoupled.")]
ThreadsOption = Annotated[int | None, typer.Option("--threads", min=1, help="Worker threads; default: all processors.")]
BetasOption = Annotated[tuple[float, float], typer.Option("--betas", help="AdamW: decay of both moments.")]
EpsOption = Annotated[float, typer.Option("--eps", help="AdamW: epsilon.")]
MovedBundleOption = Annotated[
    Path | None, typer.Option("--bundle", help="Where the run's bundle is now, if it was moved.")
]


def _version(wanted: bool) -> None:
    if wanted:
        from edge_razor import __version__

        typer.echo(f"edge-razor {__version__}")
        raise typer.Exit()


@app.callback()
def _common(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    pass


@app.command(epilog="Example: edge-razor export my_models:resnet18 -o model.razor --input 3x224x224 --trainable last:2")
def export(
    spec: Annotated[
        str, typer.Argument(metavar="SPEC", help="package.module:factory of an nn.Module, or a .onnx file.")
    ],
    output: OutOption,
    input_shape: Annotated[
        str | None, typer.Option("--input", help="Input shape without the batch: 3x224x224. Needed for SPEC in torch.")
    ] = None,
    loss: Annotated[str, typer.Option("--loss", help="cross_entropy, mse or bce_with_logits.")] = "cross_entropy",
    label_smoothing: Annotated[float, typer.Option("--label-smoothing", help="Of cross_entropy.")] = 0.0,
    trainable: Annotated[
        str, typer.Option("--trainable", help="all, head, last:N, bias, norm, or globs on names, comma-separated.")
    ] = "all",
    classes: Annotated[
        str | None, typer.Option("--classes", help="Class names in order: comma-separated, or a file with one a line.")
    ] = None,
    preprocessing: Annotated[
        Path | None,
        typer.Option("--preprocessing", help="JSON file: resize, crop, mean, std, interpolation (docs/bundle.md)."),
    ] = None,
    imagenet: Annotated[bool, typer.Option("--imagenet", help="Normalize images as ImageNet models expect.")] = False,
    dropout: Annotated[bool, typer.Option("--dropout/--no-dropout", help="Keep dropout for training.")] = True,
) -> None:
    """Make a bundle from a torch or ONNX model (workstation; needs the extra 'export')."""
    from .export import run

    run(spec, output, input_shape, loss, label_smoothing, trainable, classes, preprocessing, imagenet, dropout)


@app.command(epilog="Example: edge-razor info model.razor")
def info(bundle: BundleArgument) -> None:
    """Show what a bundle holds."""
    from .info import run

    run(bundle)


@app.command(epilog="Example: edge-razor plan model.razor --mem-budget 128MB --batch-size 8")
def plan(
    bundle: BundleArgument,
    mem_budget: BudgetOption = None,
    batch_size: BatchOption = 8,
    sparsity: SparsityOption = "auto",
    razor: RazorOption = "centered",
    optimizer: OptimizerOption = "sgd",
    momentum: MomentumOption = 0.9,
    nesterov: NesterovOption = False,
    weight_decay: DecayOption = 0.0,
    micro_batch: Annotated[
        int | None, typer.Option("--micro-batch", min=1, help="Samples at a time; default: the most that fits.")
    ] = None,
    threads: ThreadsOption = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the plan, for the C API or 'train --plan'.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Place every byte of training under a cap, and show what the cap is spent on."""
    from .plan import run

    options: dict[str, Any] = {
        "mem_budget": mem_budget,
        "batch_size": batch_size,
        "sparsity": sparsity,
        "razor": razor,
        "optimizer": optimizer,
        "momentum": momentum,
        "nesterov": nesterov,
        "weight_decay": weight_decay,
        "micro_batch": micro_batch,
        "threads": threads,
    }
    run(bundle, output, as_json, options)


@app.command(
    epilog="Example: edge-razor train model.razor --data photos --mem-budget 128MB --epochs 3 --out runs/first; "
    "to go on after an interruption, the same with --resume."
)
def train(
    context: typer.Context,
    bundle: BundleArgument,
    data: Annotated[
        Path, typer.Option("--data", help="Folder of class folders of images, .npz, or x.npy beside y.npy.")
    ],
    mem_budget: BudgetOption = None,
    out: Annotated[Path | None, typer.Option("--out", help="Run directory; default runs/<bundle>.")] = None,
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="Passes over the data.")] = 3,
    batch_size: BatchOption = 8,
    lr: Annotated[float, typer.Option("--lr", min=0, help="Learning rate.")] = 1e-3,
    schedule: Annotated[str, typer.Option("--schedule", help="constant, cosine or linear.")] = "cosine",
    warmup: Annotated[int, typer.Option("--warmup", min=0, help="Steps of linear warm-up.")] = 0,
    optimizer: OptimizerOption = "sgd",
    momentum: MomentumOption = 0.9,
    nesterov: NesterovOption = False,
    weight_decay: DecayOption = 0.0,
    betas: BetasOption = (0.9, 0.999),
    eps: EpsOption = 1e-8,
    sparsity: SparsityOption = "auto",
    razor: RazorOption = "centered",
    val_split: Annotated[float, typer.Option("--val-split", help="Share of the data held out for validation.")] = 0.1,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of split, order, augmentation and dropout.")] = 0,
    flip: Annotated[bool, typer.Option("--flip", help="Mirror half of the training images.")] = False,
    random_crop: Annotated[bool, typer.Option("--random-crop", help="Crop training images at random places.")] = False,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave unreadable images out and count them.")] = False,
    threads: ThreadsOption = None,
    plan_file: Annotated[
        Path | None, typer.Option("--plan", help="Use a plan that 'plan -o' wrote; it fixes batch size to threads.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in the run directory.")] = False,
    save_every: Annotated[
        int | None, typer.Option("--save-every", min=1, help="Steps between checkpoints; default: each epoch.")
    ] = None,
    log_every: Annotated[int, typer.Option("--log-every", min=1, help="Steps between lines of metrics.jsonl.")] = 10,
    profile: Annotated[bool, typer.Option("--profile", help="Show the time by kernel at the end.")] = False,
) -> int:
    """Fine-tune a model inside a memory cap."""
    from .train import RunOptions, run

    settings: dict[str, Any] = {
        "batch_size": batch_size,
        "lr": lr,
        "schedule": schedule,
        "warmup_steps": warmup,
        "optimizer": optimizer,
        "momentum": momentum,
        "nesterov": nesterov,
        "weight_decay": weight_decay,
        "betas": betas,
        "eps": eps,
        "sparsity": sparsity,
        "razor": razor,
        "seed": seed,
    }
    parameters = {"warmup": "warmup_steps"}
    given = {
        parameters.get(name, name)
        for name in context.params
        if (source := context.get_parameter_source(name)) is not None and source.name == "COMMANDLINE"
    }
    options = RunOptions(
        bundle=bundle,
        data=data,
        out=out or Path("runs") / bundle.name.removesuffix(".razor"),
        mem_budget=mem_budget,
        threads=threads,
        epochs=epochs,
        val_split=val_split,
        flip=flip,
        random_crop=random_crop,
        skip_bad=skip_bad,
        plan_file=plan_file,
        resume=resume,
        save_every=save_every,
        log_every=log_every,
        profile=profile,
        settings=settings,
        given=frozenset(given),
    )
    return run(options)


@app.command(name="eval", epilog="Example: edge-razor eval runs/first --data photos/test")
def evaluate(
    run_directory: RunArgument,
    data: Annotated[Path, typer.Option("--data", help="As for 'train'.")],
    bundle: MovedBundleOption = None,
    mem_budget: BudgetOption = None,
    threads: ThreadsOption = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave unreadable images out and count them.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Loss and accuracy of a tuned model."""
    from .evaluate import run

    run(run_directory, data, bundle, mem_budget, threads, skip_bad, as_json)


@app.command(name="to-onnx", epilog="Example: edge-razor to-onnx runs/first -o tuned.onnx")
def to_onnx(run_directory: RunArgument, output: OutOption, bundle: MovedBundleOption = None) -> None:
    """Write the tuned model as an ONNX file that stock onnxruntime runs."""
    from .convert import to_onnx as run

    run(run_directory, output, bundle)


@app.command(name="to-torch", epilog="Example: edge-razor to-torch runs/first -o tuned.safetensors")
def to_torch(run_directory: RunArgument, output: OutOption, bundle: MovedBundleOption = None) -> None:
    """Write the tuned weights under the names of the user's own torch state dict."""
    from .convert import to_torch as run

    run(run_directory, output, bundle)


@app.command(epilog="Example: edge-razor demo --mem-budget 160MB")
def demo(
    mem_budget: Annotated[str, typer.Option("--mem-budget", help="Cap on the training process.")] = "160MB",
    sparsity: SparsityOption = "auto",
    directory: Annotated[
        Path | None, typer.Option("--directory", help="Keep data, bundle and run here; default: a temporary directory.")
    ] = None,
    threads: Annotated[int, typer.Option("--threads", min=1, help="Worker threads.")] = 2,
    compare: Annotated[bool, typer.Option("--compare/--no-compare", help="Do the same in PyTorch beside it.")] = True,
) -> None:
    """The main job on real data: EfficientNet-Lite0 learns handwritten digits (extra 'demo')."""
    from edge_razor.demo import run

    run(budget=mem_budget, sparsity=sparsity, directory=directory, threads=threads, compare=compare)
