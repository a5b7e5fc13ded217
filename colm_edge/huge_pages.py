"""Huge pages for weights, where Linux gives them to those who ask (transparent_hugepage: madvise).

Every token reads all weights, in pages of 4 KiB far more of them than a processor keeps addresses
of. llama.cpp does not ask: files' pages are the file system's affair, but what it rearranges for a
CPU is in memory of its own. The idea is ik_llama.cpp's (its option -thp).
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
        for start, end in _beyond(before, _allocated()):
            if end - start >= MIN_BYTES:
                madvise(start, end - start, mmap.MADV_HUGEPAGE)  # a wish, which may be refused

    return ask


def _allocated() -> list[Range]:
    """Return where memory is that belongs to no file, in rising order."""
    found = []
    try:
        with open("/proc/self/maps") as file:
            for line in file:
                addresses, access, _, _, _, *name = line.split()
                if access == "rw-p" and not name:
                    start, end = addresses.split("-")
                    found.append((int(start, 16), int(end, 16)))
    except OSError:
        return []  # nobody tells
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
