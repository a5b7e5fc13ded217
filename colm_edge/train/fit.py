"""Fit a switch: score the data with both models, fit heads on one part, judge them on the other.

The models stay frozen and only the head is fitted, a weaker variant of Co-LLM's joint
fine-tuning (arXiv 2403.03870, section 2.2) that needs only the two GGUF files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from colm_edge import readout
from colm_edge.arrays import Doubles, Floats, Ints
from colm_edge.errors import DataError
from colm_edge.files import sha256_of
from colm_edge.switch.file import FEATURE_SETS, Switch
from colm_edge.switch.reading import HIDDEN, sigmoids
from colm_edge.switch.rules import DEFAULT_RATE
from colm_edge.train.documents import Documents, held_back_lines
from colm_edge.train.heads import CHUNK_ROWS, Head, Loss, Standardised, check_fit
from colm_edge.train.objectives import (
    BEST_OF,
    OBJECTIVES,
    hard_loss,
    loss_figures,
    weak_label,
)
from colm_edge.train.score_files import scored_by, tell_choices
from colm_edge.train.scores import Scores
from colm_edge.train.scoring import MakeProgress, Recorded, score

if TYPE_CHECKING:
    from colm_edge.pair import Pair


# (the calibrated switch, the held-back lines) -> a threshold, and how it was found, for the report
ChooseThreshold = Callable[[Switch, set[int]], tuple[float, Any]]
SEARCH_TOKENS = 100_000  # enough to choose the objective and the regularisation
FIT_BYTES = 4 << 30  # of columns in memory; a sample of the tokens where all take more
L2_GRID = (1e-2, 1e-3, 1e-4, 1e-5)  # on standardised weights
PRIOR_L2_GRID = (1.0, 0.3, 0.1, 0.03, *L2_GRID)  # on their distance from a rule's
NO_REGRET = (
    "the objective regret needs the expert's view of the base's choices, which a server does not "
    "tell; give the expert as a GGUF file, or another objective"
)
# Between two of them thresholds are interpolated, which low rates, in the tail, would miss.
LOW_RATES = (0.0025, 0.005, 0.01, 0.02, 0.03, 0.04)
CALIBRATED_RATES = (0.0, *LOW_RATES, *(round(0.05 * i, 2) for i in range(1, 21)))


@dataclass(frozen=True)
class FitOptions:
    """What is asked of a fit.

    features: hidden, logits or both; None takes those of the switch that is updated, or both.
    objective: a name in OBJECTIVES, or "best": the one in BEST_OF whose hard decisions at defer
    rates of 0.1 to 0.3 are likelier on the held-back lines; for text that the expert wrote itself,
    "regret".
    seed: decides which lines are held back.
    update: the switch that this one replaces; the report compares them, and the fit of `marginal`,
    from which `budget` starts, begins with it. `regret` and `weak` do not: they have one optimum.
    compare: fit the other feature sets as well and report how they do.
    choose: chooses the default threshold, given the calibrated switch and the held-back lines;
    by default `choose_threshold` does, and for "regret" it is that of DEFAULT_RATE.
    """

    features: str | None = None
    objective: str = "best"
    seed: int = 0
    update: Switch | None = None
    compare: bool = False
    choose: ChooseThreshold | None = None


@dataclass(frozen=True)
class Split:
    """Scores, and which of their rows heads are fitted on and which are held back to judge them."""

    scores: Scores
    train: Ints
    valid: Ints

    def gold(self, rows: Ints) -> tuple[Doubles, Doubles]:
        """Return the log-probabilities of the gold tokens in some rows, base's and expert's."""
        return self.scores.base[rows], self.scores.expert[rows]


@dataclass(frozen=True)
class Fit:
    """A fitted switch, its figures, and the held-back lines that they were measured on."""

    switch: Switch
    report: dict[str, Any]
    scores: Scores
    valid: Ints  # the held-back tokens' rows in the scores
    p: Doubles  # p_defer of every held-back token
    p_before: Doubles | None  # the same by the switch that is updated


@dataclass(frozen=True)
class Trial:
    """A head fitted to one objective with its best l2, and p_defer of the held-back tokens."""

    objective: str
    n_tokens: int  # that the head was fitted on
    head: Head
    l2: float
    p: Doubles
    figures: dict[str, float]
    hard_loss: float


def fit_switch(
    pair: Pair,
    documents: Documents,
    options: FitOptions,
    *,
    progress: MakeProgress,
    work: Path | None = None,
    expert_scores: Sequence[Path] = (),
    recorded: Recorded | None = None,
) -> Fit:
    """Score the documents, fit a switch on one part of them and judge it on the other.

    work, expert_scores, recorded: as in `score`.

    The report's losses are nats per token of the held-back lines, on which objective,
    regularisation, threshold and calibration were chosen too: judge a switch on separate data.
    Raises DataError when there are too few documents to hold any back.
    """
    update = options.update
    check_fit()
    _check_objective(options.objective, pair, expert_scores, recorded)
    held_back = held_back_lines(documents, options.seed)
    scores = score(
        pair, documents, progress, work=work, expert_scores=expert_scores, recorded=recorded
    )
    split = _split(scores, held_back)
    features = options.features or _feature_set(update)
    names = FEATURE_SETS[features]
    old = None if update is None or update.features != names else _head(update)
    # An expert likes its own text better throughout: that it does says nothing of a token.
    by_expert = recorded is not None
    objective = "regret" if by_expert and options.objective == "best" else options.objective
    trial, trials = fit_head(split, names, objective, old)
    info = models_of(pair, scored_by(expert_scores), bool(expert_scores))
    info |= {"objective": trial.objective}
    switch = _switch(trial, names, split, info, to_rate=by_expert)
    chosen = {}
    if options.choose is not None:
        threshold, chosen["threshold_by"] = options.choose(switch, held_back)
        switch = replace(switch, threshold=threshold)
    report = {
        "features": features,
        "objective": trial.objective,
        **_figures_of(trial, switch.threshold, split),
        **chosen,
        **_counts(documents, held_back, split, trial),
        "objectives": {name: other.figures for name, other in trials.items()},
    }
    p_before = None
    if update is not None:
        p_before, report["before"] = _before(update, split)
    if options.compare:
        report["feature_sets"] = _feature_sets(features, trial, split)
    return Fit(switch, report, scores, split.valid, trial.p, p_before)


def models_of(pair: Pair, scorer: str | None, elsewhere: bool) -> dict[str, str]:
    """Return what a switch remembers of the models: their names, and what tells their files from
    others. scorer: the expert's name, if it scored elsewhere."""
    found = {"base": pair.base.path.name, "expert": Path(scorer or pair.expert.name).name}
    models = {"base": pair.base}
    if pair.expert_is_here and not elsewhere:
        models["expert"] = pair.expert_session.model
    for role, model in models.items():
        found[f"{role}_fingerprint"] = model.fingerprint
        found[f"{role}_sha256"] = " ".join(sha256_of(file) for file in model.files)
    return found


