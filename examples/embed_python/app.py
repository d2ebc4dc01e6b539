"""An app that goes on learning: it serves predictions while a thread in the background fine-tunes the network.

`Learner` is the part to copy. It works on what a workstation made ahead, a plan and the pretrained weights, so that the
device needs numpy and edge-razor alone. README.md shows how to run it.

Two native sessions execute the plan: one trains, the other predicts with the last good weights. A session's calls run
one at a time, in order of arrival, and release the interpreter's lock. With one session alone a prediction would wait
for the training step that is running, and see weights that nobody has judged yet. The second costs its parameters and
the part of the arena that inference touches.
"""

from __future__ import annotations

import argparse
import os
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np

from edge_razor.runtime import Session

Batch = tuple[np.ndarray, np.ndarray]


class Learner:
    """Fine-tunes in a background thread of low priority; `predict` answers meanwhile.

    All methods may be called from any thread; `close` comes last.

    Attributes:
        update: optimizer updates done.
        rounds: times that the weights were judged since the start.
        best_loss: loss of the served weights on the held-out batch.
        error: what ended training (a loss that became NaN, a full disk, data that cannot be read), or None.
            Predictions go on.
    """

    def __init__(
        self,
        plan: Path,
        weights: Path,
        run: Path,
        next_batch: Callable[[int], Batch],
        held_out: Batch,
        *,
        learning_rate: float = 1e-2,
        updates_a_round: int = 20,
        niceness: int = 10,
    ) -> None:
        """
        Args:
            plan, weights: what `edge-razor plan -o` and `export` made (`model.razor/weights.safetensors`).
            run: directory of the checkpoint and of the served weights; training goes on from those that are there.
            next_batch: the batch of update number u, from 1: inputs [n, …] float32, targets int32 or float32.
            held_out: judges the weights. Those that are served are replaced when the loss on it is lower.
            updates_a_round: updates between two judgements; each writes a checkpoint.
            niceness: of the training thread, 0 … 19. The worker threads of a plan for several threads keep the app's:
                plan with --threads 1 for training that never competes with it.
        """
        self._checkpoint, self._served = run / "checkpoint", run / "served.safetensors"
        self._next_batch, self._held_out = next_batch, held_out
        self._learning_rate, self._updates_a_round, self._niceness = learning_rate, updates_a_round, niceness
        run.mkdir(parents=True, exist_ok=True)
        data = plan.read_bytes()
        self._learner, self._server = Session(data), Session(data)
        self._learner.load_weights(weights)
        self.update, self.rounds, self.error = 0, 0, None  # type: int, int, Exception | None
        if self._checkpoint.exists() and self._served.exists():
            self.update, own = self._learner.load_checkpoint(self._checkpoint)
            (self.best_loss,) = struct.unpack("<d", own)
        else:
            self._learner.save_weights(self._served)
            self.best_loss = self._judge()
        self._server.load_weights(self._served)
        self._go, self._stop, self._changed = threading.Event(), threading.Event(), threading.Condition()
        self._go.set()
        self._thread = threading.Thread(target=self._work, name="edge-razor learner", daemon=True)

    def start(self) -> None:
        """Begins to train; once."""
        self._thread.start()

    def pause(self) -> None:
        """Training stops after the step that is running."""
        self._go.clear()

    def resume(self) -> None:
        self._go.set()

    def predict(self, inputs: np.ndarray) -> np.ndarray:
        """Output of the network, float32 [n, …], with the last good weights. Never waits for training."""
        return self._server.predict([np.ascontiguousarray(inputs)])[0]

    def wait_for_rounds(self, rounds: int) -> bool:
        """Waits until so many rounds are done or training has ended; whether they are done."""
        with self._changed:
            self._changed.wait_for(lambda: self.rounds >= rounds or not self._thread.is_alive())
        return self.rounds >= rounds

    def close(self) -> None:
        """Ends training after the running step, with a checkpoint, and frees the memory."""
        self._stop.set()
        self._go.set()
        if self._thread.is_alive():
            self._thread.join()
        self._learner.close()
        self._server.close()

    # ---- In the training thread ----

    def _work(self) -> None:
        if self._niceness and hasattr(os, "setpriority"):  # on Linux a thread's id stands for that thread alone
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), self._niceness)
        try:
            while not self._stop.is_set():
                self._round()
        except Exception as error:  # of the data, too; what is served stays as it is
            self.error = error
        finally:
            with self._changed:
                self._changed.notify_all()

    def _round(self) -> None:
        for _ in range(self._updates_a_round):
            self._go.wait()
            if self._stop.is_set():
                break
            inputs, targets = self._next_batch(self.update + 1)
            self._learner.train_step([inputs], targets, learning_rate=self._learning_rate, update=self.update + 1)
            self.update += 1
        loss = self._judge()
        if loss < self.best_loss:
            # One call replaces all weights: no prediction mixes old and new. The file outlives the app.
            self._learner.save_weights(self._served)
            self._server.load_weights(self._served)
            self.best_loss = loss
        self._learner.save_checkpoint(self._checkpoint, self.update, struct.pack("<d", self.best_loss))
        with self._changed:
            self.rounds += 1
            self._changed.notify_all()

    def _judge(self) -> float:
        inputs, targets = self._held_out
        return self._learner.evaluate([inputs], targets).loss


def stripes(first: int, samples: int) -> Batch:
    """Generated data: noisy 20 × 20 images of stripes in ten directions; sample i is always the same."""
    images = np.empty((samples, 1, 20, 20), np.float32)
    labels = np.empty(samples, np.int32)
    y, x = np.mgrid[0:20, 0:20]
    for i in range(samples):
        random = np.random.default_rng(first + i)
        labels[i] = random.integers(10)
        angle = np.pi * labels[i] / 10
        wave = np.sin(x * np.cos(angle) + y * np.sin(angle) + random.uniform(0, 2 * np.pi))
        images[i, 0] = wave + random.normal(0, 0.3, (20, 20))
    return images, labels


def main() -> None:
    parser = argparse.ArgumentParser(description="Answers predictions while the network goes on learning.")
    parser.add_argument("plan", type=Path, help="plan of the network of examples/embed_c")
    parser.add_argument("weights", type=Path, help="digits.razor/weights.safetensors")
    parser.add_argument("run", type=Path, help="directory for checkpoint and served weights")
    parser.add_argument("--rounds", type=int, default=20, help="rounds of 20 updates (default 20)")
    options = parser.parse_args()

    images, labels = stripes(10**6, 200)
    learner = Learner(
        options.plan, options.weights, options.run, lambda u: stripes(16 * u, 16), stripes(2 * 10**6, 100)
    )
    learner.start()
    try:
        for n in range(1, options.rounds + 1):
            if not learner.wait_for_rounds(n):
                raise SystemExit(f"training ended: {learner.error}")
            right = float((learner.predict(images).argmax(axis=1) == labels).mean())
            print(f"update {learner.update}: served weights are right on {right:.0%}", flush=True)
    finally:
        learner.close()


if __name__ == "__main__":
    main()
