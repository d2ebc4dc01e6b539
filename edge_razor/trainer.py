"""The trainer: one bundle, one plan, one native session, and the state of training around them.

This module and what it imports stay light: numpy, the standard library and the ctypes binding. Planning happens in a
child process because it needs onnx.
"""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from edge_razor.batches import Array, check_inputs, check_targets
from edge_razor.budget import resolve_budget
from edge_razor.bundle import Bundle
from edge_razor.checkpoint import BUFFER_BYTES, Checkpoint
from edge_razor.errors import MemoryCapError, NonFiniteError, PlanError, UsageError
from edge_razor.guard import MemoryGuard, MemoryPart, cap_error, memory_parts
from edge_razor.handover import put_aside, take_back
from edge_razor.manifest import IGNORE_INDEX
from edge_razor.memory import forget_peak, give_back_freed_memory, peak_rss_bytes, rss_bytes
from edge_razor.metrics import correct_count, loss_sum
from edge_razor.planner import Plan, plan_in_child
from edge_razor.runtime import Session, SpillInfo, abi_version
from edge_razor.schedule import Schedule
from edge_razor.to_peft import merged
from edge_razor.training_state import (
    SETTINGS,
    bundle_of,
    check_bundle,
    read_tensors,
    run_state,
    stored_progress,
    stored_settings,
    write_run,
)
from edge_razor.units import format_bytes

__all__ = ["Trainer"]

Arrays: TypeAlias = "Array | Sequence[Array]"
KEEP = 2  # checkpoints: the newest, and one to fall back to


