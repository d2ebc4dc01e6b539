"""The choice under a cap: it must fit; then the least harm to the gradient; then the least time (docs/planner.md).

Structures (micro-batch, recomputation, frozen layers) are tried from the fastest; for each, a solver picks how every
value is kept, the table is lowered and placed, and what the model of live bytes missed is taken off the limit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from . import solve
from .live_model import LiveModel
from .search import SPARSITY_GRID, Candidate, Search, Structure

__all__ = ["Decision", "choose", "negligible"]

# Relative error of the gradient that counts as none when times are compared: that of one batch against another is
# larger by an order of magnitude.
NEGLIGIBLE_ERROR = 0.02
# What `fast` may cost: no more harm than this sparsity for all values would (docs/planner.md has the training curves).
FAST_SPARSITY = 0.95
NEARLY_LEAST = 1.1  # a structure whose error is within this factor of the least may be taken if it is faster
_ROUNDS = 4
_QUANTA = 256  # the limit is rounded down to a power of two of about this part, so that a process of another size by a
# few pages gets the same plan


@dataclass(slots=True)
class Decision:
    """What was chosen, and how sure it is."""

    candidate: Candidate
    bound: float | None = (
        None  # of the objective: no selection of this structure is below it, as far as the model knows
    )
    solver: str = "none"
    objective: Literal["harm", "seconds"] = "harm"

    @property
    def gap(self) -> float:
        """How far harm (seconds, if time was minimized) may be from the least of this structure: 0 … 1 of it."""
        reached = self.candidate.seconds
        if self.objective == "harm":
            reached = self.candidate.harm - self.candidate.search.frozen_harm
        if self.bound is None or reached <= 0:
            return 0.0
        return max(0.0, (reached - self.bound) / reached)


def negligible() -> float:
    """Harm that counts as none."""
    return NEGLIGIBLE_ERROR**2


def choose(parts: list[Search], cap: int | None) -> Decision | None:
    """The best candidate that needs at most `cap` bytes; None if there is none.

    Args:
        parts: searches with more and more layers frozen, none first.
    """
    parts = [part for part in parts if part.feasible(cap)]
    if not parts:
        return None
    settings = parts[0].settings
    if settings.fixed is not None and settings.prefer != "exact":
        return _fixed(parts, settings.fixed, cap)
    if settings.prefer == "fast":
        found = _fast(parts, cap)
        if found is not None:
            return found
    return _least_harm(parts, cap, exact_only=settings.prefer == "exact")


def _fixed(parts: list[Search], sparsity: float, cap: int | None) -> Decision | None:
    """One sparsity for all, as the user says: first without recomputation, with the largest micro-batch that fits."""
    for part in parts:
        for structure in part.structures:
            candidate = part.candidate(sparsity, structure.micro_batch, structure.level)
            if candidate.fits(cap):
                return Decision(candidate)
    return None


@dataclass(slots=True)
class _Found:
    """A structure with a selection that fits by the model."""

    part: Search
    structure: Structure
    seconds: float
    index: np.ndarray | None  # None: everything exact
    harm: float
    single: float  # least harm of one sparsity for all, by the model; inf if none fits


def _least_harm(parts: list[Search], cap: int | None, exact_only: bool) -> Decision | None:
    order = sorted(
        ((part.exact_seconds(s), i, s) for i, part in enumerate(parts) for s in part.structures),
        key=lambda item: (item[0], item[1], item[2].level, -item[2].micro_batch),
    )
    found: list[_Found] = []
    fastest = float("inf")  # of what has negligible harm
    for seconds, number, structure in order:
        if seconds >= fastest:
            break
        part = parts[number]
        allowed = _allowed(part, structure, cap)
        if allowed is not None and allowed < 0:
            continue
        model = None if exact_only or allowed is None else part.model(structure)
        dense = None if model is None else model.peak(_first(model))
        if dense is None or allowed is None or dense <= 1.05 * allowed:
            exact = part.candidate(0.0, structure.micro_batch, structure.level)
            if exact.fits(cap):
                found.append(_Found(part, structure, seconds, None, exact.harm, 0.0))
                if exact_only or exact.harm <= negligible():
                    break
                continue
        if model is None or allowed is None:
            continue
        start, single = _best_single(model, allowed)
        if start is None:
            continue
        index = solve.improve(model, allowed, start)
        harm = float(model.harm[index].sum()) + part.frozen_harm
        count = part.settings.batch_size // structure.micro_batch
        seconds = count * (model.seconds + float(model.column_seconds[index].sum()))
        found.append(_Found(part, structure, seconds, index, harm, single + part.frozen_harm))
        if harm <= negligible():
            fastest = min(fastest, seconds)
    while found:
        least = min(f.harm for f in found)
        single = min(f.single for f in found)
        accepted = max(negligible(), least, min(NEARLY_LEAST**2 * least, single))
        pick = next(f for f in sorted(found, key=lambda f: f.seconds) if f.harm <= accepted)
        decision = _refine(pick, cap)
        if decision is not None:
            return decision
        found.remove(pick)  # by the model it fitted
    return _extreme(parts, cap)


def _extreme(parts: list[Search], cap: int | None) -> Decision | None:
    """The extreme of least harm, then least time, that fits: there is one if `feasible` said so."""
    fitting = [candidate for part in parts for candidate in part.extremes() if candidate.fits(cap)]
    return Decision(min(fitting, key=lambda c: (c.harm, c.seconds))) if fitting else None


def _fast(parts: list[Search], cap: int | None) -> Decision | None:
    """The least time with no more harm than `FAST_SPARSITY` for all values would bring; None if none fits."""
    best: Decision | None = None
    for part in parts:
        whole = Structure(part.settings.micro_batches[0])
        allowance = sum(part.harm(n, c) for n, c in part.uniform(whole, FAST_SPARSITY).items())
        if part.frozen_harm > allowance:
            continue
        # Choices save at most as much time as with nothing made again; a twentieth for what the models miss.
        saved = 1.05 * _most_saved(part.model(whole))
        for structure in sorted(part.structures, key=part.exact_seconds):
            if best is not None and part.exact_seconds(structure) - saved >= best.candidate.seconds:
                break
            allowed = _allowed(part, structure, cap)
            if allowed is not None and allowed < 0:
                continue
            model = part.model(structure)
            count = part.settings.batch_size // structure.micro_batch
            fastest = sum(model.column_seconds[b:e].min() for b, e in model.groups)
            if best is not None and count * (model.seconds + fastest) >= best.candidate.seconds:
                continue
            limit = model.peak(_first(model)) + 2**40 if allowed is None else allowed
            decision = _fit(part, structure, cap, limit, allowance - part.frozen_harm)
            if decision is not None and (best is None or decision.candidate.seconds < best.candidate.seconds):
                best = decision
    return best


def _refine(pick: _Found, cap: int | None) -> Decision | None:
    """The selection again by the solver, lowered and placed; None if nothing that was tried fits."""
    part, structure = pick.part, pick.structure
    if pick.index is None:
        return Decision(part.candidate(0.0, structure.micro_batch, structure.level), 0.0)
    allowed = _allowed(part, structure, cap)
    assert allowed is not None
    return _fit(part, structure, cap, allowed, None)


def _fit(
    part: Search, structure: Structure, cap: int | None, allowed: int, harm_limit: float | None
) -> Decision | None:
    """Solves, lowers, places, and corrects the limit by what the model missed, a few times; the best that fits.

    `harm_limit` None: least harm; else least time with no more harm than that.
    """
    model = part.model(structure)
    best: Decision | None = None
    limit = _rounded(allowed)
    seen: set[bytes] = set()
    for _ in range(_ROUNDS):
        solution, solver = _solve(model, limit, harm_limit)
        if solution is None or solution.index.tobytes() in seen:
            break
        seen.add(solution.index.tobytes())
        candidate = part.chosen(structure, model.chosen(solution.index))
        if candidate.fits(cap):
            decision = Decision(candidate, solution.bound, solver)
            if harm_limit is not None:
                count = part.settings.batch_size // structure.micro_batch
                decision.bound, decision.objective = count * (model.seconds + solution.bound), "seconds"
            if best is None or _objective(decision, harm_limit) < _objective(best, harm_limit):
                best = decision
            missed = model.peak(solution.index) - candidate.accounting.arena
            if cap is None or missed <= 0.003 * allowed:
                break
            limit = _rounded(allowed + missed)
        else:
            assert cap is not None
            over = max(candidate.lower_bound, candidate.accounting.total) - cap
            limit = min(limit, model.peak(solution.index)) - over
    return best


def _objective(decision: Decision, harm_limit: float | None) -> tuple[float, float]:
    candidate = decision.candidate
    harm, seconds = candidate.harm, candidate.seconds
    return (seconds, harm) if harm_limit is not None else (harm, seconds)


def _solve(model: LiveModel, limit: int, harm_limit: float | None) -> tuple[solve.Solution | None, str]:
    """By HiGHS, else greedily; the better of the two for least harm."""
    start, _ = _best_single(model, limit)
    greedy = None if start is None else solve.improve(model, limit, start)
    version = solve.highs_version()
    found: solve.Solution | None = None
    if version is not None:
        if harm_limit is None:
            found = solve.minimize_harm(model, limit, greedy)
        else:
            found = solve.minimize_seconds(model, limit, harm_limit)
    elif greedy is not None and harm_limit is not None:
        index = solve.hasten(model, limit, greedy, harm_limit)
        if model.harm[index].sum() <= harm_limit:
            return solve.Solution(index, 0.0), "greedy"
        return None, "greedy"
    if greedy is not None and harm_limit is None:
        if found is None or model.harm[greedy].sum() < model.harm[found.index].sum():
            return solve.Solution(greedy, 0.0 if found is None else found.bound), "greedy"
    return found, version or "greedy"


def _best_single(model: LiveModel, limit: int) -> tuple[np.ndarray | None, float]:
    """One sparsity for all values, the least that fits by the model, and its harm; else the smallest form of all."""
    for sparsity in SPARSITY_GRID:
        index = _single(model, sparsity)
        if model.peak(index) <= limit:
            return index, float(model.harm[index].sum())
    return None, float("inf")


def _single(model: LiveModel, sparsity: float) -> np.ndarray:
    """The columns of one sparsity for all values; values without razor forms take their smallest."""
    found = []
    for begin, end in model.groups:
        columns = model.columns[begin:end]
        razor = [i for i, c in enumerate(columns) if c.choice.sparsity == sparsity and c.choice.sparsity > 0]
        found.append(begin + (0 if sparsity == 0 else razor[0] if razor else len(columns) - 1))
    return np.array(found, np.int64)


def _most_saved(model: LiveModel) -> float:
    """Seconds of a micro-batch that the fastest choices save against exact ones."""
    return sum(float(model.column_seconds[b] - model.column_seconds[b:e].min()) for b, e in model.groups)


def _first(model: LiveModel) -> np.ndarray:
    return np.array([begin for begin, _ in model.groups], np.int64)


def _allowed(part: Search, structure: Structure, cap: int | None) -> int | None:
    """Bytes for the arena of a structure; negative if its evaluation alone is too large; None without a cap."""
    if cap is None:
        return None
    memory = part.memory(part.settings.batch_size // structure.micro_batch)
    allowed = cap - part.accounting(memory, 0).total
    return allowed if allowed >= part.evaluation(structure.micro_batch, memory)[1] else -1


def _rounded(limit: int) -> int:
    """Down to a power of two of about 1/256 of the limit."""
    quantum = max(limit // _QUANTA, 1)
    quantum = 1 << (quantum.bit_length() - 1)
    return limit // quantum * quantum
