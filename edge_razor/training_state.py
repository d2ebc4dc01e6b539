"""What a checkpoint says of a run and holds of it: a trainer's settings, step and data position, and its tensors.

`SETTINGS` is the one list of the settings: what is not in it is neither written nor taken.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_razor.bundle import Bundle
from edge_razor.checkpoint import BUFFER_BYTES, Checkpoint, write_checkpoint
from edge_razor.errors import CheckpointError, UsageError
from edge_razor.run_lock import run_lock
from edge_razor.runtime import Session
from edge_razor.tensors import TensorSpec, make_directory

if TYPE_CHECKING:
    from edge_razor.trainer import Trainer

__all__ = [
    "SETTINGS",
    "Progress",
    "bundle_of",
    "check_bundle",
    "read_tensors",
    "run_state",
    "stored_extra",
    "stored_progress",
    "stored_settings",
    "write_run",
]

ASKED = ("sparsity", "micro_batch")  # what the planner may choose again when the cap changes
_STATE_NAMES = {"sgd": ("momentum",), "adamw": ("exp_avg", "exp_avg_sq")}


# ---- Settings: the arguments that make a trainer do the same training again ----


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) <= 1e30  # type: ignore[arg-type]  # nor NaN


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))


def _or_none(valid: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: value is None or valid(value)


@dataclass(frozen=True)
class Setting:
    """`of(trainer)` is the value, JSON-able; `valid(value)` its type. The planner checks the range."""

    of: Callable[[Trainer], Any]
    valid: Callable[[object], bool]


def _planned(name: str, valid: Callable[[object], bool], default: Any = None) -> Setting:
    """A setting that the plan fixes; `default` in plans made before there was a choice."""
    return Setting(lambda trainer: trainer.plan.summary.get(name, default), valid)


def _of_optimizer(name: str, valid: Callable[[object], bool]) -> Setting:
    return Setting(lambda trainer: trainer.plan.summary["optimizer"][name], valid)


SETTINGS: Mapping[str, Setting] = {
    "batch_size": _planned("batch_size", _is_count),
    "micro_batch": _planned("micro_batch", _or_none(_is_count)),
    "sparsity": Setting(
        lambda trainer: trainer.plan.sparsity if trainer.plan.summary["choices"] is None else "auto",
        lambda value: _is_text(value) or _is_number(value),
    ),
    "choices": _planned("choices", _or_none(lambda value: isinstance(value, dict))),
    "prefer": _planned("prefer", _is_text),
    "razor": _planned("razor", _is_text),
    "attention": _planned("attention", _is_text, "recompute"),
    "frozen_weights": _planned("frozen_weights", _is_text),
    "optimizer": _of_optimizer("name", _is_text),
    "lr": Setting(lambda trainer: trainer.lr, _is_number),
    "momentum": _of_optimizer("momentum", _is_number),
    "nesterov": _of_optimizer("nesterov", lambda value: isinstance(value, bool)),
    "weight_decay": _of_optimizer("weight_decay", _is_number),
    "betas": _of_optimizer("betas", _is_pair),
    "eps": _of_optimizer("eps", _is_number),
    "schedule": Setting(lambda trainer: trainer.schedule.kind, _is_text),
    "warmup_steps": Setting(lambda trainer: trainer.schedule.warmup_steps, _is_count),
    "total_steps": Setting(lambda trainer: trainer.schedule.total_steps, _or_none(_is_count)),
    "seed": Setting(lambda trainer: trainer.seed, _is_count),
    "threads": _planned("threads", _or_none(_is_count)),
    "mem_budget": _planned("mem_budget", _or_none(lambda value: _is_count(value) or _is_text(value))),
}
# Came after checkpoints of this format: one without them was made with `Trainer`'s default.
_LATER = ("attention", "frozen_weights")


def stored_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """Arguments of `Trainer` that a run had, each of the right type: a checkpoint may come from anyone.

    Raises:
        CheckpointError: missing, unknown or of another type.
    """
    settings = checkpoint.state.get("settings")
    if not isinstance(settings, dict):
        raise CheckpointError(f"{checkpoint.path}: has no settings; it is damaged")
    for name in SETTINGS.keys() - settings.keys() - set(_LATER):
        raise CheckpointError(f"{checkpoint.path}: lacks the setting {name!r}; it is damaged")
    for name, value in settings.items():
        if name not in SETTINGS:
            raise CheckpointError(
                f"{checkpoint.path}: this edge-razor does not know its setting {name!r}; use the one that wrote it"
            )
        if not SETTINGS[name].valid(value):
            raise CheckpointError(f"{checkpoint.path}: its setting {name!r} is not valid; it is damaged")
    return dict(settings)


# ---- The rest of what is said ----


@dataclass(frozen=True)
class Progress:
    """Optimizer updates done; (epoch, batches of it done); settings that the planner may choose again."""

    update: int
    position: tuple[int, int]
    asked: dict[str, Any]


def run_state(trainer: Trainer, asked: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """What `Checkpoint.state` gives back."""
    return {
        "bundle": str(trainer.bundle.path.resolve()),
        "bundle_id": trainer.bundle.id,
        "weights_id": trainer.bundle.weights_id,
        "update": trainer.update,
        "position": list(trainer.position),
        "settings": trainer.settings(),
        "asked": {name: asked[name] for name in ASKED},
        "extra": dict(extra),
    }


def stored_progress(checkpoint: Checkpoint) -> Progress:
    """
    Raises:
        CheckpointError: missing, or of another type.
    """
    state = checkpoint.state
    position, asked = state.get("position"), state.get("asked", {})
    if not _is_count(state.get("update")) or not (
        isinstance(position, list) and len(position) == 2 and all(map(_is_count, position))
    ):
        raise CheckpointError(f"{checkpoint.path}: has no valid step or data position; it is damaged")
    if not isinstance(asked, dict) or not all(name in ASKED and SETTINGS[name].valid(v) for name, v in asked.items()):
        raise CheckpointError(f"{checkpoint.path}: what was asked of the planner is not valid; it is damaged")
    return Progress(state["update"], (position[0], position[1]), dict(asked))


def stored_extra(checkpoint: Checkpoint) -> dict[str, Any]:
    """What `Trainer.save` was given beside the training itself.

    Raises:
        CheckpointError: it is no table, or its classes are no list of names.
    """
    extra = checkpoint.state.get("extra", {})
    classes = extra.get("classes") if isinstance(extra, dict) else 0
    if classes is not None and not (isinstance(classes, list) and all(map(_is_text, classes))):
        raise CheckpointError(f"{checkpoint.path}: what it says of the run is not valid; it is damaged")
    return dict(extra)


def bundle_of(checkpoint: Checkpoint, bundle: str | os.PathLike[str] | None) -> Path:
    """Path of the bundle that a checkpoint belongs to: `bundle` if given, else where it was then.

    Raises:
        CheckpointError: it is not there any more.
    """
    if bundle is not None:
        return Path(bundle)
    path = checkpoint.state.get("bundle")
    if not isinstance(path, str) or "\0" in path or not Path(path).exists():
        raise CheckpointError(f"{checkpoint.path}: its bundle {path} is gone; name the bundle's present path")
    return Path(path)


def check_bundle(checkpoint: Checkpoint, bundle: Bundle) -> None:
    """
    Raises:
        CheckpointError: the checkpoint was made from another bundle (another graph, or other weights).
    """
    ids = (checkpoint.state.get("bundle_id"), checkpoint.state.get("weights_id"))
    if ids != (bundle.id, bundle.weights_id):
        raise CheckpointError(f"{checkpoint.path}: belongs to another bundle than {bundle.path}")


# ---- Tensors ----


def _places(session: Session, names: Collection[str], optimizer: str) -> dict[str, tuple[str, int | None]]:
    """Tensor of a checkpoint → parameter and slot of its optimizer state (None: the parameter), in the file's order."""
    parameters = session.parameters()
    places: dict[str, tuple[str, int | None]] = {name: (name, None) for name in names}
    for name in names:
        for slot, title in enumerate(_STATE_NAMES[optimizer][: parameters[name].states]):
            places[f"optimizer/{title}/{name}"] = (name, slot)
    return places


