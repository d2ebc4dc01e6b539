"""`export`: a bundle from `package.module:factory` or a .onnx file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from edge_razor.bundle import Bundle
from edge_razor.errors import UsageError

from .info import show

__all__ = ["run"]

IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def run(
    spec: str,
    output: Path,
    input_shape: str | None,
    loss: str,
    label_smoothing: float,
    trainable: str,
    classes: str | None,
    preprocessing_file: Path | None,
    imagenet: bool,
    dropout: bool,
    tokens: int | None = None,
    tokenizer: Path | None = None,
    buckets: str | None = None,
) -> None:
    shape = None if input_shape is None else parse_shape(input_shape)
    preprocessing = _preprocessing(preprocessing_file, imagenet, shape)
    names = None if classes is None else parse_classes(classes)
    from edge_razor import export
    from edge_razor.exporters.spec import load_spec

    model = load_spec(spec, causal=loss == "token_cross_entropy", classes=None if names is None else len(names))
    example: Any = None
    shorter: list[int] = []
    if tokens is not None:
        if shape is not None:
            raise UsageError("give either --text or --input")
        if tokenizer is None and spec.startswith("hf:"):
            tokenizer = Path(spec.removeprefix("hf:"))
        example = _text_example(model, tokens)
        shorter = _buckets(buckets, tokens, isinstance(model, Path))
    elif not isinstance(model, Path):
        if shape is None:
            raise UsageError(
                "a torch model needs --input, its input shape without the batch, such as --input 3x224x224"
            )
        import torch

        example = (torch.zeros(2, *shape),)
    elif shape is not None:
        example = (np.zeros((2, *shape), np.float32),)
    export(
        model,
        example,
        output,
        loss=loss,
        label_smoothing=label_smoothing,
        trainable=trainable,
        classes=names,
        preprocessing=preprocessing,
        dropout=dropout,
        tokenizer=tokenizer,
        buckets=shorter,
    )
    print(f"wrote {output}")
    with Bundle(output) as bundle:
        show(bundle)


def _buckets(text: str | None, tokens: int, fixed: bool) -> list[int]:
    """Shorter lengths: those in ``text``; by default a half and a quarter, at least 16, of a model that is no file."""
    if text is None:
        return [] if fixed else [size for size in (tokens // 4, tokens // 2) if size >= 16]
    if text == "none":
        return []
    if not re.fullmatch(r"[1-9]\d{0,6}(,[1-9]\d{0,6})*", text):
        raise UsageError(f"--buckets {text!r} are no numbers of tokens; write 32,64 or none")
    return sorted(int(size) for size in text.split(","))


def _text_example(model: Any, tokens: int) -> Any:
    """Token indices and attention mask under the names of forward()'s arguments; for an ONNX file what it takes."""
    from inspect import signature

    if isinstance(model, Path):
        import onnx

        count = len(onnx.load(model, load_external_data=False).graph.input)
        return tuple(np.ones((2, tokens), np.int64) for _ in range(count))
    import torch

    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if isinstance(limit, int) and tokens > limit:
        raise UsageError(f"--text {tokens}: the model has positions for {limit} tokens only")
    ones = torch.ones(2, tokens, dtype=torch.int64)
    names = list(signature(model.forward).parameters)
    known = [name for name in ("input_ids", "attention_mask") if name in names]
    return {name: ones for name in known} if "input_ids" in known else tuple(ones for _ in names[:2])


def parse_shape(text: str) -> tuple[int, ...]:
    """The sizes in a text such as 3x224x224.

    Raises:
        UsageError: not sizes with an x between them.
    """
    if not re.fullmatch(r"[1-9]\d{0,8}([x,][1-9]\d{0,8})*", text):
        raise UsageError(f"--input {text!r} is no shape; write sizes without the batch, such as 3x224x224")
    return tuple(int(size) for size in re.split("[x,]", text))


def parse_classes(text: str) -> list[str]:
    """Class names from a file with one a line, or from a comma-separated list.

    Raises:
        UsageError: no names, or one twice.
    """
    path = Path(text)
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else text.split(",")
    names = [line.strip() for line in lines if line.strip()]
    if not names or len(set(names)) < len(names):
        raise UsageError(f"--classes {text!r} gives no names, or one twice")
    return names


def _preprocessing(file: Path | None, imagenet: bool, shape: tuple[int, ...] | None) -> dict[str, Any] | None:
    if file is not None and imagenet:
        raise UsageError("give either --preprocessing or --imagenet")
    if file is not None:
        try:
            table = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UsageError(f"{file}: is not JSON: {error}") from error
        if not isinstance(table, dict):
            raise UsageError(f"{file}: must be a JSON object with resize, crop, mean and std")
        return table
    if not imagenet:
        return None
    if shape is None or len(shape) != 3 or shape[0] != 3:
        raise UsageError("--imagenet needs --input 3xHEIGHTxWIDTH")
    crop = min(shape[1:])
    resize = round(crop * 256 / 224)
    return {"resize": resize, "crop": crop, "mean": IMAGENET_MEAN, "std": IMAGENET_STD, "interpolation": "bilinear"}
