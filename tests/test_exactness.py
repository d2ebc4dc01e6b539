"""The whole pipeline, export → plan → native step, equals PyTorch: every family and setting."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from edge_razor import trainer
from edge_razor.bundle import Bundle
from edge_razor.planner import Plan, plan, turns
from edge_razor.planner.deserialize import read_steps
from edge_razor.planner.graph import read_graph
from edge_razor.planner.search import Search
from tests.models import FAMILIES
from tests.parity import compare_step, export_model, randomize_norms
from tests.planner.conftest import settings

IMAGE, CLASSES = (3, 64, 64), 10
LOSS_LIMIT, UPDATE_LIMIT = 1e-5, 1e-3
WITHOUT_MAPS = ("mlp", "vit")


def build(family: str) -> nn.Module:
    torch.manual_seed(1)
    return randomize_norms(FAMILIES[family](num_classes=CLASSES), seed=1)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """Bundle of (family, trainable set); each is exported once."""
    directory = tmp_path_factory.mktemp("bundles")

    @cache
    def bundle(family: str, trainable: str) -> Path:
        path = directory / f"{family}-{trainable.replace(':', '')}.razor"
        return export_model(build(family), path, IMAGE, trainable)

    return bundle


def check(bundles: Callable[[str, str], Path], family: str, trainable: str = "all", **settings: Any) -> None:
    bundle = bundles(family, trainable)
    result = compare_step(build(family), bundle, image=IMAGE, classes=CLASSES, seed=1, **settings)
    assert result.parameters > 0
    assert result.loss_error <= LOSS_LIMIT
    assert result.excess <= UPDATE_LIMIT, f"{result.worst} is off by {result.excess:.1e}"
    assert result.norm_error <= UPDATE_LIMIT


@pytest.mark.parametrize("family", FAMILIES)
def test_one_step_at_sparsity_0_equals_pytorch(family: str, bundles: Callable[[str, str], Path]) -> None:
    check(bundles, family, sparsity=0.0)


@pytest.mark.parametrize("form", ["centered", "plain"])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_step_at_sparsity_90_equals_the_definition(
    family: str, form: str, bundles: Callable[[str, str], Path]
) -> None:
    check(bundles, family, sparsity=0.9, form=form)


@pytest.mark.parametrize(
    ("family", "sparsity"), [(f, 0.0) for f in FAMILIES] + [("mobilenet_v2", 0.9), ("resnet50", 0.9)]
)
def test_one_step_in_turns_equals_pytorch(
    family: str, sparsity: float, bundles: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As larger images would make them: every map counts as large, and a turn as free."""
    for cost in ("LARGE_BYTES", "CALL_BYTES", "WEIGHT_PASSES", "SUM_PASSES"):
        monkeypatch.setattr(turns, cost, 0)
    made: list[Plan] = []

    def plan_here(*arguments: Any, **options: Any) -> Plan:
        made.append(plan(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(trainer, "plan_in_child", plan_here)
    check(bundles, family, sparsity=sparsity, batch_size=4)
    (planned,) = made
    samples = {step.ints[0] for step in read_steps(planned.binary).train if step.kernel.startswith("conv")}
    assert family in WITHOUT_MAPS or 2 in samples


@pytest.mark.parametrize("sparsity", [0.0, 0.9])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_arena_is_within_3_percent_of_the_live_bytes(
    family: str, sparsity: float, bundles: Callable[[str, str], Path]
) -> None:
    """With nothing made again, and with as much as there is."""
    with Bundle(bundles(family, "all")) as bundle:
        graph = read_graph(bundle.read_file("training.onnx"), bundle.manifest.raw["output"]["name"])
    search = Search(graph, settings(batch_size=8))
    for level in {0, len(search.levels) - 1}:
        candidate = search.candidate(sparsity, 8, level)
        assert candidate.accounting.arena <= 1.03 * candidate.peak_live


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"sparsity": 0.5}, id="centered 0.5"),
        pytest.param({"sparsity": 0.97}, id="centered 0.97"),
        pytest.param({"sparsity": 0.97, "form": "plain"}, id="plain 0.97"),
        pytest.param({"optimizer": "adamw", "steps": 2, "eps": 1e-3}, id="AdamW"),
        pytest.param(
            {"optimizer": "adamw", "micro_batch": 1, "weight_decay": 0.1, "steps": 2, "eps": 1e-3},
            id="AdamW, micro-batches",
        ),
        pytest.param({"momentum": 0.9, "micro_batch": 2, "steps": 3, "lr": 1.0}, id="momentum, micro-batches"),
        pytest.param({"momentum": 0.9, "nesterov": True, "micro_batch": 2, "steps": 3, "lr": 1.0}, id="Nesterov"),
        pytest.param({"micro_batch": 1}, id="micro-batch 1"),
        pytest.param({"batch_size": 3}, id="batch of 3"),
        pytest.param({"trainable": "head"}, id="head"),
        pytest.param({"trainable": "last:3"}, id="last:3"),
        pytest.param({"trainable": "bias"}, id="bias"),
        pytest.param({"trainable": "norm"}, id="norm"),
    ],
)
def test_settings_equal_pytorch_on_mobilenet_v2(settings: dict[str, Any], bundles: Callable[[str, str], Path]) -> None:
    check(bundles, "mobilenet_v2", **settings)
