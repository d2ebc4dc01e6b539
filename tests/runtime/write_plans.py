"""Writes the plans that runtime/tests/native_test.cpp runs and alters: ``python -m tests.runtime.write_plans DIR``."""

from __future__ import annotations

import sys
from pathlib import Path

from .plan_writer import encode, linear_plan, spilled


def main() -> None:
    folder = Path(sys.argv[1])
    plans = {
        "linear": linear_plan(),
        "momentum": linear_plan(threads=2, momentum=0.9, pixels=(3, 5), outputs=17),
        "classes": linear_plan(threads=3, loss="cross_entropy", batch=5, micro=2),
        "spilled": spilled(linear_plan(threads=2, pixels=(9, 20), outputs=40)),
    }
    for name, plan in plans.items():
        path = folder / f"{name}.plan"
        path.write_bytes(encode(plan))
        print(path)


if __name__ == "__main__":
    main()
