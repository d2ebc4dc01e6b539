"""A training step with each set of kernels, beside PyTorch held to the same instructions.

python dev.py bench instruction_sets [--models mobilenet_v2 …] [--rounds 7]

Writes results/instruction_sets.md. A set that the processor lacks is listed with the error.
"""

from __future__ import annotations

import argparse

from benchmarks.common import markdown_table, write_result
from benchmarks.models import NAMES, bundle
from benchmarks.turns import Case, Measured, say, take_turns

# What edge-razor calls a set of kernels: how tables call it, and what holds PyTorch and its libraries to it. (MKL does
# not heed MKL_ENABLE_INSTRUCTIONS on processors that are not Intel's: a product of 1024 rows was as fast with it.)
SETS: dict[str, tuple[str, dict[str, str]]] = {
    "portable": (
        "SSE2 (oneDNN: SSE4)",
        {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"},
    ),
    "avx2": (
        "AVX2",
        {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "AVX2"},
    ),
    "avx512": ("AVX-512", {}),
}
WARM_UP = 1


def cases(name: str) -> list[Case]:
    """edge-razor at two sparsities and PyTorch in its two memory formats, with one set of instructions."""
    ours, theirs = (("EDGE_RAZOR_ISA", name),), tuple(SETS[name][1].items())
    return [
        Case("centered 0.95", "edge-razor", ("--sparsity", "0.95"), ours),
        Case("sparsity 0", "edge-razor", ("--sparsity", "0"), ours),
        Case("PyTorch eager", "torch", (), theirs),
        Case("PyTorch eager, channels_last", "torch-channels-last", (), theirs),
    ]


def row(model: str, name: str, results: list[Measured]) -> tuple[str, ...]:
    """Median seconds of the systems that cases() lists, and PyTorch's better ones over ours."""
    label = SETS[name][0]
    errors = [result.error for result in results if result.error]
    if errors:
        return (model, label, errors[0].replace("|", "/"), "–", "–", "–", "–")
    packed, exact, *theirs = (result.step for result in results)
    torch = min(theirs)
    times = (f"{seconds:.3f}" for seconds in (packed, exact, torch))
    return (model, label, *times, f"{torch / packed:.2f}x", f"{torch / exact:.2f}x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["mobilenet_v2", "resnet18", "vit_tiny"], choices=NAMES)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    rows = []
    for model in options.models:
        common = ("--bundle", str(bundle(model)), "--batch-size", "8", "--threads", "2")
        for name in SETS:
            say(f"{model}, {name}")
            rows.append(row(model, name, take_turns(cases(name), model, common, options.rounds, WARM_UP)))
    header = ("model", "instructions", "centered 0.95, s", "sparsity 0, s", "PyTorch, s", "0.95", "sparsity 0")
    write_result(
        "instruction_sets",
        "Instruction sets: a step of batch 8, two threads",
        "python dev.py bench instruction_sets",
        "Medians of the systems in turns; PyTorch in the better of its memory formats, held to the same instructions "
        "by ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA and MKL_CBWR; the last columns are its time over ours. All on this "
        "processor: one without AVX2 is slower in other ways, too.\n\n" + markdown_table(header, rows),
        "torch",
    )


if __name__ == "__main__":
    main()
