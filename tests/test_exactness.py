"""The whole pipeline, export → plan → native step, equals PyTorch: every family and setting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models import FAMILIES
from tests.parity import compare_step, randomize_norms

CLASSES = 10
LOSS_LIMIT, UPDATE_LIMIT = 1e-5, 1e-3


def check(family: str, directory: Path, **settings: Any) -> None:
    torch.manual_seed(1)
    model = randomize_norms(FAMILIES[family](num_classes=CLASSES), seed=1)
    result = compare_step(model, directory, image=(3, 64, 64), classes=CLASSES, seed=1, **settings)
    assert result.parameters > 0
    assert result.loss_error <= LOSS_LIMIT
    assert result.update_error <= UPDATE_LIMIT, f"{result.worst} is off by {result.update_error:.1e}"


@pytest.mark.parametrize("family", FAMILIES)
def test_one_step_at_sparsity_0_equals_pytorch(family: str, tmp_path: Path) -> None:
    check(family, tmp_path, sparsity=0.0)


@pytest.mark.parametrize("form", ["centered", "plain"])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_step_at_sparsity_90_equals_the_definition(family: str, form: str, tmp_path: Path) -> None:
    check(family, tmp_path, sparsity=0.9, form=form)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"sparsity": 0.5}, id="centered 0.5"),
        pytest.param({"sparsity": 0.97}, id="centered 0.97"),
        pytest.param({"sparsity": 0.97, "form": "plain"}, id="plain 0.97"),
        pytest.param({"optimizer": "adamw", "steps": 2}, id="AdamW"),
        pytest.param(
            {"optimizer": "adamw", "micro_batch": 1, "weight_decay": 0.1, "steps": 2}, id="AdamW, micro-batches"
        ),
        pytest.param({"momentum": 0.9, "micro_batch": 2, "steps": 3, "lr": 0.01}, id="momentum, micro-batches"),
        pytest.param({"momentum": 0.9, "nesterov": True, "micro_batch": 2, "steps": 3, "lr": 0.01}, id="Nesterov"),
        pytest.param({"micro_batch": 1}, id="micro-batch 1"),
        pytest.param({"batch_size": 3}, id="batch of 3"),
        pytest.param({"trainable": "head"}, id="head"),
        pytest.param({"trainable": "last:3"}, id="last:3"),
        pytest.param({"trainable": "bias"}, id="bias"),
        pytest.param({"trainable": "norm"}, id="norm"),
    ],
)
def test_settings_equal_pytorch_on_mobilenet_v2(settings: dict[str, Any], tmp_path: Path) -> None:
    check("mobilenet_v2", tmp_path, **settings)
