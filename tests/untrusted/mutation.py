"""Altered copies of a valid file: of its bytes, or of the JSON in it."""

from __future__ import annotations

import copy
import json
from random import Random
from typing import Any

__all__ = ["mutate_bytes", "mutate_json"]

_WORDS = (
    b"\0",
    b"\xff",
    b"\xff\xff\xff\x7f",
    b"\0\0\0\x80",
    b"\xff" * 8,
    b"\xff" * 7 + b"\x7f",
    b"PK\1\2",
    b"\n",
    b'"',
)
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, 10**400, -(10**400), 0.5, float("nan"), float("inf"), 1e308, "",
    "x", "\ud800", "\0", "../../x", "/etc/passwd", "9" * 5000, [], [[]], [1, 2], [None], {}, {"": {}}, ["\ud800"],
)  # fmt: skip


def mutate_bytes(data: bytes, random: Random) -> bytes:
    """One to four changes: flipped, overwritten, removed, repeated, inserted or swapped bytes, or a cut end."""
    result = bytearray(data)
    for _ in range(random.randint(1, 4)):
        at, count = random.randrange(len(result) + 1), random.choice((1, 2, 4, 8, 32))
        kind = random.randrange(7)
        if kind == 0 and at < len(result):
            result[at] ^= 1 << random.randrange(8)
        elif kind == 1:
            word = random.choice(_WORDS)
            result[at : at + len(word)] = word
        elif kind == 2:
            del result[at : at + count]
        elif kind == 3:
            result[at:at] = result[at : at + count]
        elif kind == 4:
            result[at:at] = random.choice(_WORDS)
        elif kind == 5:
            other = random.randrange(len(result) + 1)
            result[at : at + count] = result[other : other + count]
        elif random.random() < 0.3:
            del result[at:]
    return bytes(result)


def mutate_json(text: bytes, random: Random) -> bytes:
    """Replaces, removes, repeats or renames one to three values anywhere in a JSON text."""
    value = copy.deepcopy(json.loads(text))
    for _ in range(random.randint(1, 3)):
        holders = _holders(value)
        if not holders:
            break
        holder, key = random.choice(holders)
        kind = random.randrange(6)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(random.choice(_VALUES)))
        elif kind == 1:
            holder[random.choice(("", "x", "\ud800", "__metadata__"))] = holder.pop(key)
        elif kind == 2:
            other, name = random.choice(holders)
            if name in other if isinstance(other, dict) else name < len(other):
                holder[key] = copy.deepcopy(other[name])
        elif kind == 3 and type(holder[key]) is int:
            holder[key] += random.choice((-1, 1, 2**32, 2**62))
        else:
            holder[key] = copy.deepcopy(random.choice(_VALUES))
    return _dump(value).encode("utf-8", "surrogatepass")


def _holders(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value inside."""
    found: list[tuple[Any, Any]] = []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found.append((value, key))
        found += _holders(inner)
    return found


def _dump(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(k)}:{_dump(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_dump, value)) + "]"
    if type(value) is int and abs(value) > 10**300:  # longer than str() may write, if it grew
        return ("-" if value < 0 else "") + "1" + "0" * 400
    return json.dumps(value)
