"""Tokenized texts (`tokenize`) as samples: token indices and attention mask, padded to the model's length."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge_razor.bundle import Bundle
from edge_razor.data.source import Source
from edge_razor.data.tokenize import Answer, Request, tokenize_in_child, tokenizer_text
from edge_razor.errors import DataError
from edge_razor.manifest import IGNORE_INDEX, TOKENIZER, Manifest

__all__ = ["TextOptions", "TextSource"]


@dataclass(frozen=True, slots=True)
class TextOptions:
    """How texts are read: names of the columns, and whether texts that are too long are cut or refused."""

    text_column: str = "text"
    label_column: str = "label"
    truncate: bool = True


class TextSource(Source):
    """Samples of a model of token indices.

    A sample is int32 [inputs, tokens]: for each input of the model its tokens, its attention mask, or zeros (token
    types). Targets are a class, or for a causal model each token's successor, −100 where there is none.

    Attributes:
        answer: figures of the texts.
    """

    def __init__(
        self,
        path: Path,
        bundle: Bundle,
        *,
        options: TextOptions | None = None,
        classes: Sequence[str] | None = None,
        skip_bad: bool = False,
    ) -> None:
        """Tokenizes the texts in a child process into a temporary file.

        Raises:
            DataError: the texts, or the model, cannot be used.
        """
        super().__init__()
        manifest, options = bundle.manifest, options or TextOptions()
        if manifest.text is None:
            raise DataError(f"{bundle.path}: has no tokenizer; export the model with --tokenizer, or give it arrays")
        self._roles = input_roles(manifest)
        self._causal, self._pad = manifest.per_token, manifest.text.pad
        self._length = manifest.inputs[0].shape[0]
        self._buckets = manifest.buckets
        if not self._causal and manifest.target_shape != ():
            raise DataError(f"{bundle.path}: gives {manifest.target_shape} targets a text; texts have one label each")
        self._directory = tempfile.TemporaryDirectory(prefix="edge-razor-text-")
        names = manifest.classes if manifest.classes is not None else classes
        self.answer: Answer = tokenize_in_child(
            Request(
                data=str(path),
                directory=self._directory.name,
                tokenizer=tokenizer_text(bundle.read_file(TOKENIZER), bundle.path),
                length=self._length,
                vocabulary=manifest.text.vocabulary,
                causal=self._causal,
                end=manifest.text.end,
                classes=None if names is None or self._causal else list(names),
                class_count=manifest.class_count or 0,
                text_column=options.text_column,
                label_column=options.label_column,
                truncate=options.truncate,
                skip_bad=skip_bad,
            )
        )
        self._rows = np.load(Path(self._directory.name) / "rows.npy")
        self._tokens = open(Path(self._directory.name) / "tokens.bin", "rb", buffering=0)  # noqa: SIM115
        self._lock = threading.Lock()
        self.bad = self.answer.bad
        self.classes = None if self.answer.classes is None else tuple(self.answer.classes)
        self.input_shape, self.input_dtype = (len(self._roles), self._length), np.dtype(np.int32)
        self.target_shape = manifest.target_shape
        self.target_dtype = np.dtype(np.int32)
        self.work_bytes = self._rows.nbytes + 8 * self._length

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int, inputs: np.ndarray, targets: np.ndarray, random: int | None) -> bool:
        """See `Source.read`."""
        first, count, label = self._rows[index].tolist()
        tokens = np.empty(count, np.int32)
        with self._lock:
            self._tokens.seek(4 * first)
            if self._tokens.readinto(tokens.data) != tokens.nbytes:
                raise DataError(f"{self._directory.name}: was truncated while it was read")
        shown = tokens[: self._length] if not self._causal else tokens[:-1]
        for row, role in zip(inputs, self._roles, strict=True):
            row[len(shown) :] = self._pad if role == "tokens" else 0
            row[: len(shown)] = shown if role == "tokens" else int(role == "mask")
        if self._causal:
            targets[len(shown) :] = IGNORE_INDEX
            targets[: len(shown)] = tokens[1:]
        else:
            targets[...] = label
        return True

    @property
    def lengths(self) -> np.ndarray | None:
        """See `Source.lengths`."""
        return None if len(self._buckets) < 2 or self._causal else np.minimum(self._rows[:, 1], self._length)

    def arguments(self, inputs: np.ndarray, targets: np.ndarray) -> tuple[Any, np.ndarray]:
        """One array for each input of the model, padded to the shortest bucket that holds the longest text."""
        used = int(inputs[:, self._roles.index("mask")].sum(axis=1).max()) if "mask" in self._roles else self._length
        tokens = next((size for size in self._buckets if size >= used), self._length)
        arrays = [np.ascontiguousarray(inputs[:, index, :tokens]) for index in range(inputs.shape[1])]
        return arrays, np.ascontiguousarray(targets[:, :tokens]) if self._causal else targets

    def close(self) -> None:
        self._tokens.close()
        self._directory.cleanup()


def input_roles(manifest: Manifest) -> list[str]:
    """What each input of a model of tokens is: "tokens", "mask" or "zeros" (token types).

    Raises:
        DataError: an input of another kind, or of another length.
    """
    roles = []
    for spec in manifest.inputs:
        if len(spec.shape) != 1 or spec.shape != manifest.inputs[0].shape or spec.dtype == "float32":
            raise DataError(f"the model's input {spec.name!r} is {spec.dtype} {list(spec.shape)}, which no text fills")
        first = "tokens" not in roles and spec.indices
        roles.append("tokens" if first else "zeros" if spec.indices or "type" in spec.name else "mask")
    if "tokens" not in roles:
        raise DataError("the model has no input of token indices, which texts need")
    return roles
