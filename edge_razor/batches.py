"""What a caller hands over as a batch, checked against the bundle and brought into a form that the runtime takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np

from edge_razor.errors import UsageError
from edge_razor.manifest import IGNORE_INDEX, InputSpec, Manifest

__all__ = ["Array", "check_inputs", "check_targets", "normalizes"]

Array: TypeAlias = "np.ndarray[Any, Any]"


def check_inputs(
    inputs: Array | Sequence[Array], manifest: Manifest, tokens: Sequence[int] = ()
) -> tuple[list[Array], bool]:
    """The model's inputs as the runtime takes them: float32 or uint8, contiguous; copied only where they are not.

    `tokens`: lengths of texts that there are plans for, beside the model's own.

    Returns:
        the arrays, and whether they are in the runtime's layout (NHWC) instead of the user's.

    Raises:
        UsageError: wrong number of inputs, shape or type, no samples, or NaN or infinity in a float input.
    """
    specs = manifest.inputs
    given = list(inputs) if isinstance(inputs, (list, tuple)) else [inputs]
    if len(given) != len(specs):
        raise UsageError(f"the model has {len(specs)} inputs ({', '.join(s.name for s in specs)}), not {len(given)}")
    arrays = [np.asarray(value) for value in given]
    channels_last = all(
        a.dtype == np.uint8 and a.shape[1:] == s.runtime_shape != s.shape for a, s in zip(arrays, specs, strict=True)
    )
    given_tokens = arrays[0].shape[1] if arrays[0].ndim == 2 else 0
    if given_tokens in tokens:
        specs = tuple(replace(spec, shape=(given_tokens,)) for spec in specs)
    arrays = [_bind(a, s, channels_last) for a, s in zip(arrays, specs, strict=True)]
    if len({len(a) for a in arrays}) > 1:
        raise UsageError(f"the inputs have different numbers of samples: {[len(a) for a in arrays]}")
    return arrays, channels_last


def _bind(array: Array, spec: InputSpec, channels_last: bool) -> Array:
    if not array.ndim or array.shape[1:] != (spec.runtime_shape if channels_last else spec.shape):
        expected = ", ".join(["samples", *map(str, spec.shape)])
        raise UsageError(f"input {spec.name!r} has shape {list(array.shape)}, the model needs [{expected}]")
    if not len(array):
        raise UsageError(f"input {spec.name!r} has no samples")
    if spec.indices:
        if array.dtype.kind not in "iu":
            raise UsageError(f"input {spec.name!r} has type {array.dtype}; give whole numbers (token indices)")
        return np.ascontiguousarray(array, dtype=np.int32)  # the session checks their range
    if spec.dtype != "float32":
        if array.dtype.kind not in "biuf":
            raise UsageError(f"input {spec.name!r} has type {array.dtype}; give {spec.dtype}")
        return np.ascontiguousarray(array, dtype=np.float32)
    if array.dtype == np.uint8:
        if normalizes(spec):
            return np.ascontiguousarray(array)  # the runtime does it while it copies
        return np.ascontiguousarray(array, dtype=np.float32) / np.float32(255)
    if array.dtype.kind != "f":
        raise UsageError(f"input {spec.name!r} has type {array.dtype}; give float32, or uint8 pixels")
    array = np.ascontiguousarray(array, dtype=np.float32)
    # A float64 sum of float32 values cannot overflow, so it is finite exactly if every value is; no mask is allocated.
    if not np.isfinite(array.sum(dtype=np.float64)):
        sample = next(i for i, a in enumerate(array) if not np.isfinite(a).all())
        raise UsageError(f"input {spec.name!r} holds NaN or infinity in sample {sample}; clean the data")
    return array


def normalizes(spec: InputSpec) -> bool:
    """Whether the plan has a normalization for uint8 data of this input; if not they become x/255 in float32 here."""
    return len(spec.shape) == 3


def check_targets(targets: Any, manifest: Manifest, samples: int, tokens: int | None = None) -> Array:
    """Targets as the runtime takes them: int32 class indices, or float32 in the output's shape; user's layout.

    `tokens`: how many the batch's texts have.

    Raises:
        UsageError: wrong shape or type, a class index out of range (named with its sample), or NaN or infinity.
    """
    array = np.asarray(targets)
    shape = (tokens,) if tokens is not None and manifest.per_token else manifest.target_shape
    expected = (samples, *shape)
    if array.shape != expected:
        raise UsageError(f"targets have shape {list(array.shape)}, {manifest.loss} needs {list(expected)}")
    classes = manifest.class_count
    if classes is None:
        if array.dtype.kind not in "fiub":
            raise UsageError(f"targets have type {array.dtype}; {manifest.loss} needs float32")
        array = np.ascontiguousarray(array, dtype=np.float32)
        if not np.isfinite(array.sum(dtype=np.float64)):
            raise UsageError("targets hold NaN or infinity; clean the data")
        return array
    if array.dtype.kind not in "iu":
        raise UsageError(f"targets have type {array.dtype}; {manifest.loss} needs whole numbers (class indices)")
    wrong = ((array < 0) | (array >= classes)) & (array != IGNORE_INDEX)
    if wrong.any():
        sample = int(np.argmax(wrong.reshape(samples, -1).any(axis=1)))
        label = array[wrong].flat[0]
        raise UsageError(f"label {label} of sample {sample} is out of range: the model has classes 0 to {classes - 1}")
    return np.ascontiguousarray(array, dtype=np.int32)
