"""Who may use what is loaded: the process that loaded it, and of a context one thread at a time.

A child of fork has none of its parent's threads, neither llama.cpp's nor ours, and would wait for
them, or for a lock that one of them held, without end.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from colm_edge.errors import ModelError

_forks = 0  # between the first of these processes and this one


def _count() -> None:
    global _forks  # noqa: PLW0603
    _forks += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_count)


class Home:
    """The process that an object was made in."""

    __slots__ = ("_forks",)

    def __init__(self) -> None:
        self._forks = _forks

    @property
    def is_here(self) -> bool:
        return self._forks == _forks

    def check(self) -> None:
        """Raise ModelError in a child of fork."""
        if self._forks != _forks:
            raise ModelError(
                "the models were loaded before this process was forked, and cannot be used in it; "
                "load them in the child, or start it with the method spawn"
            )


def close_each(*closers: Callable[[], object]) -> None:
    """Call each, also where those before it fail, and then raise the first error. An interrupt ends
    it at once: what it came in may still be in use."""
    first: Exception | None = None
    for close in closers:
        try:
            close()
        except Exception as e:
            first = first or e
    if first is not None:
        raise first


class HomeLock:
    """A lock that raises ModelError in a child of fork: `with lock.held():`. A thread that holds it
    may take it again.

    Here and in `Alone` the `with` statement itself takes it: behind a method of ours that does,
    Ctrl-C could come before the block has begun, and it would stay taken.
    """

    __slots__ = ("_lock", "home")

    def __init__(self) -> None:
        self.home, self._lock = Home(), threading.RLock()

    def held(self) -> threading.RLock:
        """Return what takes it for a `with` block."""
        self.home.check()
        return self._lock

    def acquire(self, timeout: float = -1) -> bool:
        self.home.check()
        return self._lock.acquire(timeout=timeout)

    def release(self) -> None:
        self._lock.release()


class Alone:
    """The lock of a context, held while llama.cpp works on it: `with alone.held():`."""

    __slots__ = ("_lock", "home")

    def __init__(self) -> None:
        self.home, self._lock = Home(), threading.Lock()

    def held(self) -> threading.Lock:
        """Return what takes it for a `with` block. Another thread that comes meanwhile, and a child
        of fork, get ModelError, where llama.cpp would crash or hang."""
        self.home.check()
        if self._lock.locked():
            raise ModelError(
                "two threads use one context at once; use the pair's own methods, which wait, or "
                "load another pair"
            )
        return self._lock