def write_run(
    run: Path,
    session: Session,
    names: Collection[str],
    optimizer: str,
    state: Mapping[str, Any],
    *,
    keep: int,
    damaged: Iterable[Path],
) -> None:
    """Writes a checkpoint of `names` and their optimizer state into a run directory, which is made if it is missing.

    Args:
        state: of `run_state`.
        keep, damaged: as `write_checkpoint`.

    Raises:
        UsageError: no checkpoint shall stay.
        NonFiniteError, OSError: as `write_checkpoint`.
        RunLockedError: another process is training in `run`.
    """
    if keep < 1:
        raise UsageError(f"keep must be at least 1 checkpoint, not {keep}")
    parameters, places = session.parameters(), _places(session, names, optimizer)
    specs = {tensor: TensorSpec(np.dtype("<f4"), tuple(parameters[name].shape)) for tensor, (name, _) in places.items()}
    buffer = np.empty(BUFFER_BYTES // 4, np.float32)

    def parts(tensor: str) -> Iterator[np.ndarray]:
        name, slot = places[tensor]
        return session.read_parts(name, slot, buffer)

    make_directory(run)
    with run_lock(run):
        write_checkpoint(run / "checkpoint", state["update"], specs, parts, state, keep=keep, damaged=damaged)


def read_tensors(checkpoint: Checkpoint, session: Session, names: Collection[str], optimizer: str) -> None:
    """Sets `names` and their optimizer state; that of a parameter which was frozen then stays as it is.

    Raises:
        CheckpointError: it trains other parameters, or with another optimizer.
    """
    trained = {name for name in checkpoint.tensors if not name.startswith("optimizer/")}
    if trained != set(names):
        other = sorted(trained ^ set(names))[0]
        raise CheckpointError(f"{checkpoint.path}: trains other parameters than the bundle ({other!r})")
    for tensor, (name, slot) in _places(session, names, optimizer).items():
        if slot is None or tensor in checkpoint.tensors:
            session.write_parts(name, slot, checkpoint.spec(tensor).shape, checkpoint.parts(tensor))
