"""Back to torch: the user's own state dict as a safetensors file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from edge_razor.bundle import Bundle
from edge_razor.tensors import TensorWriter, replacing

__all__ = ["write_state_dict"]


def write_state_dict(path: Path, bundle: Bundle, read: Callable[[str], np.ndarray]) -> None:
    """Writes every name of the state dict, buffers and tied tensors included, in the user's order and layout.

    Args:
        path: the file; it appears whole or not at all.
        bundle: gives names, types and shapes.
        read: gives the tensor of a name, one at a time.
    """
    aliases = bundle.manifest.aliases
    specs = {name: bundle.tensors[aliases.get(name, name)] for name in bundle.manifest.state_names}
    with replacing(path) as file:
        writer = TensorWriter(file, specs, {"format": "pt"})
        for name in specs:
            writer.write(name, read(name))
