"""The timeline of a plan file, against what the planner placed."""

from __future__ import annotations

from typing import Any

import pytest

from edge_razor.errors import PlanError
from edge_razor.planner.planning import plan_graph
from edge_razor.planner.timeline import KINDS, read_timeline

from .conftest import mobile_network, settings
from .networks import Built, Network


def transformer() -> Built:
    net = Network((6, 6, 16))
    x = net.conv(net.input, 16, 3, pad=1, norm=True, act="gelu")
    x = net.binary("Add", x, net.conv(x, 16, norm=True, act="hardswish"))
    return net.build(net.linear(net.mean(x, (1, 2)), 4))


NETWORKS = {"mobile": lambda: mobile_network()[1], "residual": transformer}


@pytest.mark.parametrize("sparsity", [0.0, 0.9])
@pytest.mark.parametrize("micro_batch", [1, 8])
@pytest.mark.parametrize("network", NETWORKS)
def test_live_bytes_peak_where_the_planner_says_and_nothing_overlaps(
    network: str, micro_batch: int, sparsity: float
) -> None:
    built = NETWORKS[network]()
    made = plan_graph(built.training, built.manifest, settings(sparsity=sparsity, micro_batch=micro_batch), None)
    timeline = read_timeline(made.binary)
    live = timeline.live_bytes()
    assert list(live) == list(KINDS)
    assert max(sum(step) for step in zip(*live.values(), strict=True)) == made.summary["live_bytes"]
    assert len(timeline.labels) == made.summary["train_steps"]
    assert 0 < timeline.arena_bytes <= made.arena_bytes
    for i, a in enumerate(timeline.stays):
        assert 0 <= a.first <= a.last < len(timeline.labels)
        for b in timeline.stays[i + 1 :]:
            together = a.first <= b.last and b.first <= a.last
            assert not (together and a.offset < b.offset + b.bytes and b.offset < a.offset + a.bytes), (a, b)


def test_what_is_kept_is_what_the_summary_says_it_is() -> None:
    """At sparsity 0.9 packed values are made by the forward pass and die in the backward pass, with their bytes."""
    built = mobile_network()[1]
    made = plan_graph(built.training, built.manifest, settings(sparsity=0.9, micro_batch=8), None)
    timeline = read_timeline(made.binary)
    kept = [stay.bytes for stay in timeline.stays if stay.kind == "kept"]
    for row in made.summary["kept"]:
        if row["form"] != "dense":
            assert row["bytes"] in kept
            kept.remove(row["bytes"])
    before = [stay for stay in timeline.stays if stay.kind == "gradients" and stay.first < timeline.loss]
    assert before == []
    assert any(stay.kind == "gradients" for stay in timeline.stays)


@pytest.mark.parametrize("damage", [lambda d: d[:-9], lambda d: b"", lambda d: d[:40] + b"\xff" * (len(d) - 40)])
def test_a_damaged_plan_is_a_plan_error(damage: Any) -> None:
    built = mobile_network()[1]
    data = plan_graph(built.training, built.manifest, settings(sparsity=0.9), None).binary
    with pytest.raises(PlanError):
        read_timeline(damage(data))
