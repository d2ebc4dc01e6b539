"""The package's readers of untrusted files; each raises errors of `edge_razor.errors` only."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image

from edge_razor.bundle import Bundle
from edge_razor.checkpoint import Checkpoint, write_checkpoint
from edge_razor.data.arrays import ArraySource, find_arrays
from edge_razor.data.images import ImageFolder
from edge_razor.data.source import Augmentation
from edge_razor.data.tokenize import Request, tokenize, tokenizer_text
from edge_razor.manifest import InputSpec, parse_manifest
from edge_razor.planner.deserialize import read_steps
from edge_razor.planner.harm import read_harm_table
from edge_razor.planner.plan_file import Plan
from edge_razor.planner.planning import plan_graph
from edge_razor.tensors import TensorSpec
from edge_razor.training_state import stored_extra, stored_progress, stored_settings
from tests.bundles import write_linear_bundle
from tests.planner.conftest import mobile_network, settings
from tests.runtime.plan_writer import encode, linear_plan, spilled

from .mutate_graph import mutate_graph
from .mutation import mutate_bytes, mutate_json

__all__ = ["READERS", "Reader"]

_FEATURES, _CLASSES = 6, 3


@dataclass(frozen=True)
class Reader:
    """`seeds(folder)`: valid files; `read(data, folder)`: reads a file of these bytes; `mutate(data, random)`."""

    seeds: Callable[[Path], list[bytes]]
    read: Callable[[bytes, Path], None]
    mutate: Callable[[bytes, Random], bytes]


def _bundle(folder: Path) -> Path:
    path = folder / "seed"
    return path if path.exists() else write_linear_bundle(path, _FEATURES, _CLASSES)


def _bytes_or_json(data: bytes, random: Random) -> bytes:
    try:
        return mutate_json(data, random) if random.random() < 0.7 else mutate_bytes(data, random)
    except (ValueError, RecursionError):
        return mutate_bytes(data, random)


# ---- Bundles ----


def _manifest_seeds(folder: Path) -> list[bytes]:
    manifest = json.loads((_bundle(folder) / "bundle.json").read_text())
    entry = manifest["files"]["training.onnx"]
    text = {
        **manifest,
        "text": {"vocabulary": 9, "pad": 0, "end": 1},
        "lora": {"rank": 2, "alpha": 4.0, "layers": {"w": {"a": "fc.weight", "b": "fc.bias", "transposed": True}}},
        "preprocessing": {"resize": 8, "crop": 7, "mean": [0.5], "std": [0.2], "interpolation": "bicubic"},
        "classes": ["a", "b", "c"],
        "files": {**manifest["files"], "tokenizer.json": entry, "training-4.onnx": entry},
    }
    return [json.dumps(manifest).encode(), json.dumps(text).encode()]


def _read_manifest(data: bytes, folder: Path) -> None:
    manifest = parse_manifest(data, "bundle")
    for name in ("buckets", "class_axis", "class_count", "per_token", "target_shape", "state_names"):
        getattr(manifest, name)
    manifest.at_tokens(3)


def _zip(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return stream.getvalue()


def _zip_seeds(folder: Path) -> list[bytes]:
    return [_zip({file.name: file.read_bytes() for file in sorted(_bundle(folder).iterdir())})]


def _mutate_zip(data: bytes, random: Random) -> bytes:
    """The bytes, or one member with the manifest's size and checksum made right again."""
    if random.random() < 0.5:
        return mutate_bytes(data, random)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            files = {info.filename: archive.read(info) for info in archive.infolist()}
        name = random.choice(sorted(files))
        if name == "bundle.json":
            files[name] = mutate_json(files[name], random)
        elif name == "weights.safetensors":
            files[name] = _mutate_safetensors(files[name], random)
        else:
            files[name] = mutate_bytes(files[name], random)
        manifest = json.loads(files["bundle.json"])
        manifest["files"][name] = {"bytes": len(files[name]), "sha256": hashlib.sha256(files[name]).hexdigest()}
        if name != "bundle.json":
            files["bundle.json"] = json.dumps(manifest).encode()
        if random.random() < 0.2:
            files[random.choice(("../escape", "/escape", "a/../../escape"))] = b"outside"
        return _zip(files)
    except Exception:  # what was altered before is no bundle any more
        return mutate_bytes(data, random)


