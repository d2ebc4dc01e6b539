"""Single kernels and kept tensors: for the planner, tests and benchmarks."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from edge_razor.errors import UsageError

from ._library import CContext, COperand, check, library


@dataclass
class Context:
    """What a kernel sees beside its operands (docs/plan-format.md, "Step context"). Losses add to ``loss``."""

    learning_rate: float = 0.0
    update: int = 1
    seed: int = 0
    micro_index: int = 0
    micro_count: int = 1
    valid_batch: int = 1
    valid_micro: int = 1
    first_sample: int = 0
    loss: float = 0.0
    counted_batch: int = 0


def _attributes(ints: Sequence[int], floats: Sequence[float]) -> tuple[Any, int, Any, int]:
    return (ctypes.c_int64 * len(ints))(*ints), len(ints), (ctypes.c_float * len(floats))(*floats), len(floats)


class KernelCall:
    """One kernel on the caller's arrays (C-contiguous, written in place), to be run as often as one likes.

    Args:
        name, ints, floats, operands: as the kernel table of docs/plan-format.md says; None is an absent operand.
            Scratch, where a kernel needs some, is the last operand: nothing is added implicitly.
        threads: size of the thread pool.
        context: fields of `Context`.

    Raises:
        UsageError: an operand is not C-contiguous.
    """

    def __init__(
        self,
        name: str,
        ints: Sequence[int],
        floats: Sequence[float],
        operands: Sequence[np.ndarray | None],
        threads: int = 1,
        **context: Any,
    ) -> None:
        c_operands = (COperand * len(operands))()
        for i, array in enumerate(operands):
            if array is None:
                continue
            if not array.flags.c_contiguous:
                raise UsageError(f"{name}: operand {i} is not C-contiguous")
            c_operands[i] = COperand(array.ctypes.data, array.nbytes)
        values = Context(**context)
        self._arrays = operands  # that C has only addresses of
        self._context = CContext(*(getattr(values, field.name) for field in fields(Context)))
        self._run = library().er_kernel_run
        self._arguments = (
            name.encode(),
            *_attributes(ints, floats),
            c_operands,
            len(operands),
            threads,
            ctypes.byref(self._context),
        )

    def __call__(self) -> None:
        """Checks and runs the kernel.

        Raises:
            UsageError: the call is not valid.
            NonFiniteError: the kernel met a NaN or an infinity.
        """
        check(self._run(*self._arguments))

    @property
    def context(self) -> Context:
        """The context after the last call, which the next one gets."""
        return Context(*(getattr(self._context, field.name) for field in fields(Context)))


def kernel_run(
    name: str,
    ints: Sequence[int],
    floats: Sequence[float],
    operands: Sequence[np.ndarray | None],
    threads: int = 1,
    **context: Any,
) -> Context:
    """Checks and runs one kernel once: `KernelCall`, whose arguments and errors are these.

    Returns:
        The context after the call.
    """
    call = KernelCall(name, ints, floats, operands, threads, **context)
    call()
    return call.context


def kernel_scratch(name: str, ints: Sequence[int], floats: Sequence[float] = (), threads: int = 1) -> int:
    """Bytes of scratch that a kernel call needs.

    Raises:
        UsageError: there is no such kernel, or the attributes are not valid.
    """
    needed = ctypes.c_uint64()
    check(library().er_kernel_scratch(name.encode(), *_attributes(ints, floats), threads, ctypes.byref(needed)))
    return needed.value


def packed_bytes(form: int, samples: int, rows: int, cols: int, keep: int) -> int:
    """Bytes of a kept tensor (form 0 float32, 1 bf16, 2 razor plain, 3 razor centered; keep = values a sample; form 4
    keeps as many of each row as `keep` says).

    Raises:
        UsageError: the arguments are not valid.
    """
    if min(form, samples, rows, cols, keep) >= 0:
        size = int(library().er_packed_bytes(form, samples, rows, cols, keep))
        if size:
            return size
    raise UsageError(f"no kept tensor has form {form}, {samples} samples, {rows} rows, {cols} columns, keep {keep}")


def unpack(form: int, samples: int, rows: int, cols: int, keep: int, packed: np.ndarray) -> np.ndarray:
    """The dense float32 tensor [samples, rows, cols] that a kept tensor stands for.

    Raises:
        UsageError: the arguments are not valid or do not belong to these bytes.
    """
    if not packed.flags.c_contiguous:
        raise UsageError("unpack: packed is not C-contiguous")
    packed_bytes(form, samples, rows, cols, keep)
    dense = np.empty((samples, rows, cols), np.float32)
    check(library().er_unpack(form, samples, rows, cols, keep, packed.ctypes.data, packed.nbytes, dense.ctypes.data))
    return dense
