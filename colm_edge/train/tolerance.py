"""What review would do to the held-back text, and which tolerance pays, if any.

A token that the expert would undo is taken for the text's own there. So this is exact on text that
the expert wrote, except for the base's words after it, and a guess on any other.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from colm_edge.arrays import Bools, Doubles, Ints
from colm_edge.decode.policy import REVIEW_SHARE
from colm_edge.llama.costs import CostTable
from colm_edge.train.fit import Fit

TOLERANCES = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)  # nats
RATES = tuple(round(0.05 * i, 2) for i in range(1, 13))  # of deferral alone, to compare with
WINDOWS = (4, 8, 16)  # of drafts that wait, where the fastest is looked for
MOST_TOKENS = 50_000  # of the held-back text


@dataclass(frozen=True)
class Course:
    """How a text was written. calls: of the expert, each with how many tokens it evaluates and of
    how many places it tells. n_undone: tokens that were taken back. n_written: tokens of the text.
    """

    calls: list[tuple[int, int]]
    n_undone: int
    n_written: int

    def seconds(self, base: CostTable, expert: CostTable) -> float:
        """Return the predicted seconds for each token of the text. A call that tells of several
        places is one batch; another is cut where that is cheaper."""
        taken = sum(expert.best(n) if k == 1 else expert.reviewing(n, k) for n, k in self.calls)
        return (base(1) * (self.n_written + self.n_undone) + taken) / max(1, self.n_written)


def course_of(
    deferred: Bools, rejected: Bools | None, window: int, looked_at: Bools | None = None
) -> Course:
    """Return how one text is written: by deferral alone, or with review.

    deferred, rejected, looked_at: of each token, (n,), whether the switch defers it, whether the
    expert would undo it, and whether it is asked that; without rejected there is no review, and
    without looked_at it is asked of all. window: the most tokens that wait for review.
    """
    n, calls, n_undone = len(deferred), list[tuple[int, int]](), 0
    held = -2  # the last token that the expert has evaluated; -1 is the prompt's last
    if rejected is None:
        for place in np.flatnonzero(deferred).tolist():
            calls.append((place - 1 - held, 1))
            held = place - 1
        return Course(calls, 0, n)
    looks = ~deferred if looked_at is None else looked_at & ~deferred
    looked, deferrals = ([*np.flatnonzero(column).tolist(), n] for column in (looks, deferred))
    bad = [*np.flatnonzero(rejected & looks).tolist(), n]
    at = 0
    while (start := min(_next(deferrals, at), _next(looked, at))) < n:
        deferral, full = _next(deferrals, start), min(n, start + window)
        defers, end = deferral < full, min(deferral, full)
        asked = looked[bisect_left(looked, start) : bisect_left(looked, end)]
        last = end if defers else asked[-1]
        calls.append((last - 1 - held, len(asked) + defers))
        held, at, first = last - 1, end + defers, _next(bad, start)
        if first < end:
            n_undone += end - first
            held, at = min(held, first - 1), first + 1
    return Course(calls, n_undone, n)


def _next(places: Sequence[int], at: int) -> int:
    """Return the first of the rising places from `at` on."""
    return places[bisect_left(places, at)]


def review_figures(fit: Fit, tables: tuple[CostTable, CostTable], window: int) -> dict[str, Any]:
    """Return what each tolerance does to the held-back text at the switch's default threshold, and
    the one that pays, or None for off. The scores have to tell the expert's regret.

    A tolerance pays if the pair is still faster than its expert alone, and the text likelier than
    without review, at the same threshold and at the same speed. Of those within one standard error
    of the likeliest, the highest is recommended.

    tables: of base and expert. window: as in `course_of`.
    """
    rows = fit.valid[:MOST_TOKENS]
    p, regret = fit.p[: len(rows)], fit.scores.regret(rows)
    base, expert = fit.scores.base[rows], fit.scores.expert[rows]
    texts = list(_texts(fit.scores.line[rows]))
    deferred = p > fit.switch.threshold
    unsure = p >= np.quantile(p[~deferred], 1 - REVIEW_SHARE) if not deferred.all() else deferred
    unsure[[text.stop - 1 for text in texts]] = True  # what ends an answer is always looked at

    def trial(
        deferred: Bools, rejected: Bools | None = None, looked_at: Bools | None = None
    ) -> tuple[dict[str, float], Doubles]:
        reviews = rejected is not None
        by_expert = deferred if rejected is None else deferred | rejected
        lost = -np.where(by_expert, expert, base)
        # An answer finds by itself how long its drafts best wait.
        windows = {window, *(n for n in WINDOWS if n < window and reviews)}
        courses = [_whole(texts, deferred, rejected, most, looked_at) for most in windows]
        fastest = min(courses, key=lambda one: one.seconds(*tables))
        return {
            "nll_hard": float(lost.mean()),
            "by_expert": float(by_expert.mean()),
            "expert_calls": len(fastest.calls) / len(rows),
            "undone": fastest.n_undone / len(rows),
            "tokens_per_second": 1 / fastest.seconds(*tables),
        }, lost

    plain = [trial(p > np.quantile(p, 1 - rate))[0] for rate in RATES]
    off = trial(deferred)[0]
    found = {}
    for nats in TOLERANCES:
        looked_at = unsure if nats else np.full(len(p), True)
        found[nats] = trial(deferred, (regret > nats) & looked_at, looked_at)
    alone = 1 / tables[1](1)
    paying = {
        nats: lost
        for nats, (figures, lost) in found.items()
        if figures["tokens_per_second"] > alone
        and figures["nll_hard"] < off["nll_hard"]
        and figures["nll_hard"] < _at_speed(plain, figures["tokens_per_second"])
    }
    return {
        "recommended": _recommended(paying),
        "expert_tokens_per_second": alone,
        "off": off,
        "tolerances": [{"review": nats, **figures} for nats, (figures, _) in found.items()],
    }


def _whole(
    texts: Sequence[slice],
    deferred: Bools,
    rejected: Bools | None,
    window: int,
    looked_at: Bools | None,
) -> Course:
    """Return the course of several texts together."""

    def of(column: Bools | None, text: slice) -> Bools | None:
        return None if column is None else column[text]

    parts = [
        course_of(deferred[text], of(rejected, text), window, of(looked_at, text)) for text in texts
    ]
    calls = [call for part in parts for call in part.calls]
    return Course(calls, sum(part.n_undone for part in parts), len(deferred))


def _texts(lines: Ints) -> Iterator[slice]:
    """Yield the rows of each line, which stand together."""
    starts = [0, *(np.flatnonzero(np.diff(lines)) + 1).tolist(), len(lines)]
    for start, end in pairwise(starts):
        yield slice(start, end)


def _at_speed(plain: list[dict[str, float]], tokens_per_second: float) -> float:
    """Return the loss of deferral alone at the rate that is as fast."""
    seconds = [1 / row["tokens_per_second"] for row in plain]
    losses = [row["nll_hard"] for row in plain]
    return float(np.interp(1 / tokens_per_second, seconds, losses))


def _recommended(paying: dict[float, Doubles]) -> float | None:
    """Return the highest tolerance within one standard error of the likeliest; None is off."""
    if not paying:
        return None
    best = min(paying.values(), key=lambda lost: float(lost.mean()))

    def is_near(lost: Doubles) -> bool:
        more = lost - best
        return bool(more.mean() <= more.std() / np.sqrt(len(more)))

    return max(nats for nats, lost in paying.items() if is_near(lost))