def _read_bundle(path: Path) -> None:
    with Bundle(path) as bundle:
        for name in bundle.manifest.files:
            bundle.read_file(name)
        buffer = np.empty(1024, np.uint8)
        for name in bundle.tensors:
            bundle.read_tensor(name)
            for _ in bundle.read_parts(name, buffer):
                pass


def _read_zip(data: bytes, folder: Path) -> None:
    path = folder / "bundle.zip"
    path.write_bytes(data)
    _read_bundle(path)


def _mutate_safetensors(data: bytes, random: Random) -> bytes:
    """The header's JSON, with its length made right again, or the bytes."""
    length = int.from_bytes(data[:8], "little")
    if random.random() < 0.3 or length > len(data) - 8:
        return mutate_bytes(data, random)
    header = _bytes_or_json(data[8 : 8 + length], random)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


_MOBILE = mobile_network()[1]


def _read_graph(data: bytes, folder: Path) -> None:
    """Plans in this process, as the child of the one that trains does."""
    plan_graph(data, _MOBILE.manifest, settings(batch_size=4, micro_batch=2), None)


# ---- Checkpoints ----


def _checkpoint_seeds(folder: Path) -> list[bytes]:
    state = {
        "bundle": "b",
        "bundle_id": "0" * 64,
        "weights_id": "1" * 64,
        "update": 3,
        "position": [0, 3],
        "settings": {
            "batch_size": 4, "micro_batch": 2, "sparsity": 0.5, "choices": None, "prefer": "balanced", "lr": 0.1,
            "razor": "plain", "attention": "recompute", "frozen_weights": "fp32", "optimizer": "sgd", "momentum": 0.9,
            "nesterov": False, "weight_decay": 0.0, "betas": [0.9, 0.999], "eps": 1e-8, "schedule": "constant",
            "warmup_steps": 0, "total_steps": None, "seed": 0, "threads": 2, "mem_budget": None,
        },
        "asked": {"sparsity": "auto", "micro_batch": None},
        "extra": {"classes": ["a", "b"], "samples": 9},
    }  # fmt: skip
    arrays = {"w": np.ones((2, 3), np.float32), "optimizer/momentum/w": np.zeros((2, 3), np.float32)}
    specs = {name: TensorSpec(np.dtype("<f4"), array.shape) for name, array in arrays.items()}
    file = write_checkpoint(folder / "checkpoint", 3, specs, lambda name: [arrays[name].reshape(-1)], state)
    return [file.read_bytes()]


def _mutate_checkpoint(data: bytes, random: Random) -> bytes:
    """Mostly the state or the header, with the header's checksum made right again."""
    length = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + length])
        metadata = header["__metadata__"]
        if random.random() < 0.6:
            metadata["state"] = mutate_json(metadata["state"].encode(), random).decode("utf-8", "surrogatepass")
        elif random.random() < 0.5:
            header = json.loads(mutate_json(json.dumps(header).encode(), random))
            metadata = header["__metadata__"]
        else:
            return _mutate_safetensors(data, random)
        metadata["crc32"] = "0" * 8
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        head = len(text).to_bytes(8, "little") + text
        checksum = f'"crc32":"{zlib.crc32(head):08x}"'.encode()
        return head.replace(b'"crc32":"00000000"', checksum, 1) + data[8 + length :]
    except Exception:  # what was altered before has no such header any more
        return _mutate_safetensors(data, random)


def _read_checkpoint(data: bytes, folder: Path) -> None:
    path = folder / "checkpoint-00000003.safetensors"
    path.write_bytes(data)
    with Checkpoint(path) as checkpoint:
        for name in checkpoint.tensors:
            checkpoint.read(name)
        for said in (stored_settings, stored_extra, stored_progress):
            said(checkpoint)


