"""Harm tables are untrusted input; harm adds up over what is computed from a value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edge_razor.errors import DataError, UsageError
from edge_razor.planner.harm import RAZOR_ERROR, HarmModel, HarmTable, interpolate, read_harm_table
from edge_razor.planner.search import SPARSITY_GRID, Search
from edge_razor.planner.storage import Choice

from .conftest import graph_of, settings
from .networks import Built, Network
from .test_execution import transformer

ENTRY: dict[str, Any] = {"norm": 2.0, "errors": {"0.5": {"relative_error": 0.1, "cosine": 0.99}}}


def write(path: Path, data: Any) -> Path:
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def test_a_harm_table_is_read(tmp_path: Path) -> None:
    errors = {"0.9": {"relative_error": 0.3}, "0.5": {"relative_error": 0.1, "cosine": 0.99}}
    data = {"version": 1, "razor": "plain", "parameters": {"w": {"norm": 2, "errors": errors}}}
    table = read_harm_table(write(tmp_path / "harm.json", data))
    assert table.razor == "plain" and table.norms == {"w": 2.0}
    assert table.errors == {"w": ((0.5, 0.1), (0.9, 0.3))}


@pytest.mark.parametrize(
    "data",
    [
        "",
        "{",
        "[" * 100_000,
        [],
        {"version": 2, "razor": "plain", "parameters": {"w": ENTRY}},
        {"version": 1, "razor": "round", "parameters": {"w": ENTRY}},
        {"version": 1, "razor": ["plain"], "parameters": {"w": ENTRY}},
        {"version": 1, "razor": "plain", "parameters": {}},
        {"version": 1, "razor": "plain", "parameters": [ENTRY]},
        {"version": 1, "razor": "plain", "parameters": {"w": 3}},
        {"version": 1, "razor": "plain", "parameters": {"w": ENTRY | {"norm": -1}}},
        {"version": 1, "razor": "plain", "parameters": {"w": ENTRY | {"norm": "2"}}},
        {"version": 1, "razor": "plain", "parameters": {"w": ENTRY | {"norm": True}}},
        {"version": 1, "razor": "plain", "parameters": {"w": ENTRY | {"norm": float("nan")}}},
        {"version": 1, "razor": "plain", "parameters": {"w": ENTRY | {"norm": 0}}},
        {"version": 1, "razor": "plain", "parameters": {"w": ENTRY | {"norm": 10**400}}},
        {"version": 1, "razor": "plain", "parameters": {"w": ENTRY | {"errors": {}}}},
        {"version": 1, "razor": "plain", "parameters": {"w": ENTRY | {"errors": {"much": {"relative_error": 0.1}}}}},
        {"version": 1, "razor": "plain", "parameters": {"w": ENTRY | {"errors": {"1.5": {"relative_error": 0.1}}}}},
        {"version": 1, "razor": "plain", "parameters": {"w": ENTRY | {"errors": {"nan": {"relative_error": 0.1}}}}},
        {"version": 1, "razor": "plain", "parameters": {"w": ENTRY | {"errors": {"0.5": 0.1}}}},
    ],
    ids=lambda data: str(data)[:60],
)
def test_a_damaged_harm_table_is_a_data_error_that_names_it(tmp_path: Path, data: Any) -> None:
    path = write(tmp_path / "harm.json", data)
    with pytest.raises(DataError, match="harm.json"):
        read_harm_table(path)


def test_a_missing_harm_table_or_one_that_is_no_text_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="missing.json"):
        read_harm_table(tmp_path / "missing.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="binary.json"):
        read_harm_table(tmp_path / "binary.json")


def table_for(names: list[str], error: float = 0.2) -> HarmTable:
    return HarmTable("centered", dict.fromkeys(names, 1.0), dict.fromkeys(names, ((0.9, error),)))


def test_a_harm_table_of_another_model_or_form_is_refused(mobile: tuple[Network, Built]) -> None:
    graph = graph_of(mobile[1])
    names = list(graph.gradients)
    with pytest.raises(UsageError, match="another model"):
        HarmModel(graph, table_for(names[1:]), "centered")
    with pytest.raises(UsageError, match="--razor centered"):
        HarmModel(graph, table_for(names), "plain")


def test_shares_add_up_and_harm_grows_with_sparsity(mobile: tuple[Network, Built]) -> None:
    graph = graph_of(mobile[1])
    for table in (None, table_for(list(graph.gradients))):
        search = Search(graph, settings(harm=table))
        assert sum(search.harm_model.share.values()) == pytest.approx(1)
        for name, value in search.values(8).items():
            harms = [search.harm(name, choice) for choice in value.choices("centered", SPARSITY_GRID)]
            assert harms[0] == 0 and harms == sorted(harms)


def test_a_measured_error_takes_the_place_of_the_usual_one(mobile: tuple[Network, Built]) -> None:
    graph = graph_of(mobile[1])
    names = list(graph.gradients)
    name = next(n for n, v in Search(graph, settings()).values(8).items() if v.role == "packed" and v.tall)
    measured = [
        Search(graph, settings(harm=table_for(names, e))).harm(name, Choice("centered", 0.9)) for e in (0.1, 0.2)
    ]
    assert measured[1] == pytest.approx(4 * measured[0])


def test_a_weight_sees_its_own_input_and_earlier_layers_see_what_activations_keep() -> None:
    graph = graph_of(transformer(Network((9, 7, 3))))
    model = HarmModel(graph, None, "centered")
    fed = model.fed(graph)
    packed = [f for name, f in fed.items() if name.startswith("kept/") and f.own and not f.onward_share]
    smooth = [f for name, f in fed.items() if name.endswith("/activation")]
    assert packed and all(len(f.own) <= 4 for f in packed)
    assert smooth and all(f.onward_share > 0 and not f.own for f in smooth)
    assert smooth[0].onward_share < smooth[-1].onward_share <= 1  # in the later layer more parameters come before


@pytest.mark.parametrize("form", list(RAZOR_ERROR))
def test_the_usual_errors_grow_with_sparsity(form: str) -> None:
    points = RAZOR_ERROR[form]
    assert list(points) == sorted(points) and [y for _, y in points] == sorted(y for _, y in points)
    assert interpolate(points, 0.9) == dict(points)[0.9] and interpolate(points, 2.0) == points[-1][1]
