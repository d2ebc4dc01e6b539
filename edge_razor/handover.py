"""What a session holds, put into files while no session is open, so that two plans' memory is never there at once."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import BinaryIO

import numpy as np

from edge_razor.checkpoint import BUFFER_BYTES
from edge_razor.runtime import Session

__all__ = ["put_aside", "take_back"]

_VALUES = "values"


def put_aside(session: Session, folder: Path, names: Collection[str]) -> dict[tuple[str, int | None], int]:
    """Writes parameters and the optimizer state into `folder`. It takes `BUFFER_BYTES` of memory, since the arena is
    still there.

    Args:
        names: parameters that may be others than the bundle's; the rest stays in the bundle.

    Returns:
        (parameter, slot) → where in the file it begins; the parameter itself has the slot None.

    Raises:
        OSError: the folder cannot be written.
    """
    places: dict[tuple[str, int | None], int] = {}
    buffer = np.empty(BUFFER_BYTES // 4, np.float32)
    with open(folder / _VALUES, "wb") as file:
        for name, parameter in session.parameters().items():
            for slot in (*((None,) if name in names else ()), *range(parameter.states)):
                places[name, slot] = file.tell()
                for part in session.read_parts(name, slot, buffer):
                    file.write(part.data)
    return places


def take_back(session: Session, folder: Path, places: Mapping[tuple[str, int | None], int]) -> None:
    """Reads what `put_aside` wrote into a session, of any plan for the same model, that has the bundle's weights."""
    parameters = session.parameters()
    buffer = np.empty(BUFFER_BYTES // 4, np.float32)
    with open(folder / _VALUES, "rb") as file:
        for (name, slot), place in places.items():
            parameter = parameters[name]
            if slot is None or slot < parameter.states:
                file.seek(place)
                session.write_parts(name, slot, parameter.shape, _parts(file, prod(parameter.shape), buffer))


def _parts(file: BinaryIO, count: int, buffer: np.ndarray) -> Iterator[np.ndarray]:
    """The next `count` float32 of a file; each part lies in `buffer`."""
    for first in range(0, count, buffer.size):
        part = buffer[: count - first]
        file.readinto(part.view(np.uint8))  # type: ignore[attr-defined]
        yield part
