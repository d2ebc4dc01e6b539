"""Writes what the fuzz targets in runtime/fuzz begin with: ``python -m tests.runtime.write_fuzz_seeds DIR``."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from edge_razor.runtime import Session

from .frozen_plans import FORMS, frozen_plan, rows_plan
from .plan_writer import columns_plan, encode, linear_plan
from .write_plans import write_plans

__all__ = ["TARGETS", "write_fuzz_seeds"]

TARGETS = ("plan_fuzz", "weights_fuzz", "checkpoint_fuzz")


def write_fuzz_seeds(folder: Path) -> None:
    """Valid plans, weights files and checkpoints, in a folder named after their target; in `plans` the plans whose
    parameters the last two are of, named TARGET-*.plan."""
    for name in (*TARGETS, "plans"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    write_plans(folder / "plan_fuzz")
    frozen = {name: encode(frozen_plan(form, micro=2)) for name, form in FORMS.items()}
    for name, plan in {**frozen, "rows": encode(rows_plan()), "columns": encode(columns_plan())}.items():
        (folder / "plan_fuzz" / f"{name}.plan").write_bytes(plan)
    plans = {"weights_fuzz": {"linear": encode(linear_plan()), **frozen}}
    plans["checkpoint_fuzz"] = {"linear": encode(linear_plan(momentum=0.9)), "int8": frozen["int8"]}
    for target, made in plans.items():
        for name, plan in made.items():
            (folder / "plans" / f"{target}-{name}.plan").write_bytes(plan)
    with Session(plans["weights_fuzz"]["linear"]) as session:
        tensors = {name: np.ones(p.shape, np.float32) for name, p in session.parameters().items()}
    (folder / "weights_fuzz" / "seed").write_bytes(save(tensors))
    more = {**tensors, "other": np.zeros(3, np.int64)}
    (folder / "weights_fuzz" / "seed-more").write_bytes(save(more, metadata={"format": "pt"}))
    for name, plan in plans["checkpoint_fuzz"].items():
        with Session(plan) as session:
            session.load_weights(folder / "weights_fuzz" / "seed")
            session.save_checkpoint(folder / "checkpoint_fuzz" / f"seed-{name}", 3, b"the program's own")


if __name__ == "__main__":
    write_fuzz_seeds(Path(sys.argv[1]))
