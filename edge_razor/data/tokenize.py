"""Texts to tokens, once, in a child process: `python -m edge_razor.data.tokenize`.

The tokenizer and its vocabulary take 40 MB and more, which the process that trains under the cap shall not hold. The
child reads the texts piece by piece, writes the tokens to a file, and is gone before training starts.

The request (`edge_razor.child`) is a `Request`, the answer an `Answer`, and the result two files in `directory`:
`tokens.bin` (int32) and `rows.npy` (int64 [samples, 3]: first token, number of tokens, label).
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edge_razor.child import ask, serve
from edge_razor.errors import DataError
from edge_razor.regular_file import open_regular

__all__ = ["Answer", "Request", "is_text", "tokenize_in_child", "tokenizer_text"]

SUFFIXES = (".csv", ".tsv", ".jsonl", ".txt")
_INDEX = re.compile(r"0|[1-9]\d{0,8}", re.ASCII)  # of a class, as a label; "00" is a name
_MAX_CLASSES = 1 << 20  # a list of whose names fits in memory
_BLOCK = 256  # texts that are tokenized together
_FIELD_LIMIT = 1 << 27  # bytes of one CSV field, or of a line


@dataclass(frozen=True)
class Request:
    """What to tokenize, and how.

    Attributes:
        data: a .csv, .tsv, .jsonl or .txt file, or a folder of .txt files.
        directory: where the result goes.
        tokenizer: the content of a tokenizer.json.
        length: tokens of a sample, special ones included.
        vocabulary: rows of the model's table.
        causal: samples are pieces of all texts one after another, and each token's target is the next one.
        end: token between two texts of a causal model; None: none.
        classes: class names by index, if known.
        class_count: of the model.
        text_column, label_column: names of columns, or of fields of JSON objects.
        truncate: cut texts that are longer, instead of refusing them.
        skip_bad: leave out, and count, what cannot be used, instead of refusing it.
    """

    data: str
    directory: str
    tokenizer: str
    length: int
    vocabulary: int
    causal: bool = False
    end: int | None = None
    classes: list[str] | None = None
    class_count: int = 0
    text_column: str = "text"
    label_column: str = "label"
    truncate: bool = True
    skip_bad: bool = False


@dataclass
class Answer:
    """Figures of a tokenized data set. `bad`: place → why it was left out; `truncated` texts lost their end."""

    samples: int = 0
    texts: int = 0
    tokens: int = 0
    truncated: int = 0
    bad: dict[str, str] = field(default_factory=dict)
    classes: list[str] | None = None


def is_text(path: Path) -> bool:
    """Whether `path` is a file or folder of texts."""
    if path.is_dir():
        return any(path.glob("*.txt"))
    return path.suffix.lower() in SUFFIXES


def tokenizer_text(data: bytes, bundle: str | Path) -> str:
    """The content of a bundle's tokenizer.json as text."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{bundle}: its tokenizer.json is no UTF-8 (byte {error.start}); export the model again"
        ) from error


def tokenize_in_child(request: Request) -> Answer:
    """
    Raises:
        DataError: the texts cannot be used; names the file and line.
        EdgeRazorError: the child died without an answer.
    """
    return Answer(
        **ask("edge_razor.data.tokenize", asdict(request), "reading texts", {"TOKENIZERS_PARALLELISM": "false"})
    )


