"""The cap is proven by the kernel: training inside a memory cgroup of exactly the cap, swap off."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from device_tests.cgroup import run_confined, unavailable
from tests.models import efficientnet_lite0, mobilenet_v2

MB = 10**6
REASON = unavailable()
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")


@pytest.fixture(scope="module", params=[mobilenet_v2, efficientnet_lite0], ids=lambda factory: factory.__name__)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    import edge_razor

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("bundle") / f"{request.param.__name__}.razor"
    edge_razor.export(request.param(num_classes=1000), (torch.zeros(2, 3, 224, 224),), path)
    return path


def train(bundle: Path, cap: int, *arguments: str) -> tuple[dict, int]:
    command = [sys.executable, "-m", "device_tests.train_once", str(bundle), "--mem-budget", str(cap), *arguments]
    done = run_confined(command, cap)
    assert done.returncode == 0, f"status {done.returncode}, {done.oom_kills} OOM kills\n{done.stderr[-2000:]}"
    assert done.oom_kills == 0
    return json.loads(done.stdout.splitlines()[-1]), done.peak_bytes


def test_a_mobile_network_at_224_trains_inside_a_128_mb_cgroup(bundle: Path) -> None:
    result, _ = train(bundle, 128 * MB, "--sparsity", "0.95", "--steps", "3", "--predict")
    assert result["peak_rss_bytes"] <= 128 * MB
    assert result["peak_rss_bytes"] <= result["predicted_peak_bytes"] <= 1.05 * result["peak_rss_bytes"]


def test_the_group_really_limits(bundle: Path) -> None:
    """The same training with a plan for 128 MB is killed in a group too small for it: the proof can fail."""
    command = [sys.executable, "-m", "device_tests.train_once", str(bundle), "--mem-budget", str(128 * MB)]
    done = run_confined([*command, "--sparsity", "0.95", "--steps", "2"], 72 * MB)
    assert done.returncode != 0
