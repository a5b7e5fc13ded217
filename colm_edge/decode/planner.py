"""Which bets the fast schedule places: what they would save, by the measured costs of batches and
by what was seen of agreements and of runs of deferrals."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

from colm_edge.llama.costs import CostTable

# What a bet must promise to save, as a share of what it costs.
MARGIN = 0.15
LOOK_AHEAD = 3  # deferrals
MAX_DRAFT = 64  # tokens in one verification
MAX_RUN = 8  # tokens that the expert writes ahead
# Estimates forget: an observation counts half after about 70 later ones.
DECAY = 0.99
CAUTION = 0.7  # standard errors
ROUGH = 0.04  # of the rates that plans are kept for
# An expert agrees more often where the base is sure of itself.
CONFIDENCE = (0.25, 0.5, 0.75)


class Rate:
    """How often something happens, learnt as it goes, old observations fading.

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
        """The rate less what it may be off by, while little was seen."""
        value = self.value
        return max(0.0, value - CAUTION * math.sqrt(value * (1 - value) / self.n))


class Draft(NamedTuple):
    """What was drafted since the last verification."""

    all_agree: float  # the probability that the expert repeats every choice that is pending
    n_choices: int  # the base's choices at deferrals, pending until the expert has verified them
    n_pending: int  # tokens that the expert would evaluate now; none where its states are at hand
    n_beyond: int  # tokens drafted after the last pending choice


class Planner:
    """Decides about bets; it lives as long as its pair and learns from every answer.

    tables: called at the first deferral; returns what decodes cost the base and the expert.
    """

    def __init__(self, tables: Callable[[], tuple[CostTable, CostTable]]) -> None:
        self._tables = tables
        self.rests = False  # whether the models are too quick for planning to pay
        self._base: CostTable | None = None
        self._expert: CostTable
        self.agreement = Rate(0.4, 4)
        self._by_confidence = [Rate(0.0, 0.0) for _ in range(len(CONFIDENCE) + 1)]
        # Of deferrals after a token of the base, and after another deferral. Gaps are taken for
        # long until they are seen to be short: a long draft costs the most when it is lost.
        self.onset, self.run = Rate(0.05, 5), Rate(0.2, 5)
        self._runs: dict[float, int] = {}  # run_ahead by the rate of runs
        self._saved: dict[tuple[float, float | None, int], float] = {}  # by rates, for saved_along

    def prepare(self) -> None:
        """Have the tables at hand."""
        if self._base is None:
            self._base, self._expert = self._tables()
            self.rests = self._base.is_quick

    def saw_agreement(self, confidence: float, agreed: bool) -> None:
        """Learn from a deferral: the base's probability for its choice, whether it was repeated."""
        self.agreement.add(agreed)
        self._by_confidence[_bucket(confidence)].add(agreed)

    def saw_deferral(self, deferred: bool, after_deferral: bool) -> None:
        """Learn from a decision of the switch."""
        (self.run if after_deferral else self.onset).add(deferred)

    def agrees(self, confidence: float) -> float:
        """Return the probability that the expert repeats a choice of this probability."""
        seen = self._by_confidence[_bucket(confidence)]
        return (seen.hits + 8 * self.agreement.cautious) / (seen.n + 8)

    def decide(self, draft: Draft) -> Literal["draft on", "verify along", "verify"]:
        """Return what promises to take the least time, now that the base's choices are pending.

        "draft on": let the base go on to the next deferral before the expert verifies.
        "verify along": verify, with what was drafted from the last pending choice on in the batch.
        """
        along = self.saved_along(draft)
        # Once well on the way to the next deferral, a draft goes there.
        if draft.n_beyond >= 2 or self.saved_on(draft) > along:
            return "draft on"
        return "verify along" if along > 0 else "verify"

    def saved_on(self, draft: Draft) -> float:
        """Return the seconds that drafting on promises to save against verifying now; negative or 0
        where it does not pay.

        To verify now and again at the next deferral, g tokens on, takes c(n_pending) + c(n_beyond +
        g) of the expert, c being the cost of the cheapest batches. To draft on to it takes one of
        n_pending + n_beyond + g if every choice is repeated, and otherwise that second call all the
        same, and g tokens of the base for nothing. Likewise for the deferrals after it.
        """
        if self._base is None or self.rests:
            return 0.0
        all_agree, n_choices, n_pending, n_beyond = draft
        base, cost, each = self._base(1), self._expert.best, self.agreement.cautious
        now = self._verifying(n_choices, n_pending)
        lost = [0.0] * LOOK_AHEAD  # against verifying now, by the number of deferrals drafted to
        for share, gap in self._gaps(n_beyond):
            k, right, wasted, saved = max(n_pending, 1) + n_beyond, all_agree, 0.0, 0.0
            for j in range(LOOK_AHEAD):
                k += gap
                if k > MAX_DRAFT:
                    lost[j:] = [math.inf] * (LOOK_AHEAD - j)
                    break
                saved += right * cost(gap + (n_beyond if j == 0 else 0))
                wasted += (1 - right) * gap * base
                paid = self._verifying(2, k) - now + wasted
                lost[j] += share * (paid * (1 + MARGIN) - saved)
                right *= each
        return -min(lost)

    def saved_along(self, draft: Draft) -> float:
        """Return the seconds, or 0, that it promises to save if the batch that verifies holds what
        was drafted from the last pending choice on as well.

        That makes it n_beyond + 1 tokens longer. If every choice is repeated, the call at the next
        deferral is by so many shorter, and there is none if that deferral comes at once.
        """
        if self._base is None or self.rests:
            return 0.0
        all_agree, n_choices, n_pending, n_beyond = draft
        along = self._verifying(2, max(n_pending, 1) + n_beyond + 1)
        paid = along - self._verifying(n_choices, n_pending)
        key = (
            _roughly(self.onset.cautious),
            None if n_beyond else _roughly(self.run.cautious),
            n_beyond,
        )
        if key not in self._saved:
            self._saved[key] = _saved_along(*key, self._expert)
        return max(0.0, all_agree * self._saved[key] - paid * (1 + MARGIN))

    def _verifying(self, n_choices: int, n: int) -> float:
        """Return what it takes to evaluate n tokens and tell what the expert makes of choices."""
        if n_choices == 1:
            return self._expert.best(n)
        return self._expert.whole(n) + self._expert.several  # all in one batch

    def _gaps(self, n_beyond: int) -> list[tuple[float, int]]:
        """Return (probability, tokens) to the next deferral: at once as far as deferrals come in
        runs, and else a geometric distribution's at its thirds' medians."""
        p = min(max(self.onset.cautious, 1e-3), 0.999)
        at_once = 0.0 if n_beyond else self.run.cautious
        beyond = 0 if n_beyond else 1
        gaps = [
            math.ceil(math.log(1 - u) / math.log(1 - p)) + beyond for u in (1 / 6, 1 / 2, 5 / 6)
        ]
        return [(at_once, 1), *(((1 - at_once) / 3, gap) for gap in gaps)]

    def run_ahead(self) -> int:
        """Return how many tokens the expert should write ahead after a deferral, or 0."""
        if self._base is None:
            return 0
        r = _roughly(self.run.cautious)
        if r not in self._runs:
            self._runs[r] = _best_run(r, self._base, self._expert)
        return self._runs[r]


