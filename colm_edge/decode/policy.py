"""Who writes the next token: the switch, read off the base's state, and its threshold."""

from __future__ import annotations

import math
from bisect import insort
from typing import NamedTuple

import numpy as np

from colm_edge.arrays import Floats
from colm_edge.errors import ModelError
from colm_edge.options import Options
from colm_edge.switch.file import Switch
from colm_edge.switch.reading import AnySwitch, Reader
from colm_edge.switch.rules import DEFAULT_RATE, Untrained

# Of RatePolicy: the number of values that the quantile starts with, evenly spread from 0 to 1; the
# tokens over which missing deferrals are made up; and the highest share meanwhile, times the rate.
PRIOR, EVEN_OUT, MOST_AT_ONCE = 2, 16, 3
# The share of the base's tokens, those likeliest to be deferred, that a review looks at:
# docs/review.md.
REVIEW_SHARE = 0.6
BASE = -1  # the writer of what is not deferred; experts count from 0


class Reading(NamedTuple):
    """What the switch and the base say about one position."""

    p_defer: float
    choice: int  # the base's likeliest token
    logsumexp: float  # of its logits
    writer: int  # BASE, or an expert's index
    expert: int  # who writes if it is deferred, or reviews what the base writes


class Policy:
    """Defer to the likeliest expert where p_defer is above a threshold; at 0 it always does.

    remembers: whether its decisions depend on all that it has read before, undone drafts too.
    """

    remembers = False

    def __init__(self, read: Reader, threshold: float) -> None:
        self._read, self.threshold = read, threshold

    def copy(self) -> Policy:
        """Return one that decides as this one would, and leaves it as it is."""
        return self

    def read(self, at: int, logits: Floats, hidden: Floats) -> Reading:
        """Read the switch for the token at position `at`. Raises ModelError for NaN and the like.

        logits, hidden: the base's state before it, (n_vocab,) and (n_embd,).
        """
        try:
            p_defer, choice, logsumexp, expert = self._read(logits, hidden)
        except ValueError as e:
            raise ModelError(f"the base or the switch is broken: {e}; use another file") from e
        writer = expert if self.defers(p_defer) else BASE
        return Reading(p_defer, choice, logsumexp, writer, expert)

    def defers(self, p_defer: float) -> bool:
        """Return whether an expert writes at a deferral probability."""
        # p > 0 for every finite state; where it underflows to 0, a threshold of 0 still defers.
        return p_defer > self.threshold or self.threshold <= 0


class RatePolicy(Policy):
    """Defer a share of the tokens, with a switch that has no calibration. The threshold is a
    running quantile of p_defer, moved so that the share deferred so far returns to the rate.

    It belongs to one answer, so that an answer depends on its prompt alone.
    """

    remembers = True

    def __init__(self, read: Reader, rate: float) -> None:
        super().__init__(read, 1 - rate)
        self._rate = rate
        self._seen = [(i + 0.5) / PRIOR for i in range(PRIOR)]  # p_defer so far, rising
        self._owed = 0.0  # deferrals that the rate asks for, minus those so far

    def copy(self) -> RatePolicy:
        other = RatePolicy(self._read, self._rate)
        other._seen, other._owed, other.threshold = self._seen[:], self._owed, self.threshold
        return other

    def defers(self, p_defer: float) -> bool:
        if not 0 < self._rate < 1:
            return super().defers(p_defer)
        share = self._rate + self._owed / EVEN_OUT
        share = min(max(share, 0.0), MOST_AT_ONCE * self._rate, 1.0)
        insort(self._seen, p_defer)
        below = len(self._seen) - round(share * len(self._seen))
        self.threshold = self._seen[below - 1] if below else 0.0
        defers = p_defer > self.threshold
        self._owed += self._rate - defers
        return defers


def threshold_of(switch: AnySwitch, options: Options) -> float:
    """Return the threshold that the options ask of a switch; where it follows a rate, its start."""
    if options.threshold is not None:
        return options.threshold
    if (rate := running_rate(switch, options)) is not None:
        return 1 - rate
    known = _calibrated(switch)
    if options.defer_rate is None or known is None:
        return switch.threshold
    return known.threshold_for(options.defer_rate)


def running_rate(switch: AnySwitch, options: Options) -> float | None:
    """Return the defer rate that the threshold follows as an answer is written, or None where the
    threshold is fixed: given, or known by the switch's calibration."""
    rate = options.defer_rate
    if rate is None and isinstance(switch, Untrained):
        rate = DEFAULT_RATE
    return rate if options.threshold is None and _calibrated(switch) is None else None


def _calibrated(switch: AnySwitch) -> Switch | None:
    """Return a switch that knows its threshold for every defer rate, or None."""
    return switch if isinstance(switch, Switch) and switch.defer_rates else None


def review_of(switch: AnySwitch, options: Options, *, possible: bool) -> float:
    """Return the tolerance of review, in nats, that the options ask for, or else the switch's own,
    where that is possible and does not contradict them; infinity is off."""
    if options.review is not None:
        return options.review
    nats = switch.review if isinstance(switch, Switch) else None
    contradicts = options.doubts or (nats == 0 and options.strategy == "compose")
    return math.inf if nats is None or contradicts or not possible else nats


def review_floor(switch: AnySwitch, options: Options) -> float:
    """Return the p_defer from which on a review looks at a token of the base; 0 is at each, as it
    has to be where the text is the expert's own."""
    if options.review == 0:
        return 0.0
    if options.review_floor is not None:
        return options.review_floor
    deferred, known = expected_rate(switch, options), _calibrated(switch)
    if deferred is None or known is None:
        return 0.0
    return known.threshold_for(deferred + REVIEW_SHARE * (1 - deferred))


def expected_rate(switch: AnySwitch, options: Options) -> float | None:
    """Return about what share of tokens is deferred by the pair, or None where that is not known or
    one model writes alone."""
    threshold = threshold_of(switch, options)
    if options.threshold is None and (rate := options.defer_rate or running_rate(switch, options)):
        return rate if rate < 1 else None
    if (known := _calibrated(switch)) is not None and 0 < threshold < 1:
        return float(np.interp(-threshold, np.negative(known.thresholds), known.defer_rates))
    return None
