"""Ask Linux for huge pages for weights, where it gives them on request (transparent_hugepage:
madvise).

Every token reads all weights, which span far more 4 KiB pages than a processor's TLB holds.
llama.cpp does not ask for huge pages. The pages of a mapped file belong to the file system, but
weights that llama.cpp repacks for a CPU are in its own memory. The idea is ik_llama.cpp's (-thp).
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable

Range = tuple[int, int]  # addresses from start to end, the end excluded
MIN_BYTES = 32 << 20  # smaller buffers have no measurable gain


def watch() -> Callable[[], None]:
    """Return a function that asks for huge pages for all memory allocated since this call.

    Call it before anything is written there. On other systems than Linux it does nothing.
    """
    if sys.platform != "linux":
        return lambda: None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    before = _allocated()

    def ask() -> None:
        now = _allocated()
        if before is None or now is None:
            return  # unknown
        for start, end in _beyond(before, now):
            if end - start >= MIN_BYTES:
                madvise(start, end - start, mmap.MADV_HUGEPAGE)  # Linux may refuse

    return ask


def _allocated() -> list[Range] | None:
    """Return the ranges of memory that are not a file's, in rising order; None if unknown."""
    found = []
    try:
        with open("/proc/self/maps", "rb") as file:  # file names may be any bytes
            for line in file:
                addresses, access, _, _, _, *name = line.split()
                if access == b"rw-p" and not name:
                    start, end = addresses.split(b"-")
                    found.append((int(start, 16), int(end, 16)))
    except OSError:
        return None
    return found


def _beyond(before: list[Range], now: list[Range]) -> list[Range]:
    """Return the parts of `now` that are not in `before`. Linux merges neighbouring ranges, so a
    new one may be part of an old one."""
    found = []
    for start, end in now:
        at = start
        for low, high in before:
            if low < end and high > at:
                found.append((at, low))
                at = high
        found.append((at, end))
    return [(start, end) for start, end in found if start < end]
