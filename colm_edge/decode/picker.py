"""Pick a token from the logits of the model that writes, and make its record; also the mixture of
both models (`compose`)."""

from __future__ import annotations

import math
from typing import Protocol, Self

import numpy as np

from colm_edge import readout
from colm_edge.arrays import Doubles, Floats
from colm_edge.decode.policy import Reading
from colm_edge.decode.step import ZERO_PROBABILITY, Source, Step
from colm_edge.errors import ModelError

Prediction = tuple[Floats, int, float]  # a model's logits, their likeliest token, log-sum-exp
COLUMNS = 2048  # in which `likeliest` lays out logits


class Sampler(Protocol):
    """Picks a token from logits (n_choose,), if they tell of one that may be written; a `copy` goes
    on from the same state."""

    def __call__(self, logits: Floats) -> int: ...
    def knows(self, logits: Floats) -> bool: ...
    def copy(self) -> Self: ...


class Picker:
    """Pick the likeliest token, or let a sampler draw one.

    n_choose: ids at or above it are never written.
    sampler: None writes the likeliest token.
    n_probs: how many of the likeliest tokens each step holds.
    composes: at a deferral, pick from the mixture of both models instead of the expert's logits.
    defer_row: the id in the base's vocabulary that is the switch and not a token, or -1.
    """

    def __init__(
        self,
        n_choose: int,
        sampler: Sampler | None = None,
        *,
        n_probs: int = 0,
        composes: bool = False,
        defer_row: int = -1,
    ) -> None:
        self.n_choose, self.sampler, self._n_probs = n_choose, sampler, n_probs
        self.composes, self._defer_row = composes, defer_row
        self._features = np.empty(len(readout.FEATURES) + 1, np.float32)  # and a defer row's

    def read(self, at: int, logits: Floats, *, of_base: bool = False) -> tuple[int, float]:
        """Return the likeliest token and the log-sum-exp of an expert's logits, a mixture's, or the
        base's, for position `at`, without the base's defer row. Raises ModelError for NaN and the
        like."""
        n_choose = min(self.n_choose, len(logits))
        row = self._defer_row if self._defer_row < len(logits) else -1
        out = self._features[: len(readout.FEATURES) + (row >= 0)]
        try:
            return readout.read_alone(logits, out, n_choose, row)
        except ValueError as e:
            who = "base" if of_base else "expert"
            raise ModelError(f"the {who} is broken: {e}; use another file") from e

    def knows(self, logits: Floats, before: Sampler | None = None) -> bool:
        """Return whether logits tell of a token that may be written. before: the sampler's state
        in their place, if it is not the present one."""
        sampler = before or self.sampler
        return sampler is None or sampler.knows(logits[: self.n_choose])

    def logits_of_deferred(self, base: Floats, expert: Floats, p_defer: float) -> Floats:
        """Return the logits that a deferred token is picked from."""
        if self.composes and p_defer < 1:
            return mixture(base, expert, p_defer, self.n_choose, self._defer_row)
        return expert

    def write(
        self, source: Source, p_defer: float, logits: Floats, choice: int, logsumexp: float
    ) -> Step:
        """Pick a token from the writer's logits, return its step. choice: the likeliest token."""
        if self.sampler is not None:
            choice = self.sampler(logits[: self.n_choose])
        return self.tell(choice, source, p_defer, logits, logsumexp)

    def write_own(self, reading: Reading, logits: Floats) -> Step:
        """Pick the base's token, from its logits, at the place of a reading."""
        return self.write("base", reading.p_defer, logits, reading.choice, reading.logsumexp)

    def tell(
        self, token: int, source: Source, p_defer: float, logits: Floats, logsumexp: float
    ) -> Step:
        """Return the step of a given token."""
        logprob = max(float(logits[token]) - logsumexp, ZERO_PROBABILITY)
        step = Step(token, source, p_defer, logprob)
        if self._n_probs:
            n, row = self._n_probs, self._defer_row
            best = likeliest(logits[: self.n_choose], logsumexp, n + (row >= 0))
            step.top = tuple(one for one in best if one[0] != row)[:n]
        return step

    def mark(self) -> Sampler | None:
        """Return the state of the sampler, for `rollback`."""
        return self.sampler.copy() if self.sampler is not None else None

    def rollback(self, mark: Sampler | None) -> Sampler | None:
        """Restore the sampler's state from a mark, which may be used once; return a mark of the
        state before."""
        replaced, self.sampler = self.sampler, mark
        return replaced


def likeliest(logits: Floats, logsumexp: float, n: int) -> tuple[tuple[int, float], ...]:
    """Return the n likeliest ids, best first, and their log-probabilities; none that is -inf."""
    n = min(n, len(logits))
    if n < COLUMNS < len(logits):
        # Laid out in rows, the n largest are in the n columns whose largest are. Of 150,000 that
        # takes 50 us, and 3 ms to part them all.
        n_rows = len(logits) // COLUMNS
        highest = logits[: n_rows * COLUMNS].reshape(n_rows, COLUMNS).max(axis=0)
        columns = np.argpartition(-highest, n - 1)[:n]
        inside = (columns + COLUMNS * np.arange(n_rows)[:, None]).ravel()
        best = np.concatenate([inside, np.arange(n_rows * COLUMNS, len(logits))])
    else:
        best = np.arange(len(logits))
    best = best[np.argpartition(-logits[best], n - 1)[:n]] if len(best) > n else best
    best = best[np.lexsort((best, -logits[best]))]
    return tuple((int(i), float(logits[i]) - logsumexp) for i in best if logits[i] > -math.inf)


def mixture(
    base: Floats, expert: Floats, p_defer: float, n_choose: int, defer_row: int = -1
) -> Floats:
    """Return log((1−p)·P_base + p·P_expert), shape (n_choose,): Co-LLM's equation 1.

    Both are normalised without the base's defer row, if it has one.
    """

    def log_softmax(logits: Floats) -> Doubles:
        x = logits.astype(np.float64)
        if 0 <= defer_row < len(x):
            x[defer_row] = -math.inf
        x -= x.max()
        x -= math.log(np.exp(x).sum())
        return x

    ours = log_softmax(base)[:n_choose] + math.log1p(-p_defer)
    theirs = log_softmax(expert)[:n_choose] + (math.log(p_defer) if p_defer > 0 else -math.inf)
    return np.logaddexp(ours, theirs).astype(np.float32)
