"""Plan files written field by field (docs/plan-format.md), without the planner, so that tests can write wrong ones.

A plan is a dict of plain values; `encode` writes whatever it holds. `linear_plan` gives a complete valid one, `spilled`
one that keeps two tensors in the spill file.
"""

from __future__ import annotations

import struct
import zlib
from typing import Any

from edge_razor.runtime import kernel_scratch

ARENA, PARAMS, STATE = 1, 2, 3
ABSENT = 2**64 - 1


def up64(n: int) -> int:
    return (n + 63) // 64 * 64


def _string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<I", len(data)) + data


def _vec(code: str, values: list[Any]) -> bytes:
    return struct.pack(f"<I{len(values)}{code}", len(values), *values)


def _list(items: list[bytes]) -> bytes:
    return struct.pack("<I", len(items)) + b"".join(items)


def _param(p: dict[str, Any]) -> bytes:
    head = _string(p["name"]) + struct.pack("<BB", p["trainable"], p.get("form", 0))
    return head + _vec("Q", p["shape"]) + _vec("B", p["perm"]) + struct.pack("<Q", p["offset"]) + _vec("Q", p["states"])


def _input(i: dict[str, Any]) -> bytes:
    head = _string(i["name"]) + struct.pack("<B", i["dtype"]) + _vec("Q", i["shape"]) + _vec("B", i["perm"])
    return head + struct.pack("<QQ", i["train"], i["eval"]) + _vec("f", i["mul"]) + _vec("f", i["add"])


def _output(o: dict[str, Any]) -> bytes:
    return _string(o["name"]) + _vec("Q", o["shape"]) + _vec("B", o["perm"]) + struct.pack("<Q", o["eval"])


def _step(s: dict[str, Any]) -> bytes:
    operands = [struct.pack("<BQQ", *operand) for operand in s["operands"]]
    return _string(s["kernel"]) + _string(s["label"]) + _vec("q", s["ints"]) + _vec("f", s["floats"]) + _list(operands)


def seal(payload: bytes, version: int = 5) -> bytes:
    """A plan file around a payload, with the right checksum."""
    return b"EDGERZR\n" + struct.pack("<IIQ", version, zlib.crc32(payload), len(payload)) + payload


def encode(plan: dict[str, Any]) -> bytes:
    sizes = ("batch_size", "micro_batch", "threads", "reserved", "arena_bytes", "params_bytes", "state_bytes")
    return seal(
        _string(plan["bundle_id"])
        + struct.pack("<IIIQQQQ", *(plan[name] for name in sizes))
        + _list([_param(p) for p in plan["params"]])
        + _list([_input(i) for i in plan["inputs"]])
        + _list([_output(o) for o in plan["outputs"]])
        + _list([_step(s) for s in plan["train"]])
        + _list([_step(s) for s in plan["eval"]])
    )


class Region:
    """Places tensors one after another; `spans` of the plan's operands."""

    def __init__(self, code: int) -> None:
        self.code, self.bytes = code, 0

    def take(self, count: int, width: int = 4) -> tuple[int, int, int]:
        span = (self.code, self.bytes, count * width)
        self.bytes = up64(self.bytes + count * width)
        return span


