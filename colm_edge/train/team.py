"""Fit one switch for several experts: a row for each, softmax over the base and all of them.

As for one expert the models stay frozen. Two objectives have a form for several:

- marginal: the likelihood of the mixture, −log Σ_j share_j · P_j(token), j over base and experts.
- regret: a classification of every token. Where the expert of its document would reject the base's
  choice it is that expert's, and weighs the nats that it regrets; all else is the base's. In both,
  nats count as often as the token is important.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np

from colm_edge.arrays import Bools, Doubles, Floats, Ints
from colm_edge.errors import DataError
from colm_edge.switch.file import FEATURE_SETS, Switch
from colm_edge.switch.reading import HIDDEN, log_shares, sigmoids
from colm_edge.switch.rules import DEFAULT_RATE
from colm_edge.train.fit import (
    FIT_BYTES,
    L2_GRID,
    SEARCH_TOKENS,
    calibrate,
    choose_threshold,
    feature_columns,
    figures_at,
    in_chunks,
    sample,
)
from colm_edge.train.heads import CHUNK_ROWS, Head, Standardised, minimize
from colm_edge.train.objectives import REJECTED, hard_figures, regret_removed
from colm_edge.train.scores import Scores

TEAM_OBJECTIVES = ("marginal", "regret")
# d of every expert, (n, K) -> the loss and its gradient
TeamLoss = Callable[[Doubles], tuple[float, Doubles]]


@dataclass(frozen=True)
class TeamScores:
    """What base and experts said of every scored token, a row each.

    scores: with each expert, in the switch's order. They may be mapped, and are never joined: the
    columns of features may be larger than memory.
    writer: the expert of each row's document, (n,): the one that wrote it, or finds it likeliest.
    by_all: every expert scored every document, so all have the same rows. Otherwise the experts
    wrote the documents, each scored its own alone, and the rows of one follow those of another.
    """

    scores: Sequence[Scores]
    writer: Ints
    by_all: bool

    @cached_property
    def line(self) -> Ints:
        """The line of each row, (n,)."""
        return self.scores[0].line if self.by_all else np.concatenate([s.line for s in self.scores])

    @property
    def n_embd(self) -> int:
        """The width of the base's hidden state."""
        return int(self.scores[0].hidden.shape[1])

    @property
    def tells_regret(self) -> bool:
        """Whether the regret is known: a server's expert does not tell it."""
        return all(scores.tells_regret for scores in self.scores)

    def features(self, rows: Ints, names: tuple[str, ...]) -> Floats:
        """Return the features of some rows, (n, k): a copy, also of scores that are mapped."""
        if self.by_all:
            return feature_columns(self.scores[0], rows, names)
        width = sum(self.n_embd if name == HIDDEN else 1 for name in names)
        found = np.empty((len(rows), width), np.float32)
        for at, scores, own in self._by_writer(rows):
            for start in range(0, len(own), CHUNK_ROWS):
                some = slice(start, start + CHUNK_ROWS)
                found[at[some]] = feature_columns(scores, own[some], names)
        return found

    def gold(self, rows: Ints) -> Doubles:
        """Return the log-probabilities of the gold tokens, (n, 1 + K): the base's first. Only where
        every expert has told them."""
        base = self.scores[0].base[rows]
        return np.column_stack([base, *(scores.expert[rows] for scores in self.scores)])

    def regret(self, rows: Ints, *, weighed: bool = False) -> Doubles:
        """Return the nats by which the document's expert prefers its own choice to the base's;
        weighed: times their importance."""
        found = np.empty(len(rows))
        for at, scores, own in self._by_writer(rows):
            found[at] = scores.weighed_regret(own) if weighed else scores.regret(own)
        return found

    def _by_writer(self, rows: Ints) -> list[tuple[Ints, Scores, Ints]]:
        """Return for each expert: which of these rows are of its documents, the scores with it, and
        these rows' places in them."""
        found, first = [], 0
        for k, scores in enumerate(self.scores):
            at = np.flatnonzero(self.writer[rows] == k)
            found.append((at, scores, rows[at] - first))
            first += 0 if self.by_all else len(scores.line)
        return found


def likeliest_writers(scores: Sequence[Scores]) -> Ints:
    """Return for each row the expert that finds its line's tokens likeliest, (n,)."""
    _, line = np.unique(scores[0].line, return_inverse=True)
    totals = np.stack([np.bincount(line, one.expert) for one in scores])
    return np.asarray(totals.argmax(axis=0)[line], np.int64)


