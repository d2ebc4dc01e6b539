"""Q, K and V of one projection are columns of its result, and their gradients of its gradient: no step copies them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from edge_razor.planner import finish, lower_shape, lower_transformer
from edge_razor.planner.planning import plan_graph
from edge_razor.planner.program import Step
from edge_razor.planner.search import Candidate, Search, Structure
from edge_razor.planner.storage import Choice, at_place, choose_storage
from edge_razor.planner.timeline import read_timeline

from .conftest import graph_of, settings
from .executor import Executor
from .networks import Built, Network
from .test_execution import batch, fused
from .verifier import verify

BATCH = 4


def candidate_of(built: Built, sparsity: float, attention: str = "recompute", **changes: object) -> Candidate:
    search = Search(graph_of(built), settings(batch_size=BATCH, sparsity=sparsity, attention=attention, **changes))
    candidate = search.candidate(sparsity, BATCH)
    verify(candidate.train, candidate.accounting.arena)
    return candidate


def copies(candidate: Candidate) -> list[Step]:
    return [step for step in (*candidate.train.steps, *candidate.evaluate.steps) if step.kernel == "copy"]


@pytest.fixture
def with_copies(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Lowers as if no kernel could read or write columns."""

    def switch() -> None:
        monkeypatch.setattr(lower_shape, "split_columns", lambda *_: None)
        monkeypatch.setattr(lower_transformer, "gradient_columns", lambda *_: {})

    return switch


