"""Steps that run some samples at a time compute what they compute at once, in less memory."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from edge_razor.planner import live_model, schedule, turns
from edge_razor.planner.choose import choose
from edge_razor.planner.context import scratch_bytes
from edge_razor.planner.optimizer import Optimizer
from edge_razor.planner.planning import plan_graph
from edge_razor.planner.program import Buffer, Program, Region, Step
from edge_razor.planner.search import Candidate, Search, Structure
from edge_razor.planner.timeline import read_timeline

from .conftest import graph_of, settings
from .executor import Executor, check_update
from .networks import Built, Network
from .test_execution import NETWORKS
from .test_live_model import selections
from .verifier import verify

SIZE = 16


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """A turn costs nothing and every map is large, so that small networks take turns wherever it is legal."""
    for cost in ("LARGE_BYTES", "CALL_BYTES", "WEIGHT_PASSES", "SUM_PASSES"):
        monkeypatch.setattr(turns, cost, 0)


def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on nothing takes turns."""
    monkeypatch.setattr(schedule, "take_turns", lambda program, samples, threads: program)
    monkeypatch.setattr(live_model, "chains", lambda program, samples, threads: [])


def inverted(net: Network) -> Built:
    """Inverted residuals: wide maps inside, a stride, a residual addition, max pooling."""
    x = net.conv(net.input, 8, 3, pad=1, norm=True, act="relu")
    y = net.conv(x, 48, norm=True, act="clip")
    y = net.conv(y, 48, 3, pad=1, group=48, norm=True, act="clip")
    x = net.binary("Add", x, net.conv(y, 8, norm=True))
    y = net.conv(x, 40, norm=True, act="hardswish")
    y = net.conv(y, 40, 3, stride=2, pad=1, group=40, norm=True, act="relu")
    x = net.max_pool(net.conv(y, 16, bias=True), 2, 2)
    return net.build(net.linear(net.mean(x, (1, 2)), 5))


def residual(net: Network) -> Built:
    """3×3 convolutions in groups and with dilation; a sum that ends in an activation; average pooling."""
    x = net.conv(net.input, 8, 3, stride=2, pad=1, bias=True, act="gelu")
    y = net.conv(x, 8, 3, pad=1, norm=True, act="relu")
    y = net.conv(y, 8, 3, pad=2, dilation=2, group=2, norm=True)
    x = net.act(net.binary("Add", y, x), "relu")
    y = net.conv(net.conv(x, 12, 3, stride=2, pad=1, norm=True, act="relu"), 12, norm=True)
    x = net.act(net.binary("Add", y, net.conv(x, 12, stride=2, norm=True)), "relu")  # dY's sum is taken twice
    x = net.conv(x, 8)
    x = net.average_pool(net.act(net.binary("Add", net.conv(x, 8), x), "silu"), 2, 2)
    return net.build(net.linear(net.mean(x, (1, 2)), 5))


def mixed(net: Network) -> Built:
    """Steps that need all samples, or cannot be cut, between those that can."""
    x = net.conv(net.input, 16, 3, pad=1, norm=True, act="relu")
    s = net.conv(net.mean(x, (1, 2), True), 4, bias=True, act="relu")
    x = net.binary("Mul", x, net.conv(s, 16, bias=True, act="sigmoid"))
    a, b = net.slice(x, 3, 0, 8), net.slice(x, 3, 8, 16)
    x = net.concat([net.conv(a, 12, 3, pad=1, norm=True, act="relu"), b], 3)
    x = net.conv(net.conv(x, 32, act="leaky_relu"), 8, 3, pad=1, norm=True)
    return net.build(net.linear(net.reshape(x, (SIZE * SIZE * 8,)), 5), loss="mse")


