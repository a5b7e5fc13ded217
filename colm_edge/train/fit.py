"""Fit a switch: score the data with both models, fit heads on one part, judge them on the other.

The models stay frozen and only the head is fitted, a weaker variant of Co-LLM's joint
fine-tuning (arXiv 2403.03870, section 2.2) that needs nothing but the two GGUF files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from colm_edge import readout
from colm_edge.errors import DataError
from colm_edge.switch.file import FEATURE_SETS, Switch
from colm_edge.switch.reading import HIDDEN
from colm_edge.train.documents import Documents
from colm_edge.train.heads import (
    CHUNK_ROWS,
    DEFER_RATES,
    Array,
    Columns,
    Head,
    Loss,
    Standardised,
    budget_loss,
    marginal_loss,
    sigmoid,
    weak_loss,
)
from colm_edge.train.scoring import MakeProgress, Scores, score, scored_by

if TYPE_CHECKING:
    from colm_edge.pair import Pair


Rows = npt.NDArray[np.int64]
# (the calibrated switch, the held-back lines) -> a threshold, and how it was found, for the report
ChooseThreshold = Callable[[Switch, set[int]], tuple[float, Any]]
VALID_SHARE = 0.2  # of the data's lines
MIN_LINES = 5
SEARCH_TOKENS = 100_000  # are enough to choose objective and regularisation
FIT_BYTES = 4 << 30  # of columns in memory; more tokens than fit are drawn from
L2_GRID = (1e-2, 1e-3, 1e-4, 1e-5)  # on standardised weights
CALIBRATED_RATES = tuple(round(0.05 * i, 2) for i in range(21))
OBJECTIVES = ("marginal", "budget", "weak")
BEST_OF = ("marginal", "budget")  # what the objective "best" chooses from; weak is a baseline


@dataclass(frozen=True)
class Fit:
    """A fitted switch, its figures, and what they were measured on: the held-back lines."""

    switch: Switch
    report: dict[str, Any]
    scores: Scores
    valid: Rows  # the held-back tokens' rows in the scores
    p: Array  # p_defer of every held-back token
    p_before: Array | None  # by the switch that is updated


@dataclass(frozen=True)
class Trial:
    """A head by one objective, the regularisation it was best with, and p_defer where held back."""

    objective: str
    n_tokens: int  # that the head was fitted on
    head: Head
    l2: float
    p: Array
    figures: dict[str, float]


def fit_switch(
    pair: Pair, documents: Documents, features: str | None = None, *, objective: str = "best",
    seed: int = 0, compare: bool = False, work: Path | None = None,
    expert_scores: Path | None = None, update: Switch | None = None,
    choose: ChooseThreshold | None = None, progress: MakeProgress,
) -> Fit:  # fmt: skip
    """Score the documents, fit a switch on one part of them and judge it on the other.

    features: hidden, logits or both; None takes those of the switch that is updated, or both.
    objective: "marginal", the paper's likelihood of the mixture; "budget", the likelihood of hard
    decisions at defer rates of 0.1 to 0.3; "weak", the paper's weak supervision; or "best", the
    one of the first two whose hard decisions at those rates are likelier on the held-back lines.
    update: the switch that this one replaces; the fit begins with it and the report compares them.
    compare: fit the other feature sets as well and report how they do. choose: chooses the default
    threshold, given the calibrated switch and the held-back lines; without it `choose_threshold`
    does. work, expert_scores: as in `score`.

    The report's losses are nats per token of the held-back lines, on which objective,
    regularisation, threshold and calibration were chosen too: judge a switch on data of its own.
    Raises DataError when there are too few documents to hold any back.
    """
    held_back = _held_back(documents, seed)
    scores = score(
        pair, documents, progress, work=work, update=update is not None,
        expert_scores=expert_scores,
    )  # fmt: skip
    is_valid = np.isin(scores.line, list(held_back))
    train, valid = np.flatnonzero(~is_valid), np.flatnonzero(is_valid)
    if features is None:
        same = (name for name in FEATURE_SETS if update and FEATURE_SETS[name] == update.features)
        features = next(same, "both")
    names, start = FEATURE_SETS[features], None
    if update is not None and update.features == names:
        start = Head(update.weight[0].astype(np.float64), float(update.bias[0]))
    trial, trials = fit_head(scores, train, valid, names, objective, start)
    base, expert = scores.base[valid], scores.expert[valid]
    rates, thresholds = calibrate(trial.p)
    switch = Switch(
        features=names,
        weight=trial.head.weight.astype(np.float32)[None, :],
        bias=np.array([trial.head.bias], np.float32),
        n_embd=pair.base.n_embd,
        threshold=choose_threshold(trial.p, base, expert),
        defer_rates=rates,
        thresholds=thresholds,
        info={
            "base": pair.base.path.name,
            "expert": Path(scored_by(expert_scores) or pair.expert.name).name,
            "objective": trial.objective,
        },
    )
    chosen: dict[str, Any] = {}
    if choose is not None:
        threshold, chosen["threshold_by"] = choose(switch, held_back)
        switch = replace(switch, threshold=threshold)
    deferred = trial.p > switch.threshold
    n_lines = len(np.unique(documents.lines))
    report: dict[str, Any] = {
        "features": features,
        "objective": trial.objective,
        "nll_base": float(-base.mean()),
        "nll_expert": float(-expert.mean()),
        **trial.figures,
        "nll_hard": float(-np.where(deferred, expert, base).mean()),
        "nll_oracle": float(-np.maximum(base, expert).mean()),
        "defer_rate": float(deferred.mean()),
        "threshold": switch.threshold,
        **chosen,
        "l2": trial.l2,
        "n_train": n_lines - len(held_back),
        "n_valid": len(held_back),
        "n_cut": documents.n_cut,
        "n_dropped": documents.n_dropped,
        "n_train_tokens": len(train),
        "n_fit_tokens": trial.n_tokens,
        "n_valid_tokens": len(valid),
        "objectives": {name: found.figures for name, found in trials.items()},
    }
    p_before = None
    if update is not None:
        p_before, report["before"] = _before(update, scores, valid)
    if compare:
        report["feature_sets"] = {features: trial.figures}
        for name in FEATURE_SETS.keys() - {features}:
            rival, _ = fit_head(scores, train, valid, FEATURE_SETS[name], trial.objective)
            report["feature_sets"][name] = rival.figures
    return Fit(switch, report, scores, valid, trial.p, p_before)


def fit_head(
    scores: Scores, train: Rows, valid: Rows, names: tuple[str, ...], objective: str = "best",
    start: Head | None = None,
) -> tuple[Trial, dict[str, Trial]]:  # fmt: skip
    """Fit a head on the train rows of the scores and judge it on the valid ones.

    Returns it, and one by each objective for comparison. With much data objective and
    regularisation are sought on a part of it; the head that is returned is fitted on all, or on
    as much as FIT_BYTES hold.
    """
    trials = _trials(scores, train, valid, names, start)
    if objective == "best":
        objective = min(BEST_OF, key=lambda name: _hard_mean(trials[name].figures))
    trial = trials[objective]
    rows = _some(train, FIT_BYTES // (4 * len(trial.head.weight)))
    if len(rows) > trial.n_tokens:
        block = Standardised(_columns(scores, rows, names))
        head = block.fit(_losses(scores, rows)[objective], trial.l2, trial.head)
        if objective == "budget":
            l2 = trials["marginal"].l2
            head = block.rescaled(head, scores.base[rows], scores.expert[rows], l2)
        trial = _tried(head, trial.l2, scores, valid, names, objective, len(rows))
    return trial, trials


def _held_back(documents: Documents, seed: int) -> set[int]:
    """Return the lines that are held back: those of the smallest keys, as the seed turns them.

    By content: when others are added to the data, documents stay on their side, but for the few
    near the border.
    """
    lines, first = np.unique(documents.lines, return_index=True)
    if len(lines) < MIN_LINES:
        raise DataError(f"{len(lines)} documents; expected at least {MIN_LINES}, to hold one back")
    turn = np.random.default_rng(seed).integers(2**64, dtype=np.uint64)
    order = np.argsort(documents.keys[first] ^ turn, kind="stable")
    return set(lines[order[: max(1, round(VALID_SHARE * len(lines)))]].tolist())


def _trials(
    scores: Scores, train: Rows, valid: Rows, names: tuple[str, ...], start: Head | None = None
) -> dict[str, Trial]:
    """Return a head by each objective, fitted and chosen on parts of both sides if they are large.

    The regularisation is the best on the held-back side, by the objective's own purpose.
    """
    rows, judged = _some(train, SEARCH_TOKENS), _some(valid, SEARCH_TOKENS)
    block = Standardised(_columns(scores, rows, names))
    x_judged = _columns(scores, judged, names)
    base, expert = scores.base[judged], scores.expert[judged]
    losses = _losses(scores, rows)

    def joint(head: Head) -> float:
        return marginal_loss(base, expert, head(x_judged))[0]

    def hard(head: Head) -> float:
        return _hard_mean(_figures(head(x_judged), base, expert))

    # The weak start helps where there are labels of both kinds and misleads where not: the fit is
    # begun from it and from nothing, and goes on from the better.
    starts: list[Head | None] = [None] if start is None else [None, start]
    weak = _path(block, losses["weak"], [None], hard)
    label = losses["weak"].args[0]
    if 0 < label.sum() < len(label):
        starts.append(weak[1])
    marginal = _path(block, losses["marginal"], starts, joint)
    budget = _path(block, losses["budget"], [marginal[1]], hard)
    chosen = {"marginal": marginal, "budget": budget, "weak": weak}
    l2, head = chosen["budget"]
    rescaled = block.rescaled(head, scores.base[rows], scores.expert[rows], marginal[0])
    chosen["budget"] = l2, rescaled
    return {
        name: _tried(head, l2, scores, valid, names, name, len(rows))
        for name, (l2, head) in chosen.items()
    }


def _losses(scores: Scores, rows: Rows) -> dict[str, partial[tuple[float, Array]]]:
    """Return each objective's loss of d on these rows."""
    base, expert = scores.base[rows], scores.expert[rows]
    label = (scores.expert_right[rows] & ~scores.base_right[rows]).astype(np.float64)
    return {
        "marginal": partial(marginal_loss, base, expert),
        "budget": partial(budget_loss, expert - base),
        "weak": partial(weak_loss, label),
    }