def team_marginal_loss(gold: Doubles, d: Doubles) -> tuple[float, Doubles]:
    """Return the mean of −log Σ_j share_j · P_j, and its gradient in d, (n, K).

    gold: log-probabilities of the gold tokens, (n, 1 + K), the base's first. The gradient is each
    expert's share less its posterior probability to have written the token.
    """
    share = log_shares(d)
    both = share + gold
    joint = np.logaddexp.reduce(both, axis=1, keepdims=True)
    gradient = np.exp(share) - np.exp(both - joint)
    return float(-joint.mean()), gradient[:, 1:] / len(d)


def team_regret_loss(regret: Doubles, writer: Ints, d: Doubles) -> tuple[float, Doubles]:
    """Return the weighted cross-entropy of whose each token is, and its gradient in d, (n, K).

    regret: weighed, writer: the expert of each token's document, both (n,).
    """
    rejected = regret > REJECTED
    weight = np.where(rejected, regret, 1.0) / len(d)
    label = np.where(rejected, writer + 1, 0)
    share, rows = log_shares(d), np.arange(len(d))
    gradient = np.exp(share)
    gradient[rows, label] -= 1.0
    return float(-(weight * share[rows, label]).sum()), (weight[:, None] * gradient)[:, 1:]


def share_of_experts(d: Doubles) -> Doubles:
    """Return p_defer, the experts' shares together, (n,)."""
    return sigmoids(np.logaddexp.reduce(d, axis=1))


def team_regret_left(regret: Doubles, writer: Ints, d: Doubles) -> float:
    """Return the mean share of the regret that is left where the tokens of the highest p_defer are
    deferred, at REGRET_RATES; it goes only where the document's expert is the one that writes."""
    gone = np.where(d.argmax(axis=1) == writer, regret, 0.0)
    removed = regret_removed(share_of_experts(d), gone).mean() * gone.sum()
    return 1.0 - float(removed / max(float(regret.sum()), 1e-300))


def fit_rows(
    block: Standardised, loss: TeamLoss, l2: float, start: Sequence[Head]
) -> tuple[Head, ...]:
    """Fit a head for each expert under one loss, with l2 · |weight|² in the standard units."""
    n_rows, width = len(start), block.columns.shape[1]

    def value(x: Doubles) -> tuple[float, Doubles]:
        rows = x.reshape(n_rows, width + 1)
        weight, bias = rows[:, :-1], rows[:, -1]
        d = np.asarray(block.columns @ weight.T.astype(np.float32), np.float64) + bias
        total, by_d = loss(d)
        by_weight = np.asarray(by_d.T.astype(np.float32) @ block.columns, np.float64)
        by_weight += 2 * l2 * weight
        gradient = np.column_stack([by_weight, by_d.sum(axis=0)])
        return total + l2 * float((weight**2).sum()), gradient.ravel()

    x = minimize(value, np.concatenate([block.standard(head) for head in start]))
    return tuple(block.raw(row) for row in x.reshape(n_rows, width + 1))


def d_of(heads: Sequence[Head], columns: Floats) -> Doubles:
    """Return d of every expert, (n, K)."""
    return np.stack([head(columns) for head in heads], axis=1)


def fit_team(
    team: TeamScores,
    held_back: set[int],
    names: Sequence[str],
    *,
    features: str = "both",
    objective: str = "best",
    info: Mapping[str, str],
) -> tuple[Switch, dict[str, Any]]:
    """Fit a switch for several experts on some lines, judge it on those held back.

    names: of the experts. objective: "marginal", "regret", or "best": regret where the experts
    wrote the documents, else marginal. features: as in `FitOptions`. info: what the switch
    remembers.

    Returns the switch, and a report of its losses in nats per token of the held-back lines. Raises
    DataError for an objective that the scores do not tell.
    """
    objective = checked_objective(objective, by_all=team.by_all)
    if objective == "regret" and not team.tells_regret:
        raise DataError(
            "the objective regret needs the experts' view of the base's choices, which a server "
            "does not tell; give them as GGUF files, or --objective marginal"
        )
    is_valid = np.isin(team.line, list(held_back))
    train, valid = np.flatnonzero(~is_valid), np.flatnonzero(is_valid)
    columns = partial(team.features, names=FEATURE_SETS[features])
    heads, l2 = _search(team, objective, len(names), train, valid, columns)
    d = in_chunks(lambda rows: d_of(heads, columns(rows)), valid)
    switch = _switch(heads, d, team, valid, objective, features, info)
    report = {
        "features": features,
        "objective": objective,
        "l2": l2,
        **_figures(team, valid, d, switch.threshold, names),
        "n_train": len(np.unique(team.line)) - len(held_back),
        "n_valid": len(held_back),
        "n_train_tokens": len(train),
        "n_valid_tokens": len(valid),
    }
    return switch, report


