"""Sources: random access to the samples of a data set, and the choice of one from a path."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_razor.errors import DataError
from edge_razor.manifest import Manifest

if TYPE_CHECKING:
    from edge_razor.bundle import Bundle
    from edge_razor.data.text import TextOptions

__all__ = ["Augmentation", "Source", "open_source"]


@dataclass(frozen=True, slots=True)
class Augmentation:
    """Random changes of training images: mirror half of them; crop at a random place instead of the middle."""

    flip: bool = False
    random_crop: bool = False


class Source(ABC):
    """A data set with random access.

    Attributes:
        input_shape, input_dtype: of one sample, as `read` fills it in (float32, or uint8 pixels).
        target_shape, target_dtype: of one target.
        classes: class names by index, if the data have names.
        work_bytes: what reading a sample allocates for a moment, at most, or holds all the time.
        bad: samples left out so far because they cannot be read: name → reason.
    """

    input_shape: tuple[int, ...]
    input_dtype: np.dtype
    target_shape: tuple[int, ...]
    target_dtype: np.dtype
    classes: tuple[str, ...] | None = None
    work_bytes: int = 0

    def __init__(self) -> None:
        self.bad: dict[str, str] = {}

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples."""

    @abstractmethod
    def read(self, index: int, inputs: np.ndarray, targets: np.ndarray, random: int | None) -> bool:
        """Fills sample `index` into `inputs` [*input_shape] and `targets` [*target_shape] (writable views).

        Args:
            random: 64 random bits for augmentation; None: none.

        Returns:
            False if the sample cannot be read and was left out (only if the source was told to skip such).

        Raises:
            DataError: the sample cannot be read; names it.
        """

    @property
    def lengths(self) -> np.ndarray | None:
        """How long each sample is, if batches of equally long ones cost less; None if all cost the same."""
        return None

    def arguments(self, inputs: np.ndarray, targets: np.ndarray) -> tuple[Any, np.ndarray]:
        """What a trainer takes for a batch [n, *input_shape] and its targets: the arrays themselves, or one for each
        input of the model, as short as the batch allows."""
        return inputs, targets

    def close(self) -> None:  # noqa: B027  (only sources that hold files need it)
        """Closes files."""


def open_source(
    path: str | Path,
    manifest: Manifest,
    *,
    augmentation: Augmentation | None = None,
    skip_bad: bool = False,
    classes: Sequence[str] | None = None,
    memory_limit: int | None = None,
    bundle: Bundle | None = None,
    text: TextOptions | None = None,
) -> Source:
    """The data set at `path` for a bundle's model.

    Args:
        path: a folder of class folders of images; a folder with x.npy and y.npy; an .npz; an .npy beside its y.npy;
            texts as .csv, .tsv, .jsonl or .txt, or a folder of .txt.
        manifest: the bundle's: input shape, classes, preprocessing.
        augmentation: for training images.
        skip_bad: leave unreadable samples out and count them, instead of failing.
        classes: class names by index that a run was trained with, if the bundle names none.
        memory_limit: bytes; arrays that must be loaded whole and are larger are refused.
        bundle: where a tokenizer is; texts need it.
        text: how texts are read.

    Raises:
        DataError: nothing there, or not in one of these forms, or not fitting the model.
    """
    from edge_razor.data.arrays import ArraySource, find_arrays
    from edge_razor.data.tokenize import is_text

    root = Path(path)
    if not root.exists():
        raise DataError(f"{root}: no such file or folder")
    if bundle is not None and any(spec.indices for spec in manifest.inputs):
        from edge_razor.data.text import TextSource

        if not is_text(root):
            raise DataError(f"{root}: this model takes texts: give a .csv, .tsv, .jsonl or .txt file")
        return TextSource(root, bundle, options=text, classes=classes, skip_bad=skip_bad)
    if len(manifest.inputs) != 1:
        raise DataError("data files feed models with one input; this one has several: use the Python API")
    arrays = find_arrays(root)
    if arrays is not None:
        return ArraySource(*arrays, manifest, memory_limit=memory_limit)
    if not root.is_dir():
        raise DataError(f"{root}: give a folder of class folders, an .npz, or x.npy beside y.npy")
    from edge_razor.data.images import ImageFolder  # Pillow only where there are images

    names = manifest.classes or (tuple(classes) if classes is not None else None)
    return ImageFolder(root, manifest, names, augmentation or Augmentation(), skip_bad)
