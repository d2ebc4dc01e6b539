"""The search for the least harmful plan that fits the cap.

Harm is ordered: sparsity changes the gradients, micro-batches only cost time. So the least sparsity for which
anything fits is taken, and with it the largest micro-batch that fits. A sparsity or micro-batch that the user fixes
is the only one tried.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from edge_razor.errors import PlanError, UsageError

from .accounting import Accounting
from .context import ParamForm, parameter_perms
from .frozen import FROZEN_WEIGHTS, frozen_forms
from .graph import Graph
from .lower import check_operators, lower_inference, lower_training
from .optimizer import Memory, Optimizer, lay_out_parameters, table_rows
from .place import Lifetime, lifetimes, live_bytes, place
from .program import Program
from .schedule import schedule_inference, schedule_training
from .storage import Storage, choose_storage

__all__ = ["SPARSITY_GRID", "Candidate", "Search", "Settings"]

# 0 is exact. Between 0 and 0.5 little is saved beyond what int8 residuals save at 0.5 (5.3 bits an element against 32).
SPARSITY_GRID = (0.0, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.925, 0.95, 0.96, 0.97, 0.98, 0.99)


@dataclass(frozen=True, slots=True)
class Settings:
    """What the user fixed. `sparsity` and `micro_batch` None: the search chooses."""

    batch_size: int
    sparsity: float | None
    micro_batch: int | None
    razor: str
    optimizer: Optimizer
    threads: int
    process_bytes: int
    blas_bytes: int
    growth_bytes: int
    data_bytes: int
    frozen_weights: str = "fp32"

    def __post_init__(self) -> None:
        if self.frozen_weights not in FROZEN_WEIGHTS:
            raise UsageError(f"frozen weights must be {', '.join(FROZEN_WEIGHTS)}, not {self.frozen_weights!r}")
        if self.batch_size < 1 or self.threads < 1 or self.data_bytes < 0 or self.process_bytes < 0:
            raise UsageError(
                f"batch size {self.batch_size} and threads {self.threads} must be at least 1, "
                f"data bytes {self.data_bytes} and base bytes {self.process_bytes} at least 0"
            )
        if self.batch_size > 2**20 or self.threads > 1024:
            raise UsageError(f"batch size {self.batch_size} or threads {self.threads} is not sensible")
        if self.micro_batch is not None and (self.micro_batch < 1 or self.batch_size % self.micro_batch):
            raise UsageError(f"micro-batch {self.micro_batch} must divide the batch size {self.batch_size}")

    @property
    def sparsities(self) -> tuple[float, ...]:
        return SPARSITY_GRID if self.sparsity is None else (self.sparsity,)

    @property
    def micro_batches(self) -> tuple[int, ...]:
        """Divisors of the batch size, largest first."""
        if self.micro_batch is not None:
            return (self.micro_batch,)
        return tuple(m for m in range(self.batch_size, 0, -1) if self.batch_size % m == 0)


class Candidate:
    """One sparsity and micro-batch: what it would need, computed when asked."""

    def __init__(self, search: Search, sparsity: float, micro_batch: int) -> None:
        settings = search.settings
        self.search = search
        self.sparsity = sparsity
        self.micro_batch = micro_batch
        self.memory: Memory = search.memory(settings.batch_size // micro_batch)
        self.storage: dict[str, Storage] = choose_storage(search.graph, micro_batch, sparsity, settings.razor)
        program, updates = lower_training(
            search.graph, micro_batch, self.storage, self.memory, settings.optimizer, settings.threads
        )
        self.train: Program = schedule_training(program, updates, settings.threads)
        self.lives: list[Lifetime] = lifetimes(self.train)
        self.peak_live: int = int(live_bytes(self.lives).max())

    def _total(self, arena: int) -> Accounting:
        settings = self.search.settings
        return Accounting(
            process=settings.process_bytes,
            blas=settings.blas_bytes,
            growth=settings.growth_bytes,
            data=settings.data_bytes,
            parameters=self.memory.params_bytes,
            mapped=self.memory.mapped_bytes,
            optimizer_state=self.memory.state_bytes - self.memory.accumulator_bytes,
            accumulators=self.memory.accumulator_bytes,
            arena=arena,
        )

    @property
    def lower_bound(self) -> int:
        """Bytes that the process needs at the least with this candidate, whatever the placement."""
        return self._total(self.peak_live).total

    @cached_property
    def evaluate(self) -> Program:
        """The placed inference program."""
        program, _ = lower_inference(self.search.inference, self.micro_batch, self.memory, self.search.settings.threads)
        return schedule_inference(program)

    @cached_property
    def accounting(self) -> Accounting:
        """The exact need, after placing both programs."""
        return self._total(max(place(self.lives), place(lifetimes(self.evaluate))))


class Search:
    """All candidates of one graph under one set of settings."""

    def __init__(
        self,
        graph: Graph,
        settings: Settings,
        relatives: Sequence[Graph] = (),
    ) -> None:
        """`relatives`: graphs of the same model for other sizes of samples, that of the longest first, with which this
        one shares parameters and their state: all are laid out alike.
        """
        if not graph.gradients:
            raise PlanError("nothing to train: the bundle's training graph has no gradient outputs")
        check_operators(graph)
        self.settings = settings
        self.graph = graph.restricted(None)
        self.inference = graph.inference()
        graphs = [part for g in relatives or (graph,) for part in (g.restricted(None), g.inference())]
        perms: dict[str, tuple[int, ...] | None] = {}
        for part in graphs:
            perms |= parameter_perms(part)
        self.forms, self.perms = frozen_forms(graphs, perms, settings.frozen_weights)
        self.tables = table_rows(graphs[0], self.perms)
        self._memory: dict[bool, Memory] = {}
        self._candidates: dict[tuple[float, int], Candidate] = {}

    def memory(self, micro_batches: int) -> Memory:
        key = self.settings.optimizer.accumulates(micro_batches)
        if key not in self._memory:
            settings = self.settings
            self._memory[key] = lay_out_parameters(
                self.graph,
                self.perms,
                settings.optimizer,
                settings.batch_size,
                micro_batches,
                self.tables,
                self.forms,
            )
        return self._memory[key]

    def candidate(self, sparsity: float, micro_batch: int) -> Candidate:
        key = (sparsity, micro_batch)
        if key not in self._candidates:
            self._candidates[key] = Candidate(self, sparsity, micro_batch)
        return self._candidates[key]

    def best(self, cap: int | None) -> Candidate | None:
        """The least harmful candidate whose need is at most `cap` bytes; None if there is none.

        Between the extremes a sparsity is tried only with micro-batches that fit at the highest, so that what fits at
        all is decided by the extremes alone and `smallest` is exact.
        """
        sparsities, micro_batches = self.settings.sparsities, self.settings.micro_batches
        for index, sparsity in enumerate(sparsities):
            if index == 1:
                micro_batches = tuple(m for m in micro_batches if self._fits(sparsities[-1], m, cap))
            for micro_batch in micro_batches:
                if self._fits(sparsity, micro_batch, cap):
                    return self.candidate(sparsity, micro_batch)
        return None

    def _fits(self, sparsity: float, micro_batch: int, cap: int | None) -> bool:
        if cap is None:
            return True
        candidate = self.candidate(sparsity, micro_batch)
        return candidate.lower_bound <= cap and candidate.accounting.total <= cap

    def smallest(self) -> int:
        """The smallest cap, in bytes, for which `best` finds something."""
        extremes = {self.settings.sparsities[0], self.settings.sparsities[-1]}
        candidates = [self.candidate(s, m) for s in extremes for m in self.settings.micro_batches]
        smallest: int | None = None
        for candidate in sorted(candidates, key=lambda c: c.lower_bound):
            if smallest is not None and candidate.lower_bound >= smallest:
                break
            total = candidate.accounting.total
            smallest = total if smallest is None else min(smallest, total)
        assert smallest is not None
        return smallest

    def advice(self) -> tuple[tuple[str, int], ...]:
        """(what to change, smallest cap that it would bring) for each knob that helps, best first."""
        settings, found = self.settings, []
        variants: list[tuple[str, Graph, Settings]] = []
        if settings.sparsity is not None and settings.sparsity < SPARSITY_GRID[-1]:
            raised = replace(settings, sparsity=SPARSITY_GRID[-1])
            variants.append((f"sparsity {SPARSITY_GRID[-1]}", self.graph, raised))
        if settings.batch_size > 1:
            smaller = replace(settings, batch_size=1, micro_batch=None, sparsity=settings.sparsities[-1])
            variants.append(("batch size 1", self.graph, smaller))
        if settings.frozen_weights != "int8" and any(form != ParamForm.FLOAT for form in self.forms.values()):
            variants.append(("frozen weights int8", self.graph, replace(settings, frozen_weights="int8")))
        if len(self.graph.gradients) > 2:
            head = self.graph.restricted(_last_layer(self.graph))
            fewest = replace(settings, micro_batch=None, sparsity=settings.sparsities[-1])
            variants.append(("training the last layer only", head, fewest))
        present = self.smallest()
        for text, graph, changed in variants:
            smallest = Search(graph, changed).smallest()
            if smallest < present:
                found.append((text, smallest))
        return tuple(sorted(found, key=lambda item: item[1]))


def _last_layer(graph: Graph) -> list[str]:
    """The trainable parameters of the last layer (module path) that has any."""
    order: dict[str, str] = {}
    for node in graph.nodes:
        if node.phase == "forward":
            order.update({i: node.layer for i in node.inputs if i in graph.gradients})
    last = list(order.values())[-1] if order else ""
    return [name for name, layer in order.items() if layer == last] or list(graph.gradients)[-1:]
