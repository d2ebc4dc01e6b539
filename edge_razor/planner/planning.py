"""From a bundle and a cap to a plan or a refusal: `plan`, and the graph-level `plan_graph` under it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

from edge_razor.budget import resolve_budget
from edge_razor.bundle import Bundle
from edge_razor.errors import BundleError, UsageError

from .accounting import BASE_VARIATION, GROWTH_BYTES, measure_base
from .calibrate import device_rates
from .choose import Decision, choose
from .context import parameter_perms
from .graph import Graph, Initializer, read_graph
from .harm import read_harm_table
from .interface import Interface, read_interface
from .optimizer import Optimizer
from .plan_file import Plan
from .refusal import refusal
from .search import SPARSITY_GRID, Candidate, Search, Settings, Structure, searches
from .serialize import encode
from .storage import Choice
from .summary import summarize

__all__ = ["plan", "plan_graph"]


def plan(
    bundle: str | os.PathLike[str],
    *,
    mem_budget: int | str | None,
    batch_size: int = 8,
    sparsity: float | str = "auto",
    razor: str = "centered",
    attention: str = "recompute",
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
    calibrated: bool = True,
    base_variation: int = BASE_VARIATION,
    data_bytes: int = 0,
    prefer: str = "balanced",
    allow_freeze: int = 0,
    harm: str | os.PathLike[str] | None = None,
    choices: Mapping[str, Any] | None = None,
    spill: bool = False,
) -> Plan:
    """Plans training of a bundle inside `mem_budget` bytes of resident memory for the whole process.

    Args:
        bundle: path of the bundle.
        mem_budget: bytes or "128MB", "512MiB", or "auto" (`edge_razor.budget`); None plans without a cap.
        batch_size: samples of one optimizer update.
        sparsity: share of each packed value that is dropped, or "auto": chosen for each value.
        razor: "centered" or "plain".
        attention: "recompute" its probabilities from Q, K and V in the backward pass, or keep the largest
            "probabilities" of each query, at the same sparsity.
        optimizer, momentum, nesterov, betas, eps, weight_decay: as torch.optim.SGD and AdamW define them.
        threads: worker threads; None: one for each processor that this process may use.
        micro_batch: samples at a time, a divisor of batch_size; None: the largest that fits.
        frozen_weights: weights that do not train: "fp32" (read in the bundle's file), "bf16" or "int8" (in memory).
        base_bytes: resident bytes of the process that will train, after its imports; None: measured in a fresh process.
        calibrated: seconds by this machine's rates, measured once; False, for another machine: by usual ones.
        base_variation: by how many bytes the next process may be larger; caps that a refusal names have room for it.
        data_bytes: what the data pipeline will hold.
        prefer: "balanced": the least error of the gradient that fits, "exact": none, however slow, or "fast": the least
            time, with no more error than sparsity 0.95 for all values would bring.
        allow_freeze: so many early layers may stay untrained.
        harm: harm table that `edge-razor fidelity` wrote; None: usual errors of each form.
        choices: `summary["choices"]` of an earlier plan, to be taken again.
        spill: kept values may lie in a file until the backward pass; the session then needs a directory for it.

    Raises:
        BudgetError: nothing fits; `smallest_budget` does, and less than it by more than `base_variation` does not.
        DataError: the harm table is damaged.
        BundleError: the bundle is damaged or its graph breaks docs/training-graph.md.
        UsageError: an argument is out of range.
    """
    budget = resolve_budget(mem_budget).bytes
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
    table = None if harm is None else read_harm_table(harm)
    settings = Settings(
        batch_size=batch_size,
        sparsity=None if sparsity == "auto" else float(sparsity),
        micro_batch=micro_batch,
        razor=razor,
        attention=attention,
        optimizer=rule,
        threads=threads,
        process_bytes=measure_base() if base_bytes is None else base_bytes,
        growth_bytes=GROWTH_BYTES,
        data_bytes=data_bytes,
        frozen_weights=frozen_weights,
        prefer=prefer,
        allow_freeze=allow_freeze,
        harm=table,
        rates=device_rates(threads) if calibrated else None,
        spill=spill,
        base_variation=base_variation,
    )
    return plan_graph(training, manifest, settings, budget, buckets, choices)


def plan_graph(
    training: bytes,
    manifest: Mapping[str, Any],
    settings: Settings,
    budget: int | None,
    buckets: Mapping[int, tuple[bytes, Mapping[str, Any]]] | None = None,
    choices: Mapping[str, Any] | None = None,
) -> Plan:
    """Plans `training.onnx` with the manifest of its bundle; errors as `plan`.

    Args:
        buckets: training graphs for texts of fewer tokens, and manifests for them. Each gets a plan with the settings
            that were found for the longest, which decides the cap; all lay parameters and state out in the same way.
        choices: as `plan` says.
    """
    output = manifest.get("output")
    if not isinstance(output, Mapping) or not isinstance(output.get("name"), str):
        raise BundleError("bundle.json: the output has no name")
    graph = read_graph(training, output["name"])
    interface = read_interface(graph, manifest)
    shorter = {tokens: (read_graph(data, output["name"]), stated) for tokens, (data, stated) in (buckets or {}).items()}
    relatives = [graph, *(other for other, _ in shorter.values())]
    _share_parameters(relatives)
    parts = (
        searches(graph, settings, relatives) if choices is None else [_frozen_as(graph, settings, relatives, choices)]
    )
    decision = choose(parts, budget) if choices is None else _again(parts[0], choices, budget)
    if decision is None:
        assert budget is not None
        raise refusal(parts, budget)
    best = decision.candidate
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
        candidate = _alike(Search(other, settings, relatives, best.search.frozen), best)
        if candidate.accounting.arena > arena:
            raise BundleError(f"training-{tokens}.onnx needs more memory than training.onnx; export the model again")
        plans[tokens] = encoded(candidate, read_interface(other, stated))
    slowdown = None
    if settings.prefer == "exact" and choices is None:
        balanced = choose([part.preferring("balanced") for part in parts], budget)
        slowdown = best.seconds / balanced.candidate.seconds if balanced is not None else None
    summary = summarize(decision, bundle_id, budget, sum(part.tried for part in parts))
    return Plan(encoded(best, interface), summary | {"slowdown": slowdown}, plans)


def _frozen_as(graph: Graph, settings: Settings, relatives: Sequence[Graph], choices: Mapping[str, Any]) -> Search:
    frozen = choices.get("frozen", [])
    if not isinstance(frozen, (list, tuple)) or not all(isinstance(n, str) and n in graph.gradients for n in frozen):
        raise UsageError("the choices freeze parameters that the model does not train; they belong to another model")
    return Search(graph, settings, relatives, tuple(frozen))


def _again(search: Search, choices: Mapping[str, Any], budget: int | None) -> Decision | None:
    """The decision that an earlier plan made, if it fits; made exactly again are more values than then, if it must be.

    Raises:
        UsageError: the choices are malformed or of another model.
    """
    stated, level = choices.get("values"), choices.get("recompute_level", 0)
    if not isinstance(stated, Mapping) or not isinstance(level, int):
        raise UsageError("the choices have no values or no recompute_level; take summary['choices'] of a plan")
    values = {name: Choice.parse(str(text)) for name, text in stated.items()}
    settings = search.settings
    for micro_batch in settings.micro_batches:
        for name, value in search.values(micro_batch).items():
            if name in values and values[name] not in value.choices(settings.razor, (values[name].sparsity,)):
                raise UsageError(f"{name!r} cannot be kept as {values[name]}; the choices belong to another model")
    inexact = {name for name, choice in values.items() if choice.kind not in ("dense", "bits", "index")}
    first = [level] if 0 <= level < len(search.levels) else []
    for number in [
        *first,
        *(i for i in range(len(search.levels)) if i != level and not inexact & search.levels[i].names),
    ]:
        for micro_batch in settings.micro_batches:
            candidate = search.chosen(Structure(micro_batch, number), values)
            if candidate.fits(budget):
                return Decision(candidate)
    return None


def _alike(search: Search, best: Candidate) -> Candidate:
    """The candidate of a shorter text's graph that keeps its values as `best` does: by name, else in the same order.

    What is made again does not change the result, so of all levels the first that needs no more memory will do.
    """
    levels = sorted(range(len(search.levels)), key=lambda level: level != best.level)
    values = search.values(best.micro_batch)
    found: list[Candidate] = []
    for level in levels:
        if best.sparsity is not None:
            candidate = search.candidate(best.sparsity, best.micro_batch, level)
        else:
            given = best.choices
            if not values.keys() >= given.keys() and len(values) == len(best.search.values(best.micro_batch)):
                names = dict(zip(best.search.values(best.micro_batch), values, strict=True))
                given = {names[name]: choice for name, choice in given.items()}
            chosen = {}
            for name, value in values.items():
                options = value.choices(search.settings.razor, SPARSITY_GRID)
                wanted = given.get(name, options[0])
                chosen[name] = wanted if wanted in options else options[-1]
            candidate = search.chosen(Structure(best.micro_batch, level), chosen)
        if candidate.accounting.arena <= best.accounting.arena:
            return candidate
        found.append(candidate)
    return found[0]


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
