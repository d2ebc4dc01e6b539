"""ctypes binding of the native runtime (``libedge_razor``, C ABI in ``edge_razor.h``).

Only numpy and the standard library are imported. The library is loaded at the first use, not at import.
"""

from ._library import abi_version, isa, library_path
from .kernels import Context, KernelCall, kernel_run, kernel_scratch, packed_bytes, unpack
from .session import Evaluation, Parameter, Port, Session, SessionInfo, SpillInfo, StepTime

__all__ = [
    "Context",
    "Evaluation",
    "KernelCall",
    "Parameter",
    "Port",
    "Session",
    "SessionInfo",
    "SpillInfo",
    "StepTime",
    "abi_version",
    "isa",
    "kernel_run",
    "kernel_scratch",
    "library_path",
    "packed_bytes",
    "unpack",
]