# ---- Data ----


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def _arrays() -> dict[str, np.ndarray]:
    return {"x": np.ones((4, _FEATURES), np.float32), "y": np.arange(4) % _CLASSES}


def _npz_seeds(folder: Path) -> list[bytes]:
    files = []
    for save in (np.savez, np.savez_compressed):
        stream = io.BytesIO()
        save(stream, **_arrays())
        files.append(stream.getvalue())
    return files


def _mutate_npz(data: bytes, random: Random) -> bytes:
    """The bytes, or one array inside."""
    if random.random() < 0.5:
        return mutate_bytes(data, random)
    arrays = {f"{name}.npy": _npy(array) for name, array in _arrays().items()}
    name = random.choice(sorted(arrays))
    arrays[name] = _mutate_npy(arrays[name], random)
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", random.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        for member, content in arrays.items():
            archive.writestr(zipfile.ZipInfo(member), content)
    return stream.getvalue()


def _mutate_npy(data: bytes, random: Random) -> bytes:
    """The bytes, or a number of the shape."""
    if random.random() < 0.6:
        return mutate_bytes(data, random)
    shape = random.choice((b"(-1, -6)", b"(10000000000, 6)", b"(4, 0)", b"(True, 6)", b"()", b"(4, 6, 1)", b"(9**9,)"))
    return data.replace(b"(4, 6)", shape).replace(b"(4,)", shape)


def _read_arrays(path: Path, folder: Path) -> None:
    manifest = parse_manifest((_bundle(folder) / "bundle.json").read_bytes(), "bundle")
    found = find_arrays(path)
    assert found is not None
    source = ArraySource(*found, manifest, memory_limit=1 << 20)
    try:
        inputs, targets = np.empty(source.input_shape, source.input_dtype), np.empty((), source.target_dtype)
        for index in range(min(len(source), 16)):
            source.read(index, inputs, targets, None)
    finally:
        source.close()


def _read_npz(data: bytes, folder: Path) -> None:
    path = folder / "data.npz"
    path.write_bytes(data)
    _read_arrays(path, folder)


def _read_npy(data: bytes, folder: Path) -> None:
    (folder / "x.npy").write_bytes(data)
    np.save(folder / "y.npy", _arrays()["y"])
    _read_arrays(folder / "x.npy", folder)


def _image(form: str, mode: str = "RGB", **options: Any) -> bytes:
    pixels = np.arange(9 * 14 * 4).astype(np.uint8).reshape(9, 14, 4)
    stream = io.BytesIO()
    Image.fromarray(pixels, "RGBA").convert(mode).save(stream, form, **options)
    return stream.getvalue()


