"""One choice for each kept value: a multiple-choice knapsack with a row for every step near a local maximum.

Solved by HiGHS (Huangfu and Hall, "Parallelizing the dual revised simplex method", 2018) where `highspy` is installed,
else by `improve`: from a selection that fits, the upgrade of most harm avoided for its bytes, again and again.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Any

import numpy as np

from .live_model import LiveModel

__all__ = ["Solution", "hasten", "highs_version", "improve", "minimize_harm", "minimize_seconds"]

# Harm comes first; the seconds of all choices together may weigh as much as this part of it.
_TIME_WEIGHT = 0.01
# Of the optimum: the search for a better selection ends there. Nodes, not seconds, so that it ends alike everywhere.
_GAP = 0.002
_SECONDS_GAP = 0.01  # where time is minimized: it is predicted far less closely
_NODES = 400
_KIB = 1024  # rows in KiB: HiGHS' tolerances are absolute


@dataclass(frozen=True, slots=True)
class Solution:
    """Columns chosen, one a group. No selection within the limit has an objective (harm, or seconds) below `bound`."""

    index: np.ndarray
    bound: float


def highs_version() -> str | None:
    """Version of the installed HiGHS; None without one."""
    try:
        import highspy
    except ImportError:
        return None
    return f"HiGHS {highspy.HIGHS_VERSION_MAJOR}.{highspy.HIGHS_VERSION_MINOR}.{highspy.HIGHS_VERSION_PATCH}"


def minimize_harm(model: LiveModel, limit: int, start: np.ndarray | None = None) -> Solution | None:
    """Least harm, then (within 1 %) least time, with at most `limit` live bytes; None if nothing fits.

    `start`: a selection that fits, to begin with.

    Raises:
        ImportError: highspy is not installed.
    """
    relaxed = _run(model, limit, model.harm, None, integer=False)
    if relaxed is None:
        return None
    bound = max(relaxed[1], 0.0)
    spread = sum(np.ptp(model.column_seconds[b:e]) for b, e in model.groups)
    weight = _TIME_WEIGHT * max(bound, 1e-9) / spread if spread > 0 else 0.0
    given = None if start is None else frozenset(start.tolist())
    found = _run(model, limit, model.harm + weight * model.column_seconds, None, integer=True, start=given)
    return None if found is None else Solution(found[0], bound)


def minimize_seconds(model: LiveModel, limit: int, harm_limit: float) -> Solution | None:
    """Least time with at most `limit` live bytes and `harm_limit` harm; None if nothing fits.

    Raises:
        ImportError: highspy is not installed.
    """
    relaxed = _run(model, limit, model.column_seconds, harm_limit, integer=False)
    if relaxed is None:
        return None
    found = _run(model, limit, model.column_seconds, harm_limit, integer=True)
    return None if found is None else Solution(found[0], relaxed[1])


def _run(
    model: LiveModel,
    limit: int,
    cost: np.ndarray,
    harm_limit: float | None,
    integer: bool,
    start: frozenset[int] | None = None,
) -> tuple[np.ndarray, float] | None:
    """(chosen columns, objective)."""
    import highspy

    columns, groups = len(model.columns), model.groups
    if not groups:
        fits = int(model.base.max(initial=0)) <= limit
        return (np.array([], np.int64), 0.0) if fits else None
    most = sum((model.matrix[:, b:e].max(axis=1) for b, e in groups), model.base)
    tight = most > limit
    least = sum((model.matrix[:, b:e].min(axis=1) for b, e in groups), model.base)
    if (least > limit).any():
        return None
    rows = model.matrix[tight] / _KIB
    upper = (limit - model.base[tight]) / _KIB
    scale = float(np.abs(cost).max()) or 1.0
    if harm_limit is not None:
        worst = float(model.harm.max()) or 1.0
        rows = np.vstack([rows, model.harm * (_KIB / worst)])
        upper = np.append(upper, harm_limit * (_KIB / worst))
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = columns, len(groups) + len(rows)
    lp.col_cost_ = cost / scale
    lp.col_lower_, lp.col_upper_ = np.zeros(columns), np.ones(columns)
    lp.row_lower_ = np.concatenate([np.ones(len(groups)), np.full(len(rows), -highspy.kHighsInf)])
    lp.row_upper_ = np.concatenate([np.ones(len(groups)), upper])
    starts, indices, values = _sparse(groups, rows)
    lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    lp.a_matrix_.start_, lp.a_matrix_.index_, lp.a_matrix_.value_ = starts, indices, values
    if integer:
        lp.integrality_ = [highspy.HighsVarType.kInteger] * columns
    # The bare binding: `Highs` prints a banner on standard output when it is made.
    solver: Any = highspy._Highs()  # type: ignore[attr-defined]
    for option, value in (
        ("output_flag", False),
        ("threads", 1),
        ("random_seed", 0),
        ("mip_rel_gap", _GAP if harm_limit is None else _SECONDS_GAP),
        ("mip_max_nodes", _NODES),
    ):
        solver.setOptionValue(option, value)
    solver.passModel(lp)
    if start is not None:
        given = highspy.HighsSolution()
        given.col_value = [float(i in start) for i in range(columns)]
        solver.setSolution(given)
    solver.run()
    solution = solver.getSolution()
    if solver.getInfo().primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
        return None
    chosen = np.array(solution.col_value)
    index = np.array([b + int(np.argmax(chosen[b:e])) for b, e in groups], np.int64)
    return index, float(solver.getInfo().objective_function_value) * scale


def _sparse(groups: list[tuple[int, int]], rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row-wise matrix: one row of ones a group, then `rows`."""
    lengths = [e - b for b, e in groups]
    where = rows != 0
    counts = [*lengths, *where.sum(axis=1).tolist()]
    indices = np.concatenate([np.arange(sum(lengths)), np.nonzero(where)[1]])
    values = np.concatenate([np.ones(sum(lengths)), rows[where]])
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32), indices.astype(np.int32), values


