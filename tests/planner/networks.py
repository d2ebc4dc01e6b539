"""Small networks in the operators of docs/training-graph.md, each beside the same network in torch.

`Network` records an NHWC forward graph and a torch function for every node; `build` differentiates the graph with the
exporter, `reference_step` runs the torch functions in float64 and gives exact gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F

from edge_razor.exporters.differentiate import differentiate
from edge_razor.exporters.graph_edit import BATCH, DOMAIN, constant, dims, make_node, to_shape
from edge_razor.exporters.razor import insert_packs
from edge_razor.exporters.training_graph import to_proto

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "clip": lambda x: x.clamp(0, 6),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.1),
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
BOUNDS = {"clip": (0.0, 6.0), "leaky_relu": (0.1, 0.0), "hardsigmoid": (1 / 6, 0.5)}


@dataclass(repr=False)
class Built:
    """A training graph as the bundle would hold it."""

    training: bytes
    manifest: dict[str, Any]
    parameters: dict[str, np.ndarray]


class Network:
    """Builds a network node by node; methods take and return graph values."""

    def __init__(self, shape: Sequence[int], seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.parameters: dict[str, np.ndarray] = {}
        self.input = ir.Value(name="input", type=ir.TensorType(ir.DataType.FLOAT), shape=to_shape((BATCH, *shape)))
        self.graph = ir.Graph([self.input], [], nodes=[], opset_imports={"": 20, DOMAIN: 1}, name="network")
        self.calls: list[tuple[ir.Value, Callable[..., torch.Tensor], list[ir.Value]]] = []
        self.count = 0

    def parameter(self, name: str, shape: Sequence[int], scale: float = 1.0, shift: float = 0.0) -> ir.Value:
        data = (self.rng.normal(size=shape) * scale + shift).astype(np.float32)
        self.parameters[name] = data
        value = constant(self.graph, data, name)
        value.meta["parameter"] = True
        return value

    def node(
        self,
        op: str,
        inputs: Sequence[ir.Value | None],
        shape: Sequence[int],
        run: Callable[..., torch.Tensor],
        attributes: dict[str, Any] | None = None,
        domain: str = "",
        reads: Sequence[ir.Value] | None = None,
    ) -> ir.Value:
        """Adds a node; `run` gets the torch values of `reads` (default: the inputs)."""
        self.count += 1
        made = make_node(op, inputs, attributes, domain=domain, shapes=[shape], like=None, names=[f"v{self.count}"])
        made.metadata_props["layer"] = f"layer{self.count}"
        self.graph.append(made)
        out = made.outputs[0]
        self.calls.append((out, run, list(reads if reads is not None else [i for i in inputs if i is not None])))
        return out

    def ints(self, values: Sequence[int]) -> ir.Value:
        self.count += 1
        return constant(self.graph, np.array(values, np.int64), f"ints/{self.count}")

    def conv(
        self,
        x: ir.Value,
        out: int,
        kernel: int = 1,
        *,
        stride: int = 1,
        pad: int = 0,
        dilation: int = 1,
        group: int = 1,
        norm: bool = False,
        bias: bool = False,
        act: str = "none",
    ) -> ir.Value:
        """Convolution, with frozen-statistics BatchNorm or bias, and activation."""
        n, h, w, c = dims(x)
        name = f"conv{self.count + 1}"
        weight = self.parameter(
            f"{name}.weight", (out, c // group, kernel, kernel), (kernel * kernel * c / group) ** -0.5
        )
        b = self.parameter(f"{name}.bias", (out,), 0.1) if bias else None
        scale, shift = None, b
        vectors = []
        if norm:
            vectors = [self.parameter(f"{name}.gamma", (out,), 0.2, 1.0), self.parameter(f"{name}.beta", (out,), 0.1)]
            vectors.append(self.parameter(f"{name}.mean", (out,), 0.1))
            variance = self.parameter(f"{name}.var", (out,), 0.0, 1.0)
            self.parameters[f"{name}.var"][:] = self.rng.uniform(0.5, 1.5, out)
            vectors.append(variance)
            fold = make_node(
                "BatchNormFold",
                [*vectors, b],
                {"epsilon": 1e-5},
                domain=DOMAIN,
                shapes=[(out,), (out,)],
                like=None,
                names=[f"{name}.scale", f"{name}.shift"],
            )
            fold.metadata_props["layer"] = name
            self.graph.append(fold)
            scale, shift = fold.outputs
        size = [(e + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1 for e in (h, w)]

        def run(x: torch.Tensor, weight: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
            bias_ = rest[0] if b is not None else None
            y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias_, stride, pad, dilation, group)
            if norm:
                gamma, beta, mean, var = rest[-4:]
                y = F.batch_norm(y, mean, var, gamma, beta, False, 0.0, 1e-5)
            return ACTIVATIONS[act](y).permute(0, 2, 3, 1)

        attributes = {
            "strides": [stride] * 2,
            "pads": [pad] * 4,
            "dilations": [dilation] * 2,
            "group": group,
            **activation(act),
        }
        reads = [x, weight, *([b] if b is not None else []), *vectors]
        return self.node("Conv", [x, weight, scale, shift], (n, *size, out), run, attributes, DOMAIN, reads)

    def linear(self, x: ir.Value, out: int, *, bias: bool = True, act: str = "none", trans: bool = True) -> ir.Value:
        *lead, c = dims(x)
        name = f"linear{self.count + 1}"
        weight = self.parameter(f"{name}.weight", (out, c) if trans else (c, out), c**-0.5)
        b = self.parameter(f"{name}.bias", (out,), 0.1) if bias else None

        def run(x: torch.Tensor, weight: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
            return ACTIVATIONS[act](F.linear(x, weight if trans else weight.T, *rest))

        attributes = {"transW": int(trans), **activation(act)}
        reads = [x, weight, *([b] if b is not None else [])]
        return self.node("Linear", [x, weight, None, b], (*lead, out), run, attributes, DOMAIN, reads)

    def act(self, x: ir.Value, act: str) -> ir.Value:
        return self.node("Affine", [x], dims(x), ACTIVATIONS[act], activation(act), DOMAIN)

    def binary(self, op: str, a: ir.Value, b: ir.Value) -> ir.Value:
        table: dict[str, Any] = {"Add": torch.add, "Sub": torch.sub, "Mul": torch.mul, "Div": torch.div}
        return self.node(op, [a, b], np.broadcast_shapes(dims(a), dims(b)), table[op])

    def max_pool(self, x: ir.Value, kernel: int, stride: int) -> ir.Value:
        n, h, w, c = dims(x)
        size = [(e - kernel) // stride + 1 for e in (h, w)]

        def run(x: torch.Tensor) -> torch.Tensor:
            return F.max_pool2d(x.permute(0, 3, 1, 2), kernel, stride).permute(0, 2, 3, 1)

        attributes = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "pads": [0] * 4, "dilations": [1, 1]}
        return self.node("MaxPool", [x], (n, *size, c), run, attributes, DOMAIN)

    def average_pool(self, x: ir.Value, kernel: int, stride: int) -> ir.Value:
        n, h, w, c = dims(x)
        size = [(e - kernel) // stride + 1 for e in (h, w)]

        def run(x: torch.Tensor) -> torch.Tensor:
            return F.avg_pool2d(x.permute(0, 3, 1, 2), kernel, stride).permute(0, 2, 3, 1)

        attributes = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "pads": [0] * 4}
        return self.node("AveragePool", [x], (n, *size, c), run, attributes, DOMAIN)

    def mean(self, x: ir.Value, axes: Sequence[int], keepdims: bool = False) -> ir.Value:
        shape = [1 if i in axes else d for i, d in enumerate(dims(x)) if keepdims or i not in axes]
        attributes = {"keepdims": int(keepdims)}
        return self.node(
            "ReduceMean",
            [x, self.ints(axes)],
            shape,
            lambda v: v.mean(list(axes), keepdim=keepdims),
            attributes,
            reads=[x],
        )

    def softmax(self, x: ir.Value, axis: int = -1) -> ir.Value:
        return self.node("Softmax", [x], dims(x), lambda v: v.softmax(axis), {"axis": axis})

    def layer_norm(self, x: ir.Value, rms: bool = False) -> ir.Value:
        """LayerNorm or RMSNorm with scale and, if LayerNorm, shift."""
        width = dims(x)[-1]
        name = f"norm{self.count + 1}"
        gamma = self.parameter(f"{name}.weight", (width,), 0.2, 1.0)
        beta = None if rms else self.parameter(f"{name}.bias", (width,), 0.1)

        def run(x: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor | None = None) -> torch.Tensor:
            if beta is None:
                return F.rms_norm(x, gamma.shape, gamma, 1e-5)
            return F.layer_norm(x, gamma.shape, gamma, beta, 1e-5)

        attributes = {"epsilon": 1e-5, "rms": int(rms)}
        return self.node("LayerNorm", [x, gamma, beta], dims(x), run, attributes, DOMAIN)

    def dropout(self, x: ir.Value, ratio: float) -> ir.Value:
        """Torch's side is the identity: for tests that compare plans with each other."""
        attributes = {"ratio": ratio, "stream": self.count + 1}
        return self.node("Dropout", [x], dims(x), lambda v: v, attributes, DOMAIN)

    def attention(
        self,
        q: ir.Value,
        k: ir.Value,
        v: ir.Value,
        kv_heads: int,
        d: int,
        causal: bool = False,
        ratio: float = 0.0,
    ) -> ir.Value:
        """On [N, positions, heads·d] each; as many query heads as Q has. Torch's side knows no dropout `ratio`."""
        heads = dims(q)[-1] // d

        def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            q, k, v = (x.reshape(*x.shape[:2], -1, d).transpose(1, 2) for x in (q, k, v))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
            return y.transpose(1, 2).reshape(y.shape[0], y.shape[2], heads * d)

        attributes = {"heads": heads, "kv_heads": kv_heads, "scale": d**-0.5, "causal": int(causal)}
        attributes |= {"ratio": ratio, "stream": self.count + 1}
        return self.node("Attention", [q, k, v, None, None], dims(q), run, attributes, DOMAIN)

    def expand_batch(self, x: ir.Value) -> ir.Value:
        """A parameter [1, …] for each sample."""
        shape = (BATCH, *dims(x)[1:])
        reads = [x, self.input]
        return self.node(
            "ExpandBatch", reads, shape, lambda x, like: x.expand(like.shape[0], *x.shape[1:]), None, DOMAIN
        )

    def reshape(self, x: ir.Value, shape: Sequence[int]) -> ir.Value:
        """`shape` without the batch dimension."""
        target = self.ints([-1, *shape])
        return self.node("Reshape", [x, target], (BATCH, *shape), lambda v: v.reshape(-1, *shape), reads=[x])

    def transpose(self, x: ir.Value, perm: Sequence[int]) -> ir.Value:
        shape = [dims(x)[p] for p in perm]
        return self.node("Transpose", [x], shape, lambda v: v.permute(*perm), {"perm": list(perm)})

    def concat(self, parts: Sequence[ir.Value], axis: int) -> ir.Value:
        shape = list(dims(parts[0]))
        shape[axis] = sum(dims(p)[axis] for p in parts)
        return self.node("Concat", list(parts), shape, lambda *v: torch.cat(v, axis), {"axis": axis})

    def split(self, x: ir.Value, axis: int, sizes: Sequence[int]) -> list[ir.Value]:
        shapes = [tuple(size if i == axis else d for i, d in enumerate(dims(x))) for size in sizes]
        names = [f"v{self.count + 1}/{part}" for part in range(len(sizes))]
        made = make_node("Split", [x, self.ints(sizes)], {"axis": axis}, shapes=shapes, like=None, names=names)
        made.metadata_props["layer"] = f"layer{self.count}"
        self.graph.append(made)
        for part, out in enumerate(made.outputs):
            self.calls.append((out, lambda v, part=part: v.split(list(sizes), axis)[part], [x]))
        return list(made.outputs)

    def slice(self, x: ir.Value, axis: int, start: int, end: int) -> ir.Value:
        shape = list(dims(x))
        shape[axis] = end - start
        inputs = [x, self.ints([start]), self.ints([end]), self.ints([axis])]
        return self.node("Slice", inputs, shape, lambda v: v.narrow(axis, start, end - start), reads=[x])

    def pad(self, x: ir.Value, before: int, after: int) -> ir.Value:
        """Zeros around the two image dimensions."""
        n, h, w, c = dims(x)
        pads = [0, before, before, 0, 0, after, after, 0]
        shape = (n, h + before + after, w + before + after, c)
        return self.node(
            "Pad", [x, self.ints(pads)], shape, lambda v: F.pad(v, (0, 0, before, after, before, after)), reads=[x]
        )

    def ancestors(self, output: ir.Value) -> list[str]:
        """The parameters that influence `output`."""
        needed = {output.name}
        for out, _, reads in reversed(self.calls):
            if out.name in needed:
                needed.update(r.name for r in reads)
        return [name for name in self.parameters if name in needed]

    def build(
        self,
        output: ir.Value,
        loss: str = "cross_entropy",
        trainable: Sequence[str] | None = None,
        smoothing: float = 0.0,
    ) -> Built:
        """Differentiates the network; `trainable` None: every parameter but the BatchNorm statistics."""
        self.output = output
        self.loss, self.smoothing = loss, smoothing
        self.trainable = [
            n for n in self.parameters if (trainable is None or n in trainable) and not n.endswith((".mean", ".var"))
        ]
        self.graph.outputs.append(output)
        model = ir.Model(self.graph, ir_version=10)
        differentiate(model, {"name": loss, "label_smoothing": smoothing}, self.trainable)
        insert_packs(model)
        shape, out = list(dims(self.input)), list(dims(output))
        manifest = {
            "inputs": [
                {"name": "input", "dtype": "float32", "shape": [None, *shape[1:]], "perm": list(range(len(shape)))}
            ],
            "output": {"name": output.name, "shape": [None, *out[1:]], "perm": list(range(len(out)))},
            "loss": {"name": loss, "label_smoothing": smoothing},
            "preprocessing": None,
        }
        return Built(to_proto(model).SerializeToString(deterministic=True), manifest, self.parameters)

    def forward(self, x: torch.Tensor, parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        values: dict[str | None, torch.Tensor] = {"input": x}
        values.update((name, tensor) for name, tensor in parameters.items())
        for out, run, reads in self.calls:
            values[out.name] = run(*(values[r.name] for r in reads))
        return values[self.output.name]

    def reference_step(
        self, x: np.ndarray, target: np.ndarray, parameters: dict[str, np.ndarray]
    ) -> tuple[float, dict[str, np.ndarray]]:
        """Loss and gradients in float64."""
        tensors = {
            n: torch.tensor(p, dtype=torch.float64, requires_grad=n in self.trainable) for n, p in parameters.items()
        }
        prediction = self.forward(torch.tensor(x, dtype=torch.float64), tensors)
        if self.loss == "cross_entropy":
            moved = prediction.movedim(-1, 1)
            loss = F.cross_entropy(moved, torch.tensor(target).long(), label_smoothing=self.smoothing)
        elif self.loss == "mse":
            loss = F.mse_loss(prediction, torch.tensor(target, dtype=torch.float64))
        else:
            loss = F.binary_cross_entropy_with_logits(prediction, torch.tensor(target, dtype=torch.float64))
        loss.backward()
        return loss.item(), {n: np.asarray(tensors[n].grad) for n in self.trainable}


def activation(act: str) -> dict[str, Any]:
    alpha, beta = BOUNDS.get(act, (0.0, 0.0))
    return {"activation": act, "alpha": alpha, "beta": beta}
