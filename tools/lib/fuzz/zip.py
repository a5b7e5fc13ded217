"""Zip archives made by hand, so that they may also be what no library writes."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from functools import cache

Members = list[tuple[str, bytes]]
BOMB_BLOCKS = 192  # of 16 MiB: 3 GiB


def members_of(data: bytes) -> Members:
    """Return an archive's names and contents; none where it is broken."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return [(info.filename, archive.read(info)) for info in archive.infolist()]
    except Exception:  # a broken one may raise anything
        return []


def zipped(members: Members, *, packed: bool = False) -> bytes:
    """Return an archive of these members, whose names may come twice."""
    return _archive(
        [
            (name, _deflated(data) if packed else data, zlib.crc32(data), len(data), packed)
            for name, data in members
        ]
    )


def bomb(members: Members, i: int) -> bytes:
    """Return an archive whose i-th member is followed by 3 GiB of zeros, packed."""
    entries = [(name, data, zlib.crc32(data), len(data), False) for name, data in members]
    name, data = members[i]
    begin = zlib.compressobj(wbits=-15)
    head = begin.compress(data) + begin.flush(zlib.Z_FULL_FLUSH)
    size = min(2**32 - 1, len(data) + (BOMB_BLOCKS << 24))
    entries[i] = name, head + _zeros() * BOMB_BLOCKS + _deflated(b""), 0, size, True
    return _archive(entries)


@cache
def _zeros() -> bytes:
    """Return 16 MiB of zeros as blocks that others may follow."""
    packer = zlib.compressobj(9, wbits=-15)
    return packer.compress(bytes(1 << 24)) + packer.flush(zlib.Z_FULL_FLUSH)


def _deflated(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


def _archive(entries: list[tuple[str, bytes, int, int, bool]]) -> bytes:
    """entries: name, bytes as stored, checksum, size when unpacked, whether packed."""
    files, index = b"", b""
    for name, stored, checksum, size, packed in entries:
        told = name.encode("utf-8", "surrogatepass")
        method = 8 if packed else 0
        both = (20, 0x800, method, 0, 33, checksum, len(stored), size, len(told))
        index += struct.pack("<4sH5H3L5H2L", b"PK\1\2", 20, *both, 0, 0, 0, 0, 0, len(files)) + told
        files += struct.pack("<4s5H3L2H", b"PK\3\4", *both, 0) + told + stored
    n = len(entries)
    return files + index + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, n, n, len(index), len(files), 0)
