"""What a head is fitted to: losses of d, the logit of p_defer, and how their heads are judged.

The paper's marginal likelihood and its weak supervision (arXiv 2403.03870), and two of our own: the
likelihood of hard decisions at a given budget of deferrals, and what the expert would regret of the
base's choices. An entry of OBJECTIVES is all that a new one needs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from colm_edge.arrays import Doubles, Ints
from colm_edge.switch.reading import sigmoids
from colm_edge.train.heads import Loss
from colm_edge.train.scores import Scores

WEAK_POSITIVE_WEIGHT = 8.0  # of a weak label 1, as in the authors' script
DEFER_RATES = (0.1, 0.2, 0.3)  # that people use: what the budget loss and the reports look at
NEWTON_STEPS = 50  # 3 to 6 are usual
# The expert rejects the base's choice if it regrets it by more than so many nats, weighed.
REJECTED = 2.0
REGRET_RATES = (0.05, 0.1, 0.2)  # at which heads are judged by the regret that they remove


def marginal_loss(base: Doubles, expert: Doubles, d: Doubles) -> tuple[float, Doubles]:
    """Return Co-LLM's loss, the mean of −log((1−σ(d))·P_base + σ(d)·P_expert), and its gradient.

    base, expert: log-probabilities of the gold tokens, (n,), nats. d: (n,). The gradient (n,) is
    with respect to d: σ(d) less the posterior probability that the expert wrote the token.
    """
    log_expert, log_base = -np.logaddexp(0, -d), -np.logaddexp(0, d)
    joint = np.logaddexp(log_base + base, log_expert + expert)
    gradient = np.exp(log_expert) - np.exp(log_expert + expert - joint)
    return float(-joint.mean()), gradient / len(d)


def weak_loss(label: Doubles, d: Doubles) -> tuple[float, Doubles]:
    """Return the weak supervision's weighted binary cross-entropy, and its gradient in d.

    label: 0 or 1, as `weak_label` gives them; label, d: (n,).
    """
    return _cross_entropy(label, np.where(label > 0, WEAK_POSITIVE_WEIGHT, 1.0), d)


def regret_loss(weighed: Doubles, d: Doubles) -> tuple[float, Doubles]:
    """Return the binary cross-entropy of whether the expert rejects the base's choice, and its
    gradient in d. What it rejects weighs as much as it regrets it, all else as one nat.

    weighed: the regret of each token times its importance, (n,).
    """
    label = (weighed > REJECTED).astype(np.float64)
    return _cross_entropy(label, np.where(label > 0, weighed, 1.0), d)


def _cross_entropy(label: Doubles, weight: Doubles, d: Doubles) -> tuple[float, Doubles]:
    """Return the mean of the weighted binary cross-entropies of σ(d), and its gradient in d.

    label, weight, d: (n,). The sum is divided by n, not by the weights.
    """
    loss = weight * (np.logaddexp(0, d) - label * d)
    return float(loss.mean()), weight * (sigmoids(d) - label) / len(d)


def regret_removed(rank: Doubles, regret: Doubles) -> Doubles:
    """Return the share of all regret that is removed when the tokens of highest rank are deferred,
    one number for each of REGRET_RATES. rank, regret: (n,). Ties are taken in their order."""
    total = np.cumsum(np.concatenate(([0.0], regret[np.argsort(-rank, kind="stable")])))
    places = np.round(np.array(REGRET_RATES) * len(rank)).astype(np.int64)
    return np.asarray(total[places] / max(float(total[-1]), 1e-300), np.float64)


def budget_loss(
    gain: Doubles, d: Doubles, rates: tuple[float, ...] = DEFER_RATES
) -> tuple[float, Doubles]:
    """Return what hard decisions lose at given defer rates, smoothed, and its gradient in d.

    gain (n,): nats that the expert is better by on each token. For each rate the threshold t is
    where the mean of σ(d − t) is that rate; the loss is −mean(σ(d − t)·gain), the average over the
    rates. t moves with d, which the gradient accounts for: raising all of d changes nothing, so
    the loss is about the ranking alone, and a steeper d is a harder decision.
    """
    total, gradient = 0.0, np.zeros(len(d))
    for rate in rates:
        share = sigmoids(d - _soft_quantile(d, rate))
        slope = share * (1 - share)
        by_threshold = float(slope @ gain) / max(float(slope.sum()), 1e-300)
        total -= float(share @ gain)
        gradient -= slope * (gain - by_threshold)
    scale = len(rates) * len(d)
    return total / scale, gradient / scale


def _soft_quantile(d: Doubles, rate: float) -> float:
    """Return the t for which the mean of σ(d − t) is the rate, by Newton's method in a bracket."""
    low, high = float(d.min()) - 40.0, float(d.max()) + 40.0
    t = float(np.quantile(d, 1 - rate))
    for _ in range(NEWTON_STEPS):
        share = sigmoids(d - t)
        excess = float(share.mean()) - rate
        if abs(excess) < 1e-10:
            break
        low, high = (t, high) if excess > 0 else (low, t)
        slope = float((share * (1 - share)).mean())
        t += excess / slope if slope > 0 else 0.0
        if not low < t < high:
            t = (low + high) / 2
    return t


