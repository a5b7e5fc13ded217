"""Choose a threshold by the answers that it leads to."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from colm_edge.evaluate.generate import answers
from colm_edge.evaluate.metrics import METRICS

if TYPE_CHECKING:
    from colm_edge.journal import Journal
    from colm_edge.options import Options
    from colm_edge.pair import Pair
    from colm_edge.switch.file import Switch
    from colm_edge.train.documents import Row
    from colm_edge.train.scoring import MakeProgress


def choose_by_answers(
    pair: Pair,
    rows: Iterable[Row],
    metric: str,
    n_lines: int,
    options: Options,
    progress: MakeProgress,
    switch: Switch,
    held_back: set[int],
    *,
    journal: Journal | None = None,
    n_slots: int = 1,
) -> tuple[float, dict[str, Any]]:
    """Choose the threshold whose answers to held-back prompts do best by a metric.

    This is the search in the authors' code: real generations at the thresholds that are calibrated
    for defer rates of 0, 0.1 … 1. Of equals the highest threshold wins, as the expert costs more.
    n_lines: use at most this many of the held-back lines, from the first on. Returns the threshold
    and a record of every trial. journal: keeps the answers. n_slots: answers written at once.
    """
    chosen = list(islice((row for row in rows if row[0] in held_back), n_lines))
    trials = []
    for rate in np.linspace(0, 1, 11):
        threshold = switch.threshold_for(float(rate))
        at = options.with_changes(threshold=threshold)
        label = f"at {rate:.1f}"
        judge = METRICS[metric]
        given = answers(
            pair, switch, at, chosen, judge, progress,
            label=label, journal=journal, n_slots=n_slots,
        )  # fmt: skip
        trials.append(
            {
                "threshold": threshold,
                "defer_rate": float(given.deferred.sum() / max(1, given.tokens.sum())),
                metric: float(given.right.mean()),
            }
        )
    best = max(trials, key=lambda trial: (trial[metric], trial["threshold"]))
    return best["threshold"], {"metric": metric, "n_lines": len(chosen), "trials": trials}
