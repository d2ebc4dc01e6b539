"""Schedules mean what the graph means, placements never overlap, and arenas stay near their lower bound."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from edge_razor.exporters.graph_edit import dims
from edge_razor.planner.lower import lower_training
from edge_razor.planner.optimizer import Optimizer
from edge_razor.planner.place import Lifetime, live_bytes, place
from edge_razor.planner.program import Buffer, Region
from edge_razor.planner.search import Candidate, Search

from .conftest import graph_of, settings
from .networks import Built, Network
from .verifier import meaning, verify


def check(built: Built, sparsity: float, micro_batch: int, razor: str = "centered", limit: float = 1.05) -> Candidate:
    """Plans one candidate and checks schedule and placement of both programs."""
    search = Search(graph_of(built), settings(razor=razor))
    candidate = search.candidate(sparsity, micro_batch)
    arena = candidate.accounting.arena
    verify(candidate.train, arena)
    verify(candidate.evaluate, arena)
    rule = search.settings.optimizer
    plain, updates = lower_training(search.graph, micro_batch, candidate.storage, candidate.memory, rule, 2)
    expected = meaning([*plain.steps, *updates], plain.inputs)
    assert meaning(candidate.train.steps, candidate.train.inputs) == expected
    assert len(expected) == len(search.graph.gradients)
    assert arena <= limit * max(candidate.peak_live, 1)
    return candidate


@pytest.mark.parametrize("razor", ["centered", "plain"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.97])
@pytest.mark.parametrize("micro_batch", [8, 1])
def test_mobile_network(mobile: tuple[Network, Built], sparsity: float, micro_batch: int, razor: str) -> None:
    check(mobile[1], sparsity, micro_batch, razor, 1.03)


@st.composite
def networks(draw: st.DrawFn) -> Built:
    """A random network of residuals, branches, pooling, products and several uses of one value."""
    net = Network((draw(st.integers(3, 9)), draw(st.integers(3, 9)), draw(st.integers(1, 4))), seed=0)
    values = [net.input]
    acts = st.sampled_from(["none", "relu", "clip", "hardswish", "sigmoid", "gelu"])
    for _ in range(draw(st.integers(1, 9))):
        x = values[draw(st.integers(max(0, len(values) - 3), len(values) - 1))]
        channels = dims(x)[3]
        kind = draw(st.sampled_from(["conv", "depthwise", "act", "add", "mul", "excite", "concat", "slice", "softmax"]))
        partners = [v for v in values[1:] if dims(v) == dims(x) and v is not x]
        if kind == "conv":
            y = net.conv(x, draw(st.integers(1, 6)), 3, pad=1, norm=draw(st.booleans()), act=draw(acts))
        elif kind == "depthwise":
            y = net.conv(x, channels, 3, pad=1, group=channels, bias=True, act=draw(acts))
        elif kind == "act":
            y = net.act(x, draw(acts.filter(lambda a: a != "none")))
        elif kind in ("add", "mul") and partners:
            y = net.binary(kind.title(), x, draw(st.sampled_from(partners)))
        elif kind == "excite":
            y = net.binary("Mul", x, net.conv(net.mean(x, (1, 2), True), channels, act="sigmoid"))
        elif kind == "concat":
            y = net.concat([x, values[-1]] if dims(values[-1])[:3] == dims(x)[:3] else [x, x], 3)
        elif kind == "slice" and channels > 1:
            y = net.slice(x, 3, 0, channels - 1)
        elif kind == "softmax":
            y = net.softmax(x)
        else:
            y = net.conv(x, channels, 1, bias=True)
        values.append(y)
    last = net.conv(values[-1], 3, bias=True)
    logits = net.linear(net.mean(last, (1, 2)), 4)
    return net.build(logits, trainable=net.ancestors(logits))


@hypothesis_settings(max_examples=60, deadline=None, print_blob=True)
@given(networks(), st.sampled_from([0.0, 0.9]), st.sampled_from([1, 2, 8]))
def test_random_networks(built: Built, sparsity: float, micro_batch: int) -> None:
    check(built, sparsity, micro_batch)


@hypothesis_settings(max_examples=80, deadline=None, print_blob=True)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 15), st.integers(1, 5000)), max_size=60))
def test_lifetimes_that_meet_never_overlap(spans: list[tuple[int, int, int]]) -> None:
    lives = [Lifetime(Buffer(f"b{i}", size), start, start + more) for i, (start, more, size) in enumerate(spans)]
    total = place(lives)
    for i, a in enumerate(lives):
        assert a.buffer.offset % 64 == 0 and a.buffer.offset + a.buffer.bytes <= total
        for b in lives[:i]:
            if a.start <= b.end and b.start <= a.end:
                apart = a.buffer.offset + a.size <= b.buffer.offset or b.buffer.offset + b.size <= a.buffer.offset
                assert apart, (a, b)
    if lives:
        assert total >= live_bytes(lives).max()


def test_live_bytes_counts_both_ends_of_a_lifetime() -> None:
    lives = [Lifetime(Buffer("a", 64), 0, 1), Lifetime(Buffer("b", 1), 1, 2)]
    np.testing.assert_array_equal(live_bytes(lives)[:3], [64, 128, 64])


def test_steps_in_place_need_less_than_the_sum_of_their_operands(mobile: tuple[Network, Built]) -> None:
    candidate = check(mobile[1], 0.9, 8)
    in_place = [s for s in candidate.train.steps if s.kernel == "activation_grad"]
    assert in_place and all(s.operands[0] is s.operands[2] for s in in_place)
    assert any(s.kernel == "conv_grad_input" and s.ints[-1] == 1 for s in candidate.train.steps)


def test_each_gradient_dies_before_the_next_layers_begins() -> None:
    net = Network((8, 8, 3))
    x = net.input
    for _ in range(5):
        x = net.conv(x, 16, 3, pad=1, act="relu")
    candidate = check(net.build(net.linear(net.mean(x, (1, 2)), 4)), 0.9, 8)
    alive: set[Buffer] = set()
    for step in candidate.train.steps:
        if step.kernel == "conv_grad_weight":
            assert not alive, f"{step.label} while {[b.name for b in alive]} waits"
            alive.update(step.writes)
        elif step.kernel == "sgd":
            alive.difference_update(step.reads)


@pytest.mark.parametrize("optimizer", [Optimizer(), Optimizer("adamw"), Optimizer(momentum=0.0)])
def test_parameters_and_state_do_not_overlap(mobile: tuple[Network, Built], optimizer: Optimizer) -> None:
    memory = Search(graph_of(mobile[1]), settings(optimizer=optimizer)).candidate(0.0, 2).memory
    inside = [p.buffer for p in memory.parameters.values() if p.buffer.region == Region.PARAMS]
    params = sorted((b.offset, b.bytes) for b in inside)
    state = sorted(
        (b.offset, b.bytes)
        for p in memory.parameters.values()
        for b in (*p.states, *([p.accumulator] if p.accumulator else []))
    )
    for ranges, total in ((params, memory.params_bytes), (state, memory.state_bytes)):
        for (offset, size), (following, _) in zip(ranges, [*ranges[1:], (total, 0)], strict=True):
            assert offset % 64 == 0 and offset + size <= following
