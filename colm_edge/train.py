"""Fit a switch: score the data with both models, then maximise the marginal likelihood.

The models stay frozen and only the head is fitted, a weaker variant of Co-LLM's joint
fine-tuning (arXiv 2403.03870, section 2.2) that needs nothing but the two GGUF files.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from colm_edge import readout
from colm_edge.documents import Documents
from colm_edge.errors import DataError, SwitchError
from colm_edge.scoring import MakeProgress, Scores, score
from colm_edge.switch import FEATURE_SETS, HIDDEN, Switch

if TYPE_CHECKING:
    from colm_edge.pair import Pair

Array = npt.NDArray[np.float64]
Loss = Callable[[Array], tuple[float, Array]]

VALID_SHARE = 0.2  # of the data's lines
MIN_LINES = 5
WEAK_POSITIVE_WEIGHT = 8.0  # of a weak label 1, as in the authors' script
CHUNK_ROWS = 1 << 16
SEARCH_TOKENS = 100_000  # are enough to choose a start and the regularisation
L2_GRID = (1e-2, 1e-3, 1e-4, 1e-5)  # on standardised weights
DEFER_RATES = tuple(round(0.05 * i, 2) for i in range(21))


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise SwitchError now rather than after an hour's work."""
    target = Path(path)
    folder = target.parent
    if target.is_dir():
        raise SwitchError(f"{target} is a folder; give a file's name")
    if not folder.is_dir():
        raise SwitchError(f"{folder}: no such folder; make it first")
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as e:
        raise SwitchError(f"{target}: cannot write there: {e.strerror or e}") from e


def marginal_loss(base: Array, expert: Array, d: Array) -> tuple[float, Array]:
    """Return Co-LLM's loss, the mean of −log((1−σ(d))·P_base + σ(d)·P_expert), and its gradient.

    base, expert: log-probabilities of the gold tokens, (n,), nats. d: (n,). The gradient (n,) is
    with respect to d: σ(d) less the posterior probability that the expert wrote the token.
    """
    log_expert, log_base = -np.logaddexp(0, -d), -np.logaddexp(0, d)
    joint = np.logaddexp(log_base + base, log_expert + expert)
    gradient = np.exp(log_expert) - np.exp(log_expert + expert - joint)
    return float(-joint.mean()), gradient / len(d)


def weak_loss(label: Array, d: Array) -> tuple[float, Array]:
    """Return the weak supervision's weighted binary cross-entropy and its gradient in d."""
    weight = np.where(label > 0, WEAK_POSITIVE_WEIGHT, 1.0) / len(d)
    loss = weight * (np.logaddexp(0, d) - label * d)
    return float(loss.sum()), weight * (np.exp(-np.logaddexp(0, -d)) - label)


def minimize(loss: Loss, x: Array, *, steps: int = 200, memory: int = 10) -> Array:
    """Minimise a smooth function by L-BFGS with backtracking (Nocedal and Wright, ch. 7).

    Stops where a step no longer lowers the loss by a relative 1e-9. Nothing to tune.
    """
    value, gradient = loss(x)
    pairs: list[tuple[Array, Array, float]] = []
    for _ in range(steps):
        direction = -_inverse_hessian_times(gradient, pairs)
        slope = float(direction @ gradient)
        if slope >= 0:  # rounding spoilt the curvature: begin again with the steepest descent
            pairs.clear()
            direction, slope = -gradient, -float(gradient @ gradient)
        if slope == 0:
            break
        step = 1.0 if pairs else min(1.0, 1.0 / np.sqrt(-slope))
        while True:
            moved = x + step * direction
            new_value, new_gradient = loss(moved)
            if new_value <= value + 1e-4 * step * slope or step < 1e-12:
                break
            step *= 0.5
        change, turn = moved - x, new_gradient - gradient
        curvature = float(change @ turn)
        if curvature > 1e-12 * float(turn @ turn):
            pairs = [*pairs[-memory + 1 :], (change, turn, 1.0 / curvature)]
        gain = value - new_value
        if gain < 0:
            break
        x, value, gradient = moved, new_value, new_gradient
        if gain <= 1e-9 * max(1.0, abs(value)):
            break
    return x


