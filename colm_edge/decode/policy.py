"""Who writes the next token: the switch, read off the base's state, and its threshold."""

from __future__ import annotations

from typing import NamedTuple

from colm_edge.decode.timeline import Floats
from colm_edge.errors import ModelError
from colm_edge.switch.reading import Reader

BASE = -1  # the writer of what is not deferred; experts count from 0


class Reading(NamedTuple):
    """What the base's state says of one position."""

    p_defer: float
    choice: int  # the base's likeliest token
    logsumexp: float  # of its logits
    writer: int  # BASE, or the index of an expert


class Policy:
    """Defer to the expert where p_defer is above a threshold; a threshold of 0 always does."""

    def __init__(self, read: Reader, threshold: float) -> None:
        self._read, self._threshold = read, threshold

    def read(self, at: int, logits: Floats, hidden: Floats) -> Reading:
        """Read the switch for the token at position `at`. Raises ModelError for NaN and the like.

        logits, hidden: the base's state before it, (n_vocab,) and (n_embd,).
        """
        try:
            p_defer, choice, logsumexp = self._read(logits, hidden)
        except ValueError as e:
            raise ModelError(f"the base or the switch is broken: {e}; use another file") from e
        return Reading(p_defer, choice, logsumexp, self.writer(p_defer))

    def writer(self, p_defer: float) -> int:
        """Return who writes at a deferral probability: BASE, or the index of an expert."""
        # p > 0 holds for every finite state; where it underflows, 0 still means always.
        return 0 if p_defer > self._threshold or self._threshold <= 0 else BASE
