"""Compare what a switch may read and what it is fitted to, on documents kept apart for this.

    python tools/studies/compare_switches.py -m BASE.gguf -me EXPERT.gguf --data FIT.jsonl \
        --test TEST.jsonl --work DIR

Heads are fitted on four fifths of FIT.jsonl, their regularisation is chosen on the other fifth, and
they are judged on TEST.jsonl: by the likelihood of the mixture, and of hard decisions at defer
rates of 0.1, 0.2 and 0.3. Beside what `colm-edge train` offers, this tries context features and a
hidden layer, which the runtime does not have, to see what they are worth. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from colm_edge.arrays import Bools, Doubles, Floats, Ints
from colm_edge.cli.common import progress
from colm_edge.pair import load
from colm_edge.switch.file import FEATURE_SETS
from colm_edge.train.documents import Documents, read_rows, tokenized
from colm_edge.train.fit import L2_GRID, feature_columns
from colm_edge.train.heads import Loss, Standardised, minimize
from colm_edge.train.objectives import (
    DEFER_RATES,
    budget_loss,
    hard_curve,
    marginal_loss,
    weak_label,
    weak_loss,
)
from colm_edge.train.scores import Scores
from colm_edge.train.scoring import score

HIDDEN_UNITS = 64
LATEST = 3  # tokens whose gain a context feature looks at

Names = tuple[str, ...]
Head = Callable[[Floats], Doubles]  # columns (n, k) -> d (n,)
Method = Callable[[Floats, Loss, float], Head]  # columns, loss of d, l2 -> a fitted head


def lagged(x: Doubles, position: Ints, by: int) -> Doubles:
    """Return what x was `by` tokens ago, 0 before the first."""
    out = np.zeros_like(x)
    out[by:] = x[:-by]
    out[position < by] = 0
    return out


@dataclass
class Side:
    """Scored documents, to fit on or to judge by, and the context features of their tokens."""

    scores: Scores
    context: dict[str, Doubles]

    @classmethod
    def of(cls, scores: Scores, documents: Documents) -> Side:
        """Add the context features that the scores give, each clipped to a usual range."""
        position = np.concatenate([np.arange(len(d.tokens) - d.start) for d in documents])
        gain = np.clip(scores.expert - scores.base, -10, 10)
        gains = [lagged(gain, position, by) for by in range(1, LATEST + 1)]
        context = {
            "position": np.log1p(position.astype(np.float64)),
            "surprise": np.minimum(lagged(-scores.base, position, 1), 10),
            "gain": np.sum(gains, axis=0),
        }
        return cls(scores, context)

    def columns(self, names: Names, extra: Names = ()) -> Floats:
        """Return features of the switch by name, then context features, (n, k)."""
        features = feature_columns(self.scores, np.arange(len(self.scores.base)), names)
        more = [self.context[name][:, None].astype(np.float32) for name in extra]
        return np.concatenate([features, *more], 1)

    def add_deferrals(self, deferred: Bools) -> None:
        """Add whether the last token was deferred, and how long ago the latest deferral was."""
        since = np.zeros(len(deferred))
        for i in range(1, len(since)):
            begun = self.context["position"][i] == 0
            since[i] = 0 if begun else 1 if deferred[i - 1] else since[i - 1] + (since[i - 1] > 0)
        self.context["last deferred"] = (since == 1).astype(np.float64)
        self.context["since"] = np.where(since > 0, 1 / np.maximum(since, 1), 0)


class Layer:
    """One tanh layer on standardised columns, and a linear head on it."""

    def __init__(self, columns: Floats) -> None:
        self.block = Standardised(columns)
        self.k = columns.shape[1]

    def _split(self, x: Doubles) -> tuple[Doubles, Doubles, Doubles, float]:
        n = self.k * HIDDEN_UNITS
        second = n + HIDDEN_UNITS
        return x[:n].reshape(self.k, -1), x[n:second], x[second:-1], float(x[-1])

    def fit(self, loss_of_d: Loss, l2: float) -> Doubles:
        def loss(x: Doubles) -> tuple[float, Doubles]:
            first, shift, second, bias = self._split(x)
            unit = np.tanh(self.block.columns @ first.astype(np.float32) + shift)
            value, by_d = loss_of_d(unit @ second + bias)
            inner = (by_d[:, None] * second) * (1 - unit**2)
            by_first = self.block.columns.T @ inner.astype(np.float32)
            gradient = np.concatenate((by_first.ravel(), inner.sum(0), by_d @ unit, [by_d.sum()]))
            weights = np.concatenate((first.ravel(), np.zeros(HIDDEN_UNITS), second, [0]))
            return value + l2 * float(weights @ weights), gradient + 2 * l2 * weights

        rng = np.random.default_rng(0)
        n = self.k * HIDDEN_UNITS
        first, second = rng.normal(0, 1 / np.sqrt(self.k), n), rng.normal(0, 0.1, HIDDEN_UNITS)
        x = np.concatenate((first, np.zeros(HIDDEN_UNITS), second, [0.0]))
        return minimize(loss, x, steps=300)

    def d(self, x: Doubles, columns: Floats) -> Doubles:
        first, shift, second, bias = self._split(x)
        standard = (columns - self.block.mean) / self.block.scale
        return np.asarray(np.tanh(standard @ first + shift) @ second + bias, np.float64)


def linear(columns: Floats, loss: Loss, l2: float) -> Head:
    return Standardised(columns.copy()).fit(loss, l2)


def layered(columns: Floats, loss: Loss, l2: float) -> Head:
    layer = Layer(columns.copy())
    return partial(layer.d, layer.fit(loss, l2))


class Comparison:
    """Heads fitted on four fifths of one side's lines and judged on the other side."""

    def __init__(self, fitted: Side, judged: Side) -> None:
        self.fitted, self.judged = fitted, judged
        scores = fitted.scores
        lines = np.random.default_rng(0).permutation(np.unique(scores.line))
        self.valid = np.isin(scores.line, lines[: len(lines) // 5])
        base, expert = scores.base[~self.valid], scores.expert[~self.valid]
        label = weak_label(scores, np.flatnonzero(~self.valid))
        self.losses: dict[str, Loss] = {
            "weak": partial(weak_loss, label),
            "marginal": partial(marginal_loss, base, expert),
            "budget": partial(budget_loss, expert - base),
        }
        self._add_deferrals()

    def _add_deferrals(self) -> None:
        """Add to both sides what a first head defers at a rate of 0.2."""
        names = FEATURE_SETS["both"]
        x = self.fitted.columns(names)
        first = linear(x[~self.valid], self.losses["budget"], L2_GRID[-1])
        at = float(np.quantile(first(x[self.valid]), 0.8))
        for side in (self.fitted, self.judged):
            side.add_deferrals(first(side.columns(names)) > at)

    def fit(self, columns: Floats, method: Method, objective: str) -> Head:
        """Return a head of this method, its regularisation the best of the grid on valid lines."""
        base, expert = (side[self.valid] for side in self._likelihoods(self.fitted))
        found = []
        for l2 in L2_GRID:
            head = method(columns[~self.valid], self.losses[objective], l2)
            d = head(columns[self.valid])
            joint = marginal_loss(base, expert, d)[0]
            rank = float(np.mean(hard(d, base, expert)))
            found.append((joint if objective == "marginal" else rank, head))
        return min(found, key=lambda entry: entry[0])[1]

    def judge(
        self, names: Names, extra: Names, method: Method, objective: str
    ) -> tuple[float, Doubles]:
        """Return the joint loss of the best head on the judged side, and its d there."""
        x, x_test = (side.columns(names, extra) for side in (self.fitted, self.judged))
        head = self.fit(x, method, objective)
        d, d_test = head(x[~self.valid]), head(x_test)
        if objective == "budget":  # its d is a ranking: make it the likeliest mixture
            line = Standardised(d[:, None].astype(np.float32)).fit(self.losses["marginal"], 0.0)
            d_test = line(d_test[:, None].astype(np.float32))
        return marginal_loss(*self._likelihoods(self.judged), d_test)[0], d_test

    @staticmethod
    def _likelihoods(side: Side) -> tuple[Doubles, Doubles]:
        return side.scores.base, side.scores.expert

    def show(self, name: str, objective: str, joint: float | None, d: Doubles) -> None:
        """Print a row of the table."""
        losses = hard(d, *self._likelihoods(self.judged))
        cells = [name, objective, "–" if joint is None else f"{joint:.3f}"]
        print("| " + " | ".join([*cells, *(f"{loss:.3f}" for loss in losses)]) + " |", flush=True)


def hard(d: Doubles, base: Doubles, expert: Doubles) -> list[float]:
    """Return the losses of hard decisions at the usual defer rates."""
    curve = hard_curve(d, base, expert)
    return [float(curve[round(rate * len(d))]) for rate in DEFER_RATES]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("-m", "--model")
    parser.add_argument("-me", "--model-expert")
    parser.add_argument("--data", required=True, help="JSONL to fit on")
    parser.add_argument("--test", required=True, help="JSONL to judge by")
    parser.add_argument("--work", type=Path, required=True, help="folder that keeps the scores")
    parser.add_argument("-t", "--threads", type=int, default=0)
    args = parser.parse_args()
    sides = []
    with load(args.model, args.model_expert, "margin", n_threads=args.threads) as pair:
        for name in ("data", "test"):
            documents = tokenized(read_rows(getattr(args, name)), pair)
            scores = score(pair, documents, progress, work=args.work / name)
            sides.append(Side.of(scores, documents))
    comparison = Comparison(*sides)
    judged = sides[1].scores
    oracle = np.maximum(judged.base, judged.expert)
    print(
        f"{len(sides[0].scores.base):,} tokens to fit on, {len(judged.base):,} to judge by: base "
        f"{-judged.base.mean():.3f}, expert {-judged.expert.mean():.3f}, per-token oracle "
        f"{-oracle.mean():.3f} nats per token\n"
    )
    print("| a switch on | fitted to | joint NLL | hard NLL at 0.1 | at 0.2 | at 0.3 |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    at_random = np.random.default_rng(1).random(len(judged.base))
    comparison.show("nothing: at random", "–", None, at_random)
    comparison.show("entropy", "–", None, judged.logit_features[:, 0].astype(np.float64))
    comparison.show("margin", "–", None, 1 - judged.logit_features[:, 2].astype(np.float64))
    both = FEATURE_SETS["both"]
    plan: list[tuple[str, Names, Names, Method]] = [
        *((name, names, (), linear) for name, names in FEATURE_SETS.items()),
        ("both, position", both, ("position",), linear),
        ("both, surprise of the last token", both, ("surprise",), linear),
        ("both, position, surprise", both, ("position", "surprise"), linear),
        ("both, last token deferred, how far back", both, ("last deferred", "since"), linear),
        ("both, the expert's gain on the last three", both, ("gain",), linear),
        (f"both, {HIDDEN_UNITS} hidden units", both, (), layered),
    ]
    for name, names, extra, method in plan:
        for objective in comparison.losses:
            joint, d = comparison.judge(names, extra, method, objective)
            comparison.show(name, objective, joint, d)


if __name__ == "__main__":
    main()
