"""`bundle.json`: reading and checking (docs/bundle.md lists the fields)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, NoReturn

from edge_razor.errors import BundleError

__all__ = [
    "BUCKET_FILE",
    "FILES",
    "FORMAT_VERSION",
    "IGNORE_INDEX",
    "MANIFEST",
    "TOKENIZER",
    "FileEntry",
    "InputSpec",
    "Manifest",
    "OutputSpec",
    "Preprocessing",
]

MANIFEST = "bundle.json"
FILES = ("training.onnx", "inference.onnx", "weights.safetensors")
TOKENIZER = "tokenizer.json"
"""Only in bundles of language models."""
BUCKET_FILE = re.compile(r"training-([1-9]\d{0,6})\.onnx")
"""Training graphs for shorter texts; the number is how many tokens."""
FORMAT_VERSION = 1
_MAX_ELEMENTS = 2**31  # of a sample
DTYPES = ("float32", "int64", "int32", "bool")
IGNORE_INDEX = -100
"""A cross-entropy target that does not count, as in torch."""
LOSSES = ("cross_entropy", "mse", "bce_with_logits")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")


@dataclass(frozen=True, slots=True)
class InputSpec:
    """A model input.

    `shape`: the user's layout without the batch dimension; `perm`: runtime dim d = user's dim perm[d]; `dtype`: the
    user's: float32, int64 (token indices, or a mask) or bool (a mask); `indices`: it indexes a table.
    """

    name: str
    shape: tuple[int, ...]
    perm: tuple[int, ...]
    dtype: str = "float32"
    indices: bool = False

    @property
    def runtime_shape(self) -> tuple[int, ...]:
        """Shape of one sample as the runtime lays it out (channels last)."""
        return tuple(self.shape[d - 1] for d in self.perm[1:])


@dataclass(frozen=True, slots=True)
class OutputSpec:
    """The model output: `shape` in the user's layout without the batch; `perm`: user's dim d = runtime dim perm[d]."""

    name: str
    shape: tuple[int, ...]
    perm: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """Images to inputs: shorter side to `resize`, crop `crop` (pixels), then (x/255 − mean)/std per channel."""

    resize: int
    crop: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str


@dataclass(frozen=True, slots=True)
class Text:
    """Tokens: rows of the model's table, the index that pads a text, and the one that ends it (None: none)."""

    vocabulary: int
    pad: int
    end: int | None


@dataclass(frozen=True, slots=True)
class LoraLayer:
    """A frozen weight W and its addition: W + (alpha/r)·B·A (transposed, if the weight is [in, out])."""

    a: str
    b: str
    transposed: bool


@dataclass(frozen=True, slots=True)
class LoraSpec:
    """Low-rank additions by the name of the weight."""

    rank: int
    alpha: float
    layers: dict[str, LoraLayer]


@dataclass(frozen=True, slots=True)
class FileEntry:
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """The content of bundle.json; `raw` is the JSON object itself."""

    producer: str
    inputs: tuple[InputSpec, ...]
    output: OutputSpec
    loss: str
    label_smoothing: float
    trainable_spec: str
    trainable: tuple[str, ...]
    state_dict: tuple[str, ...]
    aliases: dict[str, str]
    classes: tuple[str, ...] | None
    preprocessing: Preprocessing | None
    text: Text | None
    lora: LoraSpec | None
    files: dict[str, FileEntry]
    raw: dict[str, Any]

    @property
    def buckets(self) -> tuple[int, ...]:
        """Tokens of a text that the bundle has a training graph for, ascending; the last is the longest."""
        shorter = [int(match[1]) for name in self.files if (match := BUCKET_FILE.fullmatch(name))]
        return (*sorted(shorter), *self.inputs[0].shape[:1]) if shorter else ()

    def at_tokens(self, tokens: int) -> dict[str, Any]:
        """`raw` for texts of so many tokens: that is the second dimension of every input, and of a causal model's
        output."""
        inputs = [{**entry, "shape": [None, tokens]} for entry in self.raw["inputs"]]
        output = dict(self.raw["output"])
        if self.per_token:
            output["shape"] = [None, tokens, *output["shape"][2:]]
        return {**self.raw, "inputs": inputs, "output": output}

    @property
    def class_axis(self) -> int:
        """Axis of the output, in the user's layout with the batch, that the runtime has last: the classes."""
        return self.output.perm.index(len(self.output.shape))

    @property
    def class_count(self) -> int | None:
        """Number of classes for cross_entropy, else None."""
        return self.output.shape[self.class_axis - 1] if self.loss == "cross_entropy" else None

    @property
    def per_token(self) -> bool:
        """Whether the model gives a class for every position of a text."""
        return self.loss == "cross_entropy" and len(self.output.shape) == 2 and any(i.indices for i in self.inputs)

    @property
    def target_shape(self) -> tuple[int, ...]:
        """Shape of one sample's target in the user's layout."""
        if self.loss != "cross_entropy":
            return self.output.shape
        return tuple(d for axis, d in enumerate(self.output.shape, 1) if axis != self.class_axis)

    @property
    def state_names(self) -> tuple[str, ...]:
        """Every name of the user's state dict, tied ones included, in order."""
        return (*self.state_dict, *(name for name in self.aliases if name not in self.state_dict))


