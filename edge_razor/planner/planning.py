"""From a bundle and a cap to a plan or a refusal: `plan`, and the graph-level `plan_graph` under it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

from edge_razor.bundle import Bundle
from edge_razor.errors import BudgetError, BundleError, UsageError
from edge_razor.units import format_bytes, parse_bytes

from .accounting import BLAS_BYTES_PER_THREAD, GROWTH_BYTES, measure_base
from .context import parameter_perms
from .graph import Graph, Initializer, read_graph
from .interface import Interface, read_interface
from .optimizer import Optimizer
from .plan_file import Plan
from .search import Candidate, Search, Settings
from .serialize import encode
from .storage import ActivationKeep, Form

__all__ = ["plan", "plan_graph"]


def plan(
    bundle: str | os.PathLike[str],
    *,
    mem_budget: int | str | None,
    batch_size: int = 8,
    sparsity: float | str = "auto",
    razor: str = "centered",
    optimizer: str = "sgd",
    momentum: float = 0.9,
    nesterov: bool = False,
    betas: Sequence[float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    threads: int | None = None,
    micro_batch: int | None = None,
    frozen_weights: str = "fp32",
    base_bytes: int | None = None,
    data_bytes: int = 0,
) -> Plan:
    """Plans training of a bundle inside `mem_budget` bytes of resident memory for the whole process.

    Args:
        bundle: path of the bundle.
        mem_budget: bytes or "128MB", "512MiB"; None plans without a cap.
        batch_size: samples of one optimizer update.
        sparsity: share of each packed value that is dropped, or "auto": the least that fits.
        razor: "centered" or "plain".
        optimizer, momentum, nesterov, betas, eps, weight_decay: as torch.optim.SGD and AdamW define them.
        threads: worker threads; None: one for each processor that this process may use.
        micro_batch: samples at a time, a divisor of batch_size; None: the largest that fits.
        frozen_weights: weights that do not train: "fp32" (read in the bundle's file), "bf16" or "int8" (in memory).
        base_bytes: resident bytes of the process that will train, after its imports; None: measured in a fresh process.
        data_bytes: what the data pipeline will hold.

    Raises:
        BudgetError: nothing fits; `smallest_budget` is exact.
        BundleError: the bundle is damaged or its graph breaks docs/training-graph.md.
        UsageError: an argument is out of range.
    """
    budget = None if mem_budget is None else parse_bytes(mem_budget)
    if isinstance(sparsity, str) and sparsity != "auto":
        try:
            sparsity = float(sparsity)
        except ValueError:
            raise UsageError(f'sparsity must be "auto" or a number, not {sparsity!r}') from None
    rule = Optimizer(optimizer, momentum, nesterov, (float(betas[0]), float(betas[1])), eps, weight_decay)
    threads = len(os.sched_getaffinity(0)) if threads is None else threads
    with Bundle(bundle) as source:
        training, manifest = source.read_file("training.onnx"), source.manifest.raw
        buckets = {
            tokens: (source.read_file(f"training-{tokens}.onnx"), source.manifest.at_tokens(tokens))
            for tokens in source.manifest.buckets[:-1]
        }
    settings = Settings(
        batch_size=batch_size,
        sparsity=None if sparsity == "auto" else float(sparsity),
        micro_batch=micro_batch,
        razor=razor,
        optimizer=rule,
        threads=threads,
        process_bytes=measure_base() if base_bytes is None else base_bytes,
        blas_bytes=BLAS_BYTES_PER_THREAD * threads,
        growth_bytes=GROWTH_BYTES,
        data_bytes=data_bytes,
        frozen_weights=frozen_weights,
    )
    return plan_graph(training, manifest, settings, budget, buckets)


def plan_graph(
    training: bytes,
    manifest: Mapping[str, Any],
    settings: Settings,
    budget: int | None,
    buckets: Mapping[int, tuple[bytes, Mapping[str, Any]]] | None = None,
) -> Plan:
    """Plans `training.onnx` with the manifest of its bundle; errors as `plan`.

    Args:
        buckets: training graphs for texts of fewer tokens, and manifests for them. Each gets a plan with the settings
            that were found for the longest, which decides the cap; all lay parameters and state out in the same way.
    """
    output = manifest.get("output")
    if not isinstance(output, Mapping) or not isinstance(output.get("name"), str):
        raise BundleError("bundle.json: the output has no name")
    graph = read_graph(training, output["name"])
    interface = read_interface(graph, manifest)
    shorter = {tokens: (read_graph(data, output["name"]), stated) for tokens, (data, stated) in (buckets or {}).items()}
    relatives = [graph, *(other for other, _ in shorter.values())]
    _share_parameters(relatives)
    search = Search(graph, settings, relatives)
    best = search.best(budget)
    if best is None:
        assert budget is not None
        raise _refusal(search, budget)
    arena = best.accounting.arena
    bundle_id = hashlib.sha256(training).hexdigest()

    def encoded(candidate: Candidate, interface: Interface) -> bytes:
        return encode(
            bundle_id=bundle_id,
            batch_size=settings.batch_size,
            micro_batch=candidate.micro_batch,
            threads=settings.threads,
            arena_bytes=candidate.accounting.arena,
            memory=candidate.memory,
            interface=interface,
            train=candidate.train,
            evaluate=candidate.evaluate,
        )

    plans = {}
    for tokens, (other, stated) in shorter.items():
        candidate = Search(other, settings, relatives).candidate(best.sparsity, best.micro_batch)
        if candidate.accounting.arena > arena:
            raise BundleError(f"training-{tokens}.onnx needs more memory than training.onnx; export the model again")
        plans[tokens] = encoded(candidate, read_interface(other, stated))
    return Plan(encoded(best, interface), _summary(search.graph, settings, best, bundle_id, budget), plans)


def _share_parameters(graphs: Sequence[Graph]) -> None:
    """Gives every graph the initializers of all, in one order, so that their parameters and states lie alike.

    Raises:
        BundleError: two graphs state one name with different shapes, or train different parameters.
    """
    if len(graphs) == 1:
        return
    first = graphs[0]
    union: dict[str, Initializer] = {}
    perms: dict[str, tuple[int, ...] | None] = {}
    for graph in graphs:
        if graph.gradients.keys() != first.gradients.keys():
            raise BundleError("the training graphs of the bundle train different parameters; export the model again")
        used = parameter_perms(graph.restricted(None)) | parameter_perms(graph.inference())
        for name, perm in used.items():
            stated = graph.initializers[name]
            known = union.setdefault(name, stated)
            if (known.dtype, known.shape) != (stated.dtype, stated.shape) or perms.setdefault(name, perm) != perm:
                raise BundleError(f"the training graphs of the bundle disagree on {name!r}; export the model again")
    for graph in graphs:
        graph.initializers = {**union, **{k: v for k, v in graph.initializers.items() if k not in union}}


def _refusal(search: Search, budget: int) -> BudgetError:
    smallest, advice = search.smallest(), search.advice()
    hints = "; ".join(f"{text}: {format_bytes(size)}" for text, size in advice)
    return BudgetError(
        f"the cap of {format_bytes(budget)} cannot be met: the smallest that works with these settings is "
        f"{format_bytes(smallest)} ({smallest} bytes)" + (f"; with {hints}" if hints else ""),
        smallest,
        advice,
    )


def _summary(graph: Graph, settings: Settings, best: Candidate, bundle_id: str, budget: int | None) -> dict[str, Any]:
    accounting = best.accounting
    optimizer = settings.optimizer
    return {
        "bundle_id": bundle_id,
        "mem_budget": budget,
        "predicted_peak_bytes": accounting.total,
        "items": accounting.items,
        "batch_size": settings.batch_size,
        "micro_batch": best.micro_batch,
        "sparsity": best.sparsity,
        "razor": settings.razor,
        "threads": settings.threads,
        "optimizer": {
            "name": optimizer.name,
            "momentum": optimizer.momentum,
            "nesterov": optimizer.nesterov,
            "betas": list(optimizer.betas),
            "eps": optimizer.eps,
            "weight_decay": optimizer.weight_decay,
        },
        "arena_bytes": accounting.arena,
        "live_bytes": best.peak_live,
        "frozen_weights": settings.frozen_weights,
        "mapped_bytes": best.memory.mapped_bytes,
        "params_bytes": best.memory.params_bytes,
        "state_bytes": best.memory.state_bytes,
        "trainable": list(graph.gradients),
        "train_steps": len(best.train.steps),
        "eval_steps": len(best.evaluate.steps),
        "kept": _kept(graph, best),
    }


def _kept(graph: Graph, best: Candidate) -> list[dict[str, Any]]:
    """What is kept for the backward pass, largest first; a dense input counts as the value that stays alive."""
    rows: list[dict[str, Any]] = []
    for node in graph.nodes:
        for value in node.outputs:
            storage = best.storage.get(value)
            if storage is None:
                continue
            if isinstance(storage.form, Form):
                form = storage.form.name.lower()
            else:
                form = storage.form.name.lower() if isinstance(storage.form, ActivationKeep) else "index"
            dense = 4 * storage.samples * storage.rows * storage.cols
            rows.append(
                {
                    "value": value.removeprefix("kept/"),
                    "layer": node.layer,
                    "operator": node.op,
                    "form": form,
                    "samples": storage.samples,
                    "rows": storage.rows,
                    "cols": storage.cols,
                    "keep": storage.keep,
                    "bytes": storage.bytes or dense,
                    "dense_bytes": dense,
                }
            )
    return sorted(rows, key=lambda row: -row["bytes"])