def _check_objective(
    objective: str, pair: Pair, expert_scores: Sequence[Path], recorded: Recorded | None
) -> None:
    """Raise now, rather than after an hour of scoring, for an objective that cannot be fitted."""
    if objective not in OBJECTIVES or not OBJECTIVES[objective].needs_regret:
        return
    if expert_scores:
        tells = tell_choices(expert_scores)
    else:
        tells = pair.expert_is_here or recorded is not None
    if not tells:
        raise DataError(NO_REGRET)


def fit_head(
    split: Split, names: tuple[str, ...], objective: str = "best", old: Head | None = None
) -> tuple[Trial, dict[str, Trial]]:
    """Fit a head on the train rows and judge it on the held-back ones.

    names: the features it reads. old: the head that it replaces, if it reads the same features.

    Returns it, and one for each objective for comparison. With much data, objective and
    regularisation are searched on a part of it; the head that is returned is fitted on all, or on
    as much as FIT_BYTES hold.
    """
    trials = _trials(split, names, old)
    if objective == "best":
        objective = min(BEST_OF, key=lambda name: trials[name].hard_loss)
    if objective not in trials:
        raise DataError(NO_REGRET)
    trial = trials[objective]
    rows = sample(split.train, FIT_BYTES // (4 * len(trial.head.weight)))
    if len(rows) > trial.n_tokens:
        chosen = OBJECTIVES[objective]
        block = Standardised(feature_columns(split.scores, rows, names))
        loss = chosen.loss(split.scores, rows)
        prior = _margin_head(block, loss, names) if chosen.by_margin else None
        if prior is not None and math.isinf(trial.l2):
            head = prior
        else:
            head = block.fit(loss, trial.l2, trial.head, prior)
        if chosen.ranks:
            mixture = OBJECTIVES["marginal"].loss(split.scores, rows)
            head = block.rescaled(head, mixture, trials["marginal"].l2)
        trial = _trial(objective, head, trial.l2, split, names, len(rows))
    return trial, trials


def _split(scores: Scores, held_back: set[int]) -> Split:
    is_valid = np.isin(scores.line, list(held_back))
    return Split(scores, np.flatnonzero(~is_valid), np.flatnonzero(is_valid))


def _feature_set(update: Switch | None) -> str:
    """Return the name of the feature set that a switch reads; "both" if it has none."""
    same = (name for name in FEATURE_SETS if update and FEATURE_SETS[name] == update.features)
    return next(same, "both")


def _switch(
    trial: Trial, names: tuple[str, ...], split: Split, info: dict[str, str], *, to_rate: bool
) -> Switch:
    """Return the trial's head as a calibrated switch. to_rate: its threshold defers DEFAULT_RATE,
    as it does where no text says how much of the regret should go."""
    rates, thresholds = calibrate(trial.p)
    if to_rate or OBJECTIVES[trial.objective].needs_regret:
        threshold = float(np.interp(DEFAULT_RATE, rates, thresholds))
    else:
        threshold = choose_threshold(trial.p, *split.gold(split.valid))
    return Switch(
        features=names,
        weight=trial.head.weight.astype(np.float32)[None, :],
        bias=np.array([trial.head.bias], np.float32),
        n_embd=split.scores.hidden.shape[1],
        threshold=threshold,
        defer_rates=rates,
        thresholds=thresholds,
        info=info,
    )


def _trials(split: Split, names: tuple[str, ...], old: Head | None) -> dict[str, Trial]:
    """Return a head for each objective, searched on a part of each side if it is large.

    The regularisation is the best on the held-back side, by the objective's own judge.
    """
    scores = split.scores
    rows, judged = sample(split.train, SEARCH_TOKENS), sample(split.valid, SEARCH_TOKENS)
    block = Standardised(feature_columns(scores, rows, names))
    held_back = feature_columns(scores, judged, names)
    starts: dict[str, Head | None] = {"zero": None}
    if old is not None:
        starts["old"] = old
    found: dict[str, tuple[float, Head]] = {}
    for name, objective in OBJECTIVES.items():
        if objective.needs_regret and not scores.tells_regret:
            continue
        loss = objective.loss(scores, rows)
        l2, head = _best_l2(
            block,
            loss,
            [starts[start] for start in objective.starts if start in starts],
            _margin_head(block, loss, names) if objective.by_margin else None,
            held_back,
            partial(objective.held_back_loss, scores, judged),
        )
        # A head fitted to labels that are all alike would mislead those that start from it.
        if name != "weak" or len(np.unique(weak_label(scores, rows))) > 1:
            starts[name] = head
        if objective.ranks:
            mixture = OBJECTIVES["marginal"].loss(scores, rows)
            head = block.rescaled(head, mixture, found["marginal"][0])
        found[name] = l2, head
    return {
        name: _trial(name, head, l2, split, names, len(rows)) for name, (l2, head) in found.items()
    }


def _best_l2(
    block: Standardised,
    loss: Loss,
    starts: list[Head | None],
    prior: Head | None,
    held_back: Floats,
    judge: Callable[[Doubles], float],
) -> tuple[float, Head]:
    """Return the l2 of the grid whose head is judged the best on held-back columns, and the head.

    From the strongest on, each fit starts from the one before. It stops at the first that is no
    better on what is held back. prior: the head that an infinite l2 would give, if not zeros.
    """
    best: tuple[float, float, Head] | None = None
    if prior is not None:
        best, starts = (judge(prior(held_back)), math.inf, prior), [prior]
    for l2 in L2_GRID if prior is None else PRIOR_L2_GRID:
        heads = [block.fit(loss, l2, start, prior) for start in starts]
        head = min(heads, key=lambda head: loss(block.d(head))[0])
        value = judge(head(held_back))
        if best is not None and value >= best[0]:
            break
        best, starts = (value, l2, head), [head]
    assert best is not None
    return best[1:]


def _margin_head(block: Standardised, loss: Loss, names: tuple[str, ...]) -> Head | None:
    """Return the head that ranks as `margin` does, with the lowest loss; None without that feature.

    The hidden state, if it is read, stands first.
    """
    if "margin" not in names:
        return None
    weight = np.zeros(block.columns.shape[1])
    weight[names.index("margin") - len(names)] = -1.0
    return block.rescaled(Head(weight, 0.0), loss, 0.0)


def _trial(
    objective: str, head: Head, l2: float, split: Split, names: tuple[str, ...], n_tokens: int
) -> Trial:
    d = _d(head, split.scores, split.valid, names)
    figures = loss_figures(split.scores, split.valid, d)
    hard = hard_loss(split.scores, split.valid, d)
    return Trial(objective, n_tokens, head, l2, sigmoids(d), figures, hard)


def _head(switch: Switch) -> Head:
    return Head(switch.weight[0].astype(np.float64), float(switch.bias[0]))


def _d(head: Head, scores: Scores, rows: Ints, names: tuple[str, ...]) -> Doubles:
    return in_chunks(lambda some: head(feature_columns(scores, some, names)), rows)


def in_chunks(values: Callable[[Ints], Doubles], rows: Ints) -> Doubles:
    """Return the values of many rows, whose columns together may be larger than memory."""
    starts = range(0, len(rows), CHUNK_ROWS)
    return np.concatenate([values(rows[at : at + CHUNK_ROWS]) for at in starts])


def _figures_of(trial: Trial, threshold: float, split: Split) -> dict[str, float]:
    """Return the report's losses: each model alone, the mixture, hard decisions."""
    base, expert = split.gold(split.valid)
    return {
        "nll_base": float(-base.mean()),
        "nll_expert": float(-expert.mean()),
        **trial.figures,
        "nll_oracle": float(-np.maximum(base, expert).mean()),
        **figures_at(threshold, trial.p, base, expert),
    }


def _counts(
    documents: Documents, held_back: set[int], split: Split, trial: Trial
) -> dict[str, float | None]:
    """Return the report's account of what the head was fitted and judged on."""
    return {
        "l2": trial.l2 if math.isfinite(trial.l2) else None,  # None: the rule itself
        "n_train": len(np.unique(documents.lines)) - len(held_back),
        "n_valid": len(held_back),
        "n_cut": documents.n_cut,
        "n_dropped": documents.n_dropped,
        "n_train_tokens": len(split.train),
        "n_fit_tokens": trial.n_tokens,
        "n_valid_tokens": len(split.valid),
    }


def _before(update: Switch, split: Split) -> tuple[Doubles, dict[str, float]]:
    """Return an older switch's p_defer of the held-back tokens, and its figures."""
    d = _d(_head(update), split.scores, split.valid, update.features)
    p, gold = sigmoids(d), split.gold(split.valid)
    return p, {
        **loss_figures(split.scores, split.valid, d),
        **figures_at(update.threshold, p, *gold),
    }


def _feature_sets(features: str, trial: Trial, split: Split) -> dict[str, dict[str, float]]:
    """Return the figures of each feature set, by the same objective."""
    figures = {features: trial.figures}
    for name, names in FEATURE_SETS.items():
        if name != features:
            figures[name] = fit_head(split, names, trial.objective)[0].figures
    return figures


def figures_at(threshold: float, p: Doubles, base: Doubles, expert: Doubles) -> dict[str, float]:
    """Return the loss, nats per token, and the share of deferrals at a threshold.

    p: p_defer of each token, (n,). base, expert: log-probabilities of the gold tokens, (n,).
    """
    deferred = p > threshold
    return {
        "nll_hard": float(-np.where(deferred, expert, base).mean()),
        "defer_rate": float(deferred.mean()),
        "threshold": threshold,
    }


def sample(rows: Ints, n: int) -> Ints:
    """Return at most n of the rows, drawn with a fixed seed, in order."""
    if len(rows) <= n:
        return rows
    return np.sort(np.random.default_rng(0).choice(rows, n, replace=False))


def feature_columns(scores: Scores, rows: Ints, names: tuple[str, ...]) -> Floats:
    """Return the features of some rows, (n, k): a copy, also of scores that are mapped."""
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


def choose_threshold(p: Doubles, base: Doubles, expert: Doubles) -> float:
    """Return the threshold whose hard decisions are likeliest on held-back tokens.

    Each token comes from the expert where p > threshold. Of the thresholds that are worse than the
    best by less than the standard error of that difference, the highest is taken, since the expert
    costs more: the rule of Breiman et al., Classification and Regression Trees, 1984, for pairs.
    The result is a float32, as in the switch file.
    """
    levels = np.unique(p)
    between = _below_one((levels[1:] + levels[:-1]) / 2)
    candidates = np.unique(np.concatenate(([0.0], between, [1.0])))
    order = np.argsort(-p)
    # Of deferring the k tokens of highest p: the gain in nats over the base alone, and its squares.
    more = (expert - base)[order]
    gain, square = (np.concatenate(([0.0], np.cumsum(x))) for x in (more, more**2))
    # A candidate defers the tokens with p above it, also after rounding and among ties.
    n_deferred = np.searchsorted(-p[order], -candidates, side="left")
    best = n_deferred[gain[n_deferred].argmax()]
    # The two decide alike, and their difference is 0, except for the tokens between them.
    lost = gain[best] - gain[n_deferred]
    variance = np.abs(square[best] - square[n_deferred]) - lost**2 / len(p)  # of a sum over all
    near = lost <= np.sqrt(np.maximum(variance, 0.0))
    return float(candidates[np.flatnonzero(near)[-1]])


def _below_one(p: Doubles) -> Doubles:
    """Round to float32, to the number below 1 at most, since 1 itself never defers."""
    highest = np.nextafter(np.float32(1), np.float32(0))
    return np.minimum(p.astype(np.float32), highest).astype(np.float64)


def calibrate(p: Doubles) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return defer rates and the thresholds that give them on held-back tokens.

    Where many p round to 1, low rates share the highest threshold that still defers.
    """
    quantiles = _below_one(np.quantile(p, [1 - rate for rate in CALIBRATED_RATES[1:-1]]))
    return CALIBRATED_RATES, (1.0, *(float(q) for q in quantiles), 0.0)
