"""Sampling where tokens are taken back: with random numbers that are used once."""

from __future__ import annotations

from random import Random
from typing import Protocol, Self

import numpy as np

from colm_edge.arrays import Doubles, Floats, Tokens
from colm_edge.decode.picker import Sampler

Drawn = tuple[Tokens, Doubles]  # ids, and the probability of each


class Distribution(Sampler, Protocol):
    """A sampler that can tell what it draws from."""

    def probabilities(self, logits: Floats) -> Drawn:
        """Return the ids that may be drawn, and the probability of each; they sum to 1."""

    def accept(self, token: int) -> None:
        """Count a token as written."""

    def likeliest(self, logits: Floats, choice: int) -> int:
        """Return the likeliest token that may be written. choice: the likeliest of all."""


class Fresh:
    """Draws from what another sampler would draw from, with random numbers of its own.

    All copies share the numbers, and a rollback does not give them back: a token that was undone
    has told something about the number that it was drawn with.
    """

    def __init__(self, sampler: Distribution, random: Random) -> None:
        self._sampler, self._random = sampler, random
        self.drawn_from: Drawn | None = None  # at the last call

    def __call__(self, logits: Floats) -> int:
        self.drawn_from = self.probabilities(logits)
        return self.draw(*self.drawn_from)

    def knows(self, logits: Floats) -> bool:
        return self._sampler.knows(logits)

    def copy(self) -> Self:
        return type(self)(self._sampler.copy(), self._random)

    def probabilities(self, logits: Floats) -> Drawn:
        return self._sampler.probabilities(logits)

    def likeliest(self, logits: Floats, choice: int) -> int:
        return self._sampler.likeliest(logits, choice)

    def uniform(self) -> float:
        """Return a number from 0 to 1, without 1."""
        return self._random.random()

    def draw(self, ids: Tokens, weight: Doubles) -> int:
        """Draw one of the ids, (n,), by their weights, and count it as written."""
        upper = np.cumsum(weight)
        at = int(np.searchsorted(upper, self.uniform() * upper[-1], side="right"))
        token = int(ids[min(at, len(ids) - 1)])
        self._sampler.accept(token)
        return token
