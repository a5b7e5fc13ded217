"""What review would do to the held-back text, and which tolerance pays, if any.

A token that the expert would undo is taken for the text's own there. So this is exact on text that
the expert wrote, but for the base's words after it, and a guess on any other.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from colm_edge.llama.costs import CostTable
from colm_edge.train.fit import Fit
from colm_edge.train.heads import Array

Bools = npt.NDArray[np.bool_]
TOLERANCES = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)  # nats
RATES = tuple(round(0.05 * i, 2) for i in range(1, 13))  # of deferral alone, to compare with
WINDOWS = (4, 8, 16)  # of drafts that wait, where the fastest is looked for
MOST_TOKENS = 50_000  # of the held-back text


@dataclass(frozen=True)
class Course:
    """How a text was written. batches: of each of the expert's calls, how many tokens it evaluates.
    n_undone: tokens that were taken back. n_written: tokens of the text."""

    batches: list[int]
    n_undone: int
    n_written: int

    def seconds(self, base: CostTable, expert: CostTable, *, reviews: bool) -> float:
        """Return the predicted seconds for each token of the text. reviews: whether the expert's
        view of every token is asked for."""
        taken = expert.reviewing if reviews else expert.best
        total = base(1) * (self.n_written + self.n_undone) + sum(map(taken, self.batches))
        return total / max(1, self.n_written)


def course_of(deferred: Bools, rejected: Bools | None, window: int) -> Course:
    """Return how one text is written: by deferral alone, or with review.

    deferred, rejected: of each token, (n,), whether the switch defers it, and whether the expert
    would undo it; None is without review. window: the most tokens that wait for review.
    """
    n, batches, n_undone, at = len(deferred), list[int](), 0, 0
    deferrals = [*np.flatnonzero(deferred).tolist(), n]
    if rejected is None:
        ends = [-1, *deferrals[:-1]]
        return Course([end - start for start, end in pairwise(ends)], 0, n)
    bad = [*np.flatnonzero(rejected & ~deferred).tolist(), n]
    while at < n:
        deferral = deferrals[bisect_left(deferrals, at)]
        end = min(deferral, at + window)
        defers = end == deferral < min(n, at + window)
        # The last final token has not been evaluated; without a deferral the last draft is not.
        batches.append(end - at + defers)
        first = bad[bisect_left(bad, at)]
        if first < end:
            n_undone += end - first
            at = first + 1
        else:
            at = end + defers
    return Course(batches, n_undone, n)


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

    def whole(deferred: Bools, rejected: Bools | None, most: int) -> Course:
        parts = [
            course_of(deferred[text], None if rejected is None else rejected[text], most)
            for text in texts
        ]
        batches = [n for part in parts for n in part.batches]
        return Course(batches, sum(part.n_undone for part in parts), len(rows))

    def trial(deferred: Bools, rejected: Bools | None) -> tuple[dict[str, float], Array]:
        reviews = rejected is not None
        by_expert = deferred if rejected is None else deferred | rejected
        lost = -np.where(by_expert, expert, base)
        # An answer finds by itself how long its drafts best wait.
        windows = {window, *(n for n in WINDOWS if n < window and reviews)}
        courses = [whole(deferred, rejected, most) for most in windows]
        course = min(courses, key=lambda one: one.seconds(*tables, reviews=reviews))
        return {
            "nll_hard": float(lost.mean()),
            "by_expert": float(by_expert.mean()),
            "expert_calls": len(course.batches) / len(rows),
            "undone": course.n_undone / len(rows),
            "tokens_per_second": 1 / course.seconds(*tables, reviews=reviews),
        }, lost

    plain = [trial(p > np.quantile(p, 1 - rate), None)[0] for rate in RATES]
    deferred = p > fit.switch.threshold
    off = trial(deferred, None)[0]
    found = {nats: trial(deferred, regret > nats) for nats in TOLERANCES}
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


def _texts(lines: npt.NDArray[np.int64]) -> Iterator[slice]:
    """Yield the rows of each line, which stand together."""
    starts = [0, *(np.flatnonzero(np.diff(lines)) + 1).tolist(), len(lines)]
    for start, end in pairwise(starts):
        yield slice(start, end)


def _at_speed(plain: list[dict[str, float]], tokens_per_second: float) -> float:
    """Return the loss of deferral alone at the rate that is as fast."""
    seconds = [1 / row["tokens_per_second"] for row in plain]
    losses = [row["nll_hard"] for row in plain]
    return float(np.interp(1 / tokens_per_second, seconds, losses))


def _recommended(paying: dict[float, Array]) -> float | None:
    """Return the highest tolerance within one standard error of the likeliest; None is off."""
    if not paying:
        return None
    best = min(paying.values(), key=lambda lost: float(lost.mean()))

    def is_near(lost: Array) -> bool:
        more = lost - best
        return bool(more.mean() <= more.std() / np.sqrt(len(more)))

    return max(nats for nats, lost in paying.items() if is_near(lost))