def linear_plan(
    *,
    batch: int = 4,
    micro: int = 2,
    threads: int = 1,
    channels: int = 3,
    pixels: tuple[int, int] = (1, 2),
    outputs: int = 5,
    loss: str = "mse",
    momentum: float = 0.0,
) -> dict[str, Any]:
    """Logits = W · flatten(NHWC(x)) + b; loss; SGD on W and b. Input is [N, C, H, W], W in torch's layout.

    With ``loss="cross_entropy"`` the target is int32 [N]; with "mse" it is float32 [N, outputs].
    """
    height, width = pixels
    features = channels * height * width
    arena, params, state = Region(ARENA), Region(PARAMS), Region(STATE)
    x, target = arena.take(micro * features), arena.take(micro * outputs if loss == "mse" else micro)
    logits, grad_w, grad_b = arena.take(micro * outputs), arena.take(features * outputs), arena.take(outputs)
    weight, bias = params.take(features * outputs), params.take(outputs)
    accumulators = micro < batch
    state_w = state.take(features * outputs) if accumulators or momentum else (0, 0, 0)
    state_b = state.take(outputs) if accumulators or momentum else (0, 0, 0)
    none = (0, 0, 0)

    # n, ih, iw, ic, oh, ow, oc, kh, kw, sh, sw, pt, pl, dh, dw, group
    conv = [micro, 1, 1, features, 1, 1, outputs, 1, 1, 1, 1, 0, 0, 1, 1, 1]

    def step(kernel: str, ints: list[int], floats: list[float], *operands: tuple[int, int, int]) -> dict[str, Any]:
        has_scratch = kernel in ("conv", "conv_grad_weight", "channel_sum")
        scratch = kernel_scratch(kernel, ints, floats, threads) if has_scratch else 0
        tail = ([arena.take(scratch, 1)] if scratch else [none]) if has_scratch else []
        return {"kernel": kernel, "label": "fc", "ints": ints, "floats": floats, "operands": [*operands, *tail]}

    def update(parameter: tuple[int, int, int], grad: tuple[int, int, int], kept: tuple[int, int, int], n: int) -> Any:
        slots = (kept, none) if momentum else (none, kept)
        return step("sgd", [n, 0], [momentum, 0.0], parameter, grad, *slots)

    forward = step("conv", [*conv, 0, 0], [0.0, 0.0], x, weight, none, bias, logits, none)
    loss_ints = [micro, 1, outputs, -100] if loss == "cross_entropy" else [micro, outputs]
    train = [
        forward,
        step(loss, loss_ints, [0.0] if loss == "cross_entropy" else [], logits, target, logits),
        step("conv_grad_weight", [*conv, 0, 0], [], x, logits, grad_w),
        step("channel_sum", [micro, outputs], [], logits, grad_b),
        update(weight, grad_w, state_w, features * outputs),
        update(bias, grad_b, state_b, outputs),
    ]
    stateful = bool(accumulators or momentum)
    return {
        "bundle_id": "0" * 64,
        "batch_size": batch,
        "micro_batch": micro,
        "threads": threads,
        "reserved": 0,
        "arena_bytes": arena.bytes,
        "params_bytes": params.bytes,
        "state_bytes": state.bytes,
        "params": [
            {
                "name": "fc.weight",
                "trainable": 1,
                "shape": [outputs, features],
                "perm": [1, 0],
                "offset": weight[1],
                "states": [state_w[1]] if stateful else [],
            },
            {
                "name": "fc.bias",
                "trainable": 1,
                "shape": [outputs],
                "perm": [0],
                "offset": bias[1],
                "states": [state_b[1]] if stateful else [],
            },
        ],
        "inputs": [
            {
                "name": "input",
                "dtype": 0,
                "shape": [micro, channels, height, width],
                "perm": [0, 2, 3, 1],
                "train": x[1],
                "eval": x[1],
                "mul": [0.5 + c for c in range(channels)],
                "add": [-1.0 - c for c in range(channels)],
            },
            {
                "name": "target",
                "dtype": int(loss == "cross_entropy"),
                "shape": [micro] if loss == "cross_entropy" else [micro, outputs],
                "perm": [0] if loss == "cross_entropy" else [0, 1],
                "train": target[1],
                "eval": ABSENT,
                "mul": [],
                "add": [],
            },
        ],
        "outputs": [{"name": "logits", "shape": [micro, outputs], "perm": [0, 1], "eval": logits[1]}],
        "train": train,
        "eval": [forward],
    }


