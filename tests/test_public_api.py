"""What users import, and what importing it costs."""

from __future__ import annotations

import json
import subprocess
import sys

import edge_razor

HEAVY = ("torch", "onnx", "google.protobuf", "rich", "PIL", "onnx_ir", "typer", "pydantic", "scipy", "numpy.random")


def loaded_after(program: str) -> list[str]:
    """Which of the heavy modules a fresh interpreter has loaded after running `program`."""
    code = f"{program}\nimport sys, json\nprint(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    return json.loads(subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True).stdout)


def test_every_public_name_resolves() -> None:
    assert sorted(edge_razor.__all__) == edge_razor.__all__
    for name in edge_razor.__all__:
        assert getattr(edge_razor, name) is not None
        assert name in dir(edge_razor)
    assert not hasattr(edge_razor, "no_such_name")


def test_importing_the_package_loads_nothing_heavy_not_even_numpy() -> None:
    assert loaded_after("import edge_razor, sys; assert 'numpy' not in sys.modules") == []


def test_the_training_process_imports_nothing_heavy() -> None:
    assert loaded_after("import edge_razor; edge_razor.Trainer; import edge_razor.cli.train") == []


def test_every_error_has_an_exit_status() -> None:
    statuses = {name: getattr(edge_razor, name).exit_status for name in edge_razor.__all__ if name.endswith("Error")}
    assert statuses["UsageError"] == 2
    assert statuses["BudgetError"] == statuses["MemoryCapError"] == 3
    others = set(statuses) - {"UsageError", "BudgetError", "MemoryCapError"}
    assert {statuses[name] for name in others} == {4}
