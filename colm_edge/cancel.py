"""End an answer from any thread: one object, passed from the stream down to llama.cpp."""

from __future__ import annotations


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
