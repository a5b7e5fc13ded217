"""End an answer from any thread: one object, passed from the stream down to llama.cpp."""

from __future__ import annotations

from concurrent.futures import Future, wait
from typing import TypeVar

T = TypeVar("T")
LOOK = 0.1  # seconds between two looks at whether an answer that waits was cancelled


class CancelledError(Exception):
    """Raised between two evaluations of an answer that was cancelled."""


class Cancel:
    """Any thread may call `request`; the evaluating thread calls `check` between evaluations."""

    __slots__ = ("requested",)

    def __init__(self) -> None:
        self.requested = False

    def request(self) -> None:
        self.requested = True

    def check(self) -> None:
        """Raise CancelledError if `request` was called."""
        if self.requested:
            raise CancelledError

    def wait_for(self, future: Future[T]) -> T:
        """Return what a future holds, once it does. Raises CancelledError if `request` was called
        before; the future goes on then."""
        while not wait([future], LOOK).done:
            self.check()
        return future.result()