def improve(model: LiveModel, limit: int, start: np.ndarray) -> np.ndarray:
    """Greedy: from `start`, which fits, upgrades values while at most `limit` bytes are live.

    An upgrade costs the bytes that it adds to the fullest row; the next one is that which avoids the most harm a byte.
    The result has no more harm than `start`.
    """
    return _climb(model, limit, start, model.harm, None)


def hasten(model: LiveModel, limit: int, start: np.ndarray, harm_limit: float) -> np.ndarray:
    """Greedy: from `start`, which fits, takes faster choices while at most `limit` bytes are live and the harm stays
    within `harm_limit`."""
    return _climb(model, limit, start, model.column_seconds, harm_limit)


def _climb(model: LiveModel, limit: int, start: np.ndarray, cost: np.ndarray, harm_limit: float | None) -> np.ndarray:
    index = np.array(start)
    live, harm = model.live(index), float(model.harm[index].sum())
    heap: list[tuple[float, int, int, int]] = []

    def offer(group: int) -> None:
        """The upgrades of one value from where it is."""
        at = int(index[group])
        for column in range(*model.groups[group]):
            gain = cost[at] - cost[column]
            if gain > 0:
                price = float(np.maximum(model.matrix[:, column] - model.matrix[:, at], 0).max(initial=0)) + 1.0
                if harm_limit is not None:
                    price = max(float(model.harm[column] - model.harm[at]), 1e-12)
                heapq.heappush(heap, (-gain / price, group, at, column))

    for group in range(len(model.groups)):
        offer(group)
    while heap:
        _, group, at, column = heapq.heappop(heap)
        if index[group] != at:
            continue  # of a choice that was replaced since
        changed = live - model.matrix[:, at] + model.matrix[:, column]
        added = float(model.harm[column] - model.harm[at])
        if changed.max(initial=0) <= limit and (harm_limit is None or harm + added <= harm_limit):
            live, harm, index[group] = changed, harm + added, column
            offer(group)
    return index
