"""Huge pages for weights, where Linux gives them to those who ask (transparent_hugepage: madvise).

Every token reads all weights, and a processor remembers where far fewer pages of 4 KiB are.
llama.cpp does not ask. The pages of a mapped file are the file system's affair, but weights that
are rearranged for a CPU are in memory of llama.cpp's own. The idea is ik_llama.cpp's (-thp).
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable

Range = tuple[int, int]  # of addresses, the end excluded
MIN_BYTES = 32 << 20  # smaller buffers gain nothing that can be measured


def watch() -> Callable[[], None]:
    """Return a function that asks for huge pages for all memory that was allocated since, and is to
    be called before anything is written there. Elsewhere than on Linux it does nothing."""
    if sys.platform != "linux":
        return lambda: None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    before = _allocated()

    def ask() -> None:
        now = _allocated()
        if before is None or now is None:
            return  # nobody tells
        for start, end in _beyond(before, now):
            if end - start >= MIN_BYTES:
                madvise(start, end - start, mmap.MADV_HUGEPAGE)  # a wish, which may be refused

    return ask


def _allocated() -> list[Range] | None:
    """Return where memory is that belongs to no file, in rising order; None if nobody tells."""
    found = []
    try:
        with open("/proc/self/maps", "rb") as file:  # names of files may be any bytes
            for line in file:
                addresses, access, _, _, _, *name = line.split()
                if access == b"rw-p" and not name:
                    start, end = addresses.split(b"-")
                    found.append((int(start, 16), int(end, 16)))
    except OSError:
        return None
    return found


def _beyond(before: list[Range], now: list[Range]) -> list[Range]:
    """Return the parts of `now` that are not in `before`: Linux makes one range of neighbours."""
    found = []
    for start, end in now:
        at = start
        for low, high in before:
            if low < end and high > at:
                found.append((at, low))
                at = high
        found.append((at, end))
    return [(start, end) for start, end in found if start < end]
