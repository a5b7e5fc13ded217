"""Arrays in numpy's files (.npy, .npz), read within the file's own length.

Files come from anywhere. Of what numpy can read, this reads what colm-edge writes: one row of
numbers of a known type, not packed. A head says how many there are, and must say as many as follow
it; it is compared with what is expected, never evaluated, and nothing is unpickled.
"""

from __future__ import annotations

import os
import re
import struct
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

# What np.save writes for the version that suits every array of ours.
_MAGIC = b"\x93NUMPY\x01\x00"
_HEAD = re.compile(
    rb"\{'descr': (.{1,200}), 'fortran_order': False, 'shape': \((.{0,20})\), \} *\n"
)
_LENGTH = re.compile(rb"(\d{1,18}),")
_TEXT = re.compile(rb"'<U(\d{1,18})'")
TEXT = np.dtype(str)
Kind = npt.DTypeLike


def read_arrays(path: str | os.PathLike[str], kinds: Mapping[str, Kind]) -> dict[str, Any]:
    """Return the arrays of these names in an .npz file, (n,) each, read-only; a text for the type
    `str`. What the file lacks is left out.

    Raises ValueError where the file is broken or holds something else, OSError where it cannot be
    read.
    """
    with open(path, "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                return _found(archive, kinds, os.fstat(file.fileno()).st_size)
        # OSError: it names a place before the file's beginning. RuntimeError: it asks for a
        # password, or needs what zipfile does not know.
        except (
            zipfile.BadZipFile, EOFError, OSError, RuntimeError, struct.error, OverflowError
        ) as e:  # fmt: skip
            raise ValueError(f"not an archive of arrays ({e})") from e


def read_array(path: str | os.PathLike[str], kind: Kind) -> npt.NDArray[Any]:
    """Return the array in an .npy file, (n,), read-only; raises as `read_arrays`."""
    with open(path, "rb") as file:
        return np.asarray(_parsed(file.read(), kind))


def _found(archive: zipfile.ZipFile, kinds: Mapping[str, Kind], size: int) -> dict[str, Any]:
    members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
    if len(members) < len(archive.infolist()):
        raise ValueError("a name comes twice")
    return {
        name: _named(name, _content(archive, members[name], size), kind)
        for name, kind in kinds.items()
        if name in members
    }


def _content(archive: zipfile.ZipFile, member: zipfile.ZipInfo, size: int) -> bytes:
    if member.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{member.filename} is packed")
    if not member.file_size == member.compress_size <= size:
        raise ValueError(f"{member.filename} is longer than the file")
    return archive.read(member)


def _named(name: str, data: bytes, kind: Kind) -> Any:
    try:
        return _parsed(data, kind)
    except ValueError as e:
        raise ValueError(f"{name}: {e}") from e


def _parsed(data: bytes, kind: Kind) -> Any:
    """Return what a file of one array holds."""
    at = 10 + int.from_bytes(data[8:10], "little")
    head = _HEAD.fullmatch(data[10:at])
    if data[:8] != _MAGIC or head is None:
        raise ValueError("not an array of numbers")
    wanted = np.dtype(kind)
    if wanted == TEXT:
        return _text(head, data[at:])
    expected = repr(np.lib.format.dtype_to_descr(wanted)).encode()
    length = _LENGTH.fullmatch(head[2])
    if head[1] != expected or length is None:
        raise ValueError(
            f"expected one row of {expected.decode()}, not {head[1]!r} in ({head[2]!r})"
        )
    n = int(length[1])
    if n * wanted.itemsize != len(data) - at:
        raise ValueError(f"expected {n} numbers, and as many bytes")
    values = np.frombuffer(data, wanted, n, at)
    if wanted == np.bool_ and (values.view(np.uint8) > 1).any():
        raise ValueError("expected true or false")
    return values


def _text(head: re.Match[bytes], body: bytes) -> str:
    length = _TEXT.fullmatch(head[1])
    if length is None or head[2] or 4 * int(length[1]) != len(body):
        raise ValueError("expected a text")
    return body.decode("utf-32-le").rstrip("\0")