class _Reader:
    """The texts of a data set with their labels and places, in order."""

    def __init__(self, request: Request, answer: Answer) -> None:
        self.request, self.answer = request, answer

    def refuse(self, place: str, why: str) -> None:
        """Raises DataError, or notes what is left out."""
        if not self.request.skip_bad:
            raise DataError(f"{place}: {why}; mend it, or leave such out with --skip-bad")
        self.answer.bad[place] = why

    def samples(self) -> Iterator[tuple[str, str | None, str]]:
        """(text, label, place)"""
        path = Path(self.request.data)
        files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
        for file in files:
            kind = file.suffix.lower()
            if kind == ".txt":
                if not self.request.causal:
                    raise DataError(f"{file}: has no labels; give a .csv or .jsonl with a text and a label column")
                yield from self._whole(file)
            elif kind == ".jsonl":
                yield from self._json_lines(file)
            else:
                yield from self._table(file, "\t" if kind == ".tsv" else ",")

    def _lines(self, file: Path) -> Iterator[tuple[int, str]]:
        """(number, line) of a UTF-8 file; a byte order mark is dropped."""
        try:
            opened = open_regular(file)
        except OSError as error:
            raise DataError(f"{file}: cannot read it: {error.strerror}") from error
        with io.BufferedReader(opened) as stream:
            for number, raw in enumerate(iter(lambda: stream.readline(_FIELD_LIMIT + 1), b""), 1):
                if len(raw) > _FIELD_LIMIT:
                    raise DataError(f"{file}:{number}: has a line of more than {_FIELD_LIMIT >> 20} MiB; break it up")
                raw = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
                try:
                    yield number, raw.decode("utf-8")
                except UnicodeDecodeError as error:
                    self.refuse(f"{file}:{number}", f"is not valid UTF-8 at byte {error.start} of the line")

    def _whole(self, file: Path) -> Iterator[tuple[str, str | None, str]]:
        """Paragraphs, so that no file needs to fit in memory at once; blank lines stay with what is before them."""
        part, first, size = list[str](), 1, 0
        for number, line in self._lines(file):
            part.append(line)
            size += len(line)
            if size > 1 << 16 and not line.strip():
                yield "".join(part), None, f"{file}:{first}"
                part, first, size = [], number + 1, 0
        if part:
            yield "".join(part), None, f"{file}:{first}"

    def _json_lines(self, file: Path) -> Iterator[tuple[str, str | None, str]]:
        for number, line in self._lines(file):
            if not line.strip():
                continue
            place = f"{file}:{number}"
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError) as error:
                self.refuse(place, f"is no JSON: {error}")
                continue
            if not isinstance(entry, dict):
                self.refuse(place, "is no JSON object")
                continue
            yield from self._entry(entry, place)

    def _table(self, file: Path, delimiter: str) -> Iterator[tuple[str, str | None, str]]:
        csv.field_size_limit(_FIELD_LIMIT)
        rows = csv.reader((line for _, line in self._lines(file)), delimiter=delimiter)
        try:
            header = [name.strip() for name in next(rows, [])]
            for column in (self.request.text_column, *(() if self.request.causal else (self.request.label_column,))):
                if column not in header:
                    option = "--text-column" if column == self.request.text_column else "--label-column"
                    raise DataError(
                        f"{file}: has no column {column!r} but {', '.join(header[:8])}; name it by {option}"
                    )
            for row in rows:
                if row:
                    yield from self._entry(dict(zip(header, row, strict=False)), f"{file}:{rows.line_num}")
        except csv.Error as error:
            raise DataError(f"{file}:{rows.line_num}: {error}") from error

    def _entry(self, entry: dict[str, Any], place: str) -> Iterator[tuple[str, str | None, str]]:
        text = entry.get(self.request.text_column)
        if not isinstance(text, str):
            self.refuse(place, f"has no text {self.request.text_column!r}")
            return
        if not _is_unicode(text):
            self.refuse(place, "holds half of a surrogate pair, which is no text")
            return
        if self.request.causal:
            yield text, None, place
            return
        label = entry.get(self.request.label_column)
        if label is None or isinstance(label, float | list | dict) or not str(label).strip():
            self.refuse(place, f"has no label {self.request.label_column!r}")
            return
        if not _is_unicode(str(label)):
            self.refuse(place, "has a label with half of a surrogate pair, which is no text")
            return
        yield text, str(label).strip(), place


def _is_unicode(text: str) -> bool:
    """Whether a text has no surrogate, which JSON can spell but UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@contextmanager
def _tokenizer_errors() -> Iterator[None]:
    """What tokenizers raises is a DataError: plain Exceptions, and panics of Rust, which are no Exceptions."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise DataError(f"the bundle's tokenizer.json cannot be used: {error}; export the model again") from error