def spilled(plan: dict[str, Any]) -> dict[str, Any]:
    """A `linear_plan` that writes its input and then the loss gradient to the spill file and reads both back."""
    train = plan["train"]
    x, dlogits = train[2]["operands"][:2]
    back = []
    for _, _, size in (x, dlogits):
        back.append((ARENA, plan["arena_bytes"], size))
        plan["arena_bytes"] = up64(plan["arena_bytes"] + size)

    def step(kernel: str, operand: tuple[int, int, int], *ints: int) -> dict[str, Any]:
        return {"kernel": kernel, "label": f"slot {ints[0]}", "ints": list(ints), "floats": [], "operands": [operand]}

    second = -(-x[2] // 4096) * 4096
    for later in train[2:]:
        later["operands"] = [back[(x, dlogits).index(o)] if o in (x, dlogits) else o for o in later["operands"]]
    train[2:2] = [
        step("spill_write", dlogits, 1, second),
        step("spill_wait", x, 0),
        step("spill_wait", dlogits, 1),
        step("spill_read", back[1], 1, second),
        step("spill_read", back[0], 0, 0),
        step("spill_wait", back[0], 0),
        step("spill_wait", back[1], 1),
    ]
    train.insert(1, step("spill_write", x, 0, 0))
    return plan


def attention_gradient(places: list[list[int]], columns: list[int]) -> dict[str, Any]:
    """A plan whose first step makes dQ, dK and dV of [2, 3, 4] in the arena `places` (offset, bytes)."""
    plan = linear_plan()
    ints, floats = [2, 3, 3, 2, 2, 2, 0, 0, 0, *[0] * 7, *columns], [0.5, 0.0]
    scratch = kernel_scratch("attention_grad", ints, floats, plan["threads"])
    begin = up64(plan["arena_bytes"])
    read, none = (ARENA, begin + 1024, 96), (0, 0, 0)
    gradients = [(ARENA, begin + offset, size) for offset, size in places]
    operands = [read, read, read, none, none, read, none, *gradients, none, none, none, (ARENA, begin + 2048, scratch)]
    plan["arena_bytes"] = begin + 2048 + up64(scratch)
    step = {"kernel": "attention_grad", "label": "a:b", "ints": ints, "floats": floats, "operands": operands}
    plan["train"].insert(0, step)
    return plan


def columns_plan() -> dict[str, Any]:
    """A plan with steps that read and write columns of a wider matrix, and samples of a packed tensor."""
    plan = attention_gradient([[0, 312]] * 3, [4, 0, 4, 0, 4, 0, 13, 0, 13, 4, 13, 9])
    begin = plan["train"][0]["operands"][7][1]
    wide, none = (ARENA, begin, 312), (0, 0, 0)
    ints, floats = [2, 3, 3, 2, 2, 2, 1, 0, 0, 0, 13, 0, 13, 4, 13, 9], [0.5, 0.0]
    scratch = kernel_scratch("attention", ints, floats, plan["threads"])
    end = plan["arena_bytes"]
    plan["arena_bytes"] = end + up64(scratch)
    operands = [wide, wide, wide, none, none, (ARENA, begin + 512, 96), none, (ARENA, end, scratch)]
    attention = {"kernel": "attention", "label": "a:b", "ints": ints, "floats": floats, "operands": operands}
    packed = [wide, (ARENA, begin + 640, 48), none]
    pack = {"kernel": "pack", "label": "a:b", "ints": [1, 2, 3, 4, 0, 13, 9], "floats": [], "operands": packed}
    turn = {**pack, "ints": [*pack["ints"], 1, 1]}
    ints = [1, 3, 1, 4, 3, 1, 4, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 0, 1, 2, 1]
    scratch, end = kernel_scratch("conv_grad_weight", ints, [], plan["threads"]), plan["arena_bytes"]
    plan["arena_bytes"] = end + up64(scratch)
    read = [packed[1], (ARENA, begin, 48), (ARENA, begin + 512, 64), (ARENA, end, scratch)]
    weight = {"kernel": "conv_grad_weight", "label": "a:b", "ints": ints, "floats": [], "operands": read}
    plan["train"][:0] = [attention, pack, turn, weight]
    return plan