def _inverse_hessian_times(gradient: Array, pairs: list[tuple[Array, Array, float]]) -> Array:
    q = gradient.copy()
    weights = []
    for change, turn, rho in reversed(pairs):
        weights.append(rho * float(change @ q))
        q -= weights[-1] * turn
    if pairs:
        change, turn, _ = pairs[-1]
        q *= float(change @ turn) / float(turn @ turn)
    for (change, turn, rho), weight in zip(pairs, reversed(weights), strict=True):
        q += change * (weight - rho * float(turn @ q))
    return q


@dataclass(frozen=True)
class Head:
    """A linear head on raw (not standardised) columns: d = columns · weight + bias."""

    weight: Array
    bias: float

    def __call__(self, columns: npt.NDArray[np.float32]) -> Array:
        return np.asarray(columns @ self.weight.astype(np.float32), np.float64) + self.bias


def fit_head(
    columns: npt.NDArray[np.float32], loss_of_d: Callable[[Array], tuple[float, Array]],
    l2: float, start: Head | None = None,
) -> Head:  # fmt: skip
    """Fit d = columns · weight + bias under a loss of d, with l2 · |weight|² on standard columns.

    columns (n, k), raw. The scales are folded into the weights that come back.
    """
    mean, scale, standard = _standardised(columns)

    def loss(x: Array) -> tuple[float, Array]:
        weight, bias = x[:-1], x[-1]
        d = np.asarray(standard @ weight.astype(np.float32), np.float64) + bias
        value, by_d = loss_of_d(d)
        by_weight = np.asarray(by_d.astype(np.float32) @ standard, np.float64) + 2 * l2 * weight
        return value + l2 * float(weight @ weight), np.append(by_weight, by_d.sum())

    x = np.zeros(columns.shape[1] + 1)
    if start is not None:
        x = np.append(start.weight * scale, start.bias + float(mean @ start.weight))
    x = minimize(loss, x)
    weight = x[:-1] / scale
    return Head(weight, float(x[-1] - mean @ weight))


def _standardised(
    columns: npt.NDArray[np.float32],
) -> tuple[Array, Array, npt.NDArray[np.float32]]:
    """Return mean, deviation, and the columns in those units, in float64 a chunk at a time."""
    chunks = [slice(at, at + CHUNK_ROWS) for at in range(0, len(columns), CHUNK_ROWS)]
    total = sum(columns[rows].sum(axis=0, dtype=np.float64) for rows in chunks)
    mean = np.asarray(total, np.float64) / len(columns)
    spread = sum(((columns[rows] - mean) ** 2).sum(axis=0) for rows in chunks)
    scale = np.maximum(np.sqrt(np.asarray(spread, np.float64) / len(columns)), 1e-6)
    standard = np.empty_like(columns)
    for rows in chunks:
        standard[rows] = (columns[rows] - mean) / scale
    return mean, scale, standard


@dataclass(frozen=True)
class Fit:
    """A fitted switch, its figures, and what they were measured on: the held-back lines."""

    switch: Switch
    report: dict[str, Any]
    held_back: Scores
    p: Array  # p_defer of every held-back token


def fit_switch(
    pair: Pair, documents: Documents, features: str, *, seed: int = 0,
    compare: bool = False, work: Path | None = None, expert_scores: Path | None = None,
    progress: MakeProgress,
) -> Fit:  # fmt: skip
    """Score the documents, fit a switch on one part of them and judge it on the other.

    The report's losses are nats per token of the held-back lines, on which regularisation,
    threshold and calibration were chosen too: judge a switch on data of its own. compare: fit the
    other feature sets as well and report how they do. work, expert_scores: as in `score`.
    Raises DataError when there are too few documents to hold any back.
    """
    lines = sorted({d.line for d in documents})
    if len(lines) < MIN_LINES:
        raise DataError(f"{len(lines)} documents; expected at least {MIN_LINES}, to hold one back")
    scores = score(pair, documents, progress, work=work, expert_scores=expert_scores)
    order = np.random.default_rng(seed).permutation(lines)
    held_back = order[: max(1, round(VALID_SHARE * len(lines)))]
    is_valid = np.isin(scores.line, held_back)
    train, valid = scores.take(~is_valid), scores.take(is_valid)
    names = FEATURE_SETS[features]
    head, l2 = _fit_regularised(train, valid, names)
    p = _probability(head, valid, names)
    threshold = choose_threshold(p, valid.base, valid.expert)
    deferred = p > threshold
    rates, thresholds = calibrate(p)
    switch = Switch(
        features=names,
        weight=head.weight.astype(np.float32)[None, :],
        bias=np.array([head.bias], np.float32),
        n_embd=pair.base.n_embd,
        threshold=threshold,
        defer_rates=rates,
        thresholds=thresholds,
        info={"base": pair.base.path.name, "expert": pair.expert.path.name},
    )
    report: dict[str, Any] = {
        "features": features,
        "nll_base": float(-valid.base.mean()),
        "nll_expert": float(-valid.expert.mean()),
        **_figures(p, valid),
        "nll_hard": float(-np.where(deferred, valid.expert, valid.base).mean()),
        "nll_oracle": float(-np.maximum(valid.base, valid.expert).mean()),
        "defer_rate": float(deferred.mean()),
        "threshold": threshold,
        "l2": l2,
        "n_train": len(lines) - len(held_back),
        "n_valid": len(held_back),
        "n_train_tokens": len(train.base),
        "n_valid_tokens": len(valid.base),
    }
    if compare:
        report["feature_sets"] = {}
        for name, columns in FEATURE_SETS.items():
            rival = head if name == features else _fit_regularised(train, valid, columns)[0]
            report["feature_sets"][name] = _figures(_probability(rival, valid, columns), valid)
    return Fit(switch, report, valid, p)