def random_network(seed: int) -> Callable[[Network], Built]:
    def make(net: Network) -> Built:
        random = np.random.default_rng(seed)
        x, width, size = net.conv(net.input, 8, 3, pad=1, norm=True, act="relu"), 8, SIZE
        for _ in range(6):
            kind = random.choice(["pointwise", "wide", "depthwise", "residual", "pool", "activation"])
            act = str(random.choice(["none", "relu", "clip", "hardswish", "gelu"]))
            norm = bool(random.integers(2))
            if kind == "pointwise":
                width = int(random.choice([8, 24, 17]))
                x = net.conv(x, width, norm=norm, bias=not norm, act=act)
            elif kind == "wide":
                x = net.conv(net.conv(x, 40, norm=norm, act="relu"), width, 3, pad=1, norm=True, act=act)
            elif kind == "depthwise":
                stride = 2 if size > 4 and random.integers(2) else 1
                x, size = net.conv(x, width, 3, stride=stride, pad=1, group=width, norm=norm, act=act), size // stride
            elif kind == "residual":
                x = net.binary("Add", net.conv(x, width, 3, pad=1, norm=norm), x)
                x = net.act(x, "relu") if random.integers(2) else x
            elif kind == "pool" and size > 4:
                pool = net.max_pool if random.integers(2) else net.average_pool
                x, size = pool(x, 2, 2), size // 2
            else:
                x = net.act(x, "silu")
        return net.build(net.linear(net.mean(x, (1, 2)), 5))

    return make


MADE = {"inverted": inverted, "residual": residual, "mixed": mixed} | {
    f"random {seed}": random_network(seed) for seed in range(8)
}


def network(name: str) -> tuple[Network, Built]:
    net = Network((SIZE, SIZE, 3), seed=1)
    return net, MADE[name](net)


def batch(net: Network, samples: int, seed: int = 3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(samples, SIZE, SIZE, 3)).astype(np.float32)
    if net.loss == "cross_entropy":
        return x, rng.integers(0, 5, samples)
    return x, rng.uniform(0, 1, (samples, 5)).astype(np.float32)


def turned(steps: list[Step]) -> list[Step]:
    """Those of the steps that take turns: they handle a part of some buffer."""
    return [step for step in steps if any(b is not None and b.whole is not None for b in step.operands)]


def checked(candidate: Candidate) -> Candidate:
    verify(candidate.train, candidate.accounting.arena)
    verify(candidate.evaluate, candidate.accounting.arena)
    return candidate


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("samples,threads", [(4, 1), (5, 2), (8, 3)])
@pytest.mark.parametrize("name", MADE)
def test_gradients_at_sparsity_zero_are_torchs(name: str, samples: int, threads: int) -> None:
    net, built = network(name)
    search = Search(graph_of(built), settings(batch_size=samples, threads=threads, optimizer=Optimizer(momentum=0.0)))
    candidate = checked(search.candidate(0.0, samples))
    assert {step.backward for step in turned(candidate.train.steps)} == {False, True}
    executor = Executor(candidate, built.parameters)
    x, target = batch(net, samples)
    loss = executor.train_step(x, target, learning_rate=1.0)
    expected_loss, gradients = net.reference_step(x, target, built.parameters)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    check_update(executor, built.parameters, gradients)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("razor", ["centered", "plain"])
