"""How many threads a decode should have, by what other programs use of the cores.

llama.cpp's threads wait for each other after every operation. Where another program takes the core
of one of them, the rest wait busily, and a decode takes up to a hundred times as long. One thread
less is then far faster.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from time import perf_counter

WINDOW = 0.25  # seconds between two looks at the other programs, at least
CALM = 0.5  # seconds that a core must be free before it is used again
# Where programs come and go, that time doubles up to this one: coming back too early costs a slow
# decode.
LONGEST_CALM = 8.0
SOON = 1.0  # seconds: a core that is lost sooner was used again too early


class Cores:
    """The cores that other programs leave to this process. Any thread may use it.

    n: how many the process may use. others: returns the seconds that other programs have computed
    on them so far, summed over the cores, or None where the system does not tell; then every core
    counts as free. clock: returns seconds.
    """

    def __init__(
        self,
        n: int,
        others: Callable[[], float | None],
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        self._n, self._others, self._clock = n, others, clock
        self._free = n
        self._lock = threading.Lock()
        self._looked, self._seen = clock(), others()
        self._busy = self._looked  # when there was last no core more than those in use
        self._raised = -LONGEST_CALM  # when cores were last used again
        self._calm = CALM
        self._lent = 0

    def threads(self, most: int) -> int:
        """Return how many threads a decode that begins now should have: 1 to `most`.

        That is `most`, even if it is more than there are cores, while other programs want none.
        """
        now = self._clock()
        if now - self._looked >= WINDOW and self._lock.acquire(blocking=False):
            try:
                self._look(now)
            finally:
                self._lock.release()
        free = self._free - self._lent
        return most if free == self._n else min(most, max(1, free))

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Leave one core more to other work of this process inside the `with` block."""
        with self._lock:
            self._lent += 1
        try:
            yield
        finally:
            with self._lock:
                self._lent -= 1

    def _look(self, now: float) -> None:
        before, since = self._seen, self._looked
        self._looked, self._seen = now, self._others()
        if before is None or self._seen is None:
            return
        # A program that wants less than half a core costs less than a thread brings.
        taken = round((self._seen - before) / (now - since))
        free = min(self._n, max(1, self._n - taken))
        if free > self._free:
            if now - self._busy < self._calm:
                return
            self._raised = now
        else:
            self._busy = now
            if free < self._free:
                hasty = now - self._raised < SOON
                self._calm = min(2 * self._calm, LONGEST_CALM) if hasty else CALM
        self._free = free


@cache
def cores() -> Cores:
    """Return the cores of this process."""
    return Cores(n_cores(), others_seconds)


def n_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def others_seconds() -> float | None:
    """Return the seconds that other programs have computed on this process's cores since the
    system started, summed over the cores; None where the system does not tell. A child of this
    process is another program while it runs."""
    try:
        if sys.platform == "win32":
            busy = _busy_on_windows()
        elif sys.platform == "darwin":
            busy = _busy_on_macos()
        else:
            busy = _busy_on_linux(Path("/proc/stat").read_text(), os.sched_getaffinity(0))
    except (OSError, AttributeError, ValueError):
        return None
    return busy - sum(os.times()[:4])  # this process, and its children once they have ended


def _busy_on_linux(stat: str, cpus: set[int]) -> float:
    """Return the busy seconds of some CPUs, from the text of /proc/stat."""
    # Programs of low priority leave a core as soon as it is wanted, unless ours is one of them.
    counts_nice = os.nice(0) > 0
    names, ticks = {f"cpu{i}" for i in cpus}, 0
    for line in stat.splitlines():
        name, *fields = line.split()
        if name in names:
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[:8])
            ticks += user + system + irq + softirq + steal + counts_nice * nice
    return ticks / os.sysconf("SC_CLK_TCK")


def _busy_on_windows() -> float:
    """Return the busy seconds of all CPUs."""
    idle, kernel, user = ctypes.c_uint64(), ctypes.c_uint64(), ctypes.c_uint64()
    times = (ctypes.byref(idle), ctypes.byref(kernel), ctypes.byref(user))
    if not ctypes.windll.kernel32.GetSystemTimes(*times):  # type: ignore[attr-defined,unused-ignore]
        raise OSError("GetSystemTimes failed")
    return (kernel.value + user.value - idle.value) / 1e7  # idle time is part of kernel's


def _busy_on_macos() -> float:
    """Return the busy seconds of all CPUs, except for programs of low priority."""
    ticks, n = (ctypes.c_uint32 * 4)(), ctypes.c_uint32(4)  # user, system, idle, nice
    system, host = _mach_host()
    if system.host_statistics(host, 3, ticks, ctypes.byref(n)):  # 3: HOST_CPU_LOAD_INFO
        raise OSError("host_statistics failed")
    return (ticks[0] + ticks[1]) / 100


@cache
def _mach_host() -> tuple[ctypes.CDLL, ctypes.c_uint32]:
    system = ctypes.CDLL(None)
    system.mach_host_self.restype = ctypes.c_uint32
    return system, ctypes.c_uint32(system.mach_host_self())