def _path(
    block: Standardised, loss: Loss, starts: list[Head | None], judge: Callable[[Head], float]
) -> tuple[float, Head]:
    """Return the l2 of the grid whose head is judged the best, and the head.

    From the strongest on, each fit begun from the one before; it stops early, where a weaker
    regularisation no longer helps what is held back.
    """
    best: tuple[float, float, Head] | None = None
    for l2 in L2_GRID:
        heads = [block.fit(loss, l2, start) for start in starts]
        head = min(heads, key=lambda head: loss(block.d(head))[0])
        value = judge(head)
        if best is not None and value >= best[0]:
            break
        best, starts = (value, l2, head), [head]
    assert best is not None
    return best[1:]


def _tried(
    head: Head, l2: float, scores: Scores, valid: Rows, names: tuple[str, ...], objective: str,
    n_tokens: int,
) -> Trial:  # fmt: skip
    d = _d(head, scores, valid, names)
    figures = _figures(d, scores.base[valid], scores.expert[valid])
    return Trial(objective, n_tokens, head, l2, sigmoid(d), figures)


def _d(head: Head, scores: Scores, rows: Rows, names: tuple[str, ...]) -> Array:
    return np.concatenate(
        [
            head(_columns(scores, rows[at : at + CHUNK_ROWS], names))
            for at in range(0, len(rows), CHUNK_ROWS)
        ]
    )


