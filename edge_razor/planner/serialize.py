"""The plan file (docs/plan-format.md): writing it, and reading its header."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from edge_razor.errors import PlanError

from .interface import Interface
from .optimizer import Memory
from .program import Buffer, Program, Region, Step

__all__ = ["HEADER", "MAGIC", "check_header", "encode"]

MAGIC = b"EDGERZR\n"
VERSION = 5
HEADER = struct.Struct("<8sIIQ")  # magic, version, crc32 of the payload, payload bytes
_ABSENT = 2**64 - 1


class _Writer:
    def __init__(self) -> None:
        self.parts: list[bytes] = []

    def pack(self, layout: str, *values: Any) -> None:
        self.parts.append(struct.pack("<" + layout, *values))

    def text(self, text: str) -> None:
        data = text.encode()
        self.pack("I", len(data))
        self.parts.append(data)

    def items(self, code: str, values: Sequence[int] | Sequence[float]) -> None:
        """A vec of numbers of one struct code."""
        self.pack(f"I{len(values)}{code}", len(values), *values)

    def each(self, values: Sequence[Any], write: Callable[[Any], None]) -> None:
        """A vec of records."""
        self.pack("I", len(values))
        for value in values:
            write(value)

    def step(self, step: Step) -> None:
        self.text(step.kernel)
        self.text(step.label)
        self.items("q", step.ints)
        self.items("f", step.floats)
        self.each(step.operands, self.operand)

    def operand(self, buffer: Buffer | None) -> None:
        if buffer is None:
            self.pack("BQQ", 0, 0, 0)
        else:
            self.pack("BQQ", int(buffer.region), buffer.offset, buffer.bytes)


def encode(
    *,
    bundle_id: str,
    batch_size: int,
    micro_batch: int,
    threads: int,
    arena_bytes: int,
    memory: Memory,
    interface: Interface,
    train: Program,
    evaluate: Program,
) -> bytes:
    """The plan file's bytes. Every buffer of both programs must be placed."""
    writer = _Writer()
    writer.text(bundle_id)
    writer.pack("IIIQ", batch_size, micro_batch, threads, 0)
    writer.pack("QQQ", arena_bytes, memory.params_bytes, memory.state_bytes)

    def parameter(p: Any) -> None:
        writer.text(p.name)
        writer.pack("BB", int(p.trainable), int(p.form))
        writer.items("Q", p.shape)
        writer.items("B", p.perm)
        writer.pack("Q", 0 if p.buffer.region == Region.MAPPED else p.buffer.offset)
        writer.items("Q", [s.offset for s in p.states])

    writer.each(list(memory.parameters.values()), parameter)
    writer.pack("I", len(interface.inputs))
    for index, binding in enumerate(interface.inputs):
        writer.text(binding.name)
        writer.pack("B", int(binding.classes))
        writer.items("Q", binding.at(micro_batch))
        writer.items("B", binding.perm)
        is_target = index == len(interface.inputs) - 1
        writer.pack("QQ", train.inputs[index].offset, _ABSENT if is_target else evaluate.inputs[index].offset)
        writer.items("f", binding.mul)
        writer.items("f", binding.add)
    output = interface.output
    writer.pack("I", 1)
    writer.text(output.name)
    runtime = [0] * len(output.shape)
    for user, dim in enumerate(output.perm):
        runtime[dim] = output.at(micro_batch)[user]
    writer.items("Q", runtime)
    writer.items("B", output.perm)
    writer.pack("Q", evaluate.outputs[0].offset)
    for program in (train, evaluate):
        _check_placed(program.steps)
        writer.each(program.steps, writer.step)
    payload = b"".join(writer.parts)
    return HEADER.pack(MAGIC, VERSION, zlib.crc32(payload), len(payload)) + payload


def _check_placed(steps: Iterable[Step]) -> None:
    for step in steps:
        for buffer in step.operands:
            if buffer is not None and (buffer.offset < 0 or buffer.region not in Region):
                raise PlanError(f"internal: {buffer.name!r} of step {step.label!r} was never placed")


def check_header(data: bytes) -> str:
    """The bundle id of a plan file.

    Raises:
        PlanError: not a plan file, of another version, truncated or altered.
    """
    if len(data) < HEADER.size or data[:8] != MAGIC:
        raise PlanError("not a plan file; make one with `edge-razor plan … -o model.plan`")
    _, version, crc, size = HEADER.unpack_from(data)
    if version != VERSION:
        raise PlanError(f"plan file has version {version}, this edge-razor reads version {VERSION}; plan again")
    payload = data[HEADER.size :]
    if len(payload) != size or zlib.crc32(payload) != crc:
        raise PlanError("plan file is truncated or altered; plan again")
    length = struct.unpack_from("<I", payload)[0] if size >= 4 else 0
    return payload[4 : 4 + length].decode("ascii", "replace")
