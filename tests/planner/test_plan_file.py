"""Plan files of texts: one for each bucket, read back together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edge_razor.errors import PlanError
from edge_razor.planner import Plan
from tests.runtime.plan_writer import encode, linear_plan


def text_plan() -> Plan:
    made = [encode(linear_plan(pixels=(1, tokens))) for tokens in (8, 4, 2)]
    figures = {"batch_size": 4, "micro_batch": 2, "threads": 1, "sparsity": 0.5, "arena_bytes": 64}
    summary = {"bundle_id": "0" * 64, **figures, "predicted_peak_bytes": 128}
    return Plan(made[0], summary, {4: made[1], 2: made[2]})


def test_all_buckets_are_written_and_read(tmp_path: Path) -> None:
    plan = text_plan()
    plan.save(tmp_path / "m.plan")
    assert [p.name for p in plan.files(tmp_path / "m.plan")] == ["m.plan", "m.plan.4", "m.plan.2"]
    assert (tmp_path / "m.plan.4").read_bytes() == plan.buckets[4]
    assert Plan.load(tmp_path / "m.plan") == plan


def test_buckets_that_are_gone_or_of_another_plan_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.plan"
    text_plan().save(path)
    (tmp_path / "m.plan.2").rename(tmp_path / "m.plan.4")
    with pytest.raises(PlanError, match="m.plan.4 does not belong to"):
        Plan.load(path)
    (tmp_path / "m.plan.4").unlink()
    with pytest.raises(PlanError, match="plan for texts of 4 tokens: No such file"):
        Plan.load(path)
    summary = json.loads((tmp_path / "m.plan.json").read_text())
    (tmp_path / "m.plan.json").write_text(json.dumps(summary | {"buckets_sha256": {"../x": "0"}}))
    with pytest.raises(PlanError, match="no table of tokens"):
        Plan.load(path)