class _Reader:
    """Typed access to JSON values; a wrong one is a BundleError that says where."""

    def __init__(self, bundle: str) -> None:
        self.bundle = bundle

    def fail(self, where: str, expected: str) -> NoReturn:
        raise BundleError(f"{self.bundle}: {MANIFEST}: {where} must be {expected}; export the model again")

    def get(self, table: Any, key: str, where: str, kind: type | tuple[type, ...], expected: str) -> Any:
        value = table.get(key) if isinstance(table, dict) else None
        if not isinstance(value, kind) or isinstance(value, bool):
            self.fail(f"{where}{key}", expected)
        return value

    def text(self, table: Any, key: str, where: str = "") -> str:
        return self.get(table, key, where, str, "a text")

    def texts(self, table: Any, key: str, where: str = "") -> tuple[str, ...]:
        values = self.get(table, key, where, list, "a list of texts")
        return self.each(values, f"{where}{key}", lambda v: isinstance(v, str), "a list of texts")

    def number(self, table: Any, key: str, where: str = "") -> float:
        value = self.get(table, key, where, (int, float), "a number")
        if not abs(value) <= 1e30:  # nor NaN
            self.fail(f"{where}{key}", "a number")
        return float(value)

    def integer(self, table: Any, key: str, where: str = "") -> int:
        value = self.get(table, key, where, int, "a whole number, not negative")
        if not 0 <= value < 2**63:
            self.fail(f"{where}{key}", "a whole number, not negative")
        return value

    def each(self, values: list[Any], where: str, test: Callable[[Any], bool], expected: str) -> tuple[Any, ...]:
        if not all(test(v) for v in values):
            self.fail(where, expected)
        return tuple(values)

    def sample_shape(self, table: Any, where: str) -> tuple[int, ...]:
        """`shape` without its first dimension, which is null for the batch."""
        shape = self.get(table, "shape", where, list, "a shape")
        if not 1 <= len(shape) <= 8 or shape[0] is not None:
            self.fail(f"{where}shape", "a shape whose first dimension is null (the batch)")
        sizes = self.each(shape[1:], f"{where}shape", lambda d: type(d) is int and d > 0, "positive after the batch")
        if prod(sizes) > _MAX_ELEMENTS:
            self.fail(f"{where}shape", "of a size that fits in memory")
        return sizes

    def permutation(self, table: Any, where: str, rank: int) -> tuple[int, ...]:
        perm = self.get(table, "perm", where, list, "a permutation")
        if sorted(d for d in perm if type(d) is int) != list(range(rank)) or len(perm) != rank or perm[0] != 0:
            self.fail(f"{where}perm", "a permutation that leaves the batch dimension first")
        return tuple(perm)


