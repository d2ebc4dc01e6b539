"""Model bundles: what the exporter writes and the planner, the trainer and the export back read (docs/bundle.md).

A bundle is a directory, or a zip of stored (not deflated) members, with `bundle.json`, `training.onnx`,
`inference.onnx` and `weights.safetensors`; of a language model also `tokenizer.json`. It is untrusted input: sizes and
checksums are verified when it is opened, nothing is unpacked, and nothing in it is executed. Reading imports neither
onnx nor protobuf; `write_bundle` gets its models from a caller that has.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from edge_razor.errors import BundleError
from edge_razor.manifest import BUCKET_FILE, FILES, FORMAT_VERSION, MANIFEST, TOKENIZER, Manifest, parse_manifest
from edge_razor.regular_file import open_regular
from edge_razor.tensors import TensorFile, TensorSpec, TensorWriter, sync_directory
from edge_razor.zipped import open_zip, stored_member_start

if TYPE_CHECKING:
    import onnx

__all__ = ["Bundle", "write_bundle"]

_MANIFEST_LIMIT = 4 << 20  # bytes: 20,000 parameters; as Python objects JSON can take 20 times its size
_CHUNK = 1 << 20


class _Member(NamedTuple):
    """Where the bytes of one file of the bundle lie."""

    path: Path
    start: int
    size: int


class Bundle:
    """An opened and verified bundle.

    Attributes:
        path: directory or zip file.
        manifest: what bundle.json says, checked.
        id: sha256 (hex) of training.onnx; plans name the bundle by it.
        weights_id: sha256 (hex) of weights.safetensors; checkpoints name it beside `id`.
        tensors: name → spec of everything in weights.safetensors.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Opens the bundle and verifies size and checksum of every file (reads the whole bundle once, in pieces).

        Raises:
            BundleError: missing, truncated, altered, of a newer format version, or not a bundle at all.
        """
        self.path = Path(path)
        try:
            self._members = _find_members(self.path)
            manifest_member = self._member(MANIFEST)
            if manifest_member.size > _MANIFEST_LIMIT:
                raise BundleError(f"{self.path}: {MANIFEST} is too large to be real")
            self._opened = self._weights_stamp()
            self.manifest: Manifest = parse_manifest(self._read(manifest_member), str(self.path))
            for name in self.manifest.files:
                self._verify(name)
            self.id = self.manifest.files[FILES[0]].sha256
            weights = self._member("weights.safetensors")
            self.weights_id = self.manifest.files["weights.safetensors"].sha256
            try:
                self._weights = TensorFile(weights.path, weights.start, weights.size)
            except ValueError as error:
                raise BundleError(f"{self.path}: weights.safetensors: {error}") from error
        except OSError as error:
            raise BundleError(f"{self.path}: cannot be read: {error.strerror or error}") from error
        self.tensors = self._weights.tensors
        self.weights_data_offset = self._weights.data_offset
        wanted = (*self.manifest.trainable, *self.manifest.aliases.values())
        missing = [n for n in wanted if n not in self.tensors]
        missing += [n for n in self.manifest.state_dict if self.manifest.aliases.get(n, n) not in self.tensors]
        if missing:
            self.close()
            raise BundleError(f"{self.path}: weights.safetensors has no tensor {missing[0]!r}; export the model again")

    def read_file(self, name: str) -> bytes:
        """The whole content of a graph or of `tokenizer.json`.

        Raises:
            BundleError: the bundle has no such file, or it was altered after it was opened.
        """
        data = self._read(self._member(name))
        if hashlib.sha256(data).hexdigest() != self.manifest.files[name].sha256:
            raise BundleError(f"{self.path}: {name} was altered while the bundle was open")
        return data

    def read_tensor(self, name: str) -> np.ndarray:
        """A copy of one tensor of weights.safetensors.

        Raises:
            BundleError: no such tensor, or the file was truncated after the bundle was opened.
        """
        with self._errors(name):
            return self._weights.read(name)

    def spec(self, name: str) -> TensorSpec:
        """What weights.safetensors says of a tensor.

        Raises:
            BundleError: no such tensor.
        """
        with self._errors(name):
            return self.tensors[name]

    def read_parts(self, name: str, buffer: np.ndarray) -> Iterator[np.ndarray]:
        """One tensor part by part: `edge_razor.tensors.TensorFile.parts`.

        Raises:
            BundleError: as `read_tensor`.
        """
        with self._errors(name):
            yield from self._weights.parts(name, buffer)

    @contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        try:
            yield
        except KeyError:
            raise BundleError(f"{self.path}: weights.safetensors has no tensor {name!r}") from None
        except (ValueError, OSError) as error:
            raise BundleError(f"{self.path}: weights.safetensors: {error}") from error

    @property
    def weights_place(self) -> tuple[Path, int, int]:
        """File, first byte and number of bytes of weights.safetensors, for whoever reads it in place."""
        return self._member("weights.safetensors")

    def check_unchanged(self) -> None:
        """
        Raises:
            BundleError: the file that holds the weights has another size or time of modification than when it was
                verified, or another file is in its place.
        """
        try:
            same = self._weights_stamp() == self._opened
        except OSError:
            same = False
        if not same:
            raise BundleError(f"{self.path}: its weights were altered while the bundle was open; start again")

    def _weights_stamp(self) -> tuple[int, ...]:
        status = os.stat(self._member("weights.safetensors").path)
        return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns

    def close(self) -> None:
        self._weights.close()

    def __enter__(self) -> Bundle:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _member(self, name: str) -> _Member:
        if name not in self._members:
            raise BundleError(f"{self.path}: {name} is missing; this is not a whole edge-razor bundle")
        return self._members[name]

    def _read(self, member: _Member) -> bytes:
        with io.BufferedReader(open_regular(member.path)) as file:
            file.seek(member.start)
            return file.read(member.size)

    def _verify(self, name: str) -> None:
        member, stated = self._member(name), self.manifest.files[name]
        if member.size != stated.bytes:
            raise BundleError(
                f"{self.path}: {name} has {member.size} bytes where bundle.json states {stated.bytes}; the bundle is "
                "truncated or altered, copy or export it again"
            )
        digest = hashlib.sha256()
        buffer = memoryview(bytearray(_CHUNK))
        with open_regular(member.path) as file:
            file.seek(member.start)
            left = member.size
            while left and (count := file.readinto(buffer[: min(left, _CHUNK)])):
                digest.update(buffer[:count])
                left -= count
        if digest.hexdigest() != stated.sha256:
            raise BundleError(f"{self.path}: {name} does not match its checksum; copy or export the bundle again")


def _find_members(path: Path) -> dict[str, _Member]:
    """The bundle's files by name. Only the known names are looked at, so no member can point anywhere else."""
    known = (MANIFEST, *FILES, TOKENIZER)

    def is_known(name: str) -> bool:
        return name in known or BUCKET_FILE.fullmatch(name) is not None

    if path.is_dir():
        files = {file.name: file for file in path.iterdir() if is_known(file.name)}
        return {n: _Member(f, 0, f.stat().st_size) for n, f in files.items() if f.is_file()}
    if not path.exists():
        raise BundleError(f"{path}: no such bundle")
    if not path.is_file():
        raise BundleError(f"{path}: is neither a directory nor a regular file; give a bundle")
    members: dict[str, _Member] = {}
    try:
        with open_zip(path) as archive:
            for info in archive.infolist():
                if not is_known(info.filename):
                    continue
                if info.filename in members:
                    raise BundleError(f"{path}: {info.filename} occurs twice in the zip")
                if (
                    info.compress_type != zipfile.ZIP_STORED
                    or info.flag_bits & 1
                    or info.compress_size != info.file_size
                ):
                    raise BundleError(f"{path}: {info.filename} is compressed; bundles are zipped with 'zip -0'")
                members[info.filename] = _Member(path, stored_member_start(path, info), info.file_size)
    except (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError, OverflowError, struct.error) as error:
        raise BundleError(f"{path}: neither a bundle directory nor a whole zip: {error}") from error
    return members


