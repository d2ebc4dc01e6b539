"""Runs a placed program kernel by kernel, in plain Python: a second executor beside the native session.

The spill file is a dict here. A tensor's bytes are taken when the wait for its writing comes and not before, and are
nonsense from the start of reading until the wait for that, so that a plan that uses memory too early gets it wrong.
"""

from __future__ import annotations

import numpy as np

from edge_razor.planner.program import Buffer, Program, Region, Step
from edge_razor.planner.search import Candidate
from edge_razor.runtime import kernel_run


def check_update(executor: Executor, before: dict[str, np.ndarray], gradients: dict[str, np.ndarray]) -> None:
    """One step of plain SGD at learning rate 1 has taken the gradients off the parameters."""
    for name, expected in gradients.items():
        change = before[name] - executor.parameter(name)
        # float32 sums of a few hundred terms, and the subtraction from a weight near 1.
        tolerance = 2e-5 * np.abs(expected).max() + 3e-7
        np.testing.assert_allclose(change, expected, rtol=0, atol=tolerance, err_msg=name)


def _aligned(size: int) -> np.ndarray:
    raw = np.zeros(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size]


class Executor:
    """The three regions of a candidate's plan, and its steps."""

    def __init__(self, candidate: Candidate, parameters: dict[str, np.ndarray]) -> None:
        self.candidate = candidate
        self.threads = candidate.search.settings.threads
        self.regions = {
            Region.ARENA: _aligned(candidate.accounting.arena),
            Region.PARAMS: _aligned(candidate.memory.params_bytes),
            Region.STATE: _aligned(candidate.memory.state_bytes),
        }
        self.file: dict[int, np.ndarray] = {}
        self.under_way: dict[int, str] = {}
        # Stale memory must never matter: fill it with NaN.
        self.regions[Region.ARENA].fill(0xFF)
        self.mapped: dict[int, np.ndarray] = {}
        for name, parameter in candidate.memory.parameters.items():
            if parameter.buffer.region == Region.MAPPED:
                self.mapped[parameter.buffer.offset] = np.ascontiguousarray(parameters[name], np.float32)
                continue
            stored = parameters[name].transpose(parameter.perm) if parameter.perm else parameters[name]
            self.array(parameter.buffer)[:] = np.ascontiguousarray(stored, np.float32).reshape(-1)

    def array(self, buffer: Buffer) -> np.ndarray:
        return self.bytes(buffer).view(np.float32)

    def bytes(self, buffer: Buffer) -> np.ndarray:
        if buffer.region == Region.MAPPED:
            return self.mapped[buffer.offset].reshape(-1).view(np.uint8)
        return self.regions[buffer.region][buffer.offset : buffer.offset + buffer.bytes]

    def parameter(self, name: str) -> np.ndarray:
        """The parameter in torch layout."""
        parameter = self.candidate.memory.parameters[name]
        stored = self.array(parameter.buffer).reshape([parameter.shape[p] for p in parameter.perm])
        return stored.transpose(np.argsort(parameter.perm)) if parameter.perm else stored

    def train_step(self, x: np.ndarray, target: np.ndarray, learning_rate: float, update: int = 1) -> float:
        """One update from a whole batch; `x` and `target` in the runtime's layout."""
        micro, loss = self.candidate.micro_batch, 0.0
        count = len(x) // micro
        for m in range(count):
            part = slice(m * micro, (m + 1) * micro)
            first, second = self.candidate.train.inputs
            self.array(first)[:] = x[part].astype(np.float32).reshape(-1)
            label = target[part].astype(np.int32 if target.dtype.kind == "i" else np.float32)
            self.bytes(second)[:] = label.reshape(-1).view(np.uint8)
            loss = self._run(
                self.candidate.train,
                loss,
                learning_rate=learning_rate,
                update=update,
                seed=7,
                micro_index=m,
                micro_count=count,
                valid_batch=len(x),
                valid_micro=micro,
                first_sample=m * micro,
            )
        return loss

    def predict(self, x: np.ndarray) -> np.ndarray:
        """Outputs for one micro-batch, flat."""
        program = self.candidate.evaluate
        self.array(program.inputs[0])[:] = x.astype(np.float32).reshape(-1)
        self._run(program, 0.0, valid_batch=len(x), valid_micro=len(x))
        return self.array(program.outputs[0]).copy()

    def _run(self, program: Program, loss: float, **context: float) -> float:
        for step in program.steps:
            if step.kernel.startswith("spill"):
                self._spill(step)
                continue
            operands = [self.bytes(b) if b is not None else None for b in step.operands]
            loss = kernel_run(step.kernel, step.ints, step.floats, operands, self.threads, loss=loss, **context).loss
        assert not self.under_way
        return loss

    def _spill(self, step: Step) -> None:
        buffer, slot = step.operands[0], step.ints[0]
        assert buffer is not None
        if step.kernel != "spill_wait":
            assert slot not in self.under_way
            self.under_way[slot] = step.kernel
            if step.kernel == "spill_read":
                self.bytes(buffer).fill(0xFF)
        elif self.under_way.pop(slot) == "spill_write":
            self.file[slot] = self.bytes(buffer).copy()
        else:
            self.bytes(buffer)[:] = self.file[slot]
