"""What may be planned: settings, structures (micro-batch, recomputation), and candidates with their exact need.

`choose.py` picks among them. Which caps can be met at all is decided here, by the extremes of every structure: all
values as exact and all as small as the settings allow. So `Search.smallest` is exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from edge_razor.errors import PlanError, UsageError

from .accounting import Accounting
from .attention_storage import ATTENTION, keep_probabilities
from .context import parameter_perms
from .cost import Rates, program_seconds
from .frozen import FROZEN_WEIGHTS, frozen_forms, looked_up_tables
from .graph import Graph
from .harm import Fed, HarmModel, HarmTable
from .live_model import LiveModel
from .lower import check_operators, lower_inference, lower_training
from .optimizer import Memory, Optimizer, lay_out_parameters, table_rows
from .place import Lifetime, lifetimes, live_bytes, place
from .program import Program
from .recompute import recompute_levels
from .schedule import order_training, schedule_inference, schedule_training
from .storage import Choice, KeptValue, Place, Storage, at_place, check_razor, choose_storage, kept_values

__all__ = [
    "PREFERENCES",
    "SPARSITY_GRID",
    "Candidate",
    "Search",
    "Settings",
    "Structure",
    "searches",
    "trained_layers",
]

# 0 is exact. Between 0 and 0.5 little is saved beyond what int8 residuals save at 0.5 (5.3 bits an element against 32).
SPARSITY_GRID = (0.0, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.925, 0.95, 0.96, 0.97, 0.98, 0.99)
PREFERENCES = ("balanced", "exact", "fast")
MAX_LEVELS = 6  # of recomputation that are tried: the first, the last, and some between


@dataclass(frozen=True, slots=True)
class Settings:
    """What the user fixed. `sparsity` and `micro_batch` None: the planner chooses.

    `prefer`: "exact" keeps every value exactly, "fast" trades gradient error for time, "balanced" takes as little
    error as the cap allows. `allow_freeze`: how many early layers may stay frozen. `harm`: measured harm, None: usual
    curves. `rates`: of this device, None: usual ones. `spill`: kept values may lie in a file.
    """

    batch_size: int
    sparsity: float | None
    micro_batch: int | None
    razor: str
    optimizer: Optimizer
    threads: int
    process_bytes: int
    growth_bytes: int
    data_bytes: int
    prefer: str = "balanced"
    allow_freeze: int = 0
    harm: HarmTable | None = None
    rates: Rates | None = None
    spill: bool = False
    attention: str = "recompute"
    frozen_weights: str = "fp32"
    base_variation: int = 0

    def __post_init__(self) -> None:
        if self.frozen_weights not in FROZEN_WEIGHTS:
            raise UsageError(f"frozen weights must be {', '.join(FROZEN_WEIGHTS)}, not {self.frozen_weights!r}")
        if self.batch_size < 1 or self.threads < 1 or self.data_bytes < 0 or self.process_bytes < 0:
            raise UsageError(
                f"batch size {self.batch_size} and threads {self.threads} must be at least 1, "
                f"data bytes {self.data_bytes} and base bytes {self.process_bytes} at least 0"
            )
        if self.attention not in ATTENTION:
            raise UsageError(f"attention must be {' or '.join(ATTENTION)}, not {self.attention!r}")
        if self.attention == "probabilities" and self.sparsity is None:
            raise UsageError("attention probabilities are kept at one sparsity for all values: give it, such as 0.9")
        if self.batch_size > 2**20 or self.threads > 1024:
            raise UsageError(f"batch size {self.batch_size} or threads {self.threads} is not sensible")
        if self.micro_batch is not None and (self.micro_batch < 1 or self.batch_size % self.micro_batch):
            raise UsageError(f"micro-batch {self.micro_batch} must divide the batch size {self.batch_size}")
        check_razor(self.sparsity or 0.0, self.razor)
        if self.prefer not in PREFERENCES:
            raise UsageError(f"prefer must be one of {', '.join(PREFERENCES)}, not {self.prefer!r}")
        if self.prefer == "exact" and self.sparsity:
            raise UsageError(f"prefer exact keeps every value exactly; leave out sparsity {self.sparsity}")
        if self.allow_freeze < 0:
            raise UsageError(f"allow_freeze must be 0 or more layers, not {self.allow_freeze}")

    @property
    def micro_batches(self) -> tuple[int, ...]:
        """Divisors of the batch size, largest first."""
        if self.micro_batch is not None:
            return (self.micro_batch,)
        return tuple(m for m in range(self.batch_size, 0, -1) if self.batch_size % m == 0)

    @property
    def extremes(self) -> tuple[float, ...]:
        """Sparsities, one for all values, that decide what fits at all."""
        if self.prefer == "exact":
            return (0.0,)
        return (0.0, SPARSITY_GRID[-1]) if self.sparsity is None else (self.sparsity,)

    @property
    def fixed(self) -> float | None:
        """The one way to keep all values, if the user leaves no choice."""
        return 0.0 if self.prefer == "exact" else self.sparsity


class Level(NamedTuple):
    """Values that are not simply kept in memory: made again, or in the spill file; both are exact."""

    place: Place
    names: frozenset[str]


@dataclass(frozen=True, slots=True)
class Structure:
    """What is decided for the whole graph: samples at a time, and which of `Search.levels`."""

    micro_batch: int
    level: int = 0


class Candidate:
    """One way to train: what it would need, computed when asked.

    Attributes:
        sparsity: the one for all values; None if `choices` differ.
        choices: how each value is kept that is not made again.
    """

    def __init__(
        self,
        search: Search,
        sparsity: float | None,
        micro_batch: int,
        storage: dict[str, Storage] | None = None,
        choices: Mapping[str, Choice] | None = None,
        level: int = 0,
    ) -> None:
        """`storage` None: as `choices` say, or with neither as `sparsity` does for all values."""
        settings = search.settings
        self.search = search
        self.sparsity = sparsity
        self.micro_batch = micro_batch
        self.level = level
        if storage is None and choices is not None:
            storage = search.storage(Structure(micro_batch, level), choices)
        elif storage is None:
            storage = choose_storage(search.graph, micro_batch, sparsity or 0.0, settings.razor)
        if settings.attention == "probabilities" and sparsity and not level:
            storage = keep_probabilities(search.graph, storage, micro_batch, sparsity, settings.razor)
        self.storage: dict[str, Storage] = storage
        self.choices: dict[str, Choice] = dict(choices or {})
        self.memory: Memory = search.memory(settings.batch_size // micro_batch)
        program, updates = lower_training(
            search.graph, micro_batch, self.storage, self.memory, settings.optimizer, settings.threads
        )
        self.train: Program = schedule_training(program, updates, micro_batch, settings.threads)
        self.lives: list[Lifetime] = lifetimes(self.train)
        self.peak_live: int = int(live_bytes(self.lives).max())

    @property
    def lower_bound(self) -> int:
        """Bytes that the process needs at the least with this candidate, whatever the placement."""
        return self.search.accounting(self.memory, self.peak_live).total

    @cached_property
    def evaluate(self) -> Program:
        """The placed inference program."""
        return self.search.evaluation(self.micro_batch, self.memory)[0]

    @cached_property
    def accounting(self) -> Accounting:
        """The exact need, after placing both programs."""
        evaluation = self.search.evaluation(self.micro_batch, self.memory)[1]
        return self.search.accounting(self.memory, max(place(self.lives), evaluation))

    def fits(self, cap: int | None) -> bool:
        """Whether it needs at most `cap` bytes; `accounting` may place it better than it takes to know that."""
        if cap is None or self.lower_bound > cap:
            return cap is None
        if "accounting" in self.__dict__:
            return self.accounting.total <= cap
        allowed = cap - self.search.accounting(self.memory, 0).total
        evaluation = self.search.evaluation(self.micro_batch, self.memory)[1]
        return evaluation <= allowed and place(self.lives, allowed) <= allowed

    @cached_property
    def harm(self) -> float:
        """Expected ‖ĝ − g‖² / ‖g‖²."""
        return sum(self.value_harm(name) for name in self.choices) + self.search.frozen_harm

    def value_harm(self, name: str) -> float:
        """What the way in which the value is kept adds to `harm`."""
        return self.search.harm(name, self.choices[name]) if name in self.choices else 0.0

    @cached_property
    def seconds(self) -> float:
        """Expected seconds of one optimizer update."""
        count = self.search.settings.batch_size // self.micro_batch
        return count * program_seconds(self.train.steps, self.search.rates)


class Search:
    """All candidates of one graph under one set of settings."""

    def __init__(
        self,
        graph: Graph,
        settings: Settings,
        relatives: Sequence[Graph] = (),
        frozen: tuple[str, ...] = (),
    ) -> None:
        """
        Args:
            relatives: graphs of the same model for other sizes of samples, that of the longest first, with which this
                one shares parameters and their state: all are laid out alike.
            frozen: parameters that are not trained though the graph has gradients for them.
        """
        if not graph.gradients:
            raise PlanError("nothing to train: the bundle's training graph has no gradient outputs")
        check_operators(graph)
        self.settings = settings
        self.whole = graph
        self.frozen = frozen
        self.graph = graph.restricted([p for p in graph.gradients if p not in frozen] if frozen else None)
        self.inference = graph.inference()
        parts = [part for g in relatives or (graph,) for part in (g.restricted(None), g.inference())]
        perms: dict[str, tuple[int, ...] | None] = {}
        for part in parts:
            perms |= parameter_perms(part)
        self.forms, self.layouts = frozen_forms(parts, perms, settings.frozen_weights)
        self.tables = table_rows(parts[0], self.layouts)
        self.looked_up = looked_up_tables(parts)
        self.rates = settings.rates or Rates.default(settings.threads)
        self.tried = 0
        """Candidates whose need was computed so far."""
        self._memory: dict[bool, Memory] = {}
        self._candidates: dict[tuple[float, Structure], Candidate] = {}
        self._values: dict[int, dict[str, KeptValue]] = {}
        self._models: dict[Structure, LiveModel] = {}
        self._evaluation: dict[tuple[int, int], tuple[Program, int]] = {}
        self._times: dict[tuple[int, int], float] = {}

    def preferring(self, prefer: str) -> Search:
        """The same search under another preference; what was computed is shared."""
        other = copy(self)
        other.settings = replace(self.settings, prefer=prefer)
        return other

    # ---- What all candidates share ----

    def memory(self, micro_batches: int) -> Memory:
        key = self.settings.optimizer.accumulates(micro_batches)
        if key not in self._memory:
            settings = self.settings
            self._memory[key] = lay_out_parameters(
                self.graph,
                self.layouts,
                settings.optimizer,
                settings.batch_size,
                micro_batches,
                self.tables,
                self.forms,
                self.looked_up,
            )
        return self._memory[key]

    def accounting(self, memory: Memory, arena: int) -> Accounting:
        settings = self.settings
        return Accounting(
            process=settings.process_bytes,
            growth=settings.growth_bytes,
            data=settings.data_bytes,
            parameters=memory.params_bytes,
            mapped=memory.mapped_bytes,
            optimizer_state=memory.state_bytes - memory.accumulator_bytes,
            accumulators=memory.accumulator_bytes,
            arena=arena,
        )

    def evaluation(self, micro_batch: int, memory: Memory) -> tuple[Program, int]:
        """The placed inference program and its arena's bytes."""
        key = (micro_batch, memory.accumulator_bytes)
        if key not in self._evaluation:
            program, _ = lower_inference(self.inference, micro_batch, memory, self.settings.threads)
            scheduled = schedule_inference(program, micro_batch, self.settings.threads)
            self._evaluation[key] = (scheduled, place(lifetimes(scheduled)))
        return self._evaluation[key]

    def values(self, micro_batch: int) -> dict[str, KeptValue]:
        if micro_batch not in self._values:
            self._values[micro_batch] = kept_values(self.graph, micro_batch)
        return self._values[micro_batch]

    @cached_property
    def levels(self) -> list[Level]:
        """Nothing, then sets of values to make again, and if allowed what to put into the spill file."""
        again = [frozenset[str](), *filter(None, recompute_levels(self.graph))]
        step = max(1.0, (len(again) - 1) / (MAX_LEVELS - 1))
        levels = [Level("recompute", again[round(i * step)]) for i in range(min(len(again), MAX_LEVELS))]
        if self.settings.spill:
            values = self.values(1)
            size = {
                n: v.storage(v.choices("centered", ())[0]).bytes or 4 * v.samples * v.rows * v.cols
                for n, v in values.items()
                if v.role != "reference"
            }
            largest = sorted(size, key=lambda name: -size[name])
            levels += [
                Level("spill", frozenset(largest[: max(1, len(largest) // 2)])),
                Level("spill", frozenset(largest)),
            ]
        return levels

    @property
    def structures(self) -> list[Structure]:
        return [Structure(m, level) for level in range(len(self.levels)) for m in self.settings.micro_batches]

    @cached_property
    def harm_model(self) -> HarmModel:
        return HarmModel(self.whole.restricted(None), self.settings.harm, self.settings.razor)

    @cached_property
    def fed(self) -> dict[str, Fed]:
        return self.harm_model.fed(self.graph)

    def harm(self, name: str, choice: Choice) -> float:
        return self.harm_model.harm(choice, self.fed[name]) if name in self.fed else 0.0

    @cached_property
    def frozen_harm(self) -> float:
        """Of parameters that are not updated: all of their gradient is missing."""
        return sum(self.harm_model.share[name] for name in self.frozen)

    # ---- Candidates ----

    def storage(self, structure: Structure, choices: Mapping[str, Choice]) -> dict[str, Storage]:
        """The table with each value as `choices` say, exact where they say nothing, and the level's values
        are where it says."""
        level = self.levels[structure.level]
        values = self.values(structure.micro_batch)
        exact = {name: value.choices(self.settings.razor, ())[0] for name, value in values.items()}
        table = {name: value.storage(choices.get(name, exact[name])) for name, value in values.items()}
        if not level.names:
            return table
        return at_place(self.graph, table, structure.micro_batch, level.names, level.place)

    def uniform(self, structure: Structure, sparsity: float) -> dict[str, Choice]:
        """One sparsity for every value that stays in memory."""
        again = self.levels[structure.level].names
        return {
            name: value.uniform(sparsity, self.settings.razor)
            for name, value in self.values(structure.micro_batch).items()
            if name not in again
        }

    def candidate(self, sparsity: float, micro_batch: int, level: int = 0) -> Candidate:
        """The candidate with one sparsity for all values."""
        structure = Structure(micro_batch, level)
        key = (sparsity, structure)
        if key not in self._candidates:
            self.tried += 1
            choices = self.uniform(structure, sparsity)
            self._candidates[key] = Candidate(self, sparsity, micro_batch, choices=choices, level=level)
        return self._candidates[key]

    def chosen(self, structure: Structure, choices: Mapping[str, Choice]) -> Candidate:
        """The candidate with a choice for each value; those left out, and not made again, are exact."""
        self.tried += 1
        given = {**self.uniform(structure, 0.0), **choices}
        choices = {name: given[name] for name in self.uniform(structure, 0.0)}
        return Candidate(self, None, structure.micro_batch, choices=choices, level=structure.level)

    def model(self, structure: Structure) -> LiveModel:
        """Live bytes, harm and seconds of a structure as functions of the choices for its values."""
        if structure not in self._models:
            settings, again = self.settings, self.levels[structure.level].names
            values = self.values(structure.micro_batch)
            options = {
                name: found
                for name, value in values.items()
                if name not in again and len(found := value.choices(settings.razor, SPARSITY_GRID)) > 1
            }
            table = self.storage(structure, {name: found[-1] for name, found in options.items()})
            memory = self.memory(settings.batch_size // structure.micro_batch)
            program, updates = lower_training(
                self.graph, structure.micro_batch, table, memory, settings.optimizer, settings.threads
            )
            ordered = order_training(program, updates, settings.threads)
            self._models[structure] = LiveModel(
                ordered, values, options, self.rates, structure.micro_batch, settings.threads, self.harm
            )
        return self._models[structure]

    def exact_seconds(self, structure: Structure) -> float:
        """Expected seconds of an update with every value kept exactly.

        Seconds of a micro-batch grow linearly with its samples, and a level of recomputation takes about the same share
        more at every size.
        """
        sizes = self.settings.micro_batches
        small, large = sizes[-1], sizes[0]
        for key in {(small, 0), (large, 0), (large, structure.level)} - self._times.keys():
            self._times[key] = program_seconds(self.candidate(0.0, *key).train.steps, self.rates)
        slope = (self._times[large, 0] - self._times[small, 0]) / max(large - small, 1)
        seconds = self._times[small, 0] + slope * (structure.micro_batch - small)
        seconds *= self._times[large, structure.level] / self._times[large, 0]
        return self.settings.batch_size / structure.micro_batch * seconds

    # ---- What fits at all ----

    def extremes(self) -> Iterator[Candidate]:
        """Every value exact and every value as small as it gets, at the smallest micro-batch, and at the largest where
        only that needs no gradient accumulators: all that decides what fits at all. Smallest first, about."""
        settings, sizes = self.settings, self.settings.micro_batches
        micro_batches = {sizes[-1]}
        if settings.optimizer.accumulates(settings.batch_size // sizes[-1]):
            micro_batches.add(sizes[0])
        for sparsity in reversed(settings.extremes):
            for micro_batch in sorted(micro_batches):
                for level in range(len(self.levels)):
                    yield self.candidate(sparsity, micro_batch, level)

    def feasible(self, cap: int | None) -> bool:
        """Whether `smallest` is at most `cap`."""
        return any(candidate.fits(cap) for candidate in self.extremes())

    def smallest(self) -> Candidate:
        """The candidate among the extremes that needs the smallest cap."""
        best: Candidate | None = None
        for candidate in sorted(self.extremes(), key=lambda c: c.lower_bound):
            if best is not None and candidate.lower_bound >= best.accounting.total:
                break
            if best is None or candidate.accounting.total < best.accounting.total:
                best = candidate
        assert best is not None
        return best


def searches(graph: Graph, settings: Settings, relatives: Sequence[Graph] = ()) -> list[Search]:
    """A search for each number of early layers that may stay frozen, none first."""
    layers = trained_layers(graph.restricted(None)) if settings.allow_freeze else []
    allowed = min(settings.allow_freeze, len(layers) - 1) if layers else 0
    found = [Search(graph, settings, relatives)]
    for count in sorted({round(allowed * i / MAX_LEVELS) for i in range(1, MAX_LEVELS + 1)} - {0}):
        names = [name for layer in layers[:count] for name in layer]
        found.append(Search(graph, settings, relatives, tuple(names)))
    return found


def trained_layers(graph: Graph) -> list[list[str]]:
    """The trainable parameters in forward order, by layers: a weight (two or more dimensions) with the vectors that are
    read before it or with it, as a convolution with its BatchNorm."""
    layers: list[list[str]] = [[]]
    seen: set[str] = set()
    complete = False
    for node in graph.nodes:
        if node.phase != "forward":
            continue
        names = [name for name in node.inputs if name in graph.gradients and name not in seen]
        seen.update(names)
        if names and complete:
            layers.append([])
        if names:
            layers[-1] += names
            complete = any(len(graph.initializers[name].shape) > 1 for name in layers[-1])
    return layers if complete or len(layers) == 1 else [*layers[:-2], layers[-2] + layers[-1]]
