"""Training data: image folders, array files, iterables; order, split, and decoding ahead of training.

`open_source` → a `Source` with random access to samples; `split` → index arrays; `Loader` → batches, from a thread.
"""

from .loader import Batch, BatchRing, IterableLoader, Loader
from .order import shuffled, split
from .source import Augmentation, Source, open_source

__all__ = [
    "Augmentation",
    "Batch",
    "BatchRing",
    "IterableLoader",
    "Loader",
    "Source",
    "open_source",
    "shuffled",
    "split",
]
