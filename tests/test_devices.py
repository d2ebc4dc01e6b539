"""Device profiles: the table, the user's own, and plans made with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edge_razor.cli import main
from edge_razor.devices import INSTRUCTION_SETS, find_device, read_devices
from edge_razor.errors import UsageError
from edge_razor.planner import Plan

from .bundles import write_linear_bundle

OWN = {
    "description": "a board",
    "cores": 3,
    "memory": "256MB",
    "free": "150MB",
    "instruction_set": "neon",
    "base_rss": "30MB",
    "sources": ["its maker"],
}


def own(path: Path, **changes: Any) -> Path:
    path.write_text(json.dumps({"devices": {"board": {**OWN, **changes}}}))
    return path


def test_the_table_has_the_usual_boards_with_sources() -> None:
    devices = read_devices()
    assert {"jetson-nano", "jetson-orin-nano", "raspberry-pi-4", "raspberry-pi-5"} <= set(devices)
    for device in devices.values():
        assert device.sources and device.description and device.instruction_set in INSTRUCTION_SETS
        assert 0 < device.base_rss < device.free <= device.memory


def test_a_device_gives_cap_threads_and_base_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = write_linear_bundle(tmp_path / "m.razor")
    output = tmp_path / "m.plan"
    assert main(["plan", str(bundle), "--device", "raspberry-pi-4", "-o", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "assumed for raspberry-pi-4 (Raspberry Pi 4 Model B" in printed
    assert "3.40 GB usually free of 4.00 GB" in printed and "4 cores" in printed and "neon" in printed
    plan = Plan.load(output)
    assert plan.threads == 4
    assert plan.summary["mem_budget"] == 3_400_000_000
    assert plan.summary["items"]["Python and libraries"] == 45_000_000
    assert "raspberry-pi-4" in plan.summary["assumed"]


def test_seconds_are_not_this_machines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("EDGE_RAZOR_CALIBRATION", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    bundle = write_linear_bundle(tmp_path / "m.razor")
    assert main(["plan", str(bundle), "--device", "jetson-nano", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["rates"] == "default" and "seconds by the rates of usual cores" in summary["assumed"]
    assert not (tmp_path / "cache").exists()


def test_what_is_written_on_the_command_line_counts_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = write_linear_bundle(tmp_path / "m.razor")
    options = ["--device", "jetson-nano", "--mem-budget", "90MB", "--threads", "1", "--json"]
    assert main(["plan", str(bundle), *options]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["threads"], summary["mem_budget"]) == (1, 90_000_000)
    assert "a cap of 90MB, as asked" in summary["assumed"] and "1 of 4 cores, as asked" in summary["assumed"]


def test_the_users_own_file_adds_devices_and_replaces_known_ones(tmp_path: Path) -> None:
    assert find_device("board", own(tmp_path / "own.json")).cores == 3
    assert find_device("jetson-nano", own(tmp_path / "own.json")).cores == 4
    renamed = tmp_path / "renamed.json"
    renamed.write_text(json.dumps({"devices": {"jetson-nano": OWN}}))
    assert find_device("jetson-nano", renamed).free == 150_000_000


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"cores": 0}, "cores must be 1 to 64, not 0"),
        ({"cores": True}, "cores must be"),
        ({"free": "300MB"}, "free at most memory"),
        ({"base_rss": "150MB"}, "base_rss must be less than free"),
        ({"memory": "much"}, "'board': memory:"),
        ({"instruction_set": "mmx"}, "instruction_set must be one of neon"),
        ({"sources": "me"}, "sources must be a list"),
        ({"color": "red"}, "look at 'color'"),
    ],
)
def test_a_wrong_entry_is_named(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        find_device("board", own(tmp_path / "own.json", **changes))


def test_unknown_devices_and_files_are_usage_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = str(write_linear_bundle(tmp_path / "m.razor"))
    assert main(["plan", bundle, "--device", "toaster"]) == 2
    assert "no device 'toaster'; there are intel-n100, jetson-nano" in capsys.readouterr().err
    assert main(["plan", bundle, "--devices", str(tmp_path / "none.json")]) == 2
    assert "name one with --device" in capsys.readouterr().err
    (tmp_path / "bad.json").write_text("{")
    assert main(["plan", bundle, "--device", "board", "--devices", str(tmp_path / "bad.json")]) == 2
    assert "is no JSON" in capsys.readouterr().err
    assert main(["plan", bundle, "--device", "board", "--devices", str(tmp_path / "none.json")]) == 2
    assert "cannot read the devices" in capsys.readouterr().err
