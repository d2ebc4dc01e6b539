"""The choice under a cap: fits, never worse than one sparsity for all, exact where that is asked for, least harm."""

from __future__ import annotations

import sys
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from edge_razor.errors import BudgetError, UsageError
from edge_razor.planner import solve
from edge_razor.planner.choose import FAST_SPARSITY, Decision, choose, negligible
from edge_razor.planner.planning import plan_graph
from edge_razor.planner.search import SPARSITY_GRID, Search, Structure, searches

from .conftest import graph_of, mobile_network, settings
from .executor import Executor
from .networks import Built, Network
from .test_placement import networks
from .verifier import verify


@pytest.fixture(scope="module")
def built() -> Built:
    return mobile_network(32)[1]


@pytest.fixture(scope="module")
def search(built: Built) -> Search:
    return Search(graph_of(built), settings())


def smallest_and_largest(parts: list[Search]) -> tuple[int, int]:
    """The smallest cap, and what keeping everything as it is takes."""
    smallest = min(part.smallest().accounting.total for part in parts)
    whole = parts[0].candidate(0.0, parts[0].settings.micro_batches[0]).accounting.total
    return smallest, max(whole, smallest)


def decide(parts: list[Search], cap: int) -> Decision:
    decision = choose(parts, cap)
    assert decision is not None
    assert decision.candidate.accounting.total <= cap
    return decision


def least_single_harm(search: Search, cap: int) -> float:
    """Harm of the best plan with one sparsity for all values and no recomputation."""
    for sparsity in SPARSITY_GRID:
        for micro_batch in search.settings.micro_batches:
            candidate = search.candidate(sparsity, micro_batch)
            if candidate.fits(cap):
                return candidate.harm
    return float("inf")


@hypothesis_settings(max_examples=25, deadline=None, print_blob=True)
@given(st.floats(0, 1.1))
def test_every_cap_from_the_smallest_on_is_met_and_no_worse_than_by_one_sparsity(search: Search, share: float) -> None:
    smallest, largest = smallest_and_largest([search])
    cap = smallest + int(share * (largest - smallest))
    decision = decide([search], cap)
    assert decision.candidate.harm <= max(negligible(), least_single_harm(search, cap)) + 1e-12
    assert 0 <= decision.gap <= 1