def hard_curve(rank: Doubles, base: Doubles, expert: Doubles) -> Doubles:
    """Return the loss of hard decisions when the k tokens of highest rank are deferred, (n + 1,).

    base, expert: log-probabilities of the gold tokens, (n,). Ties are taken in their order.
    """
    gain = np.cumsum((expert - base)[np.argsort(-rank, kind="stable")])
    curve: Doubles = -(base.sum() + np.concatenate(([0.0], gain))) / len(rank)
    return curve


def hard_figures(rank: Doubles, base: Doubles, expert: Doubles) -> dict[str, float]:
    """Return that loss where each of DEFER_RATES is deferred, by its name in reports."""
    curve = hard_curve(rank, base, expert)
    return {f"nll_hard_{rate}": float(curve[round(rate * len(rank))]) for rate in DEFER_RATES}


def loss_figures(scores: Scores, rows: Ints, d: Doubles) -> dict[str, float]:
    """Return the joint loss, that of hard decisions at the defer rates that people use, and, where
    it is known, the share of the regret that these remove."""
    base, expert = scores.base[rows], scores.expert[rows]
    figures = {"nll_joint": _joint_loss(scores, rows, d), **hard_figures(d, base, expert)}
    if scores.tells_regret:
        removed = regret_removed(d, scores.regret(rows)).tolist()
        names = [f"regret_removed_{rate}" for rate in REGRET_RATES]
        figures |= dict(zip(names, removed, strict=True))
    return figures


def _joint_loss(scores: Scores, rows: Ints, d: Doubles) -> float:
    return marginal_loss(scores.base[rows], scores.expert[rows], d)[0]


def hard_loss(scores: Scores, rows: Ints, d: Doubles) -> float:
    """Return the mean loss of hard decisions at those rates."""
    losses = hard_figures(d, scores.base[rows], scores.expert[rows])
    return sum(losses.values()) / len(losses)


def regret_left(scores: Scores, rows: Ints, d: Doubles) -> float:
    """Return the mean share of the weighed regret that is left at REGRET_RATES."""
    return 1.0 - float(regret_removed(d, scores.weighed_regret(rows)).mean())


def weak_label(scores: Scores, rows: Ints) -> Doubles:
    """Return the paper's weak label: 1 where only the expert's likeliest token is the gold one."""
    return (scores.expert_right[rows] & ~scores.base_right[rows]).astype(np.float64)


@dataclass(frozen=True)
class Objective:
    """What a head can be fitted to.

    loss: (scores, rows) -> the loss of d on these rows, to minimise.
    held_back_loss: (scores, rows, d) of held-back tokens -> a number; the regularisation with the
    lowest one is taken.
    starts: where the fit starts; of several, the best result is taken: "zero", "old" (the switch
    that is updated), or the head of an objective that stands earlier in OBJECTIVES.
    ranks: d says only which tokens come first, so it is rescaled to the likeliest mixture.
    by_margin: the regularisation holds the head to the untrained rule `margin`, and that rule
    itself is taken where no fit is judged better.
    needs_regret: of the scores.
    """

    loss: Callable[[Scores, Ints], Loss]
    held_back_loss: Callable[[Scores, Ints, Doubles], float]
    starts: tuple[str, ...] = ("zero",)
    ranks: bool = False
    by_margin: bool = False
    needs_regret: bool = False


# Fitted in this order.
OBJECTIVES = {
    # The paper's weak supervision.
    "weak": Objective(
        loss=lambda scores, rows: partial(weak_loss, weak_label(scores, rows)),
        held_back_loss=hard_loss,
    ),
    # The paper's likelihood of the mixture.
    "marginal": Objective(
        loss=lambda scores, rows: partial(marginal_loss, scores.base[rows], scores.expert[rows]),
        held_back_loss=_joint_loss,
        starts=("zero", "old", "weak"),
    ),
    # The likelihood of hard decisions at the defer rates that people use.
    "budget": Objective(
        loss=lambda scores, rows: partial(budget_loss, scores.expert[rows] - scores.base[rows]),
        held_back_loss=hard_loss,
        starts=("marginal",),
        ranks=True,
    ),
    # Whether the expert would reject the base's choice.
    "regret": Objective(
        loss=lambda scores, rows: partial(regret_loss, scores.weighed_regret(rows)),
        held_back_loss=regret_left,
        by_margin=True,
        needs_regret=True,
    ),
}
BEST_OF = ("marginal", "budget")  # what the objective "best" chooses from; weak is a baseline