def _image_seeds(folder: Path) -> list[bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    return [
        _image("PNG"), _image("PNG", "I;16"), _image("PNG", "P", transparency=3), _image("PNG", "LA"),
        _image("JPEG", exif=exif), _image("JPEG", "CMYK"), _image("JPEG", progressive=True), _image("BMP"),
        _image("GIF", "P"), _image("WEBP", exif=exif), _image("TIFF", compression="tiff_lzw"),
        _image("TIFF", "L", exif=exif), _image("TIFF", "1", compression="group4"), _image("PPM"), _image("PPM", "1"),
    ]  # fmt: skip


def _mutate_image(data: bytes, random: Random) -> bytes:
    """The bytes, or those inside of one chunk of a PNG, with its length and checksum made right again."""
    chunks, at = [], 8
    while data.startswith(b"\x89PNG") and at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    if not chunks or random.random() < 0.3:
        return mutate_bytes(data, random)
    index = random.randrange(len(chunks))
    kind, content = chunks[index]
    if random.random() < 0.2:
        kind = random.choice((b"iTXt", b"zTXt", b"eXIf", b"iCCP", b"fcTL", b"PLTE", b"tRNS", b"gAMA", b"acTL"))
    chunks[index] = (kind, mutate_bytes(content, random))
    if random.random() < 0.1:
        chunks.insert(index, random.choice(chunks))
    parts = [len(c).to_bytes(4, "big") + k + c + zlib.crc32(k + c).to_bytes(4, "big") for k, c in chunks]
    return data[:8] + b"".join(parts)


def _read_image(data: bytes, folder: Path) -> None:
    (folder / "images" / "class").mkdir(parents=True, exist_ok=True)
    (folder / "images" / "class" / "image.png").write_bytes(data)  # Pillow goes by the contents
    manifest = parse_manifest((_bundle(folder) / "bundle.json").read_bytes(), "bundle")
    manifest = replace(manifest, inputs=(InputSpec("x", (3, 6, 8), (0, 2, 3, 1)),))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source = ImageFolder(folder / "images", manifest, None, Augmentation(flip=True, random_crop=True), False)
        if source.work_bytes > 1 << 20:  # the plan counts it; decoding takes that much
            return
        inputs, targets = np.empty(source.input_shape, source.input_dtype), np.empty((), source.target_dtype)
        for random in (None, 7):
            source.read(0, inputs, targets, random)


_WORDS = ("[UNK]", "good", "bad", "film", "a")


def _tokenizer(model: dict[str, Any] | None = None, **parts: Any) -> str:
    words = {word: index for index, word in enumerate(_WORDS)}
    return json.dumps(
        {
            "version": "1.0",
            "added_tokens": [],
            "pre_tokenizer": {"type": "Whitespace"},
            "model": model or {"type": "WordLevel", "vocab": words, "unk_token": "[UNK]"},
            **parts,
        }
    )


def _tokenizer_seeds(folder: Path) -> list[bytes]:
    special = {"content": "[UNK]", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    letters = {letter: index for index, letter in enumerate("abdfgilmo")}
    made = [
        _tokenizer(added_tokens=[{"id": 0, "special": True, **special}]),
        _tokenizer(
            {"type": "BPE", "vocab": {**letters, "go": 9, "goo": 10}, "merges": [["g", "o"], ["go", "o"]],
             "dropout": None, "unk_token": "a", "continuing_subword_prefix": None, "end_of_word_suffix": None,
             "fuse_unk": False, "byte_fallback": True, "ignore_merges": False},
            pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            decoder={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        ),
        _tokenizer(
            {"type": "WordPiece", "vocab": {**letters, "[UNK]": 9, "##m": 10, "[CLS]": 11, "[SEP]": 12},
             "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100},
            normalizer={"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
                        "strip_accents": None, "lowercase": True},
            pre_tokenizer={"type": "BertPreTokenizer"},
            post_processor={"type": "BertProcessing", "sep": ["[SEP]", 12], "cls": ["[CLS]", 11]},
            truncation={"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 1},
            padding={"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": 2, "pad_id": 0,
                     "pad_type_id": 0, "pad_token": "[PAD]"},
        ),
        _tokenizer(
            {"type": "Unigram", "unk_id": 0, "byte_fallback": False,
             "vocab": [["<unk>", 0.0], ["\u2581", -2.0], ["\u2581good", -3.0], ["film", -3.5], ["a", -4.0]]},
            normalizer={"type": "Sequence", "normalizers": [
                {"type": "Strip", "strip_left": True, "strip_right": True},
                {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}, {"type": "NFKC"}]},
            pre_tokenizer={"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": "\\p{N}{1,3}"}, "behavior": "Isolated", "invert": False},
                {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}]},
            post_processor={
                "type": "TemplateProcessing",
                "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}}},
        ),
    ]  # fmt: skip
    return [text.encode() for text in made]


def _read_tokenizer(data: bytes, folder: Path) -> None:
    path = folder / "data.csv"
    path.write_text('text,label\n"a good, film",1\nbad film  42,0\n')
    request = Request(
        data=str(path), directory=str(folder), tokenizer=tokenizer_text(data, "bundle"), length=4, vocabulary=16,
        class_count=2,
    )  # fmt: skip
    for causal in (False, True):
        json.dumps(asdict(tokenize(replace(request, causal=causal)))).encode()


def _read_text(suffix: str) -> Callable[[bytes, Path], None]:
    def read(data: bytes, folder: Path) -> None:
        path = folder / f"data{suffix}"
        path.write_bytes(data)
        request = Request(
            data=str(path), directory=str(folder), tokenizer=_tokenizer(), length=4, vocabulary=5, class_count=2
        )
        json.dumps(asdict(tokenize(request))).encode()

    return read


def _mutate_lines(data: bytes, random: Random) -> bytes:
    """One line of JSON, or the bytes."""
    lines = data.split(b"\n")
    index = random.randrange(len(lines))
    lines[index] = _bytes_or_json(lines[index], random)
    return b"\n".join(lines)


# ---- Plans and harm tables ----


def _plan_seeds(folder: Path) -> list[bytes]:
    return [encode(linear_plan(momentum=0.9)), encode(spilled(linear_plan(pixels=(9, 20), outputs=40)))]


def _mutate_plan(data: bytes, random: Random) -> bytes:
    payload = mutate_bytes(data[24:], random)
    return data[:12] + struct.pack("<IQ", zlib.crc32(payload), len(payload)) + payload


def _read_plan(data: bytes, folder: Path) -> None:
    read_steps(data)


def _summary_seeds(folder: Path) -> list[bytes]:
    summary = {
        "bundle_id": "a", "batch_size": 4, "micro_batch": 2, "threads": 1, "sparsity": 0.5, "arena_bytes": 64,
        "predicted_peak_bytes": 9, "mem_budget": None, "razor": "plain", "items": {"arena": 64}, "choices": None,
        "optimizer": {
            "name": "sgd", "momentum": 0.9, "nesterov": False, "betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 0.0
        },
    }  # fmt: skip
    return [json.dumps(summary).encode()]


def _read_summary(data: bytes, folder: Path) -> None:
    plan = encode({**linear_plan(), "bundle_id": "a"})
    (folder / "model.plan").write_bytes(plan)
    if data.startswith(b"{") and len(data) > 2:
        data = b'{"plan_sha256":"' + hashlib.sha256(plan).hexdigest().encode() + b'",' + data[1:]
    (folder / "model.plan.json").write_bytes(data)
    loaded = Plan.load(folder / "model.plan")
    _ = (loaded.batch_size, loaded.micro_batch, loaded.threads, loaded.sparsity, loaded.predicted_peak_bytes)


def _harm_seeds(folder: Path) -> list[bytes]:
    entry = {"norm": 1.5, "errors": {"0": {"relative_error": 0.0}, "0.9": {"relative_error": 0.3}}}
    return [json.dumps({"version": 1, "razor": "plain", "parameters": {"w": entry, "b": entry}}).encode()]


def _read_harm(data: bytes, folder: Path) -> None:
    path = folder / "harm.json"
    path.write_bytes(data)
    read_harm_table(path)


READERS: dict[str, Reader] = {
    "manifest": Reader(_manifest_seeds, _read_manifest, _bytes_or_json),
    "bundle": Reader(_zip_seeds, _read_zip, _mutate_zip),
    "graph": Reader(lambda folder: [_MOBILE.training], _read_graph, mutate_graph),
    "checkpoint": Reader(_checkpoint_seeds, _read_checkpoint, _mutate_checkpoint),
    "npz": Reader(_npz_seeds, _read_npz, _mutate_npz),
    "npy": Reader(lambda folder: [_npy(_arrays()["x"])], _read_npy, _mutate_npy),
    "csv": Reader(lambda folder: [b'text,label\n"a good, film",1\nbad film,0\n'], _read_text(".csv"), mutate_bytes),
    "jsonl": Reader(
        lambda folder: [b'{"text": "a good film", "label": 1}\n{"text": "bad film", "label": "0"}\n'],
        _read_text(".jsonl"),
        _mutate_lines,
    ),
    "image": Reader(_image_seeds, _read_image, _mutate_image),
    "tokenizer": Reader(_tokenizer_seeds, _read_tokenizer, _bytes_or_json),
    "plan": Reader(_plan_seeds, _read_plan, _mutate_plan),
    "plan_summary": Reader(_summary_seeds, _read_summary, _bytes_or_json),
    "harm_table": Reader(_harm_seeds, _read_harm, _bytes_or_json),
}
