"""onnxruntime-training-cpu, whose last release (1.19.2, 2024-09) needs an older onnx: in an environment of its own.

``environment()`` makes that on first use; ``make`` runs inside it. Training starts from the bundle's inference graph,
so the work is the same: the same operators and weights, BatchNorm with frozen statistics.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.systems.system import System

VERSION = "1.19.2"
# The newest of each that this release works with.
REQUIREMENTS = (f"onnxruntime-training-cpu=={VERSION}", "onnx==1.16.2", "numpy==1.26.4", "protobuf==7.36.2")
PYTHONS = ("python3.11", "python3.10", "python3.9")  # the release has no wheel for a newer one


def environment() -> Path:
    """The Python interpreter of the environment, which is made in the cache directory if it is not there.

    Raises:
        RuntimeError: there is no Python old enough, or a package cannot be had.
    """
    found = sys.executable if sys.version_info < (3, 12) else next(filter(None, map(shutil.which, PYTHONS)), None)
    if found is None:
        raise RuntimeError(f"onnxruntime-training-cpu {VERSION} needs one of {', '.join(PYTHONS)}")
    home = Path(tempfile.gettempdir()) / f"edge-razor-bench-onnxruntime-training-{VERSION}"
    python, ready = home / "bin" / "python", home / "ready"
    if not ready.exists():
        print(f"making an environment for onnxruntime-training-cpu {VERSION}", flush=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *REQUIREMENTS]
        for command in ([found, "-m", "venv", "--clear", str(home)], install):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
        ready.touch()
    return python


def _import_training() -> tuple[Any, Any]:
    """``onnxruntime.training``'s artifacts and api modules, without its ``__init__``: that imports torch, for GPUs."""
    import onnxruntime

    package = types.ModuleType("onnxruntime.training")
    package.__path__ = [os.path.join(os.path.dirname(onnxruntime.__file__), "training")]
    sys.modules["onnxruntime.training"] = package
    from onnxruntime.training import api, artifacts  # type: ignore[attr-defined]

    return artifacts, api


def fold_frozen_batch_norms(model: Any) -> list[str]:
    """Rewrites conv → BatchNormalization with frozen statistics, in place, as one convolution of a scaled weight.

    W' = W · gamma/√(var + ε) and b' = beta + (b − mean) · gamma/√(var + ε) are computed in the graph, so that gradients
    reach W, gamma and beta. Its own gradient of BatchNormalization would be that of batch statistics: other work.

    Returns:
        Names of the float initializers that are constants and not trained.
    """
    from onnx import helper, numpy_helper

    graph = model.graph
    tensors = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            tensors[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
    producer = {output: node for node in graph.node for output in node.output}
    constants: list[str] = []
    nodes: list[Any] = []

    def constant(name: str, values: np.ndarray) -> str:
        graph.initializer.append(numpy_helper.from_array(values, name))
        constants.append(name)
        return name

    shape = numpy_helper.from_array(np.array([-1, 1, 1, 1], np.int64), "column")
    graph.initializer.append(shape)
    for node in graph.node:
        if node.op_type != "BatchNormalization":
            nodes.append(node)
            continue
        to, (_, gamma, beta, mean, var) = node.output[0], node.input
        conv = producer[node.input[0]]
        if conv.op_type != "Conv":
            raise ValueError(f"BatchNormalization {node.name} does not follow a convolution")
        epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
        inverse = (1 / np.sqrt(tensors[var] + np.float32(epsilon))).astype(np.float32)
        bias = conv.input[2] if len(conv.input) > 2 else constant(f"{to}/zero", np.zeros_like(inverse))
        made = [
            helper.make_node("Mul", [gamma, constant(f"{to}/inverse", inverse)], [f"{to}/scale"]),
            helper.make_node("Reshape", [f"{to}/scale", "column"], [f"{to}/column"]),
            helper.make_node("Mul", [conv.input[1], f"{to}/column"], [f"{to}/weight"]),
            helper.make_node("Sub", [bias, constant(f"{to}/mean", tensors[mean])], [f"{to}/centre"]),
            helper.make_node("Mul", [f"{to}/scale", f"{to}/centre"], [f"{to}/moved"]),
            helper.make_node("Add", [beta, f"{to}/moved"], [f"{to}/bias"]),
        ]
        folded = helper.make_node("Conv", [conv.input[0], f"{to}/weight", f"{to}/bias"], [to])
        folded.attribute.extend(conv.attribute)
        nodes = [n for n in nodes if n is not conv] + [*made, folded]
    del graph.node[:]
    graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    for unused in [i for i in graph.initializer if i.name not in used]:
        graph.initializer.remove(unused)
    return constants


def write_artifacts(inference: Path, directory: Path) -> None:
    """Writes what the training API loads. Takes much memory, so it runs in a process of its own."""
    import onnx

    artifacts, _ = _import_training()
    model = onnx.load(str(inference))
    constants = fold_frozen_batch_norms(model)
    floats = [i.name for i in model.graph.initializer if i.data_type == onnx.TensorProto.FLOAT]
    artifacts.generate_artifacts(
        model,
        requires_grad=[name for name in floats if name not in constants],
        frozen_params=constants,
        loss=artifacts.LossType.CrossEntropyLoss,
        optimizer=artifacts.OptimType.SGD,
        artifact_directory=str(directory),
    )


def make(options: argparse.Namespace, images: np.ndarray, labels: np.ndarray) -> System:
    directory = Path(tempfile.mkdtemp(prefix="edge-razor-bench-artifacts-"))
    inference = Path(options.bundle) / "inference.onnx"
    code = "import sys; from pathlib import Path; from benchmarks.systems.ort_training import write_artifacts; "
    code += "write_artifacts(Path(sys.argv[1]), Path(sys.argv[2]))"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, str(inference), str(directory)], capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
        _, api = _import_training()
        import onnxruntime

        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = options.threads
        state = api.CheckpointState.load_checkpoint(str(directory / "checkpoint"))
        module = api.Module(
            str(directory / "training_model.onnx"),
            state,
            str(directory / "eval_model.onnx"),
            device="cpu",
            session_options=settings,
        )
        optimizer = api.Optimizer(str(directory / "optimizer_model.onnx"), module)
    finally:
        shutil.rmtree(directory)
    optimizer.set_learning_rate(1e-3)
    module.train()

    def step() -> float:
        loss = module(images, labels)
        optimizer.step()
        module.lazy_reset_grad()
        return float(loss)

    return System(step)
