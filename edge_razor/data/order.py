"""Which sample comes when: seeded order and split, the same on every platform and version of Python and numpy.

The order comes from sorting a hash of (seed, epoch, index), so an epoch's order needs no state: a resumed run finds its
place from the epoch and the batch number alone. (numpy.random would add 6.6 MB of resident memory for this.)
"""

from __future__ import annotations

import numpy as np

from edge_razor.errors import UsageError

__all__ = ["mix", "shuffled", "split"]

_MASK = 2**64 - 1


def mix(*values: int) -> int:
    """A 64-bit hash of integers (splitmix64's finalizer, Steele et al. 2014), well spread in every bit."""
    state = 0
    for value in values:
        state = (state + 0x9E3779B97F4A7C15 + (value & _MASK)) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def _permutation(count: int, key: int) -> np.ndarray:
    """A permutation of 0 … count−1 as int64: the order of mix'ed indices."""
    state = np.arange(count, dtype=np.uint64)
    state += np.uint64(key)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    state ^= state >> np.uint64(31)
    return np.argsort(state, kind="stable")


def shuffled(indices: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """`indices` in the order of epoch `epoch`."""
    return indices[_permutation(len(indices), mix(seed, 1, epoch))]


def split(count: int, validation: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of (training, validation) samples, each ascending; `validation` is the share of the latter.

    Raises:
        UsageError: the share is not in 0 ≤ share < 1, or leaves no sample for training or none for a share above 0.
    """
    if not 0 <= validation < 1:
        raise UsageError(f"the validation share must be at least 0 and below 1, not {validation}")
    held_out = round(count * validation)
    if held_out == count or (validation > 0 and held_out == 0):
        raise UsageError(f"a validation share of {validation} of {count} samples leaves one side empty; change it")
    order = _permutation(count, mix(seed, 2))
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def grouped(
    order: np.ndarray, lengths: np.ndarray, batch_size: int, seed: int | None = None, epoch: int = 0
) -> np.ndarray:
    """`order` with samples of similar length together, batch by batch; the last batch stays the short one.

    Args:
        order: indices of samples.
        lengths: of every sample.
        seed: sort within windows of 32 batches, and shuffle the batches, so that epochs differ; None: sort all.
    """
    window = len(order) if seed is None else 32 * batch_size
    parts = [order[i : i + window] for i in range(0, len(order), window)] if len(order) else []
    result = np.concatenate([part[np.argsort(lengths[part], kind="stable")] for part in parts]) if parts else order
    if seed is None:
        return result
    whole = len(result) // batch_size * batch_size
    batches = result[:whole].reshape(-1, batch_size)
    chosen = shuffled(np.arange(len(batches)), mix(seed, 5), epoch)
    return np.concatenate([batches[chosen].reshape(-1), result[whole:]])
