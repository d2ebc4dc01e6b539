"""What a session holds, put into files while no session is open, so that two plans' memory is never there at once."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path

import numpy as np

from edge_razor.runtime import Session

__all__ = ["put_aside", "take_back"]

_WEIGHTS, _STATE = "weights.safetensors", "optimizer-state"


def put_aside(session: Session, folder: Path) -> dict[tuple[str, int], int]:
    """Writes every parameter and the optimizer state into `folder`, one tensor in memory at a time.

    Returns:
        (parameter, slot) → where in the file of states it begins.

    Raises:
        OSError: the folder cannot be written.
    """
    session.save_weights(folder / _WEIGHTS)
    places = {}
    with open(folder / _STATE, "wb") as file:
        for name, parameter in session.parameters().items():
            for slot in range(parameter.states):
                places[name, slot] = file.tell()
                session.read_state(name, slot).tofile(file)
    return places


def take_back(session: Session, folder: Path, places: Mapping[tuple[str, int], int]) -> None:
    """Reads what `put_aside` wrote into a session of the same model, whatever its plan."""
    session.load_weights(folder / _WEIGHTS)
    parameters = session.parameters()
    with open(folder / _STATE, "rb") as file:
        for (name, slot), place in places.items():
            parameter = parameters[name]
            if slot < parameter.states:
                file.seek(place)
                value = np.fromfile(file, np.float32, prod(parameter.shape))
                session.write_state(name, slot, value.reshape(parameter.shape))