def _search(
    team: TeamScores,
    objective: str,
    n_experts: int,
    train: Ints,
    valid: Ints,
    columns: Callable[[Ints], Floats],
) -> tuple[Sequence[Head], float]:
    """Return the heads with the l2 of the grid that is judged the best, and that l2. With much data
    it is searched and judged on parts; the heads are then fitted on all, or on as much as FIT_BYTES
    hold."""

    def loss_on(rows: Ints) -> TeamLoss:
        if objective == "marginal":
            return partial(team_marginal_loss, team.gold(rows))
        return partial(team_regret_loss, team.regret(rows, weighed=True), team.writer[rows])

    judges = sample(valid, SEARCH_TOKENS)
    held_back = columns(judges)

    def judged(heads: Sequence[Head]) -> float:
        d = d_of(heads, held_back)
        if objective == "marginal":
            return team_marginal_loss(team.gold(judges), d)[0]
        return team_regret_left(team.regret(judges, weighed=True), team.writer[judges], d)

    searched = sample(train, SEARCH_TOKENS)
    block = Standardised(columns(searched))
    width = block.columns.shape[1]
    heads: Sequence[Head] = [Head(np.zeros(width), 0.0)] * n_experts
    best: tuple[float, float, Sequence[Head]] | None = None
    for l2 in L2_GRID:
        heads = fit_rows(block, loss_on(searched), l2, heads)
        value = judged(heads)
        if best is not None and value >= best[0]:
            break
        best = value, l2, heads
    assert best is not None
    _, l2, heads = best
    rows = sample(train, FIT_BYTES // (4 * width))
    if len(rows) > len(searched):
        heads = fit_rows(Standardised(columns(rows)), loss_on(rows), l2, heads)
    return heads, l2


def checked_objective(objective: str, *, by_all: bool) -> str:
    """Return an objective, or what "best" stands for. by_all: as in TeamScores.

    Raises DataError for one that does not go with several experts, or with such scores.
    """
    if objective == "best":
        return "marginal" if by_all else "regret"
    if objective not in TEAM_OBJECTIVES:
        raise DataError(
            f"the objective {objective} is for one expert; for several there are "
            f"{' and '.join(TEAM_OBJECTIVES)}"
        )
    if objective == "marginal" and not by_all:
        raise DataError(
            "the objective marginal needs what every expert thinks of every text; give --data, or "
            "--objective regret"
        )
    return objective


def _switch(
    heads: Sequence[Head],
    d: Doubles,
    team: TeamScores,
    valid: Ints,
    objective: str,
    features: str,
    info: Mapping[str, str],
) -> Switch:
    p = share_of_experts(d)
    rates, thresholds = calibrate(p)
    if objective == "regret":  # no text says how much of it should go
        threshold = float(np.interp(DEFAULT_RATE, rates, thresholds))
    else:
        gold = team.gold(valid)
        threshold = choose_threshold(p, gold[:, 0], of_chosen(gold, d))
    return Switch(
        features=FEATURE_SETS[features],
        weight=np.stack([head.weight for head in heads]).astype(np.float32),
        bias=np.array([head.bias for head in heads], np.float32),
        n_embd=team.n_embd,
        threshold=threshold,
        defer_rates=rates,
        thresholds=thresholds,
        info={**info, "objective": objective},
    )


def of_chosen(gold: Doubles, d: Doubles) -> Doubles:
    """Return the log-probability of each gold token by the expert that would write it, (n,)."""
    return np.asarray(np.take_along_axis(gold[:, 1:], d.argmax(axis=1)[:, None], axis=1)[:, 0])


def _figures(
    team: TeamScores, valid: Ints, d: Doubles, threshold: float, names: Sequence[str]
) -> dict[str, Any]:
    p, writer = share_of_experts(d), team.writer[valid]
    deferred = p > threshold
    to = d.argmax(axis=1)
    figures: dict[str, Any] = {
        # Of the deferred tokens of each expert's documents: the share that goes to each expert.
        "sent": {
            name: {
                other: _share(to[deferred & (writer == k)] == j) for j, other in enumerate(names)
            }
            for k, name in enumerate(names)
        },
    }
    if team.tells_regret:
        figures["regret_removed"] = 1 - team_regret_left(team.regret(valid), writer, d)
    if not team.by_all:
        return figures | {"threshold": threshold, "defer_rate": float(deferred.mean())}
    gold = team.gold(valid)
    base, chosen = gold[:, 0], of_chosen(gold, d)
    return figures | {
        **figures_at(threshold, p, base, chosen),
        "nll_base": float(-base.mean()),
        "nll_expert": float(-gold[:, 1:].mean(axis=0).max()),
        "nll_experts": {name: float(-gold[:, 1 + k].mean()) for k, name in enumerate(names)},
        "nll_joint": team_marginal_loss(gold, d)[0],
        **hard_figures(p, base, chosen),
        "nll_oracle": float(-gold.max(axis=1).mean()),
    }


def _share(hits: Bools) -> float | None:
    return float(hits.mean()) if len(hits) else None
