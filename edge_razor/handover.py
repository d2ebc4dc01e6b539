"""What a session holds, put into files while no session is open, so that two plans' memory is never there at once."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import prod
from pathlib import Path

import numpy as np

from edge_razor.runtime import Session

__all__ = ["put_aside", "take_back"]

_VALUES = "values"
_PARAMETER = -1  # in place of a slot


def put_aside(session: Session, folder: Path, names: Collection[str]) -> dict[tuple[str, int], int]:
    """Writes parameters and the optimizer state into `folder`, one tensor in memory at a time.

    Args:
        names: parameters that may be others than the bundle's; the rest stays in the bundle.

    Returns:
        (parameter, slot) → where in the file it begins; the parameter itself has the slot −1.

    Raises:
        OSError: the folder cannot be written.
    """
    places = {}
    with open(folder / _VALUES, "wb") as file:
        for name, parameter in session.parameters().items():
            if name in names:
                places[name, _PARAMETER] = file.tell()
                session.read_parameter(name).tofile(file)
            for slot in range(parameter.states):
                places[name, slot] = file.tell()
                session.read_state(name, slot).tofile(file)
    return places


def take_back(session: Session, folder: Path, places: Mapping[tuple[str, int], int]) -> None:
    """Reads what `put_aside` wrote into a session, of any plan for the same model, that has the bundle's weights."""
    parameters = session.parameters()
    with open(folder / _VALUES, "rb") as file:
        for (name, slot), place in places.items():
            parameter = parameters[name]
            if slot < parameter.states:
                file.seek(place)
                value = np.fromfile(file, np.float32, prod(parameter.shape))
                if slot == _PARAMETER:
                    session.write_parameter(name, value.reshape(parameter.shape))
                else:
                    session.write_state(name, slot, value.reshape(parameter.shape))
