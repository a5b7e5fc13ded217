"""One object that ends an answer, from whatever thread, down to the evaluation under way."""

from __future__ import annotations


class CancelledError(Exception):
    """Raised between two evaluations of an answer that nobody wants any more."""


class Cancel:
    """Handed down from the stream to llama.cpp; `request` ends what checks it, from any thread."""

    __slots__ = ("requested",)

    def __init__(self) -> None:
        self.requested = False

    def request(self) -> None:
        self.requested = True

    def check(self) -> None:
        """Raise CancelledError once the end was requested."""
        if self.requested:
            raise CancelledError
