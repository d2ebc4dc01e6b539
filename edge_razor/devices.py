"""Device profiles: what planning on a workstation assumes about the device that will train (docs/devices.md)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from edge_razor.errors import UsageError
from edge_razor.units import format_bytes, parse_bytes

__all__ = ["INSTRUCTION_SETS", "Device", "find_device", "read_devices"]

INSTRUCTION_SETS = ("neon", "sse2", "avx2", "avx512")


@dataclass(frozen=True, slots=True)
class Device:
    """One entry of the table. Sizes in bytes.

    Attributes:
        memory: what the device has.
        free: what the operating system usually leaves to one process: the default cap.
        base_rss: resident memory of the training process after its imports.
        sources: where the figures come from.
    """

    name: str
    description: str
    cores: int
    memory: int
    free: int
    instruction_set: str
    base_rss: int
    sources: tuple[str, ...]

    def assumptions(self, mem_budget: int | str | None, threads: int | None) -> str:
        """One line for people: what a plan with this cap and these threads (None: the device's) takes for granted."""
        cap = f"{format_bytes(self.free)} usually free" if mem_budget is None else f"a cap of {mem_budget}, as asked"
        workers = f"{self.cores} cores" if threads is None else f"{threads} of {self.cores} cores, as asked"
        return (
            f"for {self.name} ({self.description}): {cap} of {format_bytes(self.memory)}, {workers}, "
            f"{self.instruction_set}, {format_bytes(self.base_rss)} for Python and libraries; "
            "seconds by the rates of usual cores, not the device's"
        )


def read_devices(extra: Path | None = None) -> dict[str, Device]:
    """The table that comes with the package, and what the user's own file adds to it or replaces.

    Args:
        extra: a file in the form of `devices.json`.

    Raises:
        UsageError: the user's file cannot be read or an entry is wrong; the message names file, device and field.
    """
    source = files("edge_razor") / "devices.json"
    devices = _parse(source.read_text(encoding="utf-8"), "devices.json")
    if extra is not None:
        try:
            text = extra.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read the devices in {extra}: {error}") from error
        devices |= _parse(text, str(extra))
    return devices


def find_device(name: str, extra: Path | None = None) -> Device:
    """
    Raises:
        UsageError: there is no such device (the message lists all), or as `read_devices`.
    """
    devices = read_devices(extra)
    if name not in devices:
        raise UsageError(
            f"there is no device {name!r}; there are {', '.join(sorted(devices))}; --devices FILE adds your own"
        )
    return devices[name]


def _parse(text: str, source: str) -> dict[str, Device]:
    try:
        stated = json.loads(text)
    except ValueError as error:
        raise UsageError(f"{source} is no JSON: {error}") from error
    table = stated.get("devices") if isinstance(stated, dict) else None
    if not isinstance(table, dict):
        raise UsageError(f'{source}: has no table "devices"')
    return {name: _device(name, entry, source) for name, entry in table.items()}


def _device(name: str, entry: Any, source: str) -> Device:
    where = f"{source}: device {name!r}"
    fields = set(Device.__dataclass_fields__) - {"name"}
    if not isinstance(entry, dict) or set(entry) != fields:
        wrong = sorted(set(entry) ^ fields) if isinstance(entry, dict) else sorted(fields)
        raise UsageError(f"{where} must have exactly the fields {', '.join(sorted(fields))}; look at {wrong[0]!r}")
    cores, instruction_set, sources = entry["cores"], entry["instruction_set"], entry["sources"]
    if type(cores) is not int or not 1 <= cores <= 64:
        raise UsageError(f"{where}: cores must be 1 to 64, not {cores!r}")
    if instruction_set not in INSTRUCTION_SETS:
        raise UsageError(f"{where}: instruction_set must be one of {', '.join(INSTRUCTION_SETS)}")
    if not isinstance(sources, list) or not all(isinstance(s, str) for s in sources):
        raise UsageError(f"{where}: sources must be a list of texts")
    sizes = {}
    for field in ("memory", "free", "base_rss"):
        try:
            sizes[field] = parse_bytes(entry[field])
        except UsageError as error:
            raise UsageError(f"{where}: {field}: {error}") from error
    if not sizes["base_rss"] < sizes["free"] <= sizes["memory"]:
        raise UsageError(f"{where}: base_rss must be less than free, and free at most memory")
    return Device(
        name,
        str(entry["description"]),
        cores,
        sizes["memory"],
        sizes["free"],
        instruction_set,
        sizes["base_rss"],
        tuple(sources),
    )
