"""Writes the plans that runtime/tests/native_test.cpp runs and alters: ``python -m tests.runtime.write_plans DIR``."""

from __future__ import annotations

import sys
from pathlib import Path

from .plan_writer import columns_plan, encode, linear_plan, spilled


def write_plans(folder: Path) -> list[Path]:
    """Writes the plans; returns their paths."""
    plans = {
        "linear": linear_plan(),
        "momentum": linear_plan(threads=2, momentum=0.9, pixels=(3, 5), outputs=17),
        "classes": linear_plan(threads=3, loss="cross_entropy", batch=5, micro=2),
        "columns": columns_plan(),
        "spilled": spilled(linear_plan(threads=2, pixels=(9, 20), outputs=40)),
    }
    paths = {folder / f"{name}.plan": plan for name, plan in plans.items()}
    for path, plan in paths.items():
        path.write_bytes(encode(plan))
    return list(paths)


def main() -> None:
    for path in write_plans(Path(sys.argv[1])):
        print(path)


if __name__ == "__main__":
    main()