def _before(update: Switch, scores: Scores, valid: Rows) -> tuple[Array, dict[str, float]]:
    """Return an older switch's p_defer of the held-back tokens, and its figures."""
    head = Head(update.weight[0].astype(np.float64), float(update.bias[0]))
    d = _d(head, scores, valid, update.features)
    p, base, expert = sigmoid(d), scores.base[valid], scores.expert[valid]
    deferred = p > update.threshold
    return p, {
        **_figures(d, base, expert),
        "nll_hard": float(-np.where(deferred, expert, base).mean()),
        "defer_rate": float(deferred.mean()),
        "threshold": update.threshold,
    }


def _figures(d: Array, base: Array, expert: Array) -> dict[str, float]:
    """Return the joint loss, and that of hard decisions at the defer rates that people use."""
    curve = hard_curve(d, base, expert)
    figures = {"nll_joint": marginal_loss(base, expert, d)[0]}
    for rate in DEFER_RATES:
        figures[f"nll_hard_{rate}"] = float(curve[round(rate * len(d))])
    return figures


def _hard_mean(figures: dict[str, float]) -> float:
    return sum(figures[f"nll_hard_{rate}"] for rate in DEFER_RATES) / len(DEFER_RATES)


def hard_curve(rank: Array, base: Array, expert: Array) -> Array:
    """Return the loss of hard decisions when the k tokens of highest rank are deferred, (n + 1,).

    base, expert: log-probabilities of the gold tokens, (n,). Ties are taken in their order.
    """
    gain = np.cumsum((expert - base)[np.argsort(-rank, kind="stable")])
    curve: Array = -(base.sum() + np.concatenate(([0.0], gain))) / len(rank)
    return curve


