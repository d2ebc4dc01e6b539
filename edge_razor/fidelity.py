"""What compression costs: how far the compressed gradient of the user's own data is from the exact one.

Gradients are read from the native runtime without a change to it: SGD with momentum keeps v = μ·v + g, so with v = 0
and a learning rate of 0 one training step leaves the gradient itself in the momentum buffer, bit for bit, micro-batches
added up, and every parameter as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np

from edge_razor.batches import check_inputs, check_targets
from edge_razor.budget import resolve_budget
from edge_razor.bundle import Bundle
from edge_razor.errors import NonFiniteError, UsageError
from edge_razor.memory import give_back_freed_memory, rss_bytes
from edge_razor.planner import Plan, plan_in_child
from edge_razor.runtime import Session, abi_version
from edge_razor.trainer import Trainer

__all__ = ["Fidelity", "Probe", "SPARSITIES", "harm", "training_curves"]

# Those that the planner chooses from.
SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.925, 0.95, 0.96, 0.97, 0.98, 0.99)
SESSION_BYTES, PLAN_BYTES = 2_000_000, 500_000  # a second session's tables, a plan that waits: MobileNetV2's are less
_MOST = 1e9  # stands for infinity, which JSON does not have
_CHUNK = 1 << 18  # elements that are compared at a time, in float64


@dataclass(slots=True)
class Sums:
    """Σ over elements and batches of e², c², e·c and (c − e)², with e the exact gradient and c the compressed one."""

    exact: float = 0.0
    compressed: float = 0.0
    product: float = 0.0
    difference: float = 0.0

    def add(self, exact: np.ndarray, compressed: np.ndarray) -> None:
        """Adds two gradients of the same shape."""
        flat_e, flat_c = exact.reshape(-1), compressed.reshape(-1)
        for begin in range(0, flat_e.size, _CHUNK):
            e, c = (flat[begin : begin + _CHUNK].astype(np.float64) for flat in (flat_e, flat_c))
            self.exact += float(e @ e)
            self.compressed += float(c @ c)
            self.product += float(e @ c)
            c -= e
            self.difference += float(c @ c)

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            self.exact + other.exact,
            self.compressed + other.compressed,
            self.product + other.product,
            self.difference + other.difference,
        )

    @property
    def relative_error(self) -> float:
        """‖c − e‖ / ‖e‖; 0 where both are 0."""
        if not self.difference:
            return 0.0
        return sqrt(self.difference / self.exact) if self.exact else float("inf")

    @property
    def cosine(self) -> float:
        """Cosine of the angle between e and c; 1 where both are 0, 0 where one is."""
        if not self.difference:
            return 1.0
        scale = sqrt(self.exact) * sqrt(self.compressed)
        return max(-1.0, min(1.0, self.product / scale)) if scale else 0.0


@dataclass(slots=True)
class Fidelity:
    """Result of a probe.

    Attributes:
        razor: "centered" or "plain".
        batches: how many were measured; sums go over all of them.
        batch_size, micro_batch: samples of a batch, and how many of them passed at a time for the exact gradient.
        loss: mean over the batches.
        predicted_peak_bytes: resident memory that was planned for the process.
        parameters: name → sparsity → sums.
        curves: sparsity (0: exact) → training loss of each step, if they were trained.
    """

    razor: str
    batches: int
    batch_size: int
    micro_batch: int
    loss: float
    predicted_peak_bytes: int
    parameters: dict[str, dict[float, Sums]]
    curves: dict[float, list[float]] = field(default_factory=dict)

    @property
    def sparsities(self) -> tuple[float, ...]:
        return tuple(next(iter(self.parameters.values()), {}))

    def layers(self) -> dict[str, dict[float, Sums]]:
        """Module path → sparsity → sums over its parameters, in the model's order."""
        found: dict[str, dict[float, Sums]] = {}
        for name, by_sparsity in self.parameters.items():
            layer = found.setdefault(name.rpartition(".")[0] or name, {})
            for sparsity, sums in by_sparsity.items():
                layer[sparsity] = layer.get(sparsity, Sums()) + sums
        return found

    def whole(self) -> dict[float, Sums]:
        """Sparsity → sums over all parameters."""
        total: dict[float, Sums] = {}
        for by_sparsity in self.parameters.values():
            for sparsity, sums in by_sparsity.items():
                total[sparsity] = total.get(sparsity, Sums()) + sums
        return total


