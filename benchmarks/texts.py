"""Texts for benchmarks: Debian's package descriptions and the sections they belong to.

    python -m benchmarks.texts DIRECTORY      # writes train.csv and test.csv

Needs ``apt-cache dumpavail`` (any Debian or Ubuntu with package lists).
"""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np

SECTIONS, TRAIN, TEST = 12, 6000, 3000


def package_descriptions() -> list[tuple[str, str]]:
    """(description, section) of every available package: of equal descriptions the first; sorted.

    Raises:
        SystemExit: there is no apt-cache, or it knows no packages.
    """
    if shutil.which("apt-cache") is None:
        raise SystemExit("apt-cache is not installed: this benchmark needs a Debian system")
    listing = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, text=True, check=True).stdout
    found: dict[str, str] = {}
    for paragraph in listing.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in paragraph.splitlines() if ": " in line and line[0] != " ")
        if "Description" in fields and "Section" in fields and "/" not in fields["Section"]:
            found.setdefault(fields["Description"].strip(), fields["Section"])
    if not found:
        raise SystemExit("apt-cache knows no packages; run apt-get update")
    return sorted(found.items())


def section_data(seed: int = 0) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """6,000 training and 3,000 test pairs of the 12 most frequent sections, drawn at random."""
    pairs = package_descriptions()
    counts = Counter(section for _, section in pairs)
    chosen = {section for section, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:SECTIONS]}
    pairs = [pair for pair in pairs if pair[1] in chosen]
    order = np.random.default_rng(seed).permutation(len(pairs))[: TRAIN + TEST]
    drawn = [pairs[index] for index in order]
    return drawn[:TRAIN], drawn[TRAIN:]


def write_csv(path: Path, pairs: list[tuple[str, str]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("text", "label"))
        writer.writerows(pairs)


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    directory.mkdir(parents=True, exist_ok=True)
    for name, data in zip(("train", "test"), section_data(), strict=True):
        write_csv(directory / f"{name}.csv", data)
        print(f"{directory / name}.csv: {len(data)} texts, {Counter(label for _, label in data).most_common(3)}, …")
