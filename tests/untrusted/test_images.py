"""Images that once made Pillow, and with it the reader, fail otherwise than it may."""

from __future__ import annotations

import io
import json
import struct
import warnings
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edge_razor.data.images import ImageFolder
from edge_razor.data.source import Augmentation
from edge_razor.errors import DataError
from edge_razor.manifest import InputSpec, parse_manifest


def png(*more: tuple[bytes, bytes], size: tuple[int, int] = (8, 6)) -> bytes:
    """A black image, with chunks between its pixels and its end."""
    header = struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes((1 + 3 * 8) * 6))
    chunks = [(b"IHDR", header), (b"IDAT", pixels), *more, (b"IEND", b"")]
    parts = [struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff_whose_pixels_begin_at_a_fraction() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 6)).save(stream, "TIFF")
    offsets = struct.pack("<HHI", 273, 4, 1)
    assert offsets in stream.getvalue()
    return stream.getvalue().replace(offsets, struct.pack("<HHI", 273, 5, 1))


def image_source(folder: Path, manifest: dict[str, Any], data: bytes, skip_bad: bool = False) -> ImageFolder:
    (folder / "images" / "class").mkdir(parents=True, exist_ok=True)
    (folder / "images" / "class" / "image.png").write_bytes(data)
    model = replace(
        parse_manifest(json.dumps(manifest).encode(), "bundle"), inputs=(InputSpec("x", (3, 6, 8), (0, 2, 3, 1)),)
    )
    return ImageFolder(folder / "images", model, None, Augmentation(), skip_bad)


@pytest.mark.parametrize(
    "data", [png((b"iCCP", b"a\0")), tiff_whose_pixels_begin_at_a_fraction()], ids=["IndexError", "TypeError"]
)
def test_an_image_that_makes_pillow_raise_anything_is_named_or_left_out(
    data: bytes, tmp_path: Path, manifest: dict[str, Any]
) -> None:
    def read(source: ImageFolder) -> bool:
        return source.read(0, np.empty(source.input_shape, np.uint8), np.empty((), np.int32), None)

    with pytest.raises(DataError, match=r"image\.png: cannot be read \(.*\); remove it, or pass --skip-bad"):
        read(image_source(tmp_path, manifest, data))
    source = image_source(tmp_path, manifest, data, skip_bad=True)
    assert not read(source) and len(source.bad) == 1
    assert read(image_source(tmp_path, manifest, png()))


def test_a_large_image_is_counted_without_a_warning_of_pillow(tmp_path: Path, manifest: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source = image_source(tmp_path, manifest, png(size=(10_000, 10_000)))
    assert source.work_bytes == 8 * 10_000 * 10_000
