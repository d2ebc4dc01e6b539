"""The cap: what is chosen under it, what is refused, and how exactly."""

from __future__ import annotations

import pytest

from edge_razor.errors import BudgetError, PlanError, UsageError
from edge_razor.planner import refusal as refusal_module
from edge_razor.planner.optimizer import Optimizer
from edge_razor.planner.planning import plan_graph
from edge_razor.planner.refusal import PRESENT, refusal
from edge_razor.planner.search import Search
from edge_razor.planner.storage import keep_count

from .conftest import graph_of, mobile_network, settings
from .networks import Built, Network


@pytest.fixture(scope="module")
def built() -> Built:
    return mobile_network(32)[1]


def test_without_a_cap_everything_is_kept_dense_and_whole(built: Built) -> None:
    plan = plan_graph(built.training, built.manifest, settings(), None)
    assert (plan.sparsity, plan.micro_batch) == (0.0, 8)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sparsity": 0.9},
        {"optimizer": Optimizer("adamw")},
        {"micro_batch": 4},
        {"razor": "plain"},
        {"batch_size": 7},
    ],
    ids=str,
)
def test_the_smallest_budget_is_exact(built: Built, changes: dict[str, object]) -> None:
    with pytest.raises(BudgetError) as refusal:
        plan_graph(built.training, built.manifest, settings(**changes), 1)
    smallest = refusal.value.smallest_budget
    plan = plan_graph(built.training, built.manifest, settings(**changes), smallest)
    assert plan.predicted_peak_bytes <= smallest
    with pytest.raises(BudgetError) as again:
        plan_graph(built.training, built.manifest, settings(**changes), smallest - 1)
    assert again.value.smallest_budget == smallest
    assert str(smallest) in str(refusal.value)


def test_a_named_cap_has_room_for_a_process_that_is_a_little_larger(built: Built) -> None:
    with pytest.raises(BudgetError) as refused:
        plan_graph(built.training, built.manifest, settings(base_variation=5000), 1)
    named = refused.value.smallest_budget
    larger = settings(process_bytes=settings().process_bytes + 5000)
    assert plan_graph(built.training, built.manifest, larger, named).predicted_peak_bytes == named
    assert all(row.smallest_budget > 5000 for row in refused.value.table)


def test_advice_names_caps_that_then_work(built: Built) -> None:
    fixed = settings(sparsity=0.0, micro_batch=8)
    with pytest.raises(BudgetError) as refusal:
        plan_graph(built.training, built.manifest, fixed, 1)
    advice = dict(refusal.value.advice)
    assert list(advice.values()) == sorted(advice.values())
    assert all(cap < refusal.value.smallest_budget for cap in advice.values())
    assert plan_graph(built.training, built.manifest, settings(sparsity=0.99, micro_batch=8), advice["sparsity 0.99"])
    assert plan_graph(built.training, built.manifest, settings(sparsity=0.0, batch_size=1), advice["batch size 1"])
    assert "training the last layer only" in advice


def test_a_change_that_brings_next_to_nothing_is_no_advice(built: Built) -> None:
    with pytest.raises(BudgetError) as refused:
        plan_graph(built.training, built.manifest, settings(sparsity=0.5, process_bytes=10**10), 1)
    assert not refused.value.advice and len(refused.value.table) == 1


def test_the_table_of_a_refusal_says_what_each_change_brings(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusal_module, "WORTHWHILE", 1.0)  # most of the cap is the arena
    adam = Optimizer("adamw")
    with pytest.raises(BudgetError) as refused:
        plan_graph(built.training, built.manifest, settings(sparsity=0.5, optimizer=adam), 1)
    error = refused.value
    assert error.table[0].change == PRESENT and error.table[0].smallest_budget == error.smallest_budget
    assert tuple((row.change, row.smallest_budget) for row in error.table[1:]) == error.advice
    changes = {row.change: row for row in error.table}
    assert {"sparsity 0.99", "optimizer sgd"} <= changes.keys()
    assert changes["sparsity 0.99"].gradient_error > error.table[0].gradient_error > 0
    assert all(row.seconds > 0 for row in error.table)
    cap = changes["optimizer sgd"].smallest_budget
    assert plan_graph(built.training, built.manifest, settings(sparsity=0.5), cap).predicted_peak_bytes <= cap


def test_a_refusal_of_an_exact_plan_advises_to_give_up_exactness(built: Built) -> None:
    with pytest.raises(BudgetError) as refused:
        plan_graph(built.training, built.manifest, settings(prefer="exact", micro_batch=8), 1)
    cap = dict(refused.value.advice)["prefer balanced"]
    assert plan_graph(built.training, built.manifest, settings(micro_batch=8), cap)


