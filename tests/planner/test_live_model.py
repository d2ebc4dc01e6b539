"""The linear model of live bytes says what the lowered program then needs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from edge_razor.planner.search import Search, Structure

from .conftest import graph_of, settings
from .networks import Built, Network
from .test_execution import fused, transformer
from .test_placement import networks


def compare(search: Search, structure: Structure, index: np.ndarray) -> tuple[int, int]:
    """Peak of live bytes by the model, and of the program."""
    model = search.model(structure)
    return model.peak(index), search.chosen(structure, model.chosen(index)).peak_live


def selections(search: Search, structure: Structure, count: int, seed: int) -> list[np.ndarray]:
    """The smallest, the exact, and random selections."""
    groups = search.model(structure).groups
    random = np.random.default_rng(seed)
    made = [np.array([e - 1 for _, e in groups], np.int64), np.array([b for b, _ in groups], np.int64)]
    return made + [np.array([random.integers(b, e) for b, e in groups], np.int64) for _ in range(count)]


@pytest.mark.parametrize("micro_batch", [8, 1])
def test_the_smallest_forms_are_modelled_to_the_byte(mobile: tuple[Network, Built], micro_batch: int) -> None:
    search = Search(graph_of(mobile[1]), settings())
    structure = Structure(micro_batch)
    smallest = selections(search, structure, 0, 0)[0]
    modelled, needed = compare(search, structure, smallest)
    assert modelled == needed


@pytest.mark.parametrize("made", [transformer, fused])
def test_a_transformers_selections_are_modelled_closely(made: Callable[[Network], Built]) -> None:
    search = Search(graph_of(made(Network((9, 7, 3)))), settings(batch_size=4))
    for level in range(len(search.levels)):
        structure = Structure(4, level)
        for index in selections(search, structure, 6, level):
            modelled, needed = compare(search, structure, index)
            assert 0.97 * needed <= modelled <= 1.10 * needed, (level, search.model(structure).chosen(index))


@hypothesis_settings(max_examples=25, deadline=None, print_blob=True)
@given(networks(), st.sampled_from([1, 8]), st.integers(0, 10**6))
def test_random_networks_are_modelled_closely(built: Built, micro_batch: int, seed: int) -> None:
    search = Search(graph_of(built), settings())
    structure = Structure(micro_batch)
    for index in selections(search, structure, 3, seed):
        modelled, needed = compare(search, structure, index)
        assert 0.8 * needed <= modelled <= 1.25 * needed


def test_harm_and_seconds_of_the_columns_add_up_to_the_candidates(mobile: tuple[Network, Built]) -> None:
    search = Search(graph_of(mobile[1]), settings())
    structure = Structure(4)
    model = search.model(structure)
    for index in selections(search, structure, 3, 7):
        candidate = search.chosen(structure, model.chosen(index))
        assert model.harm[index].sum() == pytest.approx(candidate.harm)
        seconds = 2 * (model.seconds + model.column_seconds[index].sum())
        assert seconds == pytest.approx(candidate.seconds, rel=0.1)
