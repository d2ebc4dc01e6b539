"""The plan as Python sees it: the bytes that the runtime executes, and a summary for people and reports."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edge_razor.errors import PlanError
from edge_razor.regular_file import read_regular

from .serialize import check_header

__all__ = ["Plan"]

_LIMIT = 64 << 20  # bytes; plans take some hundred bytes a step
_SUMMARY_LIMIT = 16 << 20
_TOKENS = re.compile(r"[1-9]\d{0,6}", re.ASCII)
_READ = ("batch_size", "micro_batch", "threads", "sparsity", "arena_bytes", "predicted_peak_bytes")


@dataclass(frozen=True, slots=True)
class Plan:
    """`binary` is the plan file (docs/plan-format.md); `summary` is JSON-able (docs/planner.md lists its fields).
    `buckets` has the plan files for texts of fewer tokens; they share memory with `binary`.
    """

    binary: bytes
    summary: dict[str, Any]
    buckets: dict[int, bytes] = field(default_factory=dict)

    @property
    def bundle_id(self) -> str:
        """sha256 (hex) of the `training.onnx` that the plan executes."""
        return str(self.summary["bundle_id"])

    @property
    def batch_size(self) -> int:
        return int(self.summary["batch_size"])

    @property
    def micro_batch(self) -> int:
        return int(self.summary["micro_batch"])

    @property
    def threads(self) -> int:
        return int(self.summary["threads"])

    @property
    def sparsity(self) -> float:
        return float(self.summary["sparsity"])

    @property
    def arena_bytes(self) -> int:
        return int(self.summary["arena_bytes"])

    @property
    def predicted_peak_bytes(self) -> int:
        """Predicted peak resident set of the training process, in bytes."""
        return int(self.summary["predicted_peak_bytes"])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan file, those for texts of fewer tokens as `<path>.<tokens>`, the summary as `<path>.json`."""
        target = Path(path)
        target.write_bytes(self.binary)
        for tokens, binary in self.buckets.items():
            _bucket_path(target, tokens).write_bytes(binary)
        summary = self.summary | {
            "plan_sha256": _sha256(self.binary),
            "buckets_sha256": {str(tokens): _sha256(binary) for tokens, binary in self.buckets.items()},
        }
        _summary_path(target).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")

    def files(self, path: str | os.PathLike[str]) -> tuple[Path, ...]:
        """The plan files that `save(path)` writes: the longest texts' first."""
        target = Path(path)
        return (target, *(_bucket_path(target, tokens) for tokens in sorted(self.buckets, reverse=True)))

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Plan:
        """Reads what `save` wrote. The runtime checks the steps again when it opens the plan.

        Raises:
            PlanError: a file is missing, damaged, of another version, or the two do not belong together.
        """
        target = Path(path)
        try:
            binary = read_regular(target, _LIMIT)
            bundle_id = check_header(binary)
            summary = json.loads(read_regular(_summary_path(target), _SUMMARY_LIMIT))
        except OSError as error:
            raise PlanError(f"cannot read {error.filename}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise PlanError(f"{_summary_path(target)} is damaged: {error}") from error
        if not isinstance(summary, dict) or summary.pop("plan_sha256", None) != _sha256(binary):
            raise PlanError(f"{_summary_path(target)} does not belong to {target}; plan again")
        if summary.get("bundle_id") != bundle_id:
            raise PlanError(f"{target} and its summary name different bundles; plan again")
        plan = Plan(binary, summary, _read_buckets(target, bundle_id, summary.pop("buckets_sha256", {})))
        try:
            for name in _READ:
                getattr(plan, name)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise PlanError(f"{_summary_path(target)} is damaged: no valid {name}") from error
        return plan


def _read_buckets(target: Path, bundle_id: str, stated: Any) -> dict[int, bytes]:
    buckets = {}
    if not isinstance(stated, dict) or not all(map(_TOKENS.fullmatch, stated)):
        raise PlanError(f"{_summary_path(target)} is damaged: its buckets are no table of tokens; plan again")
    for tokens, digest in stated.items():
        path = _bucket_path(target, int(tokens))
        try:
            binary = read_regular(path, _LIMIT)
        except OSError as error:
            raise PlanError(f"cannot read {path}, the plan for texts of {tokens} tokens: {error.strerror}") from error
        if _sha256(binary) != digest or check_header(binary) != bundle_id:
            raise PlanError(f"{path} does not belong to {target}; plan again")
        buckets[int(tokens)] = binary
    return buckets


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _bucket_path(path: Path, tokens: int) -> Path:
    return path.with_name(f"{path.name}.{tokens}")


def _summary_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")