def write_bundle(
    path: str | os.PathLike[str],
    training: onnx.ModelProto,
    inference: onnx.ModelProto,
    tensors: Mapping[str, np.ndarray],
    manifest: Mapping[str, Any],
    tokenizer: bytes | None = None,
    buckets: Mapping[int, onnx.ModelProto] | None = None,
) -> Path:
    """Writes a bundle directory; it appears whole under its name or not at all. An existing bundle there is replaced.

    Args:
        path: the bundle directory to make.
        training: training graph; initializers marked EXTERNAL get location, offset and length filled in (in place).
        inference: forward graph, likewise.
        tensors: everything for weights.safetensors, by name.
        manifest: bundle.json without `format_version` and `files`, which are added here.
        tokenizer: content of tokenizer.json, for a language model.
        buckets: training graphs for texts of fewer tokens.

    Returns:
        `path`.

    Raises:
        BundleError: an external initializer has no tensor or one of another shape; `path` is no bundle.
        OSError: the disk is full or not writable.
    """
    target = Path(path)
    if target.exists() and not (target / MANIFEST).is_file():
        raise BundleError(f"{target}: exists and is not a bundle; choose another name")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        os.chmod(temporary, 0o777 & ~_umask())
        with open(temporary / "weights.safetensors", "wb") as file:
            writer = TensorWriter(file, {n: TensorSpec(a.dtype, a.shape) for n, a in tensors.items()})
            for name, array in tensors.items():
                writer.write(name, array)
        shorter = {f"training-{tokens}.onnx": model for tokens, model in sorted((buckets or {}).items())}
        for file_name, model in {"training.onnx": training, "inference.onnx": inference, **shorter}.items():
            _fill_external_data(model, writer, file_name)
            (temporary / file_name).write_bytes(model.SerializeToString(deterministic=True))
        names = (*FILES, *shorter, *(() if tokenizer is None else (TOKENIZER,)))
        if tokenizer is not None:
            (temporary / TOKENIZER).write_bytes(tokenizer)
        files = {name: _fingerprint(temporary / name) for name in names}
        content = {"format_version": FORMAT_VERSION, **manifest, "files": files}
        text = json.dumps(content, indent=1).encode()
        parse_manifest(text, str(target))  # what is written must be readable
        (temporary / MANIFEST).write_bytes(text)
        for name in (*names, MANIFEST):
            with open(temporary / name, "rb") as file:
                os.fsync(file.fileno())
        sync_directory(temporary)
        _swap_in(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _swap_in(temporary: Path, target: Path) -> None:
    """Puts directory `temporary` in the place of `target`; an old bundle is moved aside first and then removed."""
    if target.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
        os.replace(target, old)
        try:
            os.replace(temporary, target)
        except OSError:
            os.replace(old, target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(temporary, target)
    sync_directory(target.parent)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _fingerprint(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _fill_external_data(model: onnx.ModelProto, writer: TensorWriter, file_name: str) -> None:
    for tensor in model.graph.initializer:
        if tensor.data_location != tensor.EXTERNAL:
            continue
        spec = writer.specs.get(tensor.name)
        if spec is None:
            raise BundleError(f"{file_name}: initializer {tensor.name!r} has no tensor in weights.safetensors")
        if tuple(tensor.dims) != spec.shape:
            raise BundleError(
                f"{file_name}: initializer {tensor.name!r} has shape {list(tensor.dims)}, its tensor {list(spec.shape)}"
            )
        del tensor.external_data[:]
        for key, value in (
            ("location", "weights.safetensors"),
            ("offset", str(writer.data_offset + spec.begin)),
            ("length", str(spec.end - spec.begin)),
        ):
            entry = tensor.external_data.add()
            entry.key, entry.value = key, value
