"""With exact levers alone, every budget gives the gradients of the plan without a cap; dropout is on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from edge_razor.bundle import write_bundle
from edge_razor.errors import BudgetError
from edge_razor.planner import Plan, plan
from edge_razor.runtime import Session

from .networks import Built
from .test_recompute import FAMILIES

BATCH = 4
BUDGETS = 10


def write(built: Built, path: Path) -> Path:
    names = list(built.parameters)
    manifest = built.manifest | {
        "producer": "test",
        "trainable": {"spec": "all", "parameters": [n for n in names if not n.endswith((".mean", ".var"))]},
        "state_dict": names,
        "aliases": {},
        "classes": None,
    }
    inference = onnx.helper.make_model(onnx.helper.make_graph([], "inference", [], []))
    return write_bundle(path, onnx.load_model_from_string(built.training), inference, built.parameters, manifest)


def gradients(made: Plan, built: Built, spill_dir: Path) -> dict[str, np.ndarray]:
    """After one step with a learning rate of 0 from momentum 0: the momentum is the gradient."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(BATCH, *built.manifest["inputs"][0]["shape"][1:])).astype(np.float32)
    target = rng.integers(0, 5, BATCH).astype(np.int32)
    with Session(made.binary, spill_dir=spill_dir) as session:
        for name in session.parameters():
            session.write_parameter(name, built.parameters[name])
        loss = session.train_step([x], target, learning_rate=0.0, update=3, seed=11)
        found = {name: session.read_state(name, 0) for name, p in session.parameters().items() if p.trainable}
    return found | {"loss": np.array(loss)}


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_at_ten_budgets_are_the_unplanned_ones(family: str, tmp_path: Path) -> None:
    built = FAMILIES[family]()
    bundle = write(built, tmp_path / "model.razor")

    spill = family == "bert"  # one family that may use the spill file, too

    def planned(budget: int | None, **more: object) -> Plan:
        return plan(bundle, mem_budget=budget, batch_size=BATCH, base_bytes=0, base_variation=0, threads=2, **more)  # type: ignore[arg-type]

    unlimited = planned(None, sparsity=0)
    with pytest.raises(BudgetError) as refused:
        planned(1, prefer="exact", spill=spill)
    smallest, largest = refused.value.smallest_budget, unlimited.predicted_peak_bytes
    assert smallest < largest
    dense = {unlimited.micro_batch: gradients(unlimited, built, tmp_path)}
    ways, spilled = set(), False
    for budget in np.linspace(smallest, largest, BUDGETS).astype(int).tolist():
        made = planned(budget, prefer="exact", spill=spill)
        assert made.predicted_peak_bytes <= budget and made.sparsity == 0
        micro = made.micro_batch
        ways.add((micro, made.summary["recompute_level"]))
        found = gradients(made, built, tmp_path)
        spilled |= any(row.get("place") == "spill" for row in made.summary["kept"])
        if micro not in dense:
            dense[micro] = gradients(planned(None, sparsity=0, micro_batch=micro), built, tmp_path)
        for name, expected in dense[micro].items():
            np.testing.assert_array_equal(found[name], expected, err_msg=f"{name} at {budget} bytes")
        for name, expected in dense[BATCH].items():  # other micro-batches add up in another order
            tolerance = 1e-5 * max(float(np.abs(expected).max()), 1e-3)
            np.testing.assert_allclose(found[name], expected, rtol=0, atol=tolerance, err_msg=f"{name} at {budget}")
    assert len(ways) > 1 and spilled == spill