def _best_run(r: float, base: CostTable, expert: CostTable) -> int:
    """Return how long a run of deferrals is best written ahead, each followed by another at rate r.

    With n of L tokens deferred, the loop one by one takes n expert's and min(n + 1, L) base's
    decodes; ahead it takes L of the expert's and one of the base for all.
    """
    best, found = 0.0, 0
    for length in range(2, MAX_RUN + 1):
        ahead = length * expert(1) + base.whole(length) + base.several
        one_by_one = 0.0
        for n in range(length + 1):
            p = r**n * (1 - r if n < length else 1)
            # The expert's evaluation of the token after the run is of use later, in a batch.
            later = expert(2) - expert(1) if n < length else 0.0
            one_by_one += p * (n * expert(1) + min(n + 1, length) * base(1) + later)
        saved = (one_by_one - ahead * (1 + MARGIN)) / (1 + length * r)
        if saved > best:
            best, found = saved, length
    return found


def _roughly(rate: float) -> float:
    """Return a rate, rounded so that what is made of it can be kept."""
    return min(round(rate / ROUGH) * ROUGH, 1 - ROUGH)


def _saved_along(onset: float, run: float | None, n_beyond: int, expert: CostTable) -> float:
    """Return what the expert saves on average at the next deferral, having evaluated n_beyond + 1
    more tokens than up to the last.

    onset, run: rates of deferrals after a token of the base's and after another deferral; run is
    None where the last token is not deferred.
    """
    saved, still = 0.0, 1.0  # the probability that none was deferred yet
    for gap in range(MAX_DRAFT - n_beyond):
        rate = onset if run is None or gap else run
        saved += still * rate * (expert.best(gap + n_beyond + 1) - expert.best(gap))
        still *= 1 - rate
    return saved


def _bucket(confidence: float) -> int:
    return sum(confidence >= edge for edge in CONFIDENCE)