@pytest.mark.parametrize("attention", ["recompute", "probabilities"])
@pytest.mark.parametrize("sparsity", [0.0, 0.9])
def test_columns_change_no_bit_and_need_no_more_memory(
    sparsity: float, attention: str, with_copies: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Sums of a copied matrix are a step of their own, which adds in another order.
    monkeypatch.setattr(finish, "_attention_takes_sums", lambda *_: False)
    net = Network((9, 7, 3), seed=1)
    built = fused(net)
    x, target = batch(built, net)

    def trained() -> tuple[Candidate, dict[str, np.ndarray]]:
        candidate = candidate_of(built, sparsity, attention)
        executor = Executor(candidate, built.parameters)
        losses = [executor.train_step(x, target, 0.1, update) for update in (1, 2)]
        found = {name: executor.parameter(name).copy() for name in candidate.memory.parameters}
        return candidate, found | {"loss": np.array(losses), "output": executor.predict(x)}

    candidate, found = trained()
    with_copies()
    copying, expected = trained()
    assert len(copies(candidate)) == 3  # the first position is cut out, here, in evaluation and backward
    assert len(copies(copying)) == 3 + 3 * (3 + 3 + 2)
    assert candidate.peak_live <= copying.peak_live
    assert candidate.accounting.arena <= 1.05 * candidate.peak_live  # what placement promises
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_attention_reads_and_writes_where_the_projection_does() -> None:
    candidate = candidate_of(fused(Network((9, 7, 3))), 0.0)
    forward = [step for step in candidate.train.steps if step.kernel == "attention"]
    backward = [step for step in candidate.train.steps if step.kernel == "attention_grad"]
    assert [step.ints[10:] for step in forward] == [
        [45, 0, 45, 15, 45, 30],
        [25, 0, 25, 15, 25, 20],
        [12, 0, 6, 0, 6, 3],
    ]
    assert [step.ints[16:22] for step in backward[::-1]] == [step.ints[10:] for step in forward]
    assert [step.ints[22:] for step in backward[::-1]] == [step.ints[10:] for step in forward]
    made = {step.label: step.operands[4] for step in candidate.train.steps if step.kernel == "conv"}
    assert forward[0].operands[0] is forward[0].operands[1] is forward[0].operands[2] in made.values()


def test_packing_reads_columns() -> None:
    steps = candidate_of(fused(Network((9, 7, 3))), 0.9).train.steps
    parts = [step for step in steps if step.kernel == "pack" and len(step.ints) > 5]
    assert sorted(step.ints[5:] for step in parts) == [
        [6, 0], [6, 3], [25, 0], [25, 15], [25, 20], [45, 0], [45, 15], [45, 30]
    ]  # fmt: skip


@pytest.mark.parametrize("dense", [("Q",), ("K", "V"), ("Q", "K", "V")])
def test_a_part_that_is_kept_alone_is_copied(dense: tuple[str, ...]) -> None:
    """The whole projection would stay in memory for it otherwise."""
    net = Network((9, 7, 3), seed=1)
    x = net.linear(net.reshape(net.input, (63, 3)), 16)
    x = net.linear(net.attention(*net.split(net.linear(x, 48), 2, (16, 16, 16)), 4, 4), 16)
    built = net.build(net.linear(net.reshape(net.slice(x, 1, 0, 1), (16,)), 5))
    search = Search(graph_of(built), settings(batch_size=BATCH))
    values = [name for name, value in search.values(BATCH).items() if value.role == "attention"]
    chosen = {name: Choice("dense" if part in dense else "bf16") for name, part in zip(values, "QKV", strict=True)}
    candidate = search.chosen(Structure(BATCH), chosen)
    verify(candidate.train, candidate.accounting.arena)
    forward = [step for step in candidate.train.steps if step.kernel == "copy" and not step.backward]
    assert len(forward) == 1 + (0 if len(dense) == 3 else 3)


def test_a_report_counts_a_matrix_of_gradients_once() -> None:
    built = fused(Network((9, 7, 3)))
    made = plan_graph(built.training, built.manifest, settings(batch_size=BATCH, sparsity=0.0), None)
    live = read_timeline(made.binary).live_bytes()
    together = [sum(kinds) for kinds in zip(*live.values(), strict=True)]
    assert max(together) == made.summary["live_bytes"]


def test_parts_in_the_spill_file_are_copied() -> None:
    """They go there and come back one by one."""
    built = fused(Network((9, 7, 3)))
    search = Search(graph_of(built), settings(batch_size=BATCH))
    table = choose_storage(search.graph, BATCH, 0.0, "centered")
    spilled = at_place(search.graph, table, BATCH, list(table), "spill")
    candidate = Candidate(search, 0.0, BATCH, spilled)
    verify(candidate.train, candidate.accounting.arena)
    assert sum(step.kernel == "copy" and not step.backward for step in candidate.train.steps) == 1 + 3 + 3 + 2


def readers_beside_attention(net: Network) -> Built:
    """V is read by a product, too, and what follows is not the columns of one matrix."""
    x = net.linear(net.reshape(net.input, (63, 3)), 16)
    q, k, v = net.split(net.linear(x, 48), 2, (16, 16, 16))
    x = net.binary("Mul", net.attention(q, k, v, 4, 4), v)
    return net.build(net.linear(net.reshape(net.slice(x, 1, 0, 1), (16,)), 5))


def rows_apart(net: Network) -> Built:
    """Queries, keys and values are different positions of one value."""
    x = net.linear(net.reshape(net.input, (63, 3)), 16)
    q, k, v = net.split(x, 1, (21, 21, 21))
    x = net.attention(q, k, v, 4, 4)
    return net.build(net.linear(net.reshape(net.slice(x, 1, 0, 1), (16,)), 5))


def read_twice(net: Network) -> Built:
    """Two attentions share K and V: each has gradients that are added up."""
    x = net.linear(net.reshape(net.input, (63, 3)), 16)
    q, k, v = net.split(net.linear(x, 48), 2, (16, 16, 16))
    x = net.binary("Add", net.attention(q, k, v, 4, 4), net.attention(net.linear(x, 16), k, v, 4, 4))
    return net.build(net.linear(net.reshape(net.slice(x, 1, 0, 1), (16,)), 5))


@pytest.mark.parametrize("sparsity", [0.0, 0.9])
@pytest.mark.parametrize("made", [readers_beside_attention, rows_apart, read_twice])
def test_anything_else_is_copied_where_it_must_be(
    made: Callable[[Network], Built], sparsity: float, with_copies: Callable[[], None]
) -> None:
    net = Network((9, 7, 3), seed=1)
    built = made(net)
    x, target = batch(built, net)
    found = []
    for copying in (False, True):
        if copying:
            with_copies()
        executor = Executor(candidate_of(built, sparsity), built.parameters)
        loss = executor.train_step(x, target, 0.1)
        found.append({n: executor.parameter(n).copy() for n in built.parameters} | {"loss": np.array(loss)})
    for name, value in found[1].items():
        np.testing.assert_array_equal(found[0][name], value, err_msg=name)