class Trainer:
    """Fine-tunes the model of a bundle inside a cap on this process's resident memory.

    >>> trainer = Trainer("model.razor", mem_budget="128MB", batch_size=8)     # doctest: +SKIP
    >>> loss = trainer.step(images, labels)    # float32 [n, 3, 224, 224], int [n], n ≤ 8     # doctest: +SKIP

    Attributes:
        bundle: the opened bundle.
        plan: the plan that the session executes; `plan.summary` has the accounting.
        lr: base learning rate; may be set at any time. The schedule's factor comes on top.
        update: optimizer updates done so far.
        position: (epoch, batches of it done), kept for whoever feeds the data; saved in checkpoints.
        guard: watches resident memory from the first step on.
        data_resident: what the caller's data hold now, in bytes, if the caller knows; for messages about memory.
    """

    def __init__(
        self,
        bundle: str | os.PathLike[str],
        mem_budget: int | str | None = None,
        batch_size: int = 8,
        sparsity: float | str = "auto",
        razor: str = "centered",
        attention: str = "recompute",
        optimizer: str = "sgd",
        lr: float = 1e-2,
        *,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        schedule: str = "constant",
        warmup_steps: int = 0,
        total_steps: int | None = None,
        threads: int | None = None,
        seed: int = 0,
        micro_batch: int | None = None,
        frozen_weights: str = "fp32",
        plan: Plan | None = None,
        data_bytes: int | None = None,
        prefer: str = "balanced",
        allow_freeze: int = 0,
        harm: str | os.PathLike[str] | None = None,
        choices: Mapping[str, Any] | None = None,
        spill_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        """Plans (in a child process) unless a plan is given, opens the session and loads the bundle's weights.

        Args:
            bundle: path of the bundle.
            mem_budget: cap on the resident memory of this process: bytes, "128MB" or "512MiB"; "auto": what is free now
                less a margin (`edge_razor.budget`); None: no cap.
            batch_size: samples of a full batch; `step` takes 1 … batch_size.
            sparsity: share of each kept activation that is dropped, 0 … 0.99, or "auto": chosen for each value.
            razor: "centered" or "plain".
            attention: "recompute" or "probabilities", see `edge_razor.plan`.
            optimizer: "sgd" (momentum, nesterov, weight_decay) or "adamw" (betas, eps, weight_decay), as in torch.
            lr: base learning rate.
            schedule, warmup_steps, total_steps: see `edge_razor.schedule.Schedule`.
            threads: worker threads; None: one for each processor that this process may use.
            seed: of dropout.
            micro_batch: samples that pass at a time; None: the planner's choice.
            frozen_weights: how weights that do not train are held: "fp32" (read in the bundle's file), "bf16" or
                "int8" (in memory, rounded; what is written in the end adds to the bundle's own float32).
            plan: a plan made ahead for this bundle; then everything that it fixes is taken from it, and
                `mem_budget`, `batch_size`, `sparsity`, `razor`, the optimizer and `threads` are ignored.
            data_bytes: what the caller's data will hold while training; None: one float32 batch.
            prefer: with sparsity "auto": "balanced" takes the least error of the gradient that the cap allows, "exact"
                none, "fast" the least time.
            allow_freeze: so many early layers may stay untrained if the cap asks for it.
            harm: harm table of `edge-razor fidelity`; None: usual errors of each form.
            choices: `plan.summary["choices"]` of an earlier plan, to be taken again; checkpoints have it.
            spill_dir: directory for the file in which a plan may keep tensors until the backward pass; None: no plan
                that does is made or taken. The file has no name, so that nothing is left behind.

        Raises:
            BudgetError, BundleError, PlanError, UsageError.
            OSError: the spill file cannot be made, or the disk has no room for it.
        """
        if not (np.isfinite(lr) and lr >= 0):
            raise UsageError(f"learning rate must be a number, 0 or more, not {lr}")
        if not 0 <= seed < 2**63:
            raise UsageError(f"seed must be 0 or more, not {seed}")
        self.schedule: Schedule = Schedule(schedule, warmup_steps, total_steps)
        self.bundle = Bundle(bundle)
        give_back_freed_memory()
        abi_version()  # loads the native library, whose resident bytes belong to the base
        if plan is not None:
            if plan.bundle_id != self.bundle.id:
                raise PlanError(f"the plan was made for another bundle than {self.bundle.path}; plan again")
            made = plan.summary["optimizer"]
            batch_size, razor, threads = plan.batch_size, plan.summary["razor"], plan.threads
            attention = plan.summary.get("attention", "recompute")  # of a plan made before there was a choice
            frozen_weights = plan.summary["frozen_weights"]
            optimizer, momentum, nesterov = made["name"], made["momentum"], made["nesterov"]
            betas, eps, weight_decay = made["betas"], made["eps"], made["weight_decay"]
        if data_bytes is None:
            data_bytes = 4 * batch_size * sum(int(np.prod(i.shape)) for i in self.bundle.manifest.inputs)
            data_bytes += BUFFER_BYTES  # of `save`
        self._planning: dict[str, Any] = {
            "batch_size": batch_size,
            "sparsity": sparsity,
            "razor": razor,
            "attention": attention,
            "optimizer": optimizer,
            "momentum": momentum,
            "nesterov": nesterov,
            "betas": list(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "threads": threads,
            "micro_batch": micro_batch,
            "frozen_weights": frozen_weights,
            "base_bytes": rss_bytes(),
            "data_bytes": data_bytes,
            "prefer": prefer,
            "allow_freeze": allow_freeze,
            "harm": None if harm is None else os.fspath(harm),
            "spill": spill_dir is not None,
        }
        self._spill_dir = spill_dir
        if plan is None:
            budget = resolve_budget(mem_budget)
            plan = plan_in_child(self.bundle.path, mem_budget=budget.bytes, choices=choices, **self._planning)
        self.lr: float = lr
        self.seed: int = seed
        self.update = 0
        self.position = (0, 0)
        self._damaged_checkpoints: tuple[Path, ...] = ()  # that the next `save` replaces
        self.data_resident: Callable[[], int] | None = None
        self._profiling = False
        self._replaced: set[str] = set()  # frozen parameters that are not the bundle's any more
        self._open(plan)
        self.guard = MemoryGuard(plan.summary["mem_budget"], plan.predicted_peak_bytes)
        self._guard_stop = weakref.finalize(self, self.guard.stop)

    def _open(self, plan: Plan) -> None:
        """Opens the sessions of a plan; parameters are the bundle's, and state is zero."""
        session = Session(plan.binary, spill_dir=self._spill_dir)
        try:
            spilled = session.spill_info().file_bytes
            if spilled and self._spill_dir is None:
                raise UsageError(f"the plan keeps {format_bytes(spilled)} in a file: give spill_dir (--spill-dir DIR)")
            self._shorter = {
                tokens: Session(data, session, spill_dir=self._spill_dir) for tokens, data in plan.buckets.items()
            }
            session.load_weights(*self.bundle.weights_place)
            self.bundle.check_unchanged()
        except BaseException:
            session.close()
            raise
        self._session = session
        self._parameters = session.parameters()
        self.plan: Plan = plan
        if self._profiling:
            self.profile(True)

    def _close_sessions(self) -> None:
        for session in (*self._shorter.values(), self._session):
            session.close()

    # ---- What is trained ----

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample of the first input, in the user's layout."""
        return self.bundle.manifest.inputs[0].shape

    @property
    def batch_size(self) -> int:
        return self.plan.batch_size

    @property
    def trainable(self) -> tuple[str, ...]:
        """Names of the parameters that training changes."""
        return tuple(name for name, p in self._parameters.items() if p.trainable)

    @property
    def _saved(self) -> list[str]:
        """What a checkpoint holds: also what the present plan has frozen, which an earlier one may have trained."""
        allowed = set(self.bundle.manifest.trainable)
        return [name for name, p in self._parameters.items() if p.trainable or name in allowed]

    @property
    def _changing(self) -> set[str]:
        """Parameters that may be others than the bundle's."""
        return {*self.bundle.manifest.trainable, *self._replaced}

    @property
    def classes(self) -> int | None:
        """Number of classes for cross-entropy, else None."""
        return self.bundle.manifest.class_count

    @property
    def buckets(self) -> tuple[int, ...]:
        """Numbers of tokens that texts may have, ascending; empty for a model of fixed inputs."""
        return (*sorted(self._shorter), *self.input_shape) if self._shorter else ()

    def _session_for(self, arrays: Sequence[Array]) -> Session:
        return self._shorter.get(_tokens(arrays) or 0, self._session)

    # ---- Training and inference ----

    def step(self, inputs: Arrays, targets: Array) -> float:
        """One optimizer update; returns the mean loss over the samples, before the update.

        Args:
            inputs: [n, …] in the user's layout (NCHW), 1 ≤ n ≤ batch_size: float32 as torch would take it, or uint8
                pixels (also NHWC), which are normalized as the bundle says. A sequence of arrays for a model with
                several inputs; texts may have any number of tokens that is in `buckets`.
            targets: class indices (any integer type), or float32 in the output's shape for mse and bce_with_logits.

        Raises:
            UsageError: wrong shape, type or label, or NaN or infinity in the inputs; nothing was changed.
            NonFiniteError: the loss became NaN or infinite; the update was not made.
            OSError: the spill file cannot be written or read: go on from the last checkpoint.
            MemoryCapError: memory grew close to the cap, beyond the plan; nothing was changed: save and end, or
                set another budget.
        """
        manifest = self.bundle.manifest
        arrays, channels_last = check_inputs(inputs, manifest, tuple(self._shorter))
        target = check_targets(targets, manifest, len(arrays[0]), _tokens(arrays))
        update = self.update + 1
        alarm = self.memory_alarm()
        if alarm is not None:
            raise alarm
        self.guard.start()
        if len(target) > self.batch_size:
            raise UsageError(f"a batch of {len(target)} samples, but the plan is for at most {self.batch_size}")
        try:
            loss = self._session_for(arrays).train_step(
                arrays,
                target,
                learning_rate=self.lr * self.schedule.factor(update),
                update=update,
                seed=self.seed,
                channels_last=channels_last,
            )
        except NonFiniteError as error:
            raise NonFiniteError(
                f"training stopped at step {update}: {error}; lower the learning rate or check the data"
            ) from error
        self.update = update
        return loss

    @property
    def current_lr(self) -> float:
        """Learning rate of the next update."""
        return self.lr * self.schedule.factor(self.update + 1)

    def predict(self, inputs: Arrays) -> np.ndarray:
        """Model output, float32 [n, …] in the user's layout, for any number of samples, in inference mode.

        Raises:
            UsageError: as `step`.
        """
        arrays, channels_last = check_inputs(inputs, self.bundle.manifest, tuple(self._shorter))
        return self._session_for(arrays).predict(arrays, channels_last=channels_last)[0]

    def evaluate(self, dataset: Iterable[tuple[Arrays, Array]]) -> dict[str, Any]:
        """Mean loss and accuracy over batches of (inputs, targets), of any sizes.

        Returns:
            `samples`, `loss` (the bundle's), `accuracy` (0 … 1; None for mse), and for a model of tokens `perplexity`.

        Raises:
            UsageError: as `step`, or there is no batch at all.
        """
        manifest = self.bundle.manifest
        samples, total, right = 0, np.zeros(2), np.zeros(2)
        for inputs, targets in dataset:
            outputs = self.predict(inputs)
            tokens = outputs.shape[1] if manifest.per_token else None
            target = check_targets(targets, manifest, len(outputs), tokens)
            axis = manifest.class_axis
            total += loss_sum(manifest.loss, outputs, target, manifest.label_smoothing, axis)
            right += correct_count(manifest.loss, outputs, target, axis)
            samples += len(outputs)
        if not samples:
            raise UsageError("there is nothing to evaluate: the data set has no batches")
        if not total[1]:
            raise UsageError(f"there is nothing to evaluate: every target is {IGNORE_INDEX}, which does not count")
        accuracy = float(right[0] / right[1]) if right[1] else None
        result: dict[str, Any] = {"samples": samples, "loss": float(total[0] / total[1]), "accuracy": accuracy}
        if manifest.per_token:
            result["perplexity"] = float(np.exp(total[0] / total[1]))
        return result

    # ---- The cap while training ----

    def memory_alarm(self) -> MemoryCapError | None:
        """What the guard has to say: None, or which part of the process grew, beyond the plan and close to the cap."""
        resident, cap = self.guard.alarm, self.plan.summary["mem_budget"]
        if resident is None or cap is None:
            return None
        return cap_error(resident, cap, self.update, self.memory_parts())

    def memory_parts(self) -> list[MemoryPart]:
        """The parts of this process's memory: planned, and resident now."""
        data = None if self.data_resident is None else self.data_resident()
        return memory_parts(self.plan.summary, self._session.resident_bytes(), data)

    def set_budget(self, mem_budget: int | str | None, scratch: str | os.PathLike[str] | None = None) -> Plan:
        """Plans again for another cap and goes on with the new plan: call it between two steps.

        Parameters, optimizer state, update counter, learning rate, dropout's seed and data position stay as they are.
        With exact storage and the same micro-batch before and after, further steps give the same bits as without the
        change. While it plans, neither the old arena nor the new one is in memory: parameters and state wait in a file.

        Args:
            mem_budget: as for `Trainer`.
            scratch: directory for that file, as large as parameters and optimizer state, which is removed afterwards;
                None: the system's temporary directory.

        Returns:
            The new plan.

        Raises:
            BudgetError: the cap cannot be met; the trainer goes on with the old plan.
            UsageError: no amount of memory.
            OSError: the scratch directory cannot be written; the trainer goes on with the old plan.
        """
        import tempfile  # not before it is needed: the process that trains pays for every module

        budget = resolve_budget(mem_budget)
        old = self.plan
        with tempfile.TemporaryDirectory(prefix=".edge-razor-", dir=scratch) as folder:
            places = put_aside(self._session, Path(folder), self._changing)
            self._close_sessions()
            forget_peak()  # what comes now is the next plan's
            try:
                self._open(plan_in_child(self.bundle.path, mem_budget=budget.bytes, **self._planning))
            except BaseException:
                self._open(old)
                raise
            finally:
                take_back(self._session, Path(folder), places)
        self.guard.watch(self.plan.summary["mem_budget"], self.plan.predicted_peak_bytes)
        return self.plan

    # ---- Weights ----

    def read_tensor(self, name: str) -> np.ndarray:
        """One tensor of the state dict as it is now, numpy, torch layout; with LoRA the sum of weight and addition.

        Raises:
            UsageError: no such name.
        """
        manifest = self.bundle.manifest
        stored = manifest.aliases.get(name, name)
        if stored not in self._parameters and stored not in self.bundle.tensors:
            raise UsageError(f"the model has no tensor {name!r}")
        return merged(self.bundle, stored, self._read_stored)

    def _read_stored(self, name: str) -> np.ndarray:
        """A tensor as it is now; one that never trains as the bundle has it, which the session may hold rounded."""
        if name not in self._parameters or name not in self._changing:
            return self.bundle.read_tensor(name)
        return self._session.read_parameter(name)

    def state_dict(self) -> dict[str, np.ndarray]:
        """All tensors under the names and in the layout and order of the user's torch state dict (copies)."""
        return {name: self.read_tensor(name) for name in self.bundle.manifest.state_names}

    def load_state_dict(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Sets parameters from arrays in torch layout; names that are no float parameters of the session are ignored.

        Raises:
            UsageError: a parameter is missing or has another shape; nothing was changed.
        """
        chosen = {}
        for name, parameter in self._parameters.items():
            if name not in tensors:
                if name in self.bundle.manifest.state_dict:
                    raise UsageError(f"the state dict has no {name!r}")
                continue  # a constant of the graph, in no state dict
            array = np.ascontiguousarray(tensors[name], dtype=np.float32)
            if array.shape != tuple(parameter.shape):
                raise UsageError(f"{name!r} has shape {list(array.shape)}, the model needs {list(parameter.shape)}")
            chosen[name] = array
        for name, array in chosen.items():
            if name not in self.bundle.manifest.trainable:
                if name not in self._replaced and np.array_equal(array, self.bundle.read_tensor(name)):
                    continue  # it stays where it is, perhaps in the bundle's file
                self._replaced.add(name)
            self._session.write_parameter(name, array)
        lora = self.bundle.manifest.lora
        for layer in lora.layers.values() if lora is not None else ():  # what was loaded is the sum already
            self._session.write_parameter(layer.b, np.zeros(self._parameters[layer.b].shape, np.float32))

    # ---- Checkpoints ----

    def settings(self) -> dict[str, Any]:
        """The arguments that make a trainer do the same training again; JSON-able."""
        return {name: setting.of(self) for name, setting in SETTINGS.items()}

    def save(self, path: str | os.PathLike[str], keep: int = KEEP, **extra: Any) -> None:
        """Writes a checkpoint into `path`; those that were there stay until the new one is durable.

        It takes `BUFFER_BYTES` of memory, whatever the size of the model.

        Args:
            path: run directory, made if it is missing.
            keep: how many checkpoints stay, this one included. With one alone, nothing is left to fall back to if the
                disk damages it.
            extra: JSON-able values that `Checkpoint.state["extra"]` gives back.

        Raises:
            NonFiniteError: a parameter is NaN or infinite; the old checkpoints stay.
            OSError: the disk is full or not writable; the newest old checkpoint stays.
            RunLockedError: another process is training in `path`.
        """
        write_run(
            Path(path),
            self._session,
            self._saved,
            self.plan.summary["optimizer"]["name"],
            run_state(self, self._planning, extra),
            keep=keep,
            damaged=self._damaged_checkpoints,
        )
        self._damaged_checkpoints = ()

    @classmethod
    def resume(
        cls, path: str | os.PathLike[str], bundle: str | os.PathLike[str] | None = None, **options: Any
    ) -> Trainer:
        """A trainer that goes on where the checkpoint of run directory `path` was written.

        Args:
            path: run directory.
            bundle: where the bundle is now; None: where it was then.
            options: `mem_budget`, `threads`, `data_bytes`, or other arguments of `Trainer` that shall differ from then.

        Raises:
            CheckpointError: missing, damaged, or of another bundle.
            BudgetError, BundleError, PlanError, UsageError: as `Trainer`.
        """
        with Checkpoint(path) as checkpoint:
            for problem in checkpoint.damaged.values():
                warnings.warn(f"{problem}; going on from {checkpoint.path}", RuntimeWarning, stacklevel=2)
            settings = stored_settings(checkpoint)
            source = bundle_of(checkpoint, bundle)
            trainer = cls(source, **{**settings, **options})
            trainer.load_checkpoint(checkpoint)
        return trainer

    def load_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Takes parameters, optimizer state, step and data position from a checkpoint of the same bundle.

        Raises:
            CheckpointError: it belongs to another bundle, or trains other parameters, or with another optimizer.
        """
        check_bundle(checkpoint, self.bundle)
        progress = stored_progress(checkpoint)
        read_tensors(checkpoint, self._session, self._saved, self.plan.summary["optimizer"]["name"])
        self._damaged_checkpoints = tuple(checkpoint.damaged)
        self.update = progress.update
        self.position = progress.position
        self._planning |= progress.asked

    # ---- Export back, figures ----

    def to_torch(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file with the user's own state dict: `load_state_dict(strict=True)` takes it."""
        from edge_razor.to_torch import write_state_dict

        write_state_dict(Path(path), self.bundle, self.read_tensor)

    def to_peft(self, path: str | os.PathLike[str]) -> None:
        """Writes the LoRA adapter alone as a directory that Hugging Face's PEFT loads.

        Raises:
            UsageError: the bundle was not exported with ``trainable="lora:…"``.
        """
        from edge_razor.to_peft import write_adapter

        write_adapter(Path(path), self.bundle, self._session.read_parameter)

    def to_onnx(self, path: str | os.PathLike[str]) -> None:
        """Writes the inference graph with the present weights as one ONNX file, in a child process (it needs onnx)."""
        from edge_razor.to_onnx import to_onnx_in_child

        to_onnx_in_child(Path(path), self.bundle, self.read_tensor)

    @property
    def peak_rss_bytes(self) -> int:
        """Highest resident memory of this process so far."""
        return peak_rss_bytes()

    def spill_info(self) -> SpillInfo:
        """Size of the spill file, and the bytes that were written to it and read back so far; 0 if there is none."""
        return self._session.spill_info()

    def profile(self, enabled: bool) -> None:
        """Starts (counting from zero) or stops timing of every step of the plan."""
        self._profiling = enabled
        for session in (self._session, *self._shorter.values()):
            session.profile(enabled)

    def profile_entries(self) -> list[Any]:
        """Time of every step of the plan since profiling started: kernel, label, phase, calls, seconds."""
        return self._session.profile_entries()

    def profiles(self) -> list[tuple[bytes, list[Any]]]:
        """(plan file, `profile_entries`) of the plan, and of those for shorter texts."""
        plans = [(self.plan.binary, self._session), *((self.plan.buckets[t], s) for t, s in self._shorter.items())]
        return [(binary, session.profile_entries()) for binary, session in plans]

    def close(self) -> None:
        """Frees the session's memory; the trainer cannot be used any more."""
        self._guard_stop()
        self._close_sessions()
        self.bundle.close()

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _tokens(arrays: Sequence[Array]) -> int | None:
    """Tokens of a batch of texts."""
    return next((int(a.shape[1]) for a in arrays if a.ndim == 2 and a.dtype == np.int32), None)
