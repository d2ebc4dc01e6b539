"""A pytest plugin that writes down kernel calls of tests/kernels, for runtime/tests/kernel_replay.cpp to run elsewhere.

python -m pytest tests/kernels -p device_tests.record_kernels --record-kernels calls.bin

Of each test it keeps a few parameter sets, spread over all of them, and of these the first few calls of each kernel.
Property-based tests are left out: their calls differ from run to run.

The file: "ERCALLS\\n", then for each call (little-endian; vec<T> is u32 count + items): str kernel, vec<i64> ints,
vec<f32> floats, u32 threads, the context (f32 u64 u64 u32 u32 u64 u64 u64 f64 u64), u32 status, f64 loss after, u32
operands; each operand u8 kind (0 absent, 1 input, 2 float32 output, 3 output of other bytes, 4 scratch), u64 bytes, the
data before (kinds 1 to 3) and after (2 and 3).
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest

import edge_razor.runtime
from edge_razor.errors import NonFiniteError
from edge_razor.runtime import Context

PER_TEST = 3  # parameter sets
PER_TEST_AND_KERNEL = 6  # calls
CALL_BYTES = 128 * 1024  # larger calls take an emulator too long


class Recorder:
    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.test = ""
        self.seen: set[tuple[Any, ...]] = set()
        self.calls: Counter[tuple[str, str]] = Counter()
        self.run = edge_razor.runtime.kernel_run
        file.write(b"ERCALLS\n")

    def __call__(
        self,
        name: str,
        ints: Sequence[int],
        floats: Sequence[float],
        operands: Sequence[np.ndarray | None],
        threads: int = 1,
        **context: Any,
    ) -> Context:
        """Stands in for `kernel_run`."""
        key = (name, tuple(ints), tuple(floats), threads, tuple(o is None or o.nbytes for o in operands))
        here = (self.test, name)
        size = sum(o.nbytes for o in operands if o is not None)
        full = key in self.seen or self.calls[here] >= PER_TEST_AND_KERNEL or size > CALL_BYTES
        if full or _overlap([o for o in operands if o is not None]):
            return self.run(name, ints, floats, operands, threads, **context)
        before = [None if o is None else o.tobytes() for o in operands]
        status, loss = 0, 0.0
        try:
            result = self.run(name, ints, floats, operands, threads, **context)
            loss = result.loss
        except NonFiniteError:
            status = 5
            raise
        finally:  # other errors are about the call, not the kernel: they are not written
            if status == 5 or "result" in locals():
                self.seen.add(key)
                self.calls[here] += 1
                self._write(name, ints, floats, operands, before, threads, Context(**context), status, loss)
        return result

    def _write(
        self,
        name: str,
        ints: Sequence[int],
        floats: Sequence[float],
        operands: Sequence[np.ndarray | None],
        before: list[bytes | None],
        threads: int,
        c: Context,
        status: int,
        loss: float,
    ) -> None:
        out = [struct.pack("<I", len(name)), name.encode()]
        out += [
            struct.pack(f"<I{len(ints)}q", len(ints), *ints),
            struct.pack(f"<I{len(floats)}f", len(floats), *floats),
        ]
        out.append(
            struct.pack(
                "<IfQQIIQQQdQIdI",
                threads,
                c.learning_rate,
                c.update,
                c.seed,
                c.micro_index,
                c.micro_count,
                c.valid_batch,
                c.valid_micro,
                c.first_sample,
                c.loss,
                c.counted_batch,
                status,
                loss,
                len(operands),
            )
        )
        scratch = edge_razor.runtime.kernel_scratch(name, ints, floats, threads)
        for i, (operand, old) in enumerate(zip(operands, before, strict=True)):
            if operand is None or old is None:
                out.append(struct.pack("<BQ", 0, 0))
            elif scratch and i == len(operands) - 1:
                out.append(struct.pack("<BQ", 4, operand.nbytes))
            elif operand.tobytes() == old:
                out += [struct.pack("<BQ", 1, operand.nbytes), old]
            else:
                kind = 2 if operand.dtype == np.float32 or _keeps_floats(name, ints) else 3
                out += [struct.pack("<BQ", kind, operand.nbytes), old, operand.tobytes()]
        self.file.write(b"".join(out))


def _overlap(operands: Sequence[np.ndarray]) -> bool:
    """Whether two operands share memory, which the file has no word for."""
    spans = sorted((o.ctypes.data, o.ctypes.data + o.nbytes) for o in operands)
    return any(end > begin for (_, end), (begin, _) in zip(spans, spans[1:], strict=False))


def _keeps_floats(name: str, ints: Sequence[int]) -> bool:
    """Whether the bytes that a fused activation keeps are its float32 pre-activation."""
    return ints[{"conv": 17, "affine": 3}[name]] == 3 if name in ("conv", "affine") else False


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record-kernels", type=Path, help="file to write kernel calls to")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--record-kernels")
    if path is not None:  # before the test modules import the function
        recorder = Recorder(open(path, "wb"))  # noqa: SIM115
        edge_razor.runtime.kernel_run = recorder
        config.stash[_RECORDER] = recorder


_RECORDER = pytest.StashKey[Recorder]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    by_test: dict[str, list[pytest.Item]] = {}
    for item in items:
        if not getattr(getattr(item, "obj", None), "is_hypothesis_test", False):
            by_test.setdefault(item.nodeid.split("[")[0], []).append(item)
    items[:] = [
        group[i * len(group) // min(PER_TEST, len(group))]
        for group in by_test.values()
        for i in range(min(PER_TEST, len(group)))
    ]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if _RECORDER in item.config.stash:
        item.config.stash[_RECORDER].test = item.nodeid


def pytest_unconfigure(config: pytest.Config) -> None:
    if _RECORDER in config.stash:
        config.stash[_RECORDER].file.close()