def harm(fidelity: Fidelity) -> dict[str, Any]:
    """The probe as JSON for the planner (docs/reports.md)."""
    return {
        "version": 1,
        "razor": fidelity.razor,
        "parameters": {
            name: {
                "norm": sqrt(next(iter(by_sparsity.values())).exact / fidelity.batches),
                "errors": {
                    f"{sparsity:g}": {"relative_error": min(sums.relative_error, _MOST), "cosine": sums.cosine}
                    for sparsity, sums in by_sparsity.items()
                },
            }
            for name, by_sparsity in fidelity.parameters.items()
        },
    }


class Probe:
    """Sessions of one model, exact and at each sparsity, on one memory.

    Beside the session's memory the probe holds one copy of the exact gradient; both are in the plan.

    Attributes:
        plans: sparsity (0: exact) → plan.
    """

    def __init__(
        self,
        bundle: str | Path,
        *,
        sparsities: Sequence[float] = SPARSITIES,
        razor: str = "centered",
        batch_size: int = 8,
        mem_budget: int | str | None = None,
        threads: int | None = None,
        data_bytes: int = 0,
        planned: Callable[[float], None] = lambda sparsity: None,
    ) -> None:
        """Plans everything, each with the largest micro-batch that fits the cap: gradients do not depend on it.

        Args:
            sparsities: what to compare with exact gradients, each above 0.
            mem_budget: as for `Trainer`.
            data_bytes: what the caller's data hold.
            planned: called when the plan of a sparsity is there.

        Raises:
            BudgetError: exact gradients, or those at one of the sparsities, do not fit the cap.
            BundleError, UsageError: as `plan`.
        """
        if not sparsities or not all(0 < s < 1 for s in sparsities) or len(set(sparsities)) != len(sparsities):
            raise UsageError(
                f"sparsities must be different numbers between 0 and 1, not {', '.join(map(str, sparsities))}"
            )
        self.bundle = Bundle(bundle)
        self.razor = razor
        manifest = self.bundle.manifest
        sizes = [self.bundle.tensors[n].end - self.bundle.tensors[n].begin for n in manifest.trainable]
        give_back_freed_memory()
        abi_version()
        arguments: dict[str, Any] = {
            "mem_budget": resolve_budget(mem_budget).bytes,
            "batch_size": batch_size,
            "razor": razor,
            "optimizer": "sgd",
            "momentum": 0.5,  # above 0: there is a buffer
            "threads": threads,
            "base_bytes": rss_bytes(),
            # the copy of the exact gradient, one gradient as it is read, what is compared at a time, and the plans
            "data_bytes": data_bytes
            + sum(sizes)
            + max(sizes, default=0)
            + 3 * 8 * _CHUNK
            + SESSION_BYTES
            + PLAN_BYTES * len(sparsities),
        }
        self.plans: dict[float, Plan] = {}
        for sparsity in (0.0, *sparsities):
            made = plan_in_child(self.bundle.path, sparsity=sparsity, **arguments)
            summary = {key: value for key, value in made.summary.items() if key != "kept"}
            self.plans[sparsity] = replace(made, summary=summary)
            planned(sparsity)
        self._base: Session | None = None

    @property
    def predicted_peak_bytes(self) -> int:
        """Resident memory that is planned for the process."""
        return max(plan.predicted_peak_bytes for plan in self.plans.values())

    def run(self, batches: Iterable[tuple[Any, Any]], seed: int = 0) -> Fidelity:
        """Measures batches of (inputs, targets), as `Trainer.step` takes them.

        Dropout masks are the same for exact and compressed gradients.

        Raises:
            NonFiniteError: the loss or a gradient is NaN or infinite.
            UsageError: as `Trainer.step`, or there is no batch.
        """
        names = [name for name, p in self._memory().parameters().items() if p.trainable]
        sums = {name: {s: Sums() for s in self.plans if s} for name in names}
        losses: list[float] = []
        for number, (inputs, targets) in enumerate(batches, 1):
            batch = self._checked(inputs, targets)
            exact: dict[str, np.ndarray] = {}
            losses.append(self._gradients(0.0, batch, number, seed, exact.__setitem__))
            for sparsity in self.plans:
                if sparsity:
                    self._gradients(sparsity, batch, number, seed, partial(_compare, sums, sparsity, exact))
        if not losses:
            raise UsageError("there is nothing to measure: the data set has no batches")
        plan = self.plans[0.0]
        mean = sum(losses) / len(losses)
        return Fidelity(
            self.razor, len(losses), plan.batch_size, plan.micro_batch, mean, self.predicted_peak_bytes, sums
        )

    def _memory(self) -> Session:
        """The session with the largest arena, whose memory the others share, with the bundle's weights."""
        if self._base is None:
            self._base = Session(max(self.plans.values(), key=lambda plan: plan.arena_bytes).binary)
            for name in self._base.parameters():
                self._base.write_parameter(name, self.bundle.read_tensor(name))
        return self._base

    def _checked(self, inputs: Any, targets: Any) -> tuple[list[np.ndarray], np.ndarray, bool, int | None]:
        """Inputs and target as a session takes them, whether channels are last, and the number of tokens."""
        manifest = self.bundle.manifest
        arrays, channels_last = check_inputs(inputs, manifest, tuple(self.plans[0.0].buckets))
        tokens = next((int(a.shape[1]) for a in arrays if a.ndim == 2 and a.dtype == np.int32), None)
        return list(arrays), check_targets(targets, manifest, len(arrays[0]), tokens), channels_last, tokens

    def _gradients(
        self,
        sparsity: float,
        batch: tuple[list[np.ndarray], np.ndarray, bool, int | None],
        update: int,
        seed: int,
        take: Callable[[str, np.ndarray], None],
    ) -> float:
        """Hands (name, gradient in torch's shape) of every trainable parameter to `take`; returns the loss."""
        arrays, target, channels_last, tokens = batch
        plan = self.plans[sparsity]
        with Session(plan.buckets.get(tokens or 0, plan.binary), self._memory()) as session:
            trainable = [p for p in session.parameters().values() if p.trainable]
            for parameter in trainable:
                session.write_state(parameter.name, 0, np.zeros(parameter.shape, np.float32))
            loss = session.train_step(
                arrays, target, learning_rate=0.0, update=update, seed=seed, channels_last=channels_last
            )
            for parameter in trainable:
                gradient = session.read_state(parameter.name, 0)
                if not np.isfinite(gradient.sum(dtype=np.float64)):
                    raise NonFiniteError(f"the gradient of {parameter.name} holds NaN or infinite values")
                take(parameter.name, gradient)
        return loss

    def close(self) -> None:
        """Frees the memory."""
        if self._base is not None:
            self._base.close()
            self._base = None
        self.bundle.close()

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _compare(
    sums: Mapping[str, Mapping[float, Sums]],
    sparsity: float,
    exact: Mapping[str, np.ndarray],
    name: str,
    gradient: np.ndarray,
) -> None:
    sums[name][sparsity].add(exact[name], gradient)


def training_curves(
    bundle: str | Path,
    batches: Callable[[], Generator[tuple[Any, Any], None, None]],
    *,
    steps: int,
    sparsities: Sequence[float],
    options: Mapping[str, Any],
    done: Callable[[float, list[float]], None] = lambda sparsity, losses: None,
) -> dict[float, list[float]]:
    """Training loss of every step, of exact and of compressed training from the same weights, on the same batches.

    Args:
        batches: gives the batches anew, in the same order, at least `steps` of them.
        sparsities: to train beside exact training (0).
        options: arguments of `Trainer` beside the sparsity: one optimizer, learning rate, seed and cap for all.
        done: called when one curve is there.

    Raises:
        BudgetError: exact training does not fit the cap.
        NonFiniteError: training diverged.
    """
    curves: dict[float, list[float]] = {}
    for sparsity in (0.0, *sparsities):
        with Trainer(bundle, sparsity=sparsity, **options) as trainer, closing(batches()) as feed:
            curves[sparsity] = [trainer.step(inputs, targets) for inputs, targets in islice(feed, steps)]
        done(sparsity, curves[sparsity])
    return curves
