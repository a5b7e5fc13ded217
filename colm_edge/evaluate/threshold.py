"""Choose a threshold by the answers that it leads to."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from colm_edge.evaluate.generate import answers
from colm_edge.evaluate.metrics import METRICS
from colm_edge.switch.file import Switch
from colm_edge.train.documents import Row
from colm_edge.train.scoring import MakeProgress

if TYPE_CHECKING:
    from colm_edge.options import Options
    from colm_edge.pair import Pair


def choose_by_answers(
    pair: Pair, rows: Iterable[Row], metric: str, n_lines: int, options: Options,
    progress: MakeProgress, switch: Switch, held_back: set[int],
) -> tuple[float, dict[str, Any]]:  # fmt: skip
    """Choose the threshold whose answers to held-back prompts do best by a metric.

    The search of the authors' code: real generations at the thresholds that are calibrated for
    defer rates of 0, 0.1 … 1. Of equals the highest threshold, as the expert is the dearer model.
    n_lines: at most so many of the held-back lines, the first. Returns it and every trial.
    """
    chosen = list(islice((row for row in rows if row[0] in held_back), n_lines))
    trials = []
    for rate in np.linspace(0, 1, 11):
        threshold = switch.threshold_for(float(rate))
        given = answers(
            pair, switch, options.with_changes(threshold=threshold), chosen, METRICS[metric],
            progress, label=f"at {rate:.1f}",
        )  # fmt: skip
        trials.append({
            "threshold": threshold,
            "defer_rate": float(given.deferred.sum() / max(1, given.tokens.sum())),
            metric: float(given.right.mean()),
        })  # fmt: skip
    best = max(trials, key=lambda trial: (trial[metric], trial["threshold"]))
    return best["threshold"], {"metric": metric, "n_lines": len(chosen), "trials": trials}
