"""The trainer: one bundle, one plan, one native session, and the state of training around them.

This module and what it imports stay light: numpy, the standard library and the ctypes binding. Planning happens in a
child process because it needs onnx.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from edge_razor.batches import Array, check_inputs, check_targets
from edge_razor.bundle import Bundle
from edge_razor.checkpoint import Checkpoint, write_checkpoint
from edge_razor.errors import CheckpointError, NonFiniteError, PlanError, UsageError
from edge_razor.manifest import IGNORE_INDEX
from edge_razor.memory import give_back_freed_memory, peak_rss_bytes, rss_bytes
from edge_razor.metrics import correct_count, loss_sum
from edge_razor.planner import Plan, plan_in_child
from edge_razor.runtime import Session, abi_version
from edge_razor.schedule import Schedule
from edge_razor.tensors import TensorSpec
from edge_razor.to_peft import merged

__all__ = ["Trainer", "bundle_of", "check_bundle"]

Arrays: TypeAlias = "Array | Sequence[Array]"
STATE_NAMES = {"sgd": ("momentum",), "adamw": ("exp_avg", "exp_avg_sq")}


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
    """

    def __init__(
        self,
        bundle: str | os.PathLike[str],
        mem_budget: int | str | None = None,
        batch_size: int = 8,
        sparsity: float | str = "auto",
        razor: str = "centered",
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
    ) -> None:
        """Plans (in a child process) unless a plan is given, opens the session and loads the bundle's weights.

        Args:
            bundle: path of the bundle.
            mem_budget: cap on the resident memory of this process: bytes, "128MB" or "512MiB"; None: no cap.
            batch_size: samples of a full batch; `step` takes 1 … batch_size.
            sparsity: share of each kept activation that is dropped, 0 … 0.99, or "auto": the least that fits.
            razor: "centered" or "plain".
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

        Raises:
            BudgetError, BundleError, PlanError, UsageError.
        """
        if not (np.isfinite(lr) and lr >= 0):
            raise UsageError(f"learning rate must be a number, 0 or more, not {lr}")
        if not 0 <= seed < 2**63:
            raise UsageError(f"seed must be 0 or more, not {seed}")
        self.schedule = Schedule(schedule, warmup_steps, total_steps)
        self.bundle = Bundle(bundle)
        give_back_freed_memory()
        abi_version()  # loads the native library and OpenBLAS, whose resident bytes belong to the base
        if plan is None:
            if data_bytes is None:
                data_bytes = 4 * batch_size * sum(int(np.prod(i.shape)) for i in self.bundle.manifest.inputs)
            plan = plan_in_child(
                self.bundle.path,
                mem_budget=mem_budget,
                batch_size=batch_size,
                sparsity=sparsity,
                razor=razor,
                optimizer=optimizer,
                momentum=momentum,
                nesterov=nesterov,
                betas=list(betas),
                eps=eps,
                weight_decay=weight_decay,
                threads=threads,
                micro_batch=micro_batch,
                frozen_weights=frozen_weights,
                base_bytes=rss_bytes(),
                data_bytes=data_bytes,
            )
        elif plan.bundle_id != self.bundle.id:
            raise PlanError(f"the plan was made for another bundle than {self.bundle.path}; plan again")
        self.plan = plan
        self.lr = lr
        self.seed = seed
        self.update = 0
        self.position = (0, 0)
        self._session = Session(plan.binary)
        self._shorter = {tokens: Session(data, self._session) for tokens, data in plan.buckets.items()}
        self._parameters = self._session.parameters()
        self._replaced: set[str] = set()  # frozen parameters that are not the bundle's any more
        self._session.load_weights(*self.bundle.weights_place)
        self.bundle.check_unchanged()

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
        """
        manifest = self.bundle.manifest
        arrays, channels_last = check_inputs(inputs, manifest, tuple(self._shorter))
        target = check_targets(targets, manifest, len(arrays[0]), _tokens(arrays))
        update = self.update + 1
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
        """A tensor as it is now; a frozen one as the bundle has it, which the session may hold rounded."""
        parameter = self._parameters.get(name)
        if parameter is None or not parameter.trainable and name not in self._replaced:
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
            if not self._parameters[name].trainable:
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
        summary = self.plan.summary
        optimizer = summary["optimizer"]
        return {
            "batch_size": self.plan.batch_size,
            "micro_batch": self.plan.micro_batch,
            "sparsity": self.plan.sparsity,
            "razor": summary["razor"],
            "frozen_weights": summary["frozen_weights"],
            "optimizer": optimizer["name"],
            "lr": self.lr,
            **{key: optimizer[key] for key in ("momentum", "nesterov", "weight_decay", "betas", "eps")},
            "schedule": self.schedule.kind,
            "warmup_steps": self.schedule.warmup_steps,
            "total_steps": self.schedule.total_steps,
            "seed": self.seed,
        }

    def save(self, path: str | os.PathLike[str], **extra: Any) -> None:
        """Writes `path`/checkpoint; the checkpoint that was there stays until the new one is durable.

        Args:
            path: run directory, made if it is missing.
            extra: JSON-able values that `Checkpoint.state["extra"]` gives back.

        Raises:
            NonFiniteError: a parameter is NaN or infinite; the old checkpoint stays.
            OSError: the disk is full or not writable; the old checkpoint stays.
        """
        specs: dict[str, TensorSpec] = {}
        for name in self.trainable:
            specs[name] = TensorSpec(np.dtype("<f4"), tuple(self._parameters[name].shape))
        for name in self.trainable:
            for slot in self._state_names(name):
                specs[f"optimizer/{slot}/{name}"] = specs[name]
        state = {
            "bundle": str(self.bundle.path.resolve()),
            "bundle_id": self.bundle.id,
            "weights_id": self.bundle.weights_id,
            "update": self.update,
            "position": list(self.position),
            "settings": self.settings(),
            "extra": extra,
        }
        file = Path(path) / "checkpoint" / "checkpoint.safetensors"
        write_checkpoint(file, specs, self._read_checkpoint_tensor, state)

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
            settings = checkpoint.state.get("settings")
            if not isinstance(settings, dict):
                raise CheckpointError(f"{checkpoint.path}: has no settings; it is damaged")
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
        names = {name for name in checkpoint.tensors if not name.startswith("optimizer/")}
        if names != set(self.trainable):
            other = sorted(names ^ set(self.trainable))[0]
            raise CheckpointError(f"{checkpoint.path}: trains other parameters than the bundle ({other!r})")
        try:
            update = int(checkpoint.state["update"])
            epoch, batch = (int(v) for v in checkpoint.state["position"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{checkpoint.path}: has no valid step or data position; it is damaged") from error
        for name in self.trainable:
            self._session.write_parameter(name, checkpoint.read(name))
            for index, slot in enumerate(self._state_names(name)):
                self._session.write_state(name, index, checkpoint.read(f"optimizer/{slot}/{name}"))
        self.update = update
        self.position = (epoch, batch)

    def _state_names(self, name: str) -> tuple[str, ...]:
        """Names of a parameter's optimizer state tensors, in slot order."""
        return STATE_NAMES[self.plan.summary["optimizer"]["name"]][: self._parameters[name].states]

    def _read_checkpoint_tensor(self, name: str) -> np.ndarray:
        if name.startswith("optimizer/"):
            _, slot, parameter = name.split("/", 2)
            return self._session.read_state(parameter, self._state_names(parameter).index(slot))
        return self._session.read_parameter(name)

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

    def profile(self, enabled: bool) -> None:
        """Starts (counting from zero) or stops timing of every step of the plan."""
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
        for session in (*self._shorter.values(), self._session):
            session.close()
        self.bundle.close()

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _tokens(arrays: Sequence[Array]) -> int | None:
    """Tokens of a batch of texts."""
    return next((int(a.shape[1]) for a in arrays if a.ndim == 2 and a.dtype == np.int32), None)


def bundle_of(checkpoint: Checkpoint, bundle: str | os.PathLike[str] | None) -> Path:
    """Path of the bundle that a checkpoint belongs to: `bundle` if given, else where it was then.

    Raises:
        CheckpointError: it is not there any more.
    """
    if bundle is not None:
        return Path(bundle)
    path = checkpoint.state.get("bundle")
    if not isinstance(path, str) or not Path(path).exists():
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
