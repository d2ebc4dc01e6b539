"""Finds and loads ``libedge_razor``, declares the C functions, and turns statuses into exceptions."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from edge_razor.errors import BundleError, EdgeRazorError, NonFiniteError, PlanError, UsageError

ABI_VERSION = 1
MAX_RANK = 8
PARAMETER = 0xFFFFFFFF  # ER_PARAMETER: instead of an optimizer state slot
LIBRARY_NAME = {"darwin": "libedge_razor.dylib", "win32": "edge_razor.dll"}.get(sys.platform, "libedge_razor.so")

i64, u32, u64, size_t, f32, f64 = (
    ctypes.c_int64,
    ctypes.c_uint32,
    ctypes.c_uint64,
    ctypes.c_size_t,
    ctypes.c_float,
    ctypes.c_double,
)
void_p, char_p, POINTER = ctypes.c_void_p, ctypes.c_char_p, ctypes.POINTER


class CInfo(ctypes.Structure):
    """``er_info``"""

    _fields_ = [(name, u64) for name in ("arena_bytes", "params_bytes", "state_bytes")] + [
        (name, u32)
        for name in (
            "batch_size",
            "micro_batch",
            "threads",
            "params",
            "inputs",
            "outputs",
            "train_steps",
            "eval_steps",
        )
    ]


class CResident(ctypes.Structure):
    """``er_resident``"""

    _fields_ = [(name, u64) for name in ("arena", "params", "state")]


class CTensorInfo(ctypes.Structure):
    """``er_tensor_info``"""

    _fields_ = [
        ("name", char_p),
        ("dtype", u32),
        ("rank", u32),
        ("shape", u64 * MAX_RANK),
        ("elements", u64),
        ("trainable", u32),
        ("states", u32),
    ]


class CArray(ctypes.Structure):
    """``er_array``"""

    _fields_ = [("data", void_p), ("bytes", u64), ("dtype", u32), ("layout", u32)]


class CEvaluation(ctypes.Structure):
    """``er_evaluation``"""

    _fields_ = [("loss", f64), ("accuracy", f64), ("weight", u64)]


class CProfileEntry(ctypes.Structure):
    """``er_profile_entry``"""

    _fields_ = [("kernel", char_p), ("label", char_p), ("phase", u32), ("calls", u64), ("seconds", f64)]


class COperand(ctypes.Structure):
    """``er_operand``"""

    _fields_ = [("data", void_p), ("bytes", u64)]


class CSpillInfo(ctypes.Structure):
    """``er_spill_info``"""

    _fields_ = [("file_bytes", u64), ("written_bytes", u64), ("read_bytes", u64), ("waited_seconds", f64)]


class CContext(ctypes.Structure):
    """``er_context``"""

    _fields_ = [
        ("learning_rate", f32),
        ("update", u64),
        ("seed", u64),
        ("micro_index", u32),
        ("micro_count", u32),
        ("valid_batch", u64),
        ("valid_micro", u64),
        ("first_sample", u64),
        ("loss", f64),
        ("counted_batch", u64),
    ]


_attributes = (POINTER(i64), u32, POINTER(f32), u32)
_copy = (void_p, u32, void_p, u64)
_copy_state = (void_p, u32, u32, void_p, u64)
# name: (result, arguments)
_FUNCTIONS: dict[str, tuple[object, tuple[object, ...]]] = {
    "er_last_error": (char_p, ()),
    "er_abi_version": (u32, ()),
    "er_isa": (char_p, ()),
    "er_session_create": (u32, (char_p, size_t, POINTER(void_p))),
    "er_session_create_shared": (u32, (char_p, size_t, void_p, POINTER(void_p))),
    "er_session_free": (None, (void_p,)),
    "er_session_info": (u32, (void_p, POINTER(CInfo))),
    "er_session_resident": (u32, (void_p, POINTER(CResident))),
    "er_param_info": (u32, (void_p, u32, POINTER(CTensorInfo))),
    "er_input_info": (u32, (void_p, u32, POINTER(CTensorInfo))),
    "er_output_info": (u32, (void_p, u32, POINTER(CTensorInfo))),
    "er_param_write": (u32, _copy),
    "er_param_read": (u32, _copy),
    "er_state_write": (u32, _copy_state),
    "er_state_read": (u32, _copy_state),
    "er_range_write": (u32, (void_p, u32, u32, u64, void_p, u64)),
    "er_range_read": (u32, (void_p, u32, u32, u64, void_p, u64)),
    "er_weights_load": (u32, (void_p, char_p)),
    "er_weights_load_at": (u32, (void_p, char_p, u64, u64)),
    "er_weights_save": (u32, (void_p, char_p)),
    "er_train_step": (u32, (void_p, POINTER(CArray), u32, f32, u64, u64, POINTER(f32))),
    "er_predict": (u32, (void_p, POINTER(CArray), u64, POINTER(void_p))),
    "er_evaluate": (u32, (void_p, POINTER(CArray), u64, POINTER(CEvaluation))),
    "er_checkpoint_save": (u32, (void_p, char_p, u64, char_p, size_t)),
    "er_checkpoint_load": (u32, (void_p, char_p, POINTER(u64), void_p, size_t, POINTER(size_t))),
    "er_profile": (u32, (void_p, ctypes.c_int)),
    "er_profile_read": (u32, (void_p, u32, POINTER(CProfileEntry))),
    "er_spill_open": (u32, (void_p, char_p)),
    "er_spill_read_info": (u32, (void_p, POINTER(CSpillInfo))),
    "er_packed_bytes": (u64, (u32, u64, u64, u64, u64)),
    "er_unpack": (u32, (u32, u64, u64, u64, u64, void_p, u64, void_p)),
    "er_kernel_scratch": (u32, (char_p, *_attributes, u32, POINTER(u64))),
    "er_kernel_run": (u32, (char_p, *_attributes, POINTER(COperand), u32, u32, POINTER(CContext))),
}


def _candidates() -> Iterable[Path]:
    # An editable install keeps the compiled library apart from the sources: look in every directory of the package.
    for directory in sys.modules[__package__].__path__:
        yield Path(directory) / LIBRARY_NAME


def library_path() -> Path:
    """Path of the shared library: environment variable ``EDGE_RAZOR_LIBRARY``, else the one beside the package.

    Raises:
        EdgeRazorError: there is none.
    """
    chosen = os.environ.get("EDGE_RAZOR_LIBRARY")
    if chosen:
        return Path(chosen)
    for path in _candidates():
        if path.exists():
            return path
    raise EdgeRazorError(
        f"the native library {LIBRARY_NAME} is not built: run 'pip install .', or set EDGE_RAZOR_LIBRARY to a build"
    )


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library with its functions declared.

    Raises:
        EdgeRazorError: it is missing, cannot be loaded, or has another ABI version.
    """
    path = library_path()
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise EdgeRazorError(f"the native library cannot be loaded: {error}") from error
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    version = loaded.er_abi_version()
    if version != ABI_VERSION:
        raise EdgeRazorError(
            f"{path} has ABI version {version}, this package needs {ABI_VERSION}: install the package again"
        )
    return loaded


_ERRORS: dict[int, type[Exception]] = {
    1: UsageError,
    2: PlanError,
    3: BundleError,
    4: MemoryError,
    5: NonFiniteError,
    6: OSError,
}


def check(status: int) -> None:
    """Raises what a status other than ``ER_OK`` stands for, with the library's message.

    Raises:
        UsageError, PlanError, BundleError, NonFiniteError, MemoryError, OSError (I/O).
    """
    if status:
        message = library().er_last_error().decode("utf-8", "replace")
        raise _ERRORS.get(status, EdgeRazorError)(message)


def abi_version() -> int:
    """ABI version of the loaded library."""
    return int(library().er_abi_version())


def isa() -> str:
    """Instruction set that the kernels run with: ``avx512vbmi2``, ``avx512``, ``avx2`` or ``portable``."""
    return library().er_isa().decode()