def parse_manifest(text: bytes, bundle: str) -> Manifest:
    """Reads and checks bundle.json; `bundle` names the bundle in errors.

    Raises:
        BundleError: not JSON, of a newer format version, or a field is missing or wrong (the message names it).
    """
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{bundle}: {MANIFEST} is damaged: {error}") from error
    read = _Reader(bundle)
    version = read.integer(raw, "format_version")
    if version > FORMAT_VERSION:
        raise BundleError(
            f"{bundle}: format version {version} is newer than this edge-razor reads ({FORMAT_VERSION}); "
            "upgrade edge-razor"
        )
    if version < 1:
        read.fail("format_version", "1")
    inputs = []
    for i, entry in enumerate(read.get(raw, "inputs", "", list, "a list of inputs")):
        where = f"inputs[{i}]."
        shape = read.sample_shape(entry, where)
        dtype = entry.get("dtype", "float32")
        if dtype not in DTYPES:
            read.fail(f"{where}dtype", "one of " + ", ".join(DTYPES))
        perm = read.permutation(entry, where, len(shape) + 1)
        inputs.append(InputSpec(read.text(entry, "name", where), shape, perm, dtype, entry.get("indices") is True))
    if not inputs:
        read.fail("inputs", "a list of at least one input")
    output = read.get(raw, "output", "", dict, "a table")
    output_shape = read.sample_shape(output, "output.")
    if not output_shape:
        read.fail("output.shape", "of at least two dimensions")
    loss = read.get(raw, "loss", "", dict, "a table")
    if read.text(loss, "name", "loss.") not in LOSSES:
        read.fail("loss.name", "one of " + ", ".join(LOSSES))
    trainable = read.get(raw, "trainable", "", dict, "a table")
    aliases = read.get(raw, "aliases", "", dict, "a table of names")
    read.each(list(aliases.values()), "aliases", lambda v: isinstance(v, str), "a table of names")
    files = read.get(raw, "files", "", dict, "a table")
    entries = {}
    for name in (*FILES, *(name for name in files if name == TOKENIZER or BUCKET_FILE.fullmatch(name))):
        entry = read.get(files, name, "files.", dict, "a table")
        sha256 = read.text(entry, "sha256", f"files.{name}.")
        if not re.fullmatch("[0-9a-f]{64}", sha256):
            read.fail(f"files.{name}.sha256", "64 hexadecimal digits")
        entries[name] = FileEntry(read.integer(entry, "bytes", f"files.{name}."), sha256)
    return Manifest(
        producer=read.text(raw, "producer"),
        inputs=tuple(inputs),
        output=OutputSpec(
            read.text(output, "name", "output."),
            output_shape,
            read.permutation(output, "output.", len(output_shape) + 1),
        ),
        loss=loss["name"],
        label_smoothing=read.number(loss, "label_smoothing", "loss.") if "label_smoothing" in loss else 0.0,
        trainable_spec=read.text(trainable, "spec", "trainable."),
        trainable=read.texts(trainable, "parameters", "trainable."),
        state_dict=read.texts(raw, "state_dict"),
        aliases=dict(aliases),
        classes=None if raw.get("classes") is None else read.texts(raw, "classes"),
        preprocessing=None if raw.get("preprocessing") is None else _preprocessing(raw["preprocessing"], read),
        text=None if raw.get("text") is None else _text(raw["text"], read, TOKENIZER in entries),
        lora=None if raw.get("lora") is None else _lora(raw["lora"], read, trainable),
        files=entries,
        raw=raw,
    )


def _text(table: Any, read: _Reader, has_tokenizer: bool) -> Text:
    end = None if isinstance(table, dict) and table.get("end") is None else read.integer(table, "end", "text.")
    text = Text(read.integer(table, "vocabulary", "text."), read.integer(table, "pad", "text."), end)
    if max(text.pad, text.end or 0) >= text.vocabulary:
        read.fail("text", "of tokens within the vocabulary")
    if not has_tokenizer:
        read.fail(f"files.{TOKENIZER}", "there, since text is")
    return text


def _lora(table: Any, read: _Reader, trainable: Any) -> LoraSpec:
    rank, alpha = read.integer(table, "rank", "lora."), read.number(table, "alpha", "lora.")
    if rank < 1 or not 0 < alpha < 1e9:
        read.fail("lora", "of a positive rank and alpha")
    layers = {}
    for name, entry in read.get(table, "layers", "lora.", dict, "a table of weights").items():
        where = f"lora.layers[{name!r}]."
        a, b = read.text(entry, "a", where), read.text(entry, "b", where)
        if not {a, b} <= set(trainable["parameters"]):
            read.fail(where + "a and b", "trainable parameters")
        layers[name] = LoraLayer(a, b, entry.get("transposed") is True)
    return LoraSpec(rank, alpha, layers)


def _preprocessing(table: Any, read: _Reader) -> Preprocessing:
    where = "preprocessing."
    channels = {}
    for key in ("mean", "std"):
        values = read.get(table, key, where, list, "a list of numbers")
        channels[key] = tuple(
            float(v)
            for v in read.each(
                values, where + key, lambda v: type(v) in (int, float) and abs(v) < 1e6, "a list of numbers"
            )
        )
    if len(channels["mean"]) != len(channels["std"]) or any(v <= 0 for v in channels["std"]):
        read.fail(where + "std", "positive and as many as mean")
    interpolation = table.get("interpolation", "bilinear")
    if interpolation not in INTERPOLATIONS:
        read.fail(where + "interpolation", "one of " + ", ".join(INTERPOLATIONS))
    resize, crop = read.integer(table, "resize", where), read.integer(table, "crop", where)
    if crop < 1 or resize < crop:
        read.fail(where + "resize", "at least crop, and crop at least 1")
    return Preprocessing(resize, crop, channels["mean"], channels["std"], interpolation)
