"""Settings and networks that several planner tests share."""

from __future__ import annotations

from typing import Any

import pytest

from edge_razor.planner.graph import Graph, read_graph
from edge_razor.planner.optimizer import Optimizer
from edge_razor.planner.search import Settings

from .networks import Built, Network


def settings(**changes: Any) -> Settings:
    """Settings with nothing but the model in the account."""
    values: dict[str, Any] = {
        "batch_size": 8,
        "sparsity": None,
        "micro_batch": None,
        "razor": "centered",
        "optimizer": Optimizer(),
        "threads": 2,
        "process_bytes": 0,
        "growth_bytes": 0,
        "data_bytes": 0,
    }
    return Settings(**(values | changes))


def graph_of(built: Built) -> Graph:
    return read_graph(built.training, built.manifest["output"]["name"])


def mobile_network(size: int = 16, seed: int = 0) -> tuple[Network, Built]:
    """Inverted residual with depthwise convolution, squeeze-and-excite, pooling and a classifier."""
    net = Network((size, size, 3), seed)
    x = net.conv(net.input, 16, 3, stride=2, pad=1, norm=True, act="relu")
    y = net.conv(x, 32, norm=True, act="hardswish")
    y = net.conv(y, 32, 3, pad=1, group=32, norm=True, act="clip")
    y = net.conv(y, 16, norm=True)
    x = net.binary("Add", x, y)
    s = net.conv(net.mean(x, (1, 2), True), 4, bias=True, act="relu")
    x = net.binary("Mul", x, net.conv(s, 16, bias=True, act="sigmoid"))
    x = net.max_pool(x, 2, 2)
    return net, net.build(net.linear(net.mean(x, (1, 2)), 10))


@pytest.fixture(scope="session")
def mobile() -> tuple[Network, Built]:
    return mobile_network()
