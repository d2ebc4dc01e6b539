"""Plans whose weight does not train, in every form that it can be held in, or of which only some rows do."""

from __future__ import annotations

from typing import Any

from edge_razor.runtime import kernel_scratch

from .plan_writer import linear_plan, up64

FEATURES, OUTPUTS = 6, 5
MAPPED = 4
FORMS = {"in_file": 1, "bf16": 2, "int8": 3}
SIZES = {1: 4 * 30, 2: 2 * 30, 3: 64 + 30}


def frozen_plan(form: int, **settings: Any) -> dict[str, Any]:
    """`linear_plan` with a weight that does not train, by rows of an output channel."""
    plan = linear_plan(**settings)
    operand = (MAPPED, 0, SIZES[1]) if form == 1 else (2, 0, SIZES[form])
    plan["params"][0] |= {"trainable": 0, "form": form, "perm": [0, 1], "offset": 0, "states": []}
    plan["params"][1]["offset"] = offset = 0 if form == 1 else up64(SIZES[form])
    plan["params_bytes"] = offset + 64
    forward = plan["train"][0]
    forward["ints"] = [*forward["ints"], form]
    forward["operands"][1:4] = [operand, (0, 0, 0), (2, offset, 20)]
    scratch = kernel_scratch("conv", forward["ints"], forward["floats"], plan["threads"])
    forward["operands"][-1] = (1, plan["arena_bytes"], scratch)
    plan["arena_bytes"] += up64(scratch)
    kept = [s for s in plan["train"] if s["kernel"] != "conv_grad_weight"]
    plan["train"] = [*kept[:3], kept[4]]
    plan["train"][3]["operands"][0] = (2, offset, 20)
    plan["eval"] = [forward]
    return plan


def rows_plan() -> dict[str, Any]:
    """`linear_plan` on the rows of a table [9, features] that trains, with the row set of its gradient."""
    plan = linear_plan(batch=2, micro=2)
    arena, params = plan["arena_bytes"], plan["params_bytes"]
    x = plan["train"][0]["operands"][0]
    ids, rows = (1, arena, 8), (1, arena + 64, 64 + 4 * 2 * FEATURES)
    table, state = (2, params, 4 * 9 * FEATURES), (3, plan["state_bytes"], 4 * 9 * FEATURES)
    plan["arena_bytes"] += 64 + up64(rows[2])
    plan["params_bytes"] += up64(table[2])
    plan["state_bytes"] += up64(state[2])
    plan["params"].append(
        {
            "name": "table",
            "trainable": 1,
            "shape": [9, FEATURES],
            "perm": [0, 1],
            "offset": params,
            "states": [state[1]],
        }
    )
    plan["inputs"][0] |= {
        "dtype": 1,
        "shape": [2, 1],
        "perm": [0, 1],
        "train": arena,
        "eval": arena,
        "mul": [],
        "add": [],
    }

    def step(kernel: str, ints: list[int], floats: list[float], *operands: tuple[int, int, int]) -> dict[str, Any]:
        return {"kernel": kernel, "label": "table", "ints": ints, "floats": floats, "operands": list(operands)}

    lookup = step("embedding", [2, 9, FEATURES, 0], [], ids, table, x)
    gradient = step("embedding_grad_rows", [2, 9, FEATURES, 2, -1], [], ids, x, rows)
    update = step("sgd_rows", [9, FEATURES, 2, 0, 0], [0.9, 0.1], table, rows, state, (0, 0, 0))
    plan["train"] = [lookup, *plan["train"], gradient, update]
    plan["eval"] = [lookup, *plan["eval"]]
    return plan


def table_plan(vocabulary: int = 9) -> dict[str, Any]:
    """`rows_plan` with a table [vocabulary, features] in the weights file, which does not train."""
    plan = rows_plan()
    table = len(plan["params"]) - 1
    plan["params"][table] |= {"trainable": 0, "form": 1, "shape": [vocabulary, FEATURES], "offset": 0, "states": []}
    plan["train"] = plan["train"][:-2]  # without its gradient and update
    for lookup in (plan["train"][0], plan["eval"][0]):
        lookup["ints"][1] = vocabulary
        lookup["operands"][1] = (MAPPED, table, 4 * vocabulary * FEATURES)
    return plan
