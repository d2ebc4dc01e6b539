"""A native training session with numpy arrays at its edges."""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from types import TracebackType

import numpy as np

from edge_razor.errors import UsageError

from ._library import (
    PARAMETER,
    CArray,
    CEvaluation,
    CInfo,
    CProfileEntry,
    CResident,
    CSpillInfo,
    CTensorInfo,
    check,
    library,
)

_DTYPES = {0: np.dtype(np.float32), 1: np.dtype(np.int32)}
USER_BYTES = 65536  # of a caller's own in a checkpoint
_CODES = {np.dtype(np.float32): 0, np.dtype(np.int32): 1, np.dtype(np.uint8): 2}


@dataclass(frozen=True)
class SessionInfo:
    """Sizes in bytes, and counts, of a plan."""

    arena_bytes: int
    params_bytes: int
    state_bytes: int
    batch_size: int
    micro_batch: int
    threads: int
    params: int
    inputs: int
    outputs: int
    train_steps: int
    eval_steps: int


@dataclass(frozen=True)
class Parameter:
    """A parameter or frozen tensor. ``shape`` is torch's; ``states`` counts its optimizer state tensors."""

    index: int
    name: str
    shape: tuple[int, ...]
    trainable: bool
    states: int


@dataclass(frozen=True)
class Port:
    """An input, the target, or an output. ``shape`` is the user's (NCHW) and begins with the micro-batch."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype


@dataclass(frozen=True)
class Evaluation:
    """``accuracy`` is 0 … 1, or NaN for a loss without right answers. ``weight`` counts what the means are over."""

    loss: float
    accuracy: float
    weight: int


@dataclass(frozen=True)
class StepTime:
    """Time spent in one step of the plan since `Session.profile`."""

    kernel: str
    label: str
    phase: str  # "train" or "eval"
    calls: int
    seconds: float


@dataclass(frozen=True)
class SpillInfo:
    """The spill file: bytes that the plan needs in it, and what has passed since it was made.

    ``waited_seconds`` is how long steps stood still for it.
    """

    file_bytes: int
    written_bytes: int
    read_bytes: int
    waited_seconds: float


def _port(info: CTensorInfo) -> Port:
    return Port(info.name.decode(), tuple(info.shape[: info.rank]), _DTYPES[info.dtype])


class Session:
    """Executes a plan (docs/plan-format.md): owns its arena, parameters, optimizer state and threads.

    May be used from several threads (the interpreter's lock is released meanwhile): calls run one at a time, in order
    of arrival, also among sessions that share memory. Different sessions run at once. `close` must come last.

    Args:
        plan: the bytes of a plan file.
        share: a session of the same model whose memory, parameters, threads and spill file this one uses, too: a plan
            for samples of another size. They count as one session.
        spill_dir: directory for the file in which the plan keeps tensors until the backward pass, if it does. The file
            has no name: nothing is left behind.

    Raises:
        PlanError: the plan is truncated, altered, of another version, or inconsistent.
        MemoryError: memory or threads cannot be had.
        OSError: the spill file cannot be made, or the disk has no room for it.
    """

    def __init__(
        self, plan: bytes, share: Session | None = None, *, spill_dir: str | os.PathLike[str] | None = None
    ) -> None:
        self._library = library()
        self._handle = ctypes.c_void_p()
        if share is None:
            check(self._library.er_session_create(plan, len(plan), ctypes.byref(self._handle)))
        else:
            handle = ctypes.byref(self._handle)
            check(self._library.er_session_create_shared(plan, len(plan), share._open(), handle))
        if spill_dir is not None:
            check(self._library.er_spill_open(self._handle, os.fsencode(spill_dir)))
        info = CInfo()
        check(self._library.er_session_info(self._handle, ctypes.byref(info)))
        self.info = SessionInfo(*(getattr(info, field.name) for field in fields(SessionInfo)))
        self.inputs = tuple(_port(self._describe("er_input_info", i)) for i in range(self.info.inputs - 1))
        self.target = _port(self._describe("er_input_info", self.info.inputs - 1))
        self.outputs = tuple(_port(self._describe("er_output_info", i)) for i in range(self.info.outputs))
        described = (self._describe("er_param_info", i) for i in range(self.info.params))
        self._parameters = {
            p.name.decode(): Parameter(i, p.name.decode(), tuple(p.shape[: p.rank]), bool(p.trainable), p.states)
            for i, p in enumerate(described)
        }

    def resident_bytes(self) -> int:
        """How much of arena, parameters and optimizer state is resident now: touched, and not swapped out."""
        resident = CResident()
        check(self._library.er_session_resident(self._open(), ctypes.byref(resident)))
        return int(resident.arena + resident.params + resident.state)

    def close(self) -> None:
        """Frees the native session. Any use after that raises UsageError. May be called twice."""
        if self._handle:
            self._library.er_session_free(self._handle)
            self._handle = ctypes.c_void_p()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self.close()

    # ---- Parameters and optimizer state ----

    def parameters(self) -> dict[str, Parameter]:
        """Every parameter and frozen tensor by its torch name, in the plan's order."""
        return dict(self._parameters)

    def read_parameter(self, name: str) -> np.ndarray:
        """A copy of a parameter: float32, torch shape and layout.

        Raises:
            UsageError: there is no such parameter.
        """
        parameter = self._find(name)
        out = np.empty(parameter.shape, np.float32)
        check(self._library.er_param_read(self._open(), parameter.index, out.ctypes.data, out.size))
        return out

    def write_parameter(self, name: str, value: np.ndarray) -> None:
        """Replaces a parameter.

        Raises:
            UsageError: there is no such parameter, or ``value`` is not float32 of its shape.
        """
        parameter = self._find(name)
        value = self._tensor(parameter, value)
        check(self._library.er_param_write(self._open(), parameter.index, value.ctypes.data, value.size))

    def read_state(self, name: str, slot: int) -> np.ndarray:
        """A copy of optimizer state tensor ``slot`` of a parameter, in the parameter's torch shape.

        Raises:
            UsageError: there is no such parameter or slot.
        """
        parameter = self._find(name, slot)
        out = np.empty(parameter.shape, np.float32)
        check(self._library.er_state_read(self._open(), parameter.index, slot, out.ctypes.data, out.size))
        return out

    def write_state(self, name: str, slot: int, value: np.ndarray) -> None:
        """Replaces optimizer state tensor ``slot`` of a parameter.

        Raises:
            UsageError: there is no such parameter or slot, or ``value`` is not float32 of the parameter's shape.
        """
        parameter = self._find(name, slot)
        value = self._tensor(parameter, value)
        check(self._library.er_state_write(self._open(), parameter.index, slot, value.ctypes.data, value.size))

    def read_parts(self, name: str, slot: int | None, buffer: np.ndarray) -> Iterator[np.ndarray]:
        """A parameter (slot None) or its optimizer state tensor ``slot``, part by part in torch's order.

        Args:
            buffer: float32 [n], n ≥ 1. What is yielded lies in it, and holds until the next part is asked for.

        Raises:
            UsageError: there is no such parameter or slot.
        """
        parameter = self._find(name, slot)
        total = math.prod(parameter.shape)
        code = PARAMETER if slot is None else slot
        for first in range(0, total, buffer.size):
            part = buffer[: total - first]
            check(self._library.er_range_read(self._open(), parameter.index, code, first, part.ctypes.data, part.size))
            yield part

    def write_parts(self, name: str, slot: int | None, shape: tuple[int, ...], parts: Iterable[np.ndarray]) -> None:
        """Replaces a parameter (slot None) or its optimizer state tensor ``slot`` by a tensor of ``shape`` in parts,
        float32, in torch's order.

        Raises:
            UsageError: there is no such parameter or slot, or it has another shape, or the parts are more or fewer.
        """
        parameter = self._find(name, slot)
        if shape != parameter.shape:
            raise UsageError(f"parameter '{name}' is float32 {parameter.shape}, not {shape}")
        if (
            slot is None and not parameter.trainable
        ):  # its scales, or its copy of what lies in a file, belong to the whole
            whole = np.concatenate([np.ravel(np.array(part)) for part in parts] or [np.empty(0, np.float32)])
            return self.write_parameter(name, whole.reshape(shape))
        first, total = 0, math.prod(shape)
        code = PARAMETER if slot is None else slot
        for given in parts:
            if given.dtype != np.float32:
                raise UsageError(f"parameter '{name}' is float32 {shape}, not {given.dtype}")
            part = np.ascontiguousarray(given)
            check(self._library.er_range_write(self._open(), parameter.index, code, first, part.ctypes.data, part.size))
            first += part.size
        if first != total:
            raise UsageError(f"parameter '{name}' has {total} elements, not {first}")

    def load_weights(self, path: str | os.PathLike[str], start: int = 0, size: int | None = None) -> None:
        """Reads every parameter from a safetensors file, 64 KB at a time; other tensors in it are ignored.

        Parameters that the plan has in the weights file are mapped read-only and read there from then on, so it must
        stay as it is. (Replacing it by a rename is fine.) A step or prediction after its size or modification time has
        changed raises BundleError.

        Args:
            path: the file.
            start, size: bytes of it that are the safetensors file (a stored zip member); None: to the end. If its
                tensors are not aligned to 4 bytes there, they are copied instead of mapped.

        Raises:
            BundleError: the file is damaged, or lacks a parameter, or has it in another shape or dtype. No parameter
                has changed, unless the file was cut short while it was read.
            OSError: it cannot be read.
        """
        size = 2**64 - 1 if size is None else size
        check(self._library.er_weights_load_at(self._open(), os.fsencode(path), start, size))

    def save_weights(self, path: str | os.PathLike[str]) -> None:
        """Writes every parameter to a safetensors file, durably; a file that was there stays until then.

        Raises:
            OSError: it cannot be written.
        """
        check(self._library.er_weights_save(self._open(), os.fsencode(path)))

    # ---- Running ----

    def train_step(
        self,
        inputs: Sequence[np.ndarray],
        target: np.ndarray,
        *,
        learning_rate: float,
        update: int,
        seed: int = 0,
        channels_last: bool = False,
    ) -> float:
        """One optimizer update.

        Args:
            inputs: one array per model input, first dimension samples (1 to ``info.batch_size``), the others as
                ``self.inputs`` says: float32, or uint8 that the plan's normalization applies to.
            target: int32 class indices, or float32, as ``self.target`` says.
            learning_rate: of this update.
            update: number of this update, from 1.
            seed: with ``update`` it fixes the dropout masks.
            channels_last: the inputs (not the target) are in the runtime's layout (NHWC) already.

        Returns:
            The mean loss over the samples.

        Raises:
            UsageError: wrong shape, dtype or label range. Nothing has changed.
            NonFiniteError: the loss or an activation is NaN or infinite; this micro-batch updated no parameter.
            OSError: the spill file cannot be written (this micro-batch updated no parameter) or not be read (the step
                is half done, and every later one raises this).
        """
        samples = len(target) if target.ndim else 0
        arrays = self._arrays((*inputs, target), (*self.inputs, self.target), samples, channels_last)
        loss = ctypes.c_float()
        check(
            self._library.er_train_step(
                self._open(), arrays, samples, learning_rate, update, seed & (2**64 - 1), ctypes.byref(loss)
            )
        )
        return loss.value

    def predict(self, inputs: Sequence[np.ndarray], *, channels_last: bool = False) -> list[np.ndarray]:
        """Forward pass in inference mode over any number of samples.

        Args:
            inputs: as for `train_step`, with any number of samples.
            channels_last: they are in the runtime's layout (NHWC) already.

        Returns:
            One float32 array [samples, …] per output, in the user's layout.

        Raises:
            UsageError: wrong shape or dtype.
            NonFiniteError: an activation is NaN or infinite, where a kernel checks for it.
        """
        samples = len(inputs[0]) if len(inputs) and inputs[0].ndim else 0
        arrays = self._arrays(inputs, self.inputs, samples, channels_last)
        outputs = [np.empty((samples, *port.shape[1:]), np.float32) for port in self.outputs]
        pointers = (ctypes.c_void_p * len(outputs))(*(out.ctypes.data for out in outputs))
        check(self._library.er_predict(self._open(), arrays, samples, pointers))
        return outputs

    def evaluate(self, inputs: Sequence[np.ndarray], target: np.ndarray, *, channels_last: bool = False) -> Evaluation:
        """The training loss and the share of right answers in inference mode, over any number of samples.

        Args:
            inputs, target, channels_last: as for `train_step`.

        Raises:
            UsageError: wrong shape, dtype or label range, no samples, or a plan without a loss.
            NonFiniteError: the loss or an activation is NaN or infinite.
        """
        samples = len(target) if target.ndim else 0
        arrays = self._arrays((*inputs, target), (*self.inputs, self.target), samples, channels_last)
        result = CEvaluation()
        check(self._library.er_evaluate(self._open(), arrays, samples, ctypes.byref(result)))
        return Evaluation(result.loss, result.accuracy, result.weight)

    def save_checkpoint(self, path: str | os.PathLike[str], update: int, user: bytes = b"") -> None:
        """Writes what training changed to one file, durably, as C does (docs/c-api.md, "The checkpoint file").

        Args:
            update: updates done so far.
            user: up to 65536 bytes of the caller's own.

        Raises:
            NonFiniteError: a parameter is NaN or infinite. A file that was there stays, as with every error.
            OSError: it cannot be written.
        """
        check(self._library.er_checkpoint_save(self._open(), os.fsencode(path), update, user, len(user)))

    def load_checkpoint(self, path: str | os.PathLike[str]) -> tuple[int, bytes]:
        """Takes parameters and optimizer state from a file of `save_checkpoint`; returns its `update` and `user`.

        Raises:
            BundleError: it is damaged, or of another model or optimizer; nothing has changed.
            OSError: it cannot be read.
        """
        update, size = ctypes.c_uint64(), ctypes.c_size_t()
        user = ctypes.create_string_buffer(USER_BYTES)
        check(
            self._library.er_checkpoint_load(
                self._open(), os.fsencode(path), ctypes.byref(update), user, USER_BYTES, ctypes.byref(size)
            )
        )
        return update.value, user.raw[: size.value]

    def spill_info(self) -> SpillInfo:
        """Figures of the spill file; all 0 for a plan that spills nothing."""
        info = CSpillInfo()
        check(self._library.er_spill_read_info(self._open(), ctypes.byref(info)))
        return SpillInfo(*(getattr(info, field.name) for field in fields(SpillInfo)))

    def profile(self, enabled: bool = True) -> None:
        """Starts (from zero) or stops timing every step."""
        check(self._library.er_profile(self._open(), int(enabled)))

    def profile_entries(self) -> list[StepTime]:
        """The time of every step, in plan order, train steps first."""
        entry = CProfileEntry()
        out = []
        for i in range(self.info.train_steps + self.info.eval_steps):
            check(self._library.er_profile_read(self._open(), i, ctypes.byref(entry)))
            phase = "eval" if entry.phase else "train"
            out.append(StepTime(entry.kernel.decode(), entry.label.decode(), phase, entry.calls, entry.seconds))
        return out

    # ---- Checks ----

    def _open(self) -> ctypes.c_void_p:
        if not self._handle:
            raise UsageError("the session is closed")
        return self._handle

    def _describe(self, function: str, index: int) -> CTensorInfo:
        info = CTensorInfo()
        check(getattr(self._library, function)(self._handle, index, ctypes.byref(info)))
        return info

    def _find(self, name: str, slot: int | None = None) -> Parameter:
        parameter = self._parameters.get(name)
        if parameter is None:
            raise UsageError(f"there is no parameter '{name}'")
        if slot is not None and not 0 <= slot < parameter.states:
            raise UsageError(f"parameter '{name}' has {parameter.states} optimizer state tensors, there is no {slot}")
        return parameter

    @staticmethod
    def _tensor(parameter: Parameter, value: np.ndarray) -> np.ndarray:
        if value.dtype != np.float32 or value.shape != parameter.shape:
            raise UsageError(
                f"parameter '{parameter.name}' is float32 {parameter.shape}, not {value.dtype} {value.shape}"
            )
        return np.ascontiguousarray(value).reshape(parameter.shape)

    @staticmethod
    def _arrays(
        values: Sequence[np.ndarray], ports: Sequence[Port], samples: int, channels_last: bool
    ) -> ctypes.Array[CArray]:
        if len(values) != len(ports):
            raise UsageError(f"{len(values)} arrays were given, {len(ports)} are needed")
        out = (CArray * len(ports))()
        for i, (value, port) in enumerate(zip(values, ports, strict=True)):
            layout = int(channels_last and port.name != "target")
            rest = port.shape[1:]
            expected = (samples, *rest[1:], rest[0]) if layout and len(rest) == 3 else (samples, *rest)
            if value.shape != expected:
                raise UsageError(f"'{port.name}' has shape {value.shape}, {expected} is needed")
            allowed = (
                (port.dtype, np.dtype(np.uint8))
                if port.dtype == np.float32 and port.name != "target"
                else (port.dtype,)
            )
            if value.dtype not in allowed:
                raise UsageError(
                    f"'{port.name}' is {value.dtype}, {' or '.join(dtype.name for dtype in allowed)} is needed"
                )
            if not value.flags.c_contiguous or not value.flags.aligned:
                raise UsageError(f"'{port.name}' is not C-contiguous: use numpy.ascontiguousarray")
            out[i] = CArray(value.ctypes.data, value.nbytes, _CODES[value.dtype], layout)
        return out
