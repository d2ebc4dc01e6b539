"""Power and heat: pauses between training steps, on battery, above a temperature, or for a share of the time."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from edge_razor.errors import UsageError

__all__ = ["Sensors", "SystemSensors", "Throttle", "be_nice", "parse_share"]

POLL_SECONDS = 2.0  # between readings of the sensors, while training and while paused
SLICE_SECONDS = 0.1  # of a pause, after which a request to stop is heard
HYSTERESIS_DEGREES = 5.0  # that it must cool down below the limit before it goes on: no flutter at the limit


class Sensors(Protocol):
    """Where `Throttle` reads from."""

    def temperature(self) -> float | None:
        """The hottest sensor in degrees Celsius; None if there is none."""
        ...

    def on_battery(self) -> bool:
        """Whether the machine runs on a battery now."""
        ...


class SystemSensors:
    """Linux: thermal zones and power supplies of /sys, and psutil's sensors; elsewhere psutil's alone."""

    def __init__(self, root: Path = Path("/sys/class")) -> None:
        self._root = root

    def temperature(self) -> float | None:
        """The hottest of all thermal zones and sensors."""
        degrees = [value / 1000 for value in self._numbers("thermal/thermal_zone*/temp")]
        degrees += [value / 1000 for value in self._numbers("hwmon/hwmon*/temp*_input")]
        if sys.platform != "linux":
            import psutil

            read = getattr(psutil, "sensors_temperatures", dict)
            degrees += [entry.current for entries in read().values() for entry in entries]
        # a zone that is switched off reports 0 or less, a broken one 127.5 or -273
        return max((value for value in degrees if 0 < value < 127), default=None)

    def on_battery(self) -> bool:
        """False on a machine without a battery."""
        if sys.platform != "linux":
            import psutil

            battery = psutil.sensors_battery()
            return battery is not None and battery.power_plugged is False
        batteries, plugged = 0, False
        for supply in self._root.glob("power_supply/*"):
            kind = _text(supply / "type")
            if kind == "Battery" and _text(supply / "scope") != "Device":  # of a mouse, say
                batteries += _text(supply / "status") == "Discharging"
            elif kind != "Battery":
                plugged |= _text(supply / "online") not in ("", "0")
        return batteries > 0 and not plugged

    def _numbers(self, pattern: str) -> list[int]:
        texts = (_text(file) for file in self._root.glob(pattern))
        return [int(text) for text in texts if text.lstrip("-").isdecimal()]


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii", errors="replace").strip()
    except OSError:  # no such file, or a sensor that does not answer now
        return ""


def parse_share(text: str) -> float:
    """A share of the time: "50%" or "0.5".

    >>> parse_share("50%"), parse_share("0.25")
    (0.5, 0.25)

    Raises:
        UsageError: not above 0 and at most 100%.
    """
    number = text.strip()
    try:
        share = float(number[:-1]) / 100 if number.endswith("%") else float(number)
    except ValueError:
        share = math.nan
    if not 0 < share <= 1:
        raise UsageError(f'a share of the time is "50%" or "0.5", above 0 and at most 100%, not {text!r}')
    return share


def be_nice(level: int) -> None:
    """Lowers this process's priority by `level`, 0 … 19; threads and processes that it starts later have it, too.

    Raises:
        UsageError: the level is out of range.
    """
    if not 0 <= level <= 19:
        raise UsageError(f"--nice must be 0 to 19, not {level}")
    if hasattr(os, "nice"):
        os.nice(level)


@dataclass(slots=True)
class Throttle:
    """Pauses between steps. Call `between_steps` after each; `paused_seconds` adds up.

    >>> throttle = Throttle(max_cpu=0.5, max_temperature=80)     # doctest: +SKIP
    >>> for images, labels in batches:                           # doctest: +SKIP
    ...     trainer.step(images, labels)
    ...     throttle.between_steps()

    Attributes:
        max_cpu: share of the time that may be spent training, above 0 and at most 1.
        pause_on_battery: train only while plugged in.
        max_temperature: degrees Celsius; above it there is a pause until it is 5 degrees cooler.
        paused_seconds: of all pauses so far.
    """

    max_cpu: float = 1.0
    pause_on_battery: bool = False
    max_temperature: float | None = None
    sensors: Sensors | None = None
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    paused_seconds: float = 0.0
    _worked_since: float = 0.0
    _next_poll: float = -math.inf
    _hot: bool = False  # since it was above the limit, until it is well below

    def __post_init__(self) -> None:
        """
        Raises:
            UsageError: a value is out of range, or a temperature is asked for and nothing measures it.
        """
        if not 0 < self.max_cpu <= 1:
            raise UsageError(f"max_cpu must be above 0 and at most 1, not {self.max_cpu}")
        if self.sensors is None:
            self.sensors = SystemSensors()
        if self.max_temperature is not None:
            if not math.isfinite(self.max_temperature):
                raise UsageError(f"max_temperature must be degrees Celsius, not {self.max_temperature}")
            if self.sensors.temperature() is None:
                raise UsageError("this machine reports no temperature; leave --max-temperature out")
        self._worked_since = self.clock()

    def start(self) -> None:
        """Counts the time from now on as work; what came before, such as planning, is not paid back."""
        self._worked_since = self.clock()

    def between_steps(
        self,
        should_stop: Callable[[], bool] = lambda: False,
        on_pause: Callable[[str], None] = lambda reason: None,
        on_resume: Callable[[str], None] = lambda text: None,
    ) -> float:
        """Pauses as long as need be, but not after `should_stop()` becomes true; returns the seconds of it.

        Args:
            on_pause: called once with the reason when a pause for battery or heat begins.
            on_resume: called with a sentence when it is over.
        """
        begin = self.clock()
        if self.max_cpu < 1:
            self._sleep(begin + (begin - self._worked_since) * (1 / self.max_cpu - 1), should_stop)
        if begin >= self._next_poll:
            self._next_poll = begin + POLL_SECONDS
            self._wait_for_sensors(should_stop, on_pause, on_resume)
        self._worked_since = self.clock()
        self.paused_seconds += self._worked_since - begin
        return self._worked_since - begin

    def _wait_for_sensors(
        self, should_stop: Callable[[], bool], on_pause: Callable[[str], None], on_resume: Callable[[str], None]
    ) -> None:
        reason = self._reason()
        if reason is None:
            return
        begin = self.clock()
        on_pause(reason)
        while reason is not None and not should_stop():
            self._sleep(self.clock() + POLL_SECONDS, should_stop)
            reason = self._reason()
        if reason is None:
            on_resume(f"going on after a pause of {self.clock() - begin:.0f} s")

    def _reason(self) -> str | None:
        """Why to pause now, None if not."""
        assert self.sensors is not None
        if self.max_temperature is not None:
            degrees = self.sensors.temperature()
            if degrees is not None:
                limit = self.max_temperature - (HYSTERESIS_DEGREES if self._hot else 0)
                self._hot = degrees > limit
                if self._hot:
                    return f"{degrees:.0f} degrees, the limit is {self.max_temperature:g}"
        if self.pause_on_battery and self.sensors.on_battery():
            return "running on battery"
        return None

    def _sleep(self, until: float, should_stop: Callable[[], bool]) -> None:
        while (left := until - self.clock()) > 0 and not should_stop():
            self.sleep(min(left, SLICE_SECONDS))
