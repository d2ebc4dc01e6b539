"""Measuring systems in turns: one step each, round after round, so that what else the machine does hits all alike."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import Worker, WorkerError
from benchmarks.systems import ort_training

PROFILE_STEPS = 5
PAUSE = 0.02  # seconds before each step: thread pools of the system before it may still spin for some milliseconds


@dataclass(frozen=True)
class Case:
    """A system to measure: its name in tables, and what ``benchmarks.worker`` is given for it: options, and names and
    values that its environment has besides."""

    label: str
    system: str
    options: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()


@dataclass
class Measured:
    """What was measured of one case. `seconds` has one figure a round; `error` is set if it could not be measured."""

    label: str
    system: str
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    setup: dict[str, Any] = field(default_factory=dict)
    peak_rss_bytes: int = 0
    figures: dict[str, Any] = field(default_factory=dict)
    profile: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None

    @property
    def step(self) -> float:
        """Median seconds."""
        return median(self.seconds)

    @property
    def kept_bytes(self) -> int | None:
        """Bytes kept between forward and backward pass, where the system says."""
        return self.figures.get("kept_bytes", self.setup.get("kept_bytes"))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> Measured:
        return Measured(**values)


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", file=sys.stderr, flush=True)


def _start(case: Case, model: str, common: Sequence[str], timeout: float) -> Worker:
    """
    Raises:
        WorkerError
    """
    python: str | Path = sys.executable
    if case.system == "onnxruntime-training":
        try:
            python = ort_training.environment()
        except RuntimeError as error:
            raise WorkerError(str(error)) from error
    arguments = (case.system, model, *common, *case.options)
    return Worker(*arguments, python=python, timeout=timeout, environment=dict(case.environment))


def take_turns(
    cases: Sequence[Case],
    model: str,
    common: Sequence[str],
    rounds: int,
    warm_up: int,
    profile: bool = False,
    timeout: float = 900.0,
    settle: float = 0.0,
) -> list[Measured]:
    """Measures the cases on one model, each in a process of its own; all processes live until the end.

    Args:
        common: options for every worker.
        rounds: steps that count, after `warm_up` ones that do not.
        profile: whether edge-razor's workers profile some more steps at the end.
        timeout: seconds that one answer may take.
        settle: where the fastest system takes less than so many seconds a step, each takes two steps a turn and the
            second counts: caches and threads are then as the step before left them, as in training. (A longer step
            hardly notices how it begins.)

    Returns:
        One result a case, in order; one that failed has `error` set and no other figure is sure.
    """
    results = [Measured(case.label, case.system) for case in cases]
    workers: dict[int, Worker] = {}
    fastest = math.inf  # step of all, seconds

    def attempt(index: int, action: Any) -> Any:
        try:
            return action()
        except WorkerError as error:
            results[index].error = str(error)
            workers.pop(index, None)
            say(f"    {results[index].label}: {error}")
            return None

    try:
        for i, case in enumerate(cases):
            worker = attempt(i, lambda case=case: _start(case, model, common, timeout))
            if worker is not None:
                workers[i], results[i].setup = worker, worker.setup
        for turn in range(warm_up + rounds):
            began = time.monotonic()
            for i, worker in list(workers.items()):
                time.sleep(PAUSE)
                for _ in range(2 if fastest < settle else 1):
                    answer = attempt(i, lambda worker=worker: worker.ask("step"))
                    if answer is None:
                        break
                    results[i].losses.append(answer["loss"])
                    fastest = min(fastest, answer["seconds"])
                if answer is not None and turn >= warm_up:
                    results[i].seconds.append(answer["seconds"])
            say(f"    round {turn + 1} of {warm_up + rounds}: {time.monotonic() - began:.1f} s")
        for i, worker in list(workers.items()):
            if profile and cases[i].system == "edge-razor":
                answer = attempt(i, lambda worker=worker: worker.ask(f"profile {PROFILE_STEPS}"))
                results[i].profile = answer["lines"] if answer else []
        for i, worker in list(workers.items()):
            answer = attempt(i, lambda worker=worker: worker.ask("stop"))
            if answer is not None:
                results[i].peak_rss_bytes = answer.pop("peak_rss_bytes")
                results[i].figures = answer
    finally:
        for worker in workers.values():
            worker.close()
    return results
