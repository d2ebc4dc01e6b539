"""Batches from a source, decoded ahead of training by a thread, in buffers that are counted in the plan."""

from __future__ import annotations

import _thread
import queue
import threading
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from typing import Any, NamedTuple

import numpy as np

from edge_razor.data.order import grouped, mix, shuffled
from edge_razor.data.source import Source

__all__ = ["Batch", "BatchRing", "IterableLoader", "Loader"]

QUEUE_DEPTH = 2  # finished batches that wait; enough to hide a slow image, and every one costs a batch of memory


class Batch(NamedTuple):
    """Inputs, targets, and the number of batches of the epoch that are done once this one is.

    The arrays belong to a ring of buffers: they hold until the next batch is asked for.
    """

    inputs: Any
    targets: Any
    done: int


class BatchRing:
    """The buffers of a source's batches: those that wait, one being filled, one in use.

    Loaders that never run at the same time (training, validation) share a ring. `bytes` is what it holds.
    """

    def __init__(self, source: Source, batch_size: int) -> None:
        self.batch_size = batch_size
        self.bytes = 0
        self._inputs = (batch_size, *source.input_shape), source.input_dtype
        self._targets = (batch_size, *source.target_shape), source.target_dtype
        self.free: queue.SimpleQueue[tuple[np.ndarray, np.ndarray]] = queue.SimpleQueue()
        for _ in range(QUEUE_DEPTH + 2):
            buffers = np.empty(*self._inputs), np.empty(*self._targets)
            self.bytes += sum(buffer.nbytes for buffer in buffers)
            self.free.put(buffers)

    @staticmethod
    def bytes_for(source: Source, batch_size: int) -> int:
        """What the whole data pipeline holds: the ring, and what reading a sample takes."""
        inputs = int(np.prod(source.input_shape)) * source.input_dtype.itemsize
        targets = int(np.prod(source.target_shape)) * source.target_dtype.itemsize
        return (QUEUE_DEPTH + 2) * batch_size * (inputs + targets) + source.work_bytes


class Loader:
    """Batches of some of a source's samples, in an order that depends on seed and epoch only."""

    def __init__(
        self, source: Source, indices: np.ndarray, ring: BatchRing, *, seed: int = 0, shuffle: bool = False
    ) -> None:
        self.source = source
        self.indices = indices
        self.ring = ring
        self.seed = seed
        self.shuffle = shuffle

    def __len__(self) -> int:
        """Batches of an epoch; the last may be short."""
        return -(-len(self.indices) // self.ring.batch_size)

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(inputs, targets) of epoch 0, for evaluation."""
        for batch in self.batches(0):
            yield batch.inputs, batch.targets

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from number `start` on.

        Raises:
            DataError: a sample cannot be read (where it was reached, not before).
        """
        order = shuffled(self.indices, self.seed, epoch) if self.shuffle else self.indices
        size = self.ring.batch_size
        if self.source.lengths is not None:
            order = grouped(order, self.source.lengths, size, self.seed if self.shuffle else None, epoch)

        def produce(put: Callable[[Any], bool], take: Callable[[], Any]) -> None:
            for number in range(start, len(self)):
                buffers = take()
                if buffers is None:
                    return
                handed_over = False
                try:
                    count = self._fill(order[number * size : (number + 1) * size], epoch, *buffers)
                    handed_over = put((buffers, count, number + 1))
                finally:
                    if not handed_over:
                        self.ring.free.put(buffers)
                if not handed_over:
                    return

        with closing(_ahead(produce, self.ring.free)) as batches:
            for buffers, count, done in batches:
                try:
                    if count:  # nothing is left of a batch whose samples were all bad
                        yield Batch(*self.source.arguments(buffers[0][:count], buffers[1][:count]), done)
                finally:
                    self.ring.free.put(buffers)

    def _fill(self, chosen: np.ndarray, epoch: int, inputs: np.ndarray, targets: np.ndarray) -> int:
        """Reads the chosen samples into the buffers; returns how many there are (bad ones leave no gap)."""
        count = 0
        for index in chosen.tolist():
            random = mix(self.seed, 3, epoch, index) if self.shuffle else None
            count += self.source.read(
                index, inputs[count], targets[count : count + 1].reshape(targets.shape[1:]), random
            )
        return count


class IterableLoader:
    """Batches from any iterable of (inputs, targets) that starts anew with each `iter()`, taken ahead by a thread."""

    def __init__(self, batches: Iterable[tuple[Any, Any]]) -> None:
        self.iterable = batches

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        for batch in self.batches(0):
            yield batch.inputs, batch.targets

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """One pass over the iterable; the first `start` batches are passed over."""

        def produce(put: Callable[[Any], bool], take: Callable[[], Any]) -> None:
            for number, (inputs, targets) in enumerate(self.iterable, 1):
                if number > start and not put(Batch(inputs, targets, number)):
                    return

        with closing(_ahead(produce, None)) as batches:
            yield from batches


class _Life:
    """Lives as long as a thread."""


def _ahead(
    produce: Callable[[Callable[[Any], bool], Callable[[], Any]], None], free: queue.SimpleQueue[Any] | None
) -> Generator[Any, None, None]:
    """Runs `produce(put, take)` in a thread, at most QUEUE_DEPTH items ahead, and yields what it puts.

    `put` returns False, and `take` (the next of `free`) None, once the consumer has stopped.
    """
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(QUEUE_DEPTH)
    stopped = threading.Event()

    def put(item: Any, kind: str = "item") -> bool:
        while not stopped.is_set():
            try:
                ready.put((kind, item), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def take() -> Any:
        assert free is not None
        while not stopped.is_set():
            try:
                return free.get(timeout=0.1)
            except queue.Empty:
                continue
        return None

    def run(life: _Life) -> None:
        try:
            produce(put, take)
            put(None, "end")
        except BaseException as error:  # handed to the consumer, whatever it is
            put(error, "error")
        finally:
            ended.set()

    # Not threading.Thread: its start() waits for ever if the system refuses the new thread's first 16 KB. Here the
    # thread's argument dies with it, however it ends.
    ended = threading.Event()
    life = _Life()
    alive = weakref.ref(life)
    _thread.start_new_thread(run, (life,))
    del life
    try:
        while True:
            try:
                kind, item = ready.get(timeout=1.0)
            except queue.Empty:
                if alive() is None and ready.empty():
                    raise MemoryError("the thread that reads data could not run") from None
                continue
            if kind == "end":
                return
            if kind == "error":
                raise item
            yield item
    finally:
        stopped.set()
        while not ended.wait(0.1) and alive() is not None:
            pass
        while not ready.empty():  # buffers that were filled in vain go back
            kind, item = ready.get_nowait()
            if free is not None and kind == "item":
                free.put(item[0])
