"""Values made again and values spilled: the gradients are those of the plan that keeps everything, bit for bit."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from edge_razor.errors import PlanError
from edge_razor.exporters.graph_edit import dims
from edge_razor.planner.graph import Graph
from edge_razor.planner.interface import read_interface
from edge_razor.planner.recompute import recompute_levels
from edge_razor.planner.search import Candidate, Search
from edge_razor.planner.segments import Forward, articulation_points
from edge_razor.planner.serialize import encode
from edge_razor.planner.storage import Form, Storage, at_place, choose_storage
from edge_razor.runtime import Session

from .conftest import graph_of, mobile_network, settings
from .executor import Executor
from .networks import Built, Network
from .test_placement import networks
from .verifier import verify

BATCH = 4


def convolutional(depth: int = 3) -> Built:
    """Residual blocks of several activations with squeeze-and-excite, pooling with indices, and dropout at the head."""
    net = Network((16, 12, 3), seed=1)
    x = net.conv(net.input, 8, 3, stride=2, pad=1, norm=True, act="hardswish")
    for act in ("relu", "silu", "leaky_relu")[:depth]:
        y = net.conv(x, 16, norm=True, act=act)
        y = net.conv(y, 16, 3, pad=1, group=16, norm=True, act=act)
        s = net.conv(net.mean(y, (1, 2), True), 4, bias=True, act="relu")
        y = net.binary("Mul", y, net.conv(s, 16, bias=True, act="sigmoid"))
        x = net.act(net.binary("Add", x, net.conv(y, 8, norm=True)), "relu")
    x = net.max_pool(x, 2, 2)
    x = net.conv(x, 24, bias=True, act="gelu")
    return net.build(net.linear(net.dropout(net.mean(x, (1, 2)), 0.2), 5))


def transformer(norm_first: bool, depth: int = 3, fused: bool = False) -> Built:
    """ViT-like (pre-norm, class token) or BERT-like (post-norm), with dropout in attention, MLP and residuals; `fused`:
    Q, K and V by one projection, K and V with half the heads."""
    net = Network((9, 7, 3), seed=1)
    x = net.linear(net.reshape(net.input, (63, 3)), 16)
    x = net.dropout(net.concat([net.expand_batch(net.parameter("token", (1, 1, 16))), x], 1), 0.1)
    for _ in range(depth):
        y = net.layer_norm(x) if norm_first else x
        if fused:
            q, k, v = net.split(net.linear(y, 32), 2, (16, 8, 8))
        else:
            q, k, v = (net.linear(y, 16) for _ in range(3))
        y = net.dropout(net.linear(net.attention(q, k, v, 2 if fused else 4, 4, ratio=0.1), 16), 0.1)
        x = net.binary("Add", x, y)
        y = x = net.layer_norm(x) if not norm_first else x
        y = net.layer_norm(x) if norm_first else y
        y = net.linear(net.dropout(net.linear(y, 32, act="gelu"), 0.1), 16)
        x = net.binary("Add", x, net.dropout(y, 0.1))
        x = x if norm_first else net.layer_norm(x)
    return net.build(net.linear(net.reshape(net.slice(net.layer_norm(x), 1, 0, 1), (16,)), 5))


FAMILIES: dict[str, Callable[[], Built]] = {
    "convolutional": convolutional,
    "vit": lambda: transformer(True),
    "bert": lambda: transformer(False),
    "fused": lambda: transformer(True, fused=True),
}


class Case:
    """A network, and runs of two updates of it with different storage tables."""

    def __init__(self, built: Built, micro_batch: int = BATCH, sparsity: float = 0.0) -> None:
        self.built, self.micro_batch = built, micro_batch
        self.search = Search(graph_of(built), settings(batch_size=BATCH))
        self.graph = self.search.graph
        self.table = choose_storage(self.graph, micro_batch, sparsity, "centered")

    def placed(self, table: dict[str, Storage], names: Collection[str], place: str) -> dict[str, Storage]:
        return at_place(self.graph, table, self.micro_batch, names, place)  # type: ignore[arg-type]

    def plan(self, table: dict[str, Storage]) -> Candidate:
        candidate = Candidate(self.search, 0.0, self.micro_batch, table)
        verify(candidate.train, candidate.accounting.arena)
        return candidate

    def batch(self) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(3)
        shape = self.graph.shapes[self.graph.inputs[0]].at(BATCH)
        x = rng.normal(size=shape).astype(np.float32)
        out = self.graph.shapes[self.graph.output].at(BATCH)
        return x, rng.integers(0, out[-1], out[:-1])

    def run(self, table: dict[str, Storage]) -> dict[str, np.ndarray]:
        """All parameters after two updates, and the losses."""
        executor = Executor(self.plan(table), self.built.parameters)
        x, target = self.batch()
        losses = [executor.train_step(x, target, 0.1, update) for update in (1, 2)]
        used = executor.candidate.memory.parameters
        return {"loss": np.array(losses)} | {name: executor.parameter(name).copy() for name in used}

    def run_native(self, table: dict[str, Storage], spill_dir: Path) -> dict[str, np.ndarray]:
        """The same by the native session."""
        plan = self.plan(table)
        binary = encode(
            bundle_id="0" * 64,
            batch_size=BATCH,
            micro_batch=self.micro_batch,
            threads=self.search.settings.threads,
            arena_bytes=plan.accounting.arena,
            memory=plan.memory,
            interface=read_interface(self.graph, self.built.manifest),
            train=plan.train,
            evaluate=plan.evaluate,
        )
        x, target = self.batch()
        with Session(binary, spill_dir=spill_dir) as session:
            for name in plan.memory.parameters:
                session.write_parameter(name, self.built.parameters[name])
            losses = [
                session.train_step([x], target.astype(np.int32), learning_rate=0.1, update=update, seed=7)
                for update in (1, 2)
            ]
            found = {name: session.read_parameter(name) for name in plan.memory.parameters}
        return {"loss": np.array(losses)} | found


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def candidates(graph: Graph) -> list[str]:
    """Every name that a table may place."""
    forward = Forward(graph)
    names = {name for unit in forward.units.values() for name in unit.names} | set(forward.points)
    return sorted(names)


@pytest.mark.parametrize("micro_batch", [4, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_level_gives_the_gradients_of_the_dense_plan(family: str, micro_batch: int) -> None:
    case = Case(FAMILIES[family](), micro_batch)
    expected = case.run(case.table)
    levels = recompute_levels(case.graph)
    assert levels[0] == frozenset() and len(levels) >= 3
    for names in levels[1:]:
        assert_same(case.run(case.placed(case.table, names, "recompute")), expected)


@pytest.mark.parametrize("sparsity", [0.0, 0.9])
@pytest.mark.parametrize("micro_batch", [4, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_spilling_everything_changes_no_bit(family: str, micro_batch: int, sparsity: float) -> None:
    case = Case(FAMILIES[family](), micro_batch, sparsity)
    names = candidates(case.graph)
    table = case.placed(case.table, names, "spill")
    steps = case.plan(table).train.steps
    writes = sum(step.kernel == "spill_write" for step in steps)
    assert writes >= len(case.table) // 2
    assert sum(step.kernel == "spill_wait" for step in steps) == 2 * writes
    assert_same(case.run(table), case.run(case.table))


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_made_again_from_the_networks_input(family: str) -> None:
    case = Case(FAMILIES[family](), 2)
    table = case.placed(case.table, candidates(case.graph), "recompute")
    assert_same(case.run(table), case.run(case.table))


@pytest.mark.parametrize("family", FAMILIES)
def test_razor_dense_recomputed_and_spilled_values_side_by_side(family: str) -> None:
    """What is made again or spilled is exact, whatever its neighbours are: the razor values alone decide the result."""
    case = Case(FAMILIES[family](), 2, sparsity=0.9)
    names = candidates(case.graph)
    exact = choose_storage(case.graph, 2, 0.0, "centered")
    for seed in range(4):
        rng = random.Random(seed)
        kinds = {name: rng.choice(["razor", "dense", "recompute", "spill"]) for name in names}
        of_kind = {kind: [n for n in names if kinds[n] == kind] for kind in ("dense", "recompute", "spill")}
        razor = dict(case.table)
        for name in (*of_kind["dense"], *of_kind["recompute"]):
            if name in razor:
                razor[name] = exact[name]
        mixed = case.placed(case.placed(razor, of_kind["recompute"], "recompute"), of_kind["spill"], "spill")
        assert any(s.place == "memory" and s.form == Form.RAZOR_CENTERED for s in mixed.values())
        assert_same(case.run(mixed), case.run(razor))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_native_session_runs_repetitions_and_the_spill_file(family: str, tmp_path: Path) -> None:
    case = Case(FAMILIES[family](), 2)
    expected = case.run_native(case.table, tmp_path)
    again = case.placed(case.table, recompute_levels(case.graph)[-1], "recompute")
    # Spilled as well: checkpoints that are made again from, and what is in no segment.
    rest = [name for name in candidates(case.graph) if name not in again or again[name].place == "memory"]
    for table in (again, case.placed(again, rest, "spill"), case.placed(case.table, candidates(case.graph), "spill")):
        assert_same(case.run_native(table, tmp_path), expected)


@hypothesis_settings(max_examples=40, deadline=None, derandomize=True)
@given(networks(), st.randoms(use_true_random=False))
def test_random_networks_with_random_places(built: Built, rng: random.Random) -> None:
    case = Case(built)
    names = candidates(case.graph)
    again = [name for name in names if rng.random() < 0.5]
    spilled = [name for name in names if rng.random() < 0.2]
    table = case.placed(case.placed(case.table, again, "recompute"), spilled, "spill")
    assert_same(case.run(table), case.run(case.table))


def test_a_value_that_is_made_again_serves_all_readers_at_once() -> None:
    case = Case(transformer(True, depth=2))
    steps = case.plan(case.placed(case.table, recompute_levels(case.graph)[-1], "recompute")).train.steps
    repeated = [(step.label, *step.ints) for step in steps if step.label.endswith(" again")]
    assert repeated and len(repeated) == len(set(repeated))


def test_segments_need_less_memory_and_the_cheap_level_repeats_no_product() -> None:
    case = Case(transformer(True, depth=6))
    levels = recompute_levels(case.graph)
    plans = [case.plan(case.placed(case.table, names, "recompute")) for names in levels]
    kernels = {step.kernel for step in plans[1].train.steps if step.label.endswith(" again")}
    assert kernels and kernels.isdisjoint({"conv", "attention", "batch_matmul", "embedding"})
    live = [plan.peak_live for plan in plans]
    assert live[1] < 0.8 * live[0] and min(live) < 0.35 * live[0]


def test_forward_steps_keep_nothing_that_is_made_again() -> None:
    """The original of a repeated convolution or LayerNorm writes no activation bits, xhat or rstd."""
    built = mobile_network()[1]
    case = Case(built)
    names = [n for n in candidates(case.graph) if n.endswith(("/activation", "/index"))]
    steps = case.plan(case.placed(case.table, names, "recompute")).train.steps
    forward = [s for s in steps if not s.backward and s.kernel in ("conv", "max_pool")]
    optional = {"conv": 5, "max_pool": 2}
    assert forward and all(step.operands[optional[step.kernel]] is None for step in forward)
    assert_same(case.run(case.placed(case.table, names, "recompute")), case.run(case.table))


def test_articulation_points_are_the_block_boundaries() -> None:
    net = Network((8, 8, 3), seed=0)
    first = net.conv(net.input, 4, bias=True, act="relu")
    inner = net.conv(first, 4, bias=True, act="relu")
    total = net.binary("Add", first, net.conv(inner, 4, bias=True))
    built = net.build(net.linear(net.mean(total, (1, 2)), 5))
    points = articulation_points(graph_of(built))
    assert points[:2] == [first.name, total.name] and inner.name not in points
    assert dims(total) == dims(first)


def test_a_value_that_is_kept_inexactly_cannot_be_made_again() -> None:
    case = Case(convolutional(1), sparsity=0.9)
    name = next(n for n, s in case.table.items() if s.form == Form.RAZOR_CENTERED)
    wrong = case.table[name]
    table = case.table | {
        name: Storage(wrong.form, wrong.samples, wrong.rows, wrong.cols, wrong.keep, wrong.bytes, "recompute")
    }
    with pytest.raises(PlanError, match="made again exactly"):
        case.plan(table)
