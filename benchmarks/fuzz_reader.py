"""Fuzzes one reader of `tests.untrusted.readers`: ``python -m benchmarks.fuzz_reader NAME RUNS SEED [FOLDER]``.

Guided by coverage with atheris, if it is installed (FOLDER keeps the corpus), else by altering valid files at random.
Prints a JSON object with `inputs` and `guided`; libFuzzer's own lines go to standard error. Any exception that is none
of the package's errors ends it with a traceback and status 1 (77 with atheris), and leaves the input in FOLDER.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from random import Random
from types import FunctionType
from typing import Any

try:
    import atheris
except ImportError:
    atheris = None


def _readers() -> tuple[Any, type[Exception]]:
    from edge_razor.errors import EdgeRazorError
    from tests.untrusted.readers import READERS

    return READERS, EdgeRazorError


def _instrument(atheris: Any) -> None:
    """Counts the branches of the package. (atheris.instrument_imports does not see an editable installation.)"""
    for module in [m for n, m in sorted(sys.modules.items()) if n.split(".")[0] == "edge_razor"]:
        for value in list(vars(module).values()):
            if getattr(value, "__module__", None) != module.__name__:
                continue
            for item in vars(value).values() if isinstance(value, type) else (value,):
                function = getattr(item, "fget", None) or item
                if isinstance(function, FunctionType):
                    atheris.instrument_func(function)


def main() -> None:
    name, runs, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    folder = Path(sys.argv[4]) if len(sys.argv) > 4 else Path(tempfile.mkdtemp())
    readers, own = _readers()
    if atheris is not None:
        _instrument(atheris)
    reader = readers[name]
    work = Path(tempfile.mkdtemp())
    seeds = reader.seeds(work)

    def read(data: bytes) -> None:
        try:
            reader.read(data, work)
        except own:
            pass

    if atheris is None:
        random = Random(seed)
        for _ in range(runs):
            data = random.choice(seeds)
            for _ in range(random.randint(1, 4)):
                data = reader.mutate(data, random)
            try:
                read(data)
            except BaseException:
                (folder / "crash").write_bytes(data)
                raise
        print(json.dumps({"inputs": runs, "guided": False}))
        return
    for index, data in enumerate(seeds):
        (folder / f"seed-{index}").write_bytes(data)

    def mutate(data: bytes, limit: int, number: int) -> bytes:
        return reader.mutate(data, Random(number))[:limit]  # type: ignore[no-any-return]

    print(json.dumps({"inputs": runs, "guided": True}), flush=True)
    options = [f"-runs={runs}", f"-seed={seed}", "-max_len=32768", "-timeout=60", "-rss_limit_mb=1024"]
    os.chdir(folder)  # where libFuzzer leaves what crashed
    atheris.Setup(["fuzz", *options, "-print_final_stats=1", str(folder)], read, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
