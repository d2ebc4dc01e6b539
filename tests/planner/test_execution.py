"""Planned steps, run on the native kernels, give PyTorch's gradients."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from edge_razor.planner.optimizer import Optimizer
from edge_razor.planner.search import Search

from .conftest import graph_of, settings
from .executor import Executor, check_update
from .networks import ACTIVATIONS, Built, Network
from .verifier import verify

BATCH = 4


def residual(norm: bool) -> Callable[[Network], Built]:
    def make(net: Network) -> Built:
        x = net.conv(net.input, 8, 3, stride=2, pad=1, norm=norm, bias=not norm, act="relu")
        y = net.conv(x, 8, 3, pad=1, norm=norm, bias=True, act="relu")
        y = net.conv(y, 8, 3, pad=2, dilation=2, group=2, norm=norm)
        x = net.act(net.binary("Add", y, x), "relu")
        return net.build(net.linear(net.mean(x, (1, 2)), 5))

    return make


def shortcuts(net: Network) -> Built:
    """Sums that end in an activation; in the shortcut a convolution, or nothing."""
    x = net.conv(net.input, 8, norm=True, act="gelu")
    y = net.conv(x, 12, 3, stride=2, pad=1, norm=True)
    x = net.act(net.binary("Add", y, net.conv(x, 12, stride=2, norm=True)), "hardswish")
    x = net.act(net.binary("Add", x, net.conv(x, 12, 3, pad=1, group=12, bias=True)), "leaky_relu")
    x = net.binary("Add", net.conv(net.conv(x, 20, act="relu"), 12, norm=True), x)
    return net.build(net.linear(net.mean(x, (1, 2)), 5))


def branches(net: Network) -> Built:
    """Concat, slice, channel shuffle, pad, transpose."""
    x = net.conv(net.input, 8, bias=True, act="relu")
    a, b = net.slice(x, 3, 0, 4), net.slice(x, 3, 4, 8)
    b = net.conv(b, 4, 3, pad=1, group=4, bias=True)
    x = net.concat([a, b, net.input], 3)
    h, w, c = 9, 7, 11
    x = net.pad(x, 1, 0)
    x = net.reshape(x, (h + 1, w + 1, 11, 1))
    x = net.reshape(net.transpose(x, (0, 1, 2, 4, 3)), (h + 1, w + 1, c))
    x = net.average_pool(x, 3, 2)
    x = net.transpose(x, (0, 3, 1, 2))
    return net.build(net.linear(net.reshape(x, (c * 4 * 3,)), 5), smoothing=0.1)


def arithmetic(net: Network) -> Built:
    """Layer scale, difference, quotient, softmax attention over positions."""
    x = net.conv(net.input, 6, bias=True, act="gelu")
    scale = net.parameter("layer_scale", (6,), 0.5, 1.0)
    y = net.binary("Mul", x, scale)
    y = net.binary("Sub", y, net.conv(x, 6, bias=True))
    weights = net.softmax(net.reshape(y, (63, 6)), 1)
    z = net.binary("Div", net.reshape(x, (63, 6)), net.binary("Add", weights, net.parameter("one", (6,), 0.0, 2.0)))
    z = net.binary("Mul", z, weights)
    return net.build(net.linear(net.mean(z, (1,)), 5, trans=False), loss="mse")


def perceptron(net: Network) -> Built:
    x = net.reshape(net.input, (9 * 7 * 3,))
    x = net.linear(x, 17, act="tanh")
    x = net.linear(x, 1, act="silu")
    return net.build(net.linear(x, 5, bias=False), loss="bce_with_logits")


def tokens(net: Network) -> Built:
    """Matrix products over rows, class index for every position."""
    x = net.linear(net.reshape(net.input, (63, 3)), 10, act="gelu_tanh")
    return net.build(net.linear(x, 5))


def transformer(net: Network) -> Built:
    """Class token, pre-norm attention with grouped heads (causal in the second block), RMSNorm, SiLU."""
    x = net.linear(net.reshape(net.input, (63, 3)), 16)
    x = net.concat([net.expand_batch(net.parameter("token", (1, 1, 16))), x], 1)
    for causal in (False, True):
        y = net.layer_norm(x)
        q, kv = net.linear(y, 16), net.linear(y, 8)
        v = net.linear(y, 8)
        x = net.binary("Add", x, net.linear(net.attention(q, kv, v, 2, 4, causal), 16))
        x = net.binary("Add", x, net.linear(net.linear(net.layer_norm(x, rms=True), 32, act="silu"), 16))
    x = net.layer_norm(x)
    return net.build(net.linear(net.reshape(net.slice(x, 1, 0, 1), (16,)), 5))


def fused(net: Network) -> Built:
    """One projection makes Q, K and V: alike as in a ViT (cut between two dimensions), then with fewer heads of K and V
    (causal), then K and V alone."""
    x = net.linear(net.reshape(net.input, (63, 3)), 15)
    qkv = net.reshape(net.linear(net.layer_norm(x), 45), (63, 3, 3, 5))
    q, k, v = (net.reshape(part, (63, 15)) for part in net.split(qkv, 2, (1, 1, 1)))
    x = net.binary("Add", x, net.linear(net.attention(q, k, v, 3, 5), 15))
    q, k, v = net.split(net.linear(net.layer_norm(x), 25), 2, (15, 5, 5))
    x = net.binary("Add", x, net.linear(net.attention(q, k, v, 1, 5, True), 15))
    y = net.layer_norm(x)
    k, v = net.split(net.linear(y, 6, bias=False), 2, (3, 3))
    x = net.binary("Add", x, net.linear(net.attention(net.linear(y, 12), k, v, 1, 3), 15))
    return net.build(net.linear(net.reshape(net.slice(net.layer_norm(x), 1, 0, 1), (15,)), 5))


NETWORKS: dict[str, Callable[[Network], Built]] = {
    "residual": residual(True),
    "residual_bias": residual(False),
    "shortcuts": shortcuts,
    "branches": branches,
    "arithmetic": arithmetic,
    "perceptron": perceptron,
    "tokens": tokens,
    "transformer": transformer,
    "fused": fused,
}


def batch(built: Built, net: Network, seed: int = 3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(BATCH, 9, 7, 3)).astype(np.float32)
    if net.loss == "cross_entropy":
        return x, rng.integers(0, 5, (BATCH, *built.manifest["output"]["shape"][1:-1]))
    return x, rng.uniform(0, 1, (BATCH, 5)).astype(np.float32)


@pytest.mark.parametrize("micro_batch", [4, 2, 1])
@pytest.mark.parametrize("name", NETWORKS)
def test_one_sgd_step_at_sparsity_zero_is_torchs(name: str, micro_batch: int) -> None:
    net = Network((9, 7, 3), seed=1)
    built = NETWORKS[name](net)
    candidate = Search(graph_of(built), settings(batch_size=BATCH)).candidate(0.0, micro_batch)
    executor = Executor(candidate, built.parameters)
    verify(candidate.train, candidate.accounting.arena)
    x, target = batch(built, net)
    loss = executor.train_step(x, target, learning_rate=1.0)
    expected_loss, gradients = net.reference_step(x, target, built.parameters)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    check_update(executor, built.parameters, gradients)


@pytest.mark.parametrize("activation", [a for a in ACTIVATIONS if a != "none"])
def test_every_activation_fused_and_alone_has_torchs_gradient(activation: str) -> None:
    net = Network((9, 7, 3), seed=2)
    x = net.conv(net.input, 5, 3, bias=True, act=activation)
    x = net.act(net.conv(x, 9, bias=True), activation)
    built = net.build(net.linear(net.mean(x, (1, 2)), 5))
    executor = Executor(Search(graph_of(built), settings(batch_size=BATCH)).candidate(0.0, 4), built.parameters)
    x_data, target = batch(built, net)
    executor.train_step(x_data, target, learning_rate=1.0)
    check_update(executor, built.parameters, net.reference_step(x_data, target, built.parameters)[1])


OPTIMIZERS = [
    Optimizer("sgd", momentum=0.0),
    Optimizer("sgd", momentum=0.9, weight_decay=0.01),
    Optimizer("sgd", momentum=0.9, nesterov=True),
    Optimizer("adamw", weight_decay=0.01),
]


@pytest.mark.parametrize("micro_batch", [4, 1])
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=["sgd", "momentum", "nesterov", "adamw"])
def test_three_updates_follow_torchs_optimizer(optimizer: Optimizer, micro_batch: int) -> None:
    net = Network((9, 7, 3), seed=4)
    built = perceptron(net)
    search = Search(graph_of(built), settings(batch_size=BATCH, optimizer=optimizer))
    candidate = search.candidate(0.0, micro_batch)
    executor = Executor(candidate, built.parameters)
    assert (candidate.memory.accumulator_bytes > 0) == optimizer.accumulates(BATCH // micro_batch)
    tensors = {n: torch.tensor(p, dtype=torch.float64) for n, p in built.parameters.items()}
    if optimizer.name == "sgd":
        torch_optimizer: torch.optim.Optimizer = torch.optim.SGD(
            tensors.values(), 0.01, optimizer.momentum, weight_decay=optimizer.weight_decay, nesterov=optimizer.nesterov
        )
    else:
        torch_optimizer = torch.optim.AdamW(tensors.values(), 0.01, weight_decay=optimizer.weight_decay)
    for update in range(1, 4):
        x, target = batch(built, net, seed=update)
        gradients = net.reference_step(x, target, {n: t.numpy() for n, t in tensors.items()})[1]
        for name, tensor in tensors.items():
            tensor.grad = torch.tensor(gradients[name])
        torch_optimizer.step()
        executor.train_step(x, target, learning_rate=0.01, update=update)
    for name, tensor in tensors.items():
        moved = (tensor.numpy() - built.parameters[name]).astype(np.float64)
        ours = executor.parameter(name).astype(np.float64) - built.parameters[name]
        # AdamW's first steps divide by |g|: relative float32 error of tiny gradients shows, so 1e-3 of the step.
        np.testing.assert_allclose(ours, moved, rtol=0, atol=1e-3 * np.abs(moved).max(), err_msg=name)


def test_frozen_parameters_do_not_move_and_the_rest_is_exact() -> None:
    net = Network((9, 7, 3), seed=5)
    x = net.conv(net.input, 8, 3, pad=1, norm=True, act="relu")
    x = net.conv(x, 8, 3, pad=1, norm=True, act="relu")
    logits = net.linear(net.mean(x, (1, 2)), 5)
    names = [n for n in net.parameters if not n.startswith("conv1")]
    built = net.build(logits, trainable=names)
    candidate = Search(graph_of(built), settings(batch_size=BATCH)).candidate(0.9, 2)
    executor = Executor(candidate, built.parameters)
    data, target = batch(built, net)
    executor.train_step(data, target, 0.1)
    for name, before in built.parameters.items():
        moved = not np.array_equal(before, executor.parameter(name))
        assert moved == (name in net.trainable), name


@pytest.mark.parametrize("razor", ["centered", "plain"])
def test_razor_keeps_the_input_gradient_exact_and_biases_with_it(razor: str) -> None:
    """Packing changes weight gradients only: biases see exact gradients when activations are piecewise linear."""
    net = Network((9, 7, 3), seed=6)
    built = residual(False)(net)
    search = Search(graph_of(built), settings(batch_size=BATCH, razor=razor))
    executor = Executor(search.candidate(0.9, 2), built.parameters)
    x, target = batch(built, net)
    executor.train_step(x, target, learning_rate=1.0)
    _, gradients = net.reference_step(x, target, built.parameters)
    inexact = 0
    for name, expected in gradients.items():
        change = built.parameters[name] - executor.parameter(name)
        close = np.abs(change - expected).max() <= 2e-5 * np.abs(expected).max() + 3e-7
        if name.endswith("bias") or name == "conv1.weight":  # the first layer's input is the network's own
            assert close, name
        inexact += not close
    assert inexact >= 3  # the packed layers' weights


@pytest.mark.parametrize("micro_batch", [4, 1])
def test_evaluation_gives_torchs_output(micro_batch: int) -> None:
    net = Network((9, 7, 3), seed=7)
    built = branches(net)
    candidate = Search(graph_of(built), settings(batch_size=BATCH)).candidate(0.5, micro_batch)
    executor = Executor(candidate, built.parameters)
    verify(candidate.evaluate, candidate.accounting.arena)
    x, _ = batch(built, net)
    parameters = {n: torch.tensor(p, dtype=torch.float64) for n, p in built.parameters.items()}
    expected = net.forward(torch.tensor(x[:micro_batch], dtype=torch.float64), parameters).numpy()
    np.testing.assert_allclose(executor.predict(x[:micro_batch]), expected.reshape(-1), rtol=1e-4, atol=1e-5)
