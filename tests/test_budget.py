"""`auto`: what the device, its cgroups and its GPU leave, less a margin."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_razor import Trainer, UsageError
from edge_razor.budget import auto_budget, resolve_budget
from edge_razor.cli import main
from tests.bundles import write_linear_bundle

HELD = 50_000_000
MiB = 2**20


def device(root: Path, available: int, files: dict[str, str] | None = None) -> Path:
    everything = {"proc/meminfo": f"MemTotal: 9 kB\nMemAvailable:   {available // 1024} kB\n", **(files or {})}
    for name, text in everything.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def v2(limit: object, used: int, inactive: int = 0, group: str = "app") -> dict[str, str]:
    folder = f"sys/fs/cgroup/{group}"
    return {
        "proc/self/cgroup": "0::/app/run\n",
        f"{folder}/memory.max": f"{limit}\n",
        f"{folder}/memory.current": f"{used}\n",
        f"{folder}/memory.stat": f"anon 5\ninactive_file {inactive}\n",
    }


def v1(limit: int, used: int, inactive: int = 0) -> dict[str, str]:
    folder = "sys/fs/cgroup/memory/app"
    return {
        "proc/self/cgroup": "5:cpu:/elsewhere\n4:memory:/app\n0::/\n",
        f"{folder}/memory.limit_in_bytes": f"{limit}\n",
        f"{folder}/memory.usage_in_bytes": f"{used}\n",
        f"{folder}/memory.stat": f"inactive_file 1\ntotal_inactive_file {inactive}\n",
    }


@pytest.mark.parametrize(
    ("files", "free", "share", "says"),
    [
        ({}, 1000 * MiB, 0.1, "free on the device"),
        (v2("max", 1), 1000 * MiB, 0.1, "free on the device"),
        (v2(500 * MiB, 300 * MiB), 200 * MiB, 0.1, "left in the memory cgroup /app"),
        (v2(500 * MiB, 300 * MiB, 100 * MiB), 300 * MiB, 0.1, "cgroup /app"),
        (v2(400 * MiB, 100 * MiB, group="app/run"), 300 * MiB, 0.1, "cgroup /app/run"),
        (v2(500 * MiB, 1 * MiB), 500 * MiB - HELD, 0.1, "cgroup /app"),  # held, but charged to another group
        (v2(5000 * MiB, 300 * MiB), 1000 * MiB, 0.1, "free on the device"),
        (v1(500 * MiB, 300 * MiB, 50 * MiB), 250 * MiB, 0.1, "cgroup /app"),
        (v1(2**63 - 4096, 300 * MiB), 1000 * MiB, 0.1, "free on the device"),
        ({"etc/nv_tegra_release": "# R36"}, 1000 * MiB, 0.2, "the GPU shares this memory"),
        ({"proc/device-tree/model": "NVIDIA Jetson Orin Nano\0"}, 1000 * MiB, 0.2, "the GPU shares"),
        ({"proc/device-tree/model": "Raspberry Pi 5\0"}, 1000 * MiB, 0.1, "free on the device"),
        (v2("nonsense", 3), 1000 * MiB, 0.1, "free on the device"),
    ],
)
def test_auto_is_what_is_held_and_free_less_a_margin(
    tmp_path: Path, files: dict[str, str], free: int, share: float, says: str
) -> None:
    budget = auto_budget(device(tmp_path, 1000 * MiB, files), HELD)
    assert budget.bytes == HELD + free - int(share * free)
    assert budget.why is not None and says in budget.why


def test_the_margin_is_never_tiny_and_the_cap_never_zero(tmp_path: Path) -> None:
    assert auto_budget(device(tmp_path, 100 * MiB), HELD).bytes == HELD + 100 * MiB - 16_000_000
    assert auto_budget(device(tmp_path, 0, v2(1, 5)), 1000).bytes == 1


def test_amounts_pass_through_and_nonsense_is_refused() -> None:
    assert resolve_budget(None) == (None, None)
    assert resolve_budget("128MB") == (128_000_000, None)
    cap = resolve_budget(" AUTO ")
    assert cap.bytes is not None and cap.bytes > 100_000_000 and cap.why
    with pytest.raises(UsageError, match="not understood"):
        resolve_budget("automatic")


def test_the_command_line_and_python_take_auto(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = write_linear_bundle(tmp_path / "model.razor")
    assert main(["plan", str(bundle), "--mem-budget", "auto"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("cap: ") and "that this process holds" in shown and "margin" in shown
    with Trainer(bundle, mem_budget="auto", threads=1) as trainer:
        assert trainer.plan.summary["mem_budget"] > trainer.plan.predicted_peak_bytes
