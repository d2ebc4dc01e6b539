"""A trained LoRA adapter in the file layout of Hugging Face's PEFT: adapter_config.json, adapter_model.safetensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from edge_razor.bundle import Bundle
from edge_razor.errors import UsageError
from edge_razor.tensors import TensorSpec, TensorWriter, replacing

__all__ = ["merged", "write_adapter"]

_PREFIX = "base_model.model."


def merged(bundle: Bundle, name: str, read: Callable[[str], np.ndarray]) -> np.ndarray:
    """The tensor `name` of the state dict: with LoRA on it W + (alpha/r)·B·A, else as `read` gives it."""
    lora = bundle.manifest.lora
    if lora is None or name not in lora.layers:
        return read(name)
    layer = lora.layers[name]
    addition = read(layer.b) @ read(layer.a)
    weight = np.array(read(name))
    weight += np.float32(lora.alpha / lora.rank) * (addition.T if layer.transposed else addition)
    return weight


def write_adapter(directory: Path, bundle: Bundle, read: Callable[[str], np.ndarray]) -> None:
    """Writes A, B and whatever trains beside them; each file appears whole or not at all.

    Args:
        directory: made if it is missing.
        bundle: says which parameters train.
        read: gives a parameter, torch layout.

    Raises:
        UsageError: the bundle has no LoRA layers.
        OSError: the disk is full or not writable.
    """
    lora = bundle.manifest.lora
    if lora is None:
        raise UsageError(f"{bundle.path}: has no LoRA layers; export the model with --trainable lora:r=8")
    names = bundle.manifest.trainable
    added = {part for layer in lora.layers.values() for part in (layer.a, layer.b)}
    saved = sorted({name.rpartition(".")[0] for name in names if name not in added})
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": None,
        "task_type": None,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(layer.transposed for layer in lora.layers.values()),
        "target_modules": [name.removesuffix(".weight") for name in lora.layers],
        "modules_to_save": saved or None,
    }
    directory.mkdir(parents=True, exist_ok=True)
    with replacing(directory / "adapter_config.json") as file:
        file.write((json.dumps(config, indent=2) + "\n").encode())
    with replacing(directory / "adapter_model.safetensors") as file:
        specs = {_PREFIX + name: TensorSpec(np.dtype("<f4"), bundle.tensors[name].shape) for name in names}
        writer = TensorWriter(file, specs, {"format": "pt"})
        for name in names:
            writer.write(_PREFIX + name, read(name))
