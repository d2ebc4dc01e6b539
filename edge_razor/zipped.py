"""Where the bytes of a stored (not compressed) zip member lie, so that they can be read in place."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path

__all__ = ["stored_member_start"]


def stored_member_start(path: Path, info: zipfile.ZipInfo) -> int:
    """Byte position in the zip of the member's data.

    The local header in front of it has name and extra fields of its own lengths, so the directory cannot tell.

    Raises:
        zipfile.BadZipFile: there is no local header where the directory says, or the data reach past the end.
    """
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        if not 0 <= info.header_offset <= size:
            raise zipfile.BadZipFile(f"no local header for {info.filename}")
        file.seek(info.header_offset)
        header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise zipfile.BadZipFile(f"no local header for {info.filename}")
    name_bytes, extra_bytes = struct.unpack("<26xHH", header)
    start = info.header_offset + 30 + name_bytes + extra_bytes
    if start + info.compress_size > size:
        raise zipfile.BadZipFile(f"{info.filename} reaches past the end of the file")
    return start