@pytest.mark.parametrize("share", [0.0, 0.02, 0.1, 0.4])
def test_without_a_solver_the_plan_is_no_worse_than_by_one_sparsity(
    search: Search, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(solve, "highs_version", lambda: None)
    monkeypatch.setattr(solve, "_run", None)  # nothing may call it
    smallest, largest = smallest_and_largest([search])
    cap = smallest + int(share * (largest - smallest))
    decision = decide([search], cap)
    assert decision.solver in ("greedy", "none")
    assert decision.candidate.harm <= max(negligible(), least_single_harm(search, cap)) + 1e-12


def test_a_missing_solver_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert solve.highs_version() is not None
    monkeypatch.setitem(sys.modules, "highspy", None)
    assert solve.highs_version() is None


def test_the_solver_prints_nothing(search: Search, capfd: pytest.CaptureFixture[str]) -> None:
    model = search.model(Structure(8))
    assert solve.minimize_harm(model, model.peak(np.array([e - 1 for _, e in model.groups], np.int64))) is not None
    assert capfd.readouterr() == ("", "")


@hypothesis_settings(max_examples=12, deadline=None, print_blob=True)
@given(networks(), st.floats(0, 1), st.sampled_from(["balanced", "exact", "fast"]))
def test_every_cap_is_met_on_random_networks(built: Built, share: float, prefer: str) -> None:
    parts = [Search(graph_of(built), settings(prefer=prefer, batch_size=4))]
    smallest, largest = smallest_and_largest(parts)
    cap = smallest + int(share * (largest - smallest))
    decision = decide(parts, cap)
    verify(decision.candidate.train, decision.candidate.accounting.arena)
    assert choose(parts, smallest - 1) is None
    if prefer == "exact":
        assert decision.candidate.harm == 0


def tiny() -> Built:
    net = Network((8, 8, 4))
    x = net.conv(net.input, 8, 3, pad=1, bias=True, act="relu")
    x = net.conv(x, 8, bias=True, act="hardswish")
    x = net.conv(x, 12, 3, pad=1, bias=True, act="relu")
    return net.build(net.linear(net.mean(x, (1, 2)), 3))


@pytest.mark.parametrize("share", [0.02, 0.2, 0.5, 0.8])
def test_the_solver_finds_the_optimum_that_trying_everything_finds(share: float) -> None:
    search = Search(graph_of(tiny()), settings(micro_batch=8))
    model = search.model(Structure(8))
    every = [np.array(index, np.int64) for index in product(*(range(b, e) for b, e in model.groups))]
    assert 50 < len(every) < 20_000
    peaks = np.array([model.peak(index) for index in every])
    harms = np.array([model.harm[index].sum() for index in every])
    seconds = np.array([model.column_seconds[index].sum() for index in every])
    limit = int(peaks.min() + share * (peaks.max() - peaks.min()))
    fits = peaks <= limit
    found = solve.minimize_harm(model, limit)
    assert found is not None and model.peak(found.index) <= limit
    least = harms[fits].min()
    assert model.harm[found.index].sum() <= 1.02 * least + 1e-9
    assert found.bound <= least + 1e-9
    allowance = float(np.median(harms[fits]))
    quick = solve.minimize_seconds(model, limit, allowance)
    assert quick is not None and model.peak(quick.index) <= limit
    assert model.harm[quick.index].sum() <= allowance * (1 + 1e-6)
    assert model.column_seconds[quick.index].sum() <= 1.01 * seconds[fits & (harms <= allowance)].min()


def test_nothing_fits_below_the_smallest_forms() -> None:
    search = Search(graph_of(tiny()), settings(micro_batch=8))
    model = search.model(Structure(8))
    assert solve.minimize_harm(model, 1) is None and solve.minimize_seconds(model, 1, 1.0) is None


def test_the_greedy_choice_stays_within_the_limit_and_only_improves(search: Search) -> None:
    model = search.model(Structure(8))
    start = np.array([e - 1 for _, e in model.groups], np.int64)
    for limit in range(model.peak(start), model.peak(start) * 3, model.peak(start) // 4):
        better = solve.improve(model, limit, start)
        assert model.peak(better) <= limit and model.harm[better].sum() <= model.harm[start].sum()
        faster = solve.hasten(model, limit, better, 0.1)
        assert model.peak(faster) <= limit and model.harm[faster].sum() <= max(0.1, model.harm[better].sum())
        assert model.column_seconds[faster].sum() <= model.column_seconds[better].sum()


@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 1.0])
def test_plans_that_prefer_exact_give_torchs_gradients(share: float) -> None:
    net, made = mobile_network(16)
    parts = [Search(graph_of(made), settings(prefer="exact", batch_size=4))]
    smallest, largest = smallest_and_largest(parts)
    candidate = decide(parts, smallest + int(share * (largest - smallest))).candidate
    assert candidate.harm == 0
    executor = Executor(candidate, made.parameters)
    rng = np.random.default_rng(1)
    x, target = rng.normal(size=(4, 16, 16, 3)).astype(np.float32), rng.integers(0, 10, 4).astype(np.int32)
    executor.train_step(x, target, learning_rate=1.0)
    for name, expected in net.reference_step(x, target, made.parameters)[1].items():
        change = made.parameters[name] - executor.parameter(name)
        np.testing.assert_allclose(change, expected, rtol=0, atol=2e-5 * np.abs(expected).max() + 3e-7, err_msg=name)


