"""The tokenizer that goes into a language model's bundle, checked against the model's table."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import onnx_ir as ir

from edge_razor.errors import BundleError, UsageError
from edge_razor.exporters.graph_edit import dims

__all__ = ["read_tokenizer"]

_PAD = ("[PAD]", "<pad>", "<|pad|>", "<|finetune_right_pad_id|>")
_END = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<|im_end|>", "<eos>", "[SEP]")


def read_tokenizer(path: str | os.PathLike[str], graph: ir.Graph) -> tuple[bytes, dict[str, Any]]:
    """The content of a tokenizer.json, and the manifest's ``text``.

    Args:
        path: the file, or the directory that it is in; a tokenizer_config.json beside it names padding and end.
        graph: forward graph with an Embedding.

    Raises:
        UsageError: the model takes no tokens, or the tokenizer has more than the model's table.
        BundleError: the file cannot be read.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise UsageError("a tokenizer needs the package tokenizers; install edge-razor[text]") from error
    file = Path(path)
    file = file / "tokenizer.json" if file.is_dir() else file
    try:
        content = file.read_bytes()
        tokenizer = Tokenizer.from_str(content.decode("utf-8"))
    except OSError as error:
        raise BundleError(f"cannot read {file}: {error.strerror}") from error
    except Exception as error:  # tokenizers raises plain Exceptions
        raise BundleError(f"{file} is no tokenizer: {error}") from error
    tables = [node.inputs[1] for node in graph if node.op_type == "Embedding"]
    sizes = [dims(table)[0] for table in tables if table is not None]
    if not sizes:
        raise UsageError("a tokenizer is given, but the model takes no token indices")
    if tokenizer.get_vocab_size() > max(sizes):
        raise UsageError(
            f"{file} has {tokenizer.get_vocab_size()} tokens, the model's table {max(sizes)}: this is another model's "
            "tokenizer"
        )
    named = _named_tokens(file.with_name("tokenizer_config.json"))
    pad = _first(tokenizer, (named.get("pad_token"), *_PAD))
    if pad is None and tokenizer.padding is not None:
        pad = int(tokenizer.padding["pad_id"])
    end = _first(tokenizer, (named.get("eos_token"), *_END))
    return content, {"vocabulary": max(sizes), "pad": pad or 0, "end": end}


def _named_tokens(file: Path) -> dict[str, str]:
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # the file is optional, and so is what it says
        return {}
    found = {}
    for name in ("pad_token", "eos_token"):
        value = table.get(name) if isinstance(table, dict) else None
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            found[name] = value
    return found


def _first(tokenizer: Any, names: tuple[str | None, ...]) -> int | None:
    for name in names:
        index = None if name is None else tokenizer.token_to_id(name)
        if index is not None:
            return int(index)
    return None