def test_a_refusal_says_what_the_spill_file_would_bring(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusal_module, "WORTHWHILE", 1.0)
    exact = settings(prefer="exact", micro_batch=8)
    with pytest.raises(BudgetError) as refused:
        plan_graph(built.training, built.manifest, exact, 1)
    cap = dict(refused.value.advice)["spill-dir"]
    with_file = settings(prefer="exact", micro_batch=8, spill=True)
    assert plan_graph(built.training, built.manifest, with_file, cap).predicted_peak_bytes <= cap
    with pytest.raises(BudgetError) as refused:
        plan_graph(built.training, built.manifest, with_file, 1)
    assert "spill-dir" not in dict(refused.value.advice) and refused.value.smallest_budget == cap


def test_training_the_head_only_costs_what_the_advice_says() -> None:
    net, _ = mobile_network(32)
    whole = Search(graph_of(mobile_network(32)[1]), settings(sparsity=0.9))
    promised = dict(refusal([whole], 1).advice)["training the last layer only"]
    names = list(net.parameters)[-2:]
    head_net = Network((32, 32, 3))
    x = head_net.conv(head_net.input, 16, 3, stride=2, pad=1, norm=True, act="relu")
    head = head_net.build(head_net.linear(head_net.mean(x, (1, 2)), 10), trainable=["linear4.weight", "linear4.bias"])
    candidate = Search(graph_of(head), settings(sparsity=0.9)).candidate(0.9, 8)
    kernels = [s.kernel for s in candidate.train.steps]
    assert kernels.count("conv_grad_weight") == 1 and "conv_grad_input" not in kernels and len(names) == 2
    assert promised < whole.smallest().accounting.total


def test_accounting_adds_up_and_counts_what_it_is_given(built: Built) -> None:
    given = settings(process_bytes=1000, growth_bytes=30, data_bytes=4)
    plan = plan_graph(built.training, built.manifest, given, None)
    items = plan.summary["items"]
    assert sum(items.values()) == plan.predicted_peak_bytes
    assert (items["Python and libraries"], items["data pipeline"]) == (1000, 4)
    assert items["arena"] == plan.arena_bytes
    trainable = set(plan.summary["trainable"])
    sizes = {n: 4 * p.size for n, p in built.parameters.items()}
    frozen = sum(size for n, size in sizes.items() if n not in trainable)  # BatchNorm's statistics
    assert items["frozen weights in the file"] == frozen > 0
    assert items["parameters"] >= sum(sizes.values()) - frozen > items["parameters"] - 64 * len(sizes)
    state = sum(sizes[n] for n in trainable)
    assert items["optimizer state"] >= state > items["optimizer state"] - 64 * len(trainable)


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        (Optimizer(), False),
        (Optimizer(nesterov=True), True),
        (Optimizer(momentum=0.0), True),
        (Optimizer("adamw"), True),
    ],
)
def test_accumulators_exist_only_where_micro_batches_need_them(
    built: Built, optimizer: Optimizer, expected: bool
) -> None:
    search = Search(graph_of(built), settings(optimizer=optimizer))
    assert search.candidate(0.0, 8).memory.accumulator_bytes == 0
    assert (search.candidate(0.0, 4).memory.accumulator_bytes > 0) == expected


@pytest.mark.parametrize(
    "changes",
    [{"batch_size": 0}, {"micro_batch": 3}, {"threads": 0}, {"data_bytes": -1}, {"sparsity": 1.0}, {"razor": "round"}],
    ids=str,
)
def test_settings_out_of_range_are_usage_errors(built: Built, changes: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        plan_graph(built.training, built.manifest, settings(**changes), None)


@pytest.mark.parametrize(
    "arguments",
    [("rmsprop",), ("sgd", 1.0), ("sgd", 0.0, True), ("adamw", 0.9, True), ("adamw", 0.9, False, (0.9, 1.0))],
    ids=str,
)
def test_optimizers_out_of_range_are_usage_errors(arguments: tuple[object, ...]) -> None:
    with pytest.raises(UsageError):
        Optimizer(*arguments)  # type: ignore[arg-type]


def test_a_graph_without_gradients_cannot_be_planned(built: Built) -> None:
    with pytest.raises(PlanError, match="nothing to train"):
        Search(graph_of(built).inference(), settings())


@pytest.mark.parametrize(
    ("elements", "sparsity", "kept"),
    [(10, 0.9, 1), (10, 0.1, 9), (1000, 0.97, 30), (64, 0.99, 1), (1, 0.99, 1), (7, 0, 7)],
)
def test_keep_count_takes_the_sparsity_as_the_decimal_it_prints_as(elements: int, sparsity: float, kept: int) -> None:
    assert keep_count(elements, sparsity) == kept
