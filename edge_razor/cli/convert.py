"""`to-onnx`, `to-torch`, `to-peft`: a run's weights in the user's formats. Neither plans nor opens a session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from edge_razor.bundle import Bundle
from edge_razor.checkpoint import Checkpoint
from edge_razor.to_onnx import write_onnx
from edge_razor.to_peft import merged, write_adapter
from edge_razor.to_torch import write_state_dict
from edge_razor.training_state import bundle_of, check_bundle
from edge_razor.units import format_bytes

from .tables import show_damaged

__all__ = ["to_onnx", "to_peft", "to_torch"]


@contextmanager
def _tuned(run: Path, bundle: Path | None) -> Iterator[tuple[Bundle, Callable[[str], np.ndarray]]]:
    """The run's bundle, and a function from a name of its state dict to the tuned tensor."""
    with Checkpoint(run) as checkpoint, Bundle(bundle_of(checkpoint, bundle)) as opened:
        show_damaged(checkpoint)
        check_bundle(checkpoint, opened)

        def stored(name: str) -> np.ndarray:
            return checkpoint.read(name) if name in checkpoint.tensors else opened.read_tensor(name)

        def read(name: str) -> np.ndarray:
            return merged(opened, opened.manifest.aliases.get(name, name), stored)

        yield opened, read


def to_onnx(run: Path, output: Path, bundle: Path | None) -> None:
    with _tuned(run, bundle) as (opened, read):
        write_onnx(output, opened, read)
    print(f"wrote {output} ({format_bytes(output.stat().st_size)})")


def to_torch(run: Path, output: Path, bundle: Path | None) -> None:
    with _tuned(run, bundle) as (opened, read):
        write_state_dict(output, opened, read)
    print(f"wrote {output} ({format_bytes(output.stat().st_size)})")


def to_peft(run: Path, output: Path, bundle: Path | None) -> None:
    with _tuned(run, bundle) as (opened, read):
        write_adapter(output, opened, read)
    print(f"wrote {output}")