def tokenize(request: Request) -> Answer:
    """What the child does; see the module's docstring."""
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise DataError("texts need the package tokenizers; install edge-razor[text]") from error
    with _tokenizer_errors():
        tokenizer = Tokenizer.from_str(request.tokenizer)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        if not request.causal:
            tokenizer.enable_truncation(request.length)
    answer = Answer()
    reader = _Reader(request, answer)
    rows, labels, names = list[tuple[int, int, int]](), dict[str, int](), list[str]()
    directory = Path(request.directory)
    with open(directory / "tokens.bin", "wb") as file:
        for block in _blocks(reader.samples()):
            with _tokenizer_errors():
                encoded = tokenizer.encode_batch([text for text, _, _ in block], add_special_tokens=not request.causal)
            for (text, label, place), tokens in zip(block, encoded, strict=True):
                ids = np.array(tokens.ids, np.int64)  # a damaged tokenizer has any
                if not text.strip() or not ids.size:
                    reader.refuse(place, "is empty")
                    continue
                if int(ids.max()) >= request.vocabulary:
                    raise DataError(
                        f"{place}: token {int(ids.max())} of the tokenizer is outside of the model's table of "
                        f"{request.vocabulary}; export the model with its own tokenizer"
                    )
                ids = ids.astype(np.int32)
                if tokens.overflowing:
                    if not request.truncate:
                        raise DataError(f"{place}: is longer than the model's {request.length} tokens; shorten it")
                    answer.truncated += 1
                answer.texts += 1
                if label is not None:
                    if request.classes is not None and label not in request.classes:
                        known = ", ".join(request.classes[:6])
                        reader.refuse(place, f"has the label {label!r}; the model has the classes {known}")
                        answer.texts -= 1
                        continue
                    if label not in labels:
                        labels[label] = len(names)
                        names.append(label)
                    rows.append((answer.tokens, ids.size, labels[label]))
                elif request.end is not None:
                    ids = np.append(ids, np.int32(request.end))
                file.write(ids.tobytes())
                answer.tokens += ids.size
    if not answer.texts:
        raise DataError(f"{request.data}: holds no texts")
    if request.causal:
        if answer.tokens < 2:
            raise DataError(f"{request.data}: holds fewer than two tokens")
        starts = np.arange(0, answer.tokens - 1, request.length)
        table = np.stack([starts, np.minimum(request.length + 1, answer.tokens - starts), 0 * starts], axis=1)
    else:
        order = _classes(request, names)
        index_of = {name: index for index, name in enumerate(order)}
        table = np.array(rows, np.int64)
        table[:, 2] = np.array([index_of[name] for name in names], np.int64)[table[:, 2]]
        answer.classes = order
    answer.samples = len(table)
    np.save(directory / "rows.npy", np.ascontiguousarray(table, np.int64))
    return answer


def _classes(request: Request, names: list[str]) -> list[str]:
    """Class names by index: the model's; or, if the labels are its indices, these; or the labels found, sorted."""
    if request.classes is not None:
        return request.classes
    if all(_INDEX.fullmatch(name) and int(name) < request.class_count for name in names):
        if request.class_count > _MAX_CLASSES:
            raise DataError(f"the bundle states {request.class_count} classes, more than are possible")
        return [str(index) for index in range(request.class_count)]
    if len(names) != request.class_count:
        raise DataError(
            f"{request.data}: has {len(names)} labels ({', '.join(sorted(names)[:6])}, …), the model "
            f"{request.class_count} classes; export the model with --classes"
        )
    return sorted(names)


def _blocks(samples: Iterator[tuple[str, str | None, str]]) -> Iterator[list[tuple[str, str | None, str]]]:
    block: list[tuple[str, str | None, str]] = []
    for sample in samples:
        block.append(sample)
        if len(block) == _BLOCK:
            yield block
            block = []
    if block:
        yield block


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """What the child does with a request."""
    try:
        return asdict(tokenize(Request(**request)))
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror}") from error


if __name__ == "__main__":
    serve(answer)
