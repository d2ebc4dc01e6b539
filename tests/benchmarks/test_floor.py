"""The floor of a training step, against figures counted by hand."""

from __future__ import annotations

import pytest

from benchmarks.floor import Work, step_work
from edge_razor.planner.graph import Graph, read_graph
from edge_razor.planner.storage import choose_storage
from tests.bundles import linear_models
from tests.planner.conftest import graph_of
from tests.planner.networks import Network

# conv 3 → 8, 3×3, stride 2: 16×16 → 8×8, ReLU; conv 8 → 4, 1×1; mean; linear 4 → 10. Batch 2.
CONV1, CONV2, LINEAR = 2 * 64 * 8 * 27, 2 * 64 * 4 * 8, 2 * 10 * 4
PARAMETERS = 8 * 27 + 8 + 4 * 8 + 4 + 10 * 4 + 10
INPUT = 2 * 16 * 16 * 3
OUTPUTS = 2 * 64 * 8 + 2 * 64 * 4 + 2 * 4 + 2 * 10  # both convolutions, the mean, the classifier
RELU_BITS = 2 * 64  # bytes: 8 channels a row


@pytest.fixture(scope="module")
def graph() -> Graph:
    net = Network((16, 16, 3))
    x = net.conv(net.input, 8, 3, stride=2, pad=1, bias=True, act="relu")
    x = net.conv(x, 4, bias=True)
    return graph_of(net.build(net.linear(net.mean(x, (1, 2)), 10)))


def test_dense_work(graph: Graph) -> None:
    work = step_work(graph, 2, choose_storage(graph, 2, 0.0, "centered"))
    assert work.forward == CONV1 + CONV2 + LINEAR
    assert work.grad_input == CONV2 + LINEAR  # none for the network's input
    assert work.grad_weight == CONV1 + CONV2 + LINEAR
    read_again = 4 * (2 * 64 * 8 + 2 * 4)  # the dense inputs of conv2 and linear
    assert work.bytes == 16 * OUTPUTS + 2 * 4 * INPUT + 2 * RELU_BITS + read_again + 20 * PARAMETERS


@pytest.mark.parametrize("razor", ["plain", "centered"])
def test_razor_saves_the_dropped_share_of_the_weight_gradient(graph: Graph, razor: str) -> None:
    storage = choose_storage(graph, 2, 0.9, razor)
    work = step_work(graph, 2, storage)
    assert (work.forward, work.grad_input) == (CONV1 + CONV2 + LINEAR, CONV2 + LINEAR)
    # conv1 reads the network's input, linear a value of one row, which stays bf16; conv2 keeps 52 of 512 a sample.
    assert work.grad_weight == CONV1 + CONV2 * 52 // 512 + LINEAR
    packed = sum(value.bytes for value in storage.values())
    assert packed > RELU_BITS
    assert work.bytes == 16 * OUTPUTS + 2 * 4 * INPUT + 2 * packed + 20 * PARAMETERS


def test_frozen_tensors_are_only_read(graph: Graph) -> None:
    head = graph.restricted([name for name in graph.gradients if name.startswith("linear")])
    dense = step_work(graph, 2, choose_storage(graph, 2, 0.0, "centered"))
    work = step_work(head, 2, choose_storage(head, 2, 0.0, "centered"))
    assert (work.forward, work.grad_input, work.grad_weight) == (dense.forward, 0, LINEAR)
    assert work.bytes < dense.bytes - 16 * (PARAMETERS - 50)


def test_a_linear_model() -> None:
    graph = read_graph(linear_models(6, 3)[0].SerializeToString(), "logits")
    work = step_work(graph, 4, {})
    assert work == Work(4 * 6 * 3, 0, 4 * 6 * 3, 16 * 4 * 3 + 2 * 4 * 4 * 6 + 20 * 21)


@pytest.mark.parametrize("sparsity", [0.0, 0.9])
def test_attention_is_two_products_forward_and_five_backward(sparsity: float) -> None:
    net = Network((9, 4))
    x = net.linear(net.input, 12)
    y = net.attention(x, net.linear(x, 6), net.linear(x, 6), 1, 6)
    graph = graph_of(net.build(net.linear(net.mean(y, (1,)), 5)))
    work = step_work(graph, 2, choose_storage(graph, 2, sparsity, "centered"))
    scores = 2 * 2 * 9 * 9 * 6  # samples, heads, queries, keys, columns of a head
    linear = 2 * 9 * (4 * 12 + 12 * 6 + 12 * 6)
    head = 2 * 12 * 5
    assert work.forward == 2 * scores + linear + head
    assert work.grad_input == 5 * scores + linear - 2 * 9 * 4 * 12 + head


def test_seconds_add_arithmetic_and_traffic() -> None:
    assert Work(600, 300, 100, 5000).seconds(500.0, 1000.0) == pytest.approx(2.0 + 5.0)