def _fit_regularised(train: Scores, valid: Scores, names: tuple[str, ...]) -> tuple[Head, float]:
    """Return the head of the l2 that does best on the held-back tokens, and that l2.

    With much data start and l2 are sought on a part of it, and the last fit is on all.
    """
    x_train, x_valid = _columns(train, names), _columns(valid, names)
    n = len(x_train)
    part: npt.NDArray[np.int64] | slice = slice(None)
    if n > SEARCH_TOKENS:
        part = np.sort(np.random.default_rng(0).choice(n, SEARCH_TOKENS, replace=False))
    x_part, base, expert = x_train[part], train.base[part], train.expert[part]

    def marginal(d: Array) -> tuple[float, Array]:
        return marginal_loss(base, expert, d)

    # The weak start helps where there are labels of both kinds and misleads where not: the fit is
    # begun from it and from nothing, and goes on from the better.
    starts: list[Head | None] = [None]
    label = (train.expert_right & ~train.base_right)[part].astype(np.float64)
    if 0 < label.sum() < len(label):
        starts.append(fit_head(x_part, lambda d: weak_loss(label, d), 1e-3))
    judged: list[tuple[float, float, Head]] = []
    for l2 in L2_GRID:
        fits = [fit_head(x_part, marginal, l2, start) for start in starts]
        fit = min(fits, key=lambda head: marginal(head(x_part))[0])
        starts = [fit]
        judged.append((marginal_loss(valid.base, valid.expert, fit(x_valid))[0], l2, fit))
    _, l2, head = min(judged, key=lambda entry: entry[0])
    if n > SEARCH_TOKENS:
        head = fit_head(x_train, lambda d: marginal_loss(train.base, train.expert, d), l2, head)
    return head, l2


def _probability(head: Head, scores: Scores, names: tuple[str, ...]) -> Array:
    return np.asarray(np.exp(-np.logaddexp(0, -head(_columns(scores, names)))), np.float64)


def _figures(p: Array, scores: Scores) -> dict[str, float]:
    """Return the joint loss, and that of hard decisions at the defer rates that people use."""
    with np.errstate(divide="ignore"):
        d = np.log(p) - np.log1p(-p)
    curve = hard_curve(p, scores)
    figures = {"nll_joint": marginal_loss(scores.base, scores.expert, d)[0]}
    for rate in (0.1, 0.2, 0.3):
        figures[f"nll_hard_{rate}"] = float(curve[round(rate * len(p))])
    return figures


def hard_curve(p: Array, scores: Scores) -> Array:
    """Return the loss of hard decisions when the k tokens of highest p are deferred, (n + 1,)."""
    gain = np.cumsum((scores.expert - scores.base)[np.argsort(-p, kind="stable")])
    curve: Array = -(scores.base.sum() + np.concatenate(([0.0], gain))) / len(p)
    return curve


def _columns(scores: Scores, names: tuple[str, ...]) -> npt.NDArray[np.float32]:
    parts = [
        scores.hidden if name == HIDDEN
        else scores.logit_features[:, readout.FEATURES.index(name), None]
        for name in names
    ]  # fmt: skip
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)


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
    quantiles = _below_one(np.quantile(p, [1 - rate for rate in DEFER_RATES[1:-1]]))
    return DEFER_RATES, (1.0, *(float(q) for q in quantiles), 0.0)