@pytest.mark.parametrize("name", MADE)
def test_razor_gradients_are_those_of_a_whole_batch(name: str, razor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples are packed each for itself, so what is kept is the same; only sums have another order."""
    net, built = network(name)
    x, target = batch(net, 6)
    results = []
    for whole in (False, True):
        if whole:
            at_once(monkeypatch)
        search = Search(graph_of(built), settings(batch_size=6, razor=razor, optimizer=Optimizer(momentum=0.0)))
        candidate = checked(search.candidate(0.9, 6))
        assert bool(turned(candidate.train.steps)) != whole
        executor = Executor(candidate, built.parameters)
        loss = executor.train_step(x, target, learning_rate=1.0)
        outputs = executor.predict(x)
        results.append((loss, outputs, {n: p - executor.parameter(n) for n, p in built.parameters.items()}))
    (loss, outputs, changes), (other_loss, other_outputs, others) = results
    assert loss == pytest.approx(other_loss, rel=1e-6)
    np.testing.assert_allclose(outputs, other_outputs, rtol=1e-4, atol=1e-5)
    for parameter, expected in others.items():
        tolerance = 2e-5 * np.abs(expected).max() + 3e-7
        np.testing.assert_allclose(changes[parameter], expected, rtol=0, atol=tolerance, err_msg=parameter)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("place", ["recompute", "spill"])
def test_values_made_again_or_spilled_give_the_same_gradients(place: str) -> None:
    net, built = network("inverted")
    graph = graph_of(built)
    search = Search(graph, settings(batch_size=6, spill=place == "spill", optimizer=Optimizer(momentum=0.0)))
    x, target = batch(net, 6)
    _, gradients = net.reference_step(x, target, built.parameters)
    tried = 0
    for number, level in enumerate(search.levels):
        if level.place != place or not level.names:
            continue
        tried += 1
        candidate = checked(search.chosen(Structure(6, number), {}))
        assert place == "spill" or turned(candidate.train.steps)  # a transfer ends every chain
        executor = Executor(candidate, built.parameters)
        executor.train_step(x, target, learning_rate=1.0)
        check_update(executor, built.parameters, gradients)
    assert tried


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("sparsity", [0.0, 0.9])
@pytest.mark.parametrize("name", [*MADE, *NETWORKS])
def test_turns_never_need_more_memory(name: str, sparsity: float, monkeypatch: pytest.MonkeyPatch) -> None:
    if name in MADE:
        built = network(name)[1]
    else:
        built = NETWORKS[name](Network((9, 7, 3), seed=1))

    def peaks() -> tuple[int, int]:
        search = Search(graph_of(built), settings())
        candidate = checked(search.candidate(sparsity, 8))
        evaluation = search.evaluation(8, candidate.memory)[1]
        return candidate.peak_live, evaluation

    taken = peaks()
    at_once(monkeypatch)
    whole = peaks()
    # A chain's memory is placed for itself first, at most a few percent above what is alive.
    assert taken[0] <= 1.03 * whole[0] and taken[1] <= 1.03 * whole[1]


@pytest.mark.usefixtures("eager")
def test_what_is_wide_inside_a_chain_needs_memory_for_one_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    built = network("inverted")[1]

    def arena() -> int:
        return Search(graph_of(built), settings(batch_size=16)).candidate(0.9, 16).accounting.arena

    taken = arena()
    at_once(monkeypatch)
    assert taken < 0.55 * arena()


def test_small_maps_take_no_turns() -> None:
    """They are in a cache anyway."""
    candidate = Search(graph_of(network("residual")[1]), settings()).candidate(0.9, 8)
    assert not turned(candidate.train.steps) and not turned(candidate.evaluate.steps)


@pytest.mark.usefixtures("eager")
def test_a_batch_of_no_more_samples_than_threads_takes_no_turns() -> None:
    search = Search(graph_of(network("inverted")[1]), settings(batch_size=4, threads=4))
    assert not turned(search.candidate(0.9, 4).train.steps)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("name", ["inverted", "mixed"])
def test_live_bytes_of_turns_are_modelled(name: str) -> None:
    search = Search(graph_of(network(name)[1]), settings())
    structure = Structure(8)
    model = search.model(structure)
    smallest, exact, *others = selections(search, structure, 4, 5)
    for index, low, high in [(smallest, 0.97, 1.03), (exact, 0.9, 1.25), *((i, 0.85, 1.25) for i in others)]:
        needed = search.chosen(structure, model.chosen(index)).peak_live
        assert low * needed <= model.peak(index) <= high * needed, model.chosen(index)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("share", [0.55, 0.7, 0.9])
def test_a_plan_under_a_cap_fits_it(share: float) -> None:
    search = Search(graph_of(network("inverted")[1]), settings(batch_size=12))
    cap = int(share * search.candidate(0.0, 12).accounting.total)
    decision = choose([search], cap)
    assert decision is not None and decision.candidate.accounting.total <= cap
    checked(decision.candidate)


@pytest.mark.usefixtures("eager")
def test_the_timeline_of_turns_stays_inside_the_arena_and_below_the_live_bytes() -> None:
    built = network("inverted")[1]
    made = plan_graph(built.training, built.manifest, settings(sparsity=0.9), None)
    timeline = read_timeline(made.binary)
    live = timeline.live_bytes()
    together = max(sum(column) for column in zip(*live.values(), strict=True))
    assert timeline.arena_bytes <= made.arena_bytes
    assert 0.7 * made.summary["live_bytes"] <= together <= made.summary["live_bytes"]
    assert max(live["kept"]) > 0


# ---- What may be a chain, by hand ----


def _conv(label: str, x: Buffer, w: Buffer, y: Buffer, samples: int = 4) -> Step:
    shape = [samples, 8, 8, 4, 8, 8, 4, 1, 1, 1, 1, 0, 0, 1, 1, 1]
    size = scratch_bytes("conv", (*shape, 0, 0), (0.0, 0.0), 2)
    scratch = Buffer(f"scratch of {label}", size) if size else None
    return Step("conv", label, [*shape, 0, 0], [0.0, 0.0], [x, w, None, None, y, None, None, scratch])


def _map(name: str, samples: int = 4) -> Buffer:
    return Buffer(name, samples * 8 * 8 * 4 * 4)


def _weight(name: str) -> Buffer:
    return Buffer(name, 64, Region.PARAMS)


@pytest.mark.usefixtures("eager")
def test_a_step_between_that_a_member_needs_runs_before_the_chain_and_one_that_needs_a_member_after_it() -> None:
    x, y, z, s, t, w = _map("x"), _map("y"), _map("z"), Buffer("s", 64), Buffer("t", 16), _weight("w")
    fill = Step("fill", "fill", [16], [1.0], [s])
    total = Step("reduce", "total", [0, 2, 256, 4, 1, 0], [], [y, t, None])
    steps = [_conv("a", x, w, y), total, fill, _conv("b", y, s, z)]
    done = turns.take_turns(Program(steps, [x], [x, z, t]), 4, 2).steps
    assert [s.label for s in done] == ["fill", "a", "b", "a", "b", "total"]
    assert [s.operands[0].start for s in done if s.label == "a"] == [0, 2048]  # type: ignore[union-attr]


@pytest.mark.usefixtures("eager")
def test_a_step_that_needs_all_samples_of_a_member_ends_the_chain_for_who_needs_it() -> None:
    x, y, z, s, w = _map("x"), _map("y"), _map("z"), Buffer("s", 64), _weight("w")
    total = Step("reduce", "total", [0, 2, 256, 4, 1, 0], [], [y, s, None])
    steps = [_conv("a", x, w, y), total, _conv("b", y, s, z)]  # b's weight is made from all of y
    program = Program(steps, [x], [z])
    assert turns.take_turns(program, 4, 2).steps == steps


@pytest.mark.usefixtures("eager")
def test_a_map_that_is_also_read_as_a_weight_is_never_cut() -> None:
    x, y, z, w = _map("x"), _map("y"), _map("z"), _weight("w")
    program = Program([_conv("a", x, w, y), _conv("b", y, y, z)], [x], [z])
    assert turns.take_turns(program, 4, 2).steps == program.steps
    swapped = Program([_conv("a", x, y, z), _conv("b", z, w, y)], [x, y], [y])  # b writes over a's weight
    assert turns.take_turns(swapped, 4, 2).steps == swapped.steps


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("samples", [3, 8])
def test_steps_of_another_number_of_samples_take_no_turns(samples: int) -> None:
    x, y, z, w = _map("x", 4), _map("y", 4), _map("z", 4), _weight("w")
    program = Program([_conv("a", x, w, y, 4), _conv("b", y, w, z, 4)], [x], [z])
    assert turns.take_turns(program, samples, 2).steps == program.steps


@pytest.mark.usefixtures("eager")
def test_samples_that_do_not_begin_at_a_multiple_of_the_alignment_are_not_cut() -> None:
    shape = [4, 3, 3, 1, 3, 3, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1]
    x, y, z, w = Buffer("x", 144), Buffer("y", 144), Buffer("z", 144), _weight("w")
    steps = [
        Step("conv", n, [*shape, 0, 0], [0.0, 0.0], [a, w, None, None, b, None, None, None])
        for n, a, b in (("a", x, y), ("b", y, z))
    ]
    assert turns.take_turns(Program(steps, [x], [z]), 4, 2).steps == steps
