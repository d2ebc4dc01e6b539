"""Back to ONNX: the bundle's inference graph with the tuned weights inside, one self-contained file.

It needs onnx, so a training process leaves it to a child: `python -m edge_razor.to_onnx BUNDLE WEIGHTS OUTPUT`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from edge_razor.bundle import Bundle
from edge_razor.errors import BundleError, EdgeRazorError, UsageError
from edge_razor.tensors import TensorFile, TensorWriter, replacing

__all__ = ["to_onnx_in_child", "write_onnx"]

_PROTOBUF_LIMIT = 2**31 - 1  # bytes of one serialized message


def write_onnx(path: Path, bundle: Bundle, read: Callable[[str], np.ndarray]) -> None:
    """Fills the inference graph's weights in and writes it; the file appears whole or not at all.

    Args:
        path: the ONNX file.
        bundle: gives the graph.
        read: gives the tensor of an initializer, torch layout.

    Raises:
        BundleError: inference.onnx is damaged, or a weight has another shape than the graph says.
        UsageError: the result would exceed the 2 GB of one ONNX file.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load_model_from_string(bundle.read_file("inference.onnx"))
    except DecodeError as error:
        raise BundleError(f"{bundle.path}: inference.onnx is not an ONNX model: {error}") from error
    size = sum(spec.end - spec.begin for spec in bundle.tensors.values()) + model.ByteSize()
    if size > _PROTOBUF_LIMIT:
        raise UsageError(f"the model has {size} bytes; one ONNX file holds at most {_PROTOBUF_LIMIT}")
    for tensor in model.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        array = read(tensor.name)
        kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        if tuple(tensor.dims) != array.shape or tensor.data_type != kind:
            raise BundleError(
                f"{bundle.path}: inference.onnx: {tensor.name!r} is {list(tensor.dims)}, its tensor {list(array.shape)}"
            )
        del tensor.external_data[:]
        tensor.data_location = onnx.TensorProto.DEFAULT
        tensor.raw_data = array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
    with replacing(path) as file:
        file.write(model.SerializeToString())


def to_onnx_in_child(path: Path, bundle: Bundle, read: Callable[[str], np.ndarray]) -> None:
    """`write_onnx` in a child process, so that this one does not load onnx.

    Raises:
        EdgeRazorError: the child failed; the message is its own.
    """
    with tempfile.TemporaryDirectory(prefix="edge-razor-") as directory:
        weights = Path(directory) / "weights.safetensors"
        lora = bundle.manifest.lora
        tuned = [*bundle.manifest.trainable, *(lora.layers if lora is not None else ())]
        with open(weights, "wb") as file:
            writer = TensorWriter(file, {name: bundle.tensors[name] for name in tuned})
            for name in tuned:
                writer.write(name, read(name))
        command = [
            sys.executable,
            "-m",
            "edge_razor.to_onnx",
            os.fspath(bundle.path),
            os.fspath(weights),
            os.fspath(path),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise EdgeRazorError(f"to-onnx: {lines[-1]}")


def _main() -> int:
    bundle_path, weights_path, path = sys.argv[1:]
    try:
        with Bundle(bundle_path) as bundle, TensorFile(Path(weights_path)) as tuned:
            write_onnx(
                Path(path), bundle, lambda name: tuned.read(name) if name in tuned.tensors else bundle.read_tensor(name)
            )
    except (EdgeRazorError, OSError) as error:
        print(error, file=sys.stderr)
        return 4
    return 0


if __name__ == "__main__":
    raise SystemExit(_main())