def test_a_mixed_table_is_executed(search: Search) -> None:
    """Values in different forms side by side: the plan is sound, and the loss is that of the dense plan."""
    model = search.model(Structure(4))
    random = np.random.default_rng(5)
    index = np.array([random.integers(b, e) for b, e in model.groups], np.int64)
    mixed = search.chosen(Structure(4), model.chosen(index))
    verify(mixed.train, mixed.accounting.arena)
    made = mobile_network(32)[1]
    x, target = random.normal(size=(8, 32, 32, 3)).astype(np.float32), random.integers(0, 10, 8).astype(np.int32)
    losses = [
        Executor(candidate, made.parameters).train_step(x, target, 0.0)
        for candidate in (mixed, search.candidate(0.0, 4))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_fast_is_no_slower_than_balanced_and_within_its_harm(search: Search) -> None:
    smallest, largest = smallest_and_largest([search])
    fast = search.preferring("fast")
    allowance = sum(search.harm(n, c) for n, c in search.uniform(Structure(8), FAST_SPARSITY).items())
    for cap in (smallest + (largest - smallest) // 4, largest):
        quick, usual = decide([fast], cap).candidate, decide([search], cap).candidate
        assert quick.seconds <= 1.01 * usual.seconds
        assert quick.harm <= allowance + 1e-9
        decision = decide([fast], cap)
        assert decision.objective == "seconds" and decision.bound is not None
        assert 0 < decision.bound <= 1.02 * quick.seconds and decision.gap < 0.5  # the model is nearly right
    unlimited = choose([fast], None)
    assert unlimited is not None and unlimited.candidate.harm <= allowance + 1e-9


def test_layers_are_frozen_only_if_allowed_and_cost_harm(built: Built) -> None:
    graph = graph_of(built)
    allowed = searches(graph, settings(allow_freeze=2, sparsity=0.9))
    assert [len(part.frozen) > 0 for part in allowed] == [False, True, True]
    assert allowed[0].smallest().accounting.total > allowed[2].smallest().accounting.total
    cap = allowed[0].smallest().accounting.total - 1
    assert choose(allowed[:1], cap) is None
    frozen = decide(allowed, cap).candidate
    assert frozen.search.frozen and frozen.harm >= frozen.search.frozen_harm > 0
    assert not set(frozen.search.frozen) & set(frozen.search.graph.gradients)
    assert len(searches(graph, settings())) == 1


def test_frozen_layers_do_not_move_and_the_others_do(built: Built) -> None:
    part = searches(graph_of(built), settings(allow_freeze=1, batch_size=4, sparsity=0.0))[-1]
    executor = Executor(part.candidate(0.0, 4), built.parameters)
    rng = np.random.default_rng(2)
    executor.train_step(rng.normal(size=(4, 32, 32, 3)), rng.integers(0, 10, 4).astype(np.int32), 0.1)
    for name in part.whole.gradients:
        moved = not np.array_equal(built.parameters[name], executor.parameter(name))
        assert moved == (name not in part.frozen), name


def test_choices_of_a_plan_are_taken_again(built: Built) -> None:
    smallest, largest = smallest_and_largest([Search(graph_of(built), settings())])
    cap = smallest + (largest - smallest) // 50
    first = plan_graph(built.training, built.manifest, settings(), cap)
    choices = first.summary["choices"]
    again = plan_graph(built.training, built.manifest, settings(micro_batch=first.micro_batch), None, choices=choices)
    assert again.binary == first.binary
    with pytest.raises(BudgetError):
        plan_graph(built.training, built.manifest, settings(micro_batch=first.micro_batch), 1000, choices=choices)


@pytest.mark.parametrize(
    "change",
    [
        {"values": None},
        {"values": {"x": "dense-ish"}},
        {"values": {"x": "centered 1.5"}},
        {"recompute_level": "high"},
        {"frozen": ["nothing"]},
        {"frozen": 3},
        {"frozen": [["nothing"]]},
    ],
    ids=str,
)
def test_malformed_choices_are_usage_errors(built: Built, change: dict[str, object]) -> None:
    choices = {"recompute_level": 0, "frozen": [], "values": {}} | change
    with pytest.raises(UsageError):
        plan_graph(built.training, built.manifest, settings(), None, choices=choices)


def test_a_choice_that_a_value_does_not_have_is_a_usage_error(built: Built) -> None:
    name = next(n for n, v in Search(graph_of(built), settings()).values(8).items() if v.role == "linear")
    choices = {"recompute_level": 0, "frozen": [], "values": {name: "centered 0.9"}}
    with pytest.raises(UsageError, match="another model"):
        plan_graph(built.training, built.manifest, settings(), None, choices=choices)


@pytest.mark.parametrize(
    "changes", [{"prefer": "cheap"}, {"prefer": "exact", "sparsity": 0.9}, {"allow_freeze": -1}], ids=str
)
def test_preferences_out_of_range_are_usage_errors(changes: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        settings(**changes)


def test_spilling_is_exact_and_only_done_if_allowed(built: Built) -> None:
    graph = graph_of(built)
    with_file = Search(graph, settings(spill=True, prefer="exact", micro_batch=8))
    without = Search(graph, settings(prefer="exact", micro_batch=8))
    assert "spill" not in {level.place for level in without.levels}
    places = [i for i, level in enumerate(with_file.levels) if level.place == "spill"]
    assert places
    candidate = with_file.candidate(0.0, 8, places[-1])
    kernels = {step.kernel for step in candidate.train.steps}
    assert {"spill_write", "spill_read", "spill_wait"} <= kernels and candidate.harm == 0
    assert candidate.peak_live < with_file.candidate(0.0, 8).peak_live


def test_the_summary_says_what_was_chosen_and_why(built: Built) -> None:
    smallest, largest = smallest_and_largest([Search(graph_of(built), settings())])
    plan = plan_graph(built.training, built.manifest, settings(), smallest + (largest - smallest) // 50)
    summary = plan.summary
    assert summary["harm"] == pytest.approx(sum(row["harm"] for row in summary["kept"]))
    assert summary["gradient_error"] == pytest.approx(summary["harm"] ** 0.5)
    assert summary["prefer"] == "balanced" and summary["solver"] and summary["candidates_tried"] > 0
    assert summary["predicted_seconds"] > 0 and 0 <= summary["gap"] <= 1 and summary["frozen"] == []
    assert {row["place"] for row in summary["kept"]} <= {"memory", "recompute"}
    fixed = plan_graph(built.training, built.manifest, settings(sparsity=0.9), None).summary
    assert fixed["choices"] is None and fixed["sparsity"] == 0.9


def test_prefer_exact_says_how_much_slower_it_is(built: Built) -> None:
    parts = [Search(graph_of(built), settings(prefer="exact"))]
    cap = parts[0].smallest().accounting.total
    summary = plan_graph(built.training, built.manifest, settings(prefer="exact"), cap).summary
    balanced = plan_graph(built.training, built.manifest, settings(), cap).summary
    assert summary["slowdown"] == pytest.approx(summary["predicted_seconds"] / balanced["predicted_seconds"])
