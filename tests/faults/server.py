"""Runs `edge-razor` command lines in forked children of a process that has everything loaded already.

Started with the shim preloaded; one JSON object a line: a request on standard input, an answer on standard output.
A run takes tens of milliseconds so, instead of half a second.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import select
import signal
import sys
import time
from typing import Any

KINDS = ("write", "fsync", "rename", "open", "mmap", "alloc", "unlink", "mkdir", "any")
HANG_SECONDS = 60.0


def main() -> None:
    shim = ctypes.CDLL(None)
    shim.fault_arm.argtypes = [ctypes.c_int, ctypes.c_long, *[ctypes.c_int] * 3, ctypes.c_long, ctypes.c_char_p]
    # What a training run imports, so that its children need not.
    import zipfile  # noqa: F401

    import edge_razor.cli.train
    import edge_razor.data.arrays
    import edge_razor.runtime
    from edge_razor.cli.app import build_parser
    from edge_razor.cli.entry import main as command

    edge_razor.runtime.abi_version()
    build_parser()
    gc.freeze()
    errors = os.memfd_create("stderr")
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        shim.fault_arm(-1, 0, 0, 0, 0, 0, b"")
        os.ftruncate(errors, 0)
        os.lseek(errors, 0, os.SEEK_SET)
        begin = time.monotonic()
        child = os.fork()
        if child == 0:
            status = 70
            try:
                nothing = os.open(os.devnull, os.O_RDWR)
                for standard, descriptor in ((0, nothing), (1, nothing), (2, errors)):
                    os.dup2(descriptor, standard)
                fault = request["fault"]
                shim.fault_arm(
                    KINDS.index(fault["kind"]) if fault["kind"] else -1,
                    fault["n"],
                    fault["errno"],
                    fault["sticky"],
                    fault["action"],
                    fault["least_bytes"],
                    request["directory"].encode(),
                )
                status = command(request["arguments"])
                with contextlib.suppress(OSError, ValueError):
                    sys.stderr.flush()
            except BaseException:
                import traceback

                traceback.print_exc()
                sys.stderr.flush()
            finally:
                os._exit(status)
        status = _wait(child, begin, request.get("kill_after"))
        seconds = time.monotonic() - begin
        counts = (ctypes.c_long * (len(KINDS) + 1))()
        shim.fault_state(counts)
        os.lseek(errors, 0, os.SEEK_SET)
        said = os.read(errors, 1 << 20).decode("utf-8", "replace")
        answer = {
            "status": status,
            "stderr": said,
            "counts": dict(zip(KINDS, counts, strict=False)),
            "fired": bool(counts[len(KINDS)]),
            "seconds": seconds,
        }
        print(json.dumps(answer), flush=True)


def _wait(child: int, begin: float, kill_after: float | None) -> int:
    """The child's exit status, negative if a signal ended it; SIGABRT stands for one that hung, too."""
    descriptor = os.pidfd_open(child)
    try:
        limit = HANG_SECONDS if kill_after is None else kill_after
        grace = HANG_SECONDS if kill_after is None else 0.0  # this process and the child may both have been stopped
        waits = (max(0.0, begin + limit - time.monotonic()), grace)
        if not any(select.select([descriptor], [], [], seconds)[0] for seconds in waits):
            os.kill(child, signal.SIGABRT if kill_after is None else signal.SIGKILL)
    finally:
        os.close(descriptor)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    main()