def _some(rows: Rows, n: int) -> Rows:
    """Return at most n of the rows, drawn by a fixed seed, in order."""
    if len(rows) <= n:
        return rows
    return np.sort(np.random.default_rng(0).choice(rows, n, replace=False))


def _columns(scores: Scores, rows: Rows, names: tuple[str, ...]) -> Columns:
    """Return the features of some rows, (n, k): a copy, whatever the scores lie on."""
    widths = [scores.hidden.shape[1] if name == HIDDEN else 1 for name in names]
    columns = np.empty((len(rows), sum(widths)), np.float32)
    for at in range(0, len(rows), CHUNK_ROWS):
        some, to = rows[at : at + CHUNK_ROWS], 0
        for name, width in zip(names, widths, strict=True):
            part = columns[at : at + CHUNK_ROWS, to : to + width]
            if name == HIDDEN:
                part[:] = scores.hidden[some]
            else:
                part[:, 0] = scores.logit_features[some, readout.FEATURES.index(name)]
            to += width
    return columns


def choose_threshold(p: Array, base: Array, expert: Array) -> float:
    """Return the threshold whose hard decisions are likeliest on held-back tokens.

    Each token comes from the expert where p > threshold. Of the thresholds within one standard
    error of the best the highest, as the expert is the dearer model: the rule of Breiman et al.,
    Classification and Regression Trees, 1984. The result is a float32, as in the switch file.
    """
    levels = np.unique(p)
    between = _below_one((levels[1:] + levels[:-1]) / 2)
    candidates = np.unique(np.concatenate(([0.0], between, [1.0])))
    order = np.argsort(-p)
    # gain[k]: deferring the k tokens of highest p, in nats over the base alone.
    gain = np.concatenate(([0.0], np.cumsum((expert - base)[order])))
    # A candidate defers the tokens of p above it, whatever rounding and ties made of it.
    gains = gain[np.searchsorted(-p[order], -candidates, side="left")]
    best = np.where(p > candidates[gains.argmax()], expert, base)
    error = float(best.std()) * np.sqrt(len(best))  # of a sum over all tokens
    return float(candidates[np.flatnonzero(gains >= gains.max() - error)[-1]])


def _below_one(p: Array) -> Array:
    """Round to float32; what would round to 1, which never defers, to the number below it."""
    highest = np.nextafter(np.float32(1), np.float32(0))
    return np.minimum(p.astype(np.float32), highest).astype(np.float64)


def calibrate(p: Array) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return defer rates and the thresholds that give them on held-back tokens.

    Where many p round to 1, low rates share the highest threshold that still defers: 1 itself
    would never.
    """
    quantiles = _below_one(np.quantile(p, [1 - rate for rate in CALIBRATED_RATES[1:-1]]))
    return CALIBRATED_RATES, (1.0, *(float(q) for q in quantiles), 0.0)
