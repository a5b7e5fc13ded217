"""Decide whether the bet of the fast schedule pays, and how long drafts best wait for review: from
the measured costs of batches, the acceptance seen so far, and how often deferrals follow each
other."""

from __future__ import annotations

import math
from collections.abc import Callable

from colm_edge.cancel import Cancel
from colm_edge.llama.costs import CostTable, best_window

# A bet must promise to save this much more than it costs.
MARGIN = 0.15
HORIZON = 64  # tokens within which the next deferral is expected
# Old observations fade: one counts half after about 70 later ones.
DECAY = 0.99
CAUTION = 0.7  # standard errors
ROUGH = 0.04  # of the rates that savings are kept for
FINE, MOST_WINDOWS = 0.02, 1000  # the same of windows, and how many are kept
Tables = Callable[[Cancel | None], tuple[CostTable, CostTable] | None]
# An expert agrees more often where the base is sure of itself.
CONFIDENCE = (0.25, 0.5, 0.75)
# What an expert undoes stands together: it is most likely right after its own tokens.
SINCE = (1, 4)


class Rate:
    """How often something happens, learnt from observations; old ones fade.

    prior: the rate before any; weight: how many observations it stands for.
    """

    def __init__(self, prior: float, weight: float) -> None:
        self.hits, self.n = prior * weight, weight

    def add(self, hit: bool) -> None:
        self.hits, self.n = self.hits * DECAY + hit, self.n * DECAY + 1

    @property
    def value(self) -> float:
        return self.hits / self.n

    @property
    def cautious(self) -> float:
        """The rate, lowered by its uncertainty while few observations were seen."""
        value = self.value
        return max(0.0, value - CAUTION * math.sqrt(value * (1 - value) / self.n))


class Planner:
    """Decides about bets and reviews. It lives as long as its pair and learns from every answer.

    tables: called before the first token, with what may cancel it; returns what decodes cost the
        base and the expert, or None where that cannot be measured.
    steady: whether reviews begin at the same places always. Behind a bridge the expert may run out
        of context before the base, and nothing is reviewed from there on.
    """

    def __init__(self, tables: Tables, *, steady: bool = False) -> None:
        self._tables, self.steady = tables, steady
        self._base: CostTable | None = None
        self._expert: CostTable | None = None
        # Whether the models are too fast for planning to pay, or cannot be measured.
        self.rests = False
        self.agreement = Rate(0.4, 4)
        self._by_confidence = [Rate(0.0, 0.0) for _ in range(len(CONFIDENCE) + 1)]
        # Of deferrals after a token of the base, and after another deferral.
        self.onset, self.run = Rate(0.05, 5), Rate(0.2, 5)
        self._saved: dict[tuple[float, float], float] = {}  # by these two rates, for `saves`
        self.looked_at = Rate(1.0, 5)  # of the base's tokens, in a review
        # Of the base's tokens, by how many it had written since the expert's.
        self.undone = [Rate(0.03, 10) for _ in range(len(SINCE) + 1)]
        self._windows: dict[tuple[float, ...], int] = {}  # by the limit and the rates

    def prepare(self, cancel: Cancel | None = None) -> None:
        """Get the cost tables, if that was not done yet. Raises CancelledError."""
        if self._expert is not None or self.rests:
            return
        tables = self._tables(cancel)
        if tables is None:
            self.rests = True
        else:
            self._base, self._expert = tables
            self.rests = self._base.is_quick

    def forget_costs(self) -> None:
        """Read the cost tables again before the next answer."""
        self._base, self._expert, self.rests = None, None, False
        self._saved.clear()
        self._windows.clear()

    def saw_agreement(self, confidence: float, agreed: bool) -> None:
        """Learn from a deferral: how sure the base was of its choice, and if the expert agreed."""
        self.agreement.add(agreed)
        self._by_confidence[_bucket(confidence)].add(agreed)

    def saw_deferral(self, deferred: bool, after_deferral: bool) -> None:
        """Learn from a decision of the switch."""
        (self.run if after_deferral else self.onset).add(deferred)

    def saw_review(self, since: int, n_kept: int, undone: bool) -> None:
        """Learn from a review, or from a token that is not looked at.

        since: the base's tokens since the expert's last, before these. n_kept: how many stayed;
        undone: whether the one after them went.
        """
        for at in range(since, since + n_kept):
            self.undone[_since(at)].add(False)
        if undone:
            self.undone[_since(since + n_kept)].add(True)

    def window(self, most: int) -> int:
        """Return after how many drafts the expert is best called to review them, at most `most`."""
        if self._base is None or self._expert is None or self.rests or self.steady:
            return most
        rates = [rate.value for rate in (self.run, self.onset, self.looked_at, *self.undone)]
        run, onset, looked_at, *undone = (round(rate / FINE) * FINE for rate in rates)
        key = most, run, onset, looked_at, *undone
        if key not in self._windows:
            if len(self._windows) == MOST_WINDOWS:
                self._windows.clear()
            self._windows[key] = best_window(
                self._base,
                self._expert,
                lambda at: onset if at else run,
                lambda at: undone[_since(at)],
                most,
                looked_at,
            )
        return self._windows[key]

    def agrees(self, confidence: float) -> float:
        """Return the probability that the expert agrees with a choice of this confidence."""
        seen = self._by_confidence[_bucket(confidence)]
        return (seen.hits + 8 * self.agreement.cautious) / (seen.n + 8)

    def saves(self, agrees: float, n_pending: int) -> float:
        """Return the seconds that are expected to be saved, or 0, if the expert's batch at a
        deferral includes the base's choice.

        The batch gets one token longer. If the expert agrees, the call at the next deferral is one
        token shorter, and not needed at all if that deferral is the next token.

        agrees: the probability that the expert agrees. n_pending: tokens that the expert would
        evaluate without the choice; 0 if its state is computed already, but then the longer batch
        has to compute it again.
        """
        expert = self._expert
        if expert is None or self.rests:
            return 0.0
        longer = expert.whole(max(n_pending, 1) + 1) + expert.outputs(2)
        paid = longer - expert.best(n_pending)
        key = _roughly(self.onset.cautious), _roughly(self.run.cautious)
        if key not in self._saved:
            self._saved[key] = _saved_later(*key, expert)
        return max(0.0, agrees * self._saved[key] - paid * (1 + MARGIN))


def _saved_later(onset: float, run: float, expert: CostTable) -> float:
    """Return the seconds that the expert saves on average at the next deferral, if it has already
    evaluated one token more.

    onset, run: rates of deferrals after a token of the base's and after another deferral.
    """
    saved, still = 0.0, 1.0  # the probability that none was deferred yet
    for gap in range(HORIZON):
        rate = onset if gap else run
        saved += still * rate * (expert.best(gap + 1) - expert.best(gap))
        still *= 1 - rate
    return saved


def _roughly(rate: float) -> float:
    """Return a rate, rounded so that results for it can be cached."""
    return min(round(rate / ROUGH) * ROUGH, 1 - ROUGH)


def _since(at: int) -> int:
    return sum(at >= edge for edge in SINCE)


def _bucket(confidence: float) -> int:
    return sum(confidence >= edge for edge in CONFIDENCE)
