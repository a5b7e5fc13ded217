"""Compare what a switch may read and what it is fitted to, on documents of their own.

    python tools/compare_switches.py -m BASE.gguf -me EXPERT.gguf --data FIT.jsonl \
        --test TEST.jsonl --work DIR

Heads are fitted on FIT.jsonl, four fifths of it, their regularisation chosen on the fifth, and
judged on TEST.jsonl: the mixture's likelihood, and that of hard decisions at defer rates of 0.1,
0.2 and 0.3. Beside what `colm-edge train` offers it tries what is not in the runtime: context
features and a hidden layer, so that their worth is known. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from colm_edge.cli.common import progress
from colm_edge.pair import load
from colm_edge.switch.file import FEATURE_SETS
from colm_edge.train.documents import read_rows, tokenized
from colm_edge.train.fit import L2_GRID, feature_columns
from colm_edge.train.heads import Array, Loss, Standardised, minimize
from colm_edge.train.objectives import (
    DEFER_RATES,
    budget_loss,
    hard_curve,
    marginal_loss,
    weak_loss,
)
from colm_edge.train.scoring import Scores, score

HIDDEN_UNITS = 64
LATEST = 3  # tokens whose gain a context feature looks at


def lagged(x: Array, position: np.ndarray, by: int) -> Array:
    """Return what x was so many tokens ago, 0 before the first."""
    out = np.zeros_like(x)
    out[by:] = x[:-by]
    out[position < by] = 0
    return out


def context(scores: Scores, documents) -> dict[str, Array]:
    """Return context features of every scored token, each clipped to a usual range."""
    position = np.concatenate([np.arange(len(d.tokens) - d.start) for d in documents])
    surprise = np.minimum(lagged(-scores.base, position, 1), 10)
    gain = np.clip(scores.expert - scores.base, -10, 10)
    return {
        "position": np.log1p(position.astype(np.float64)),
        "surprise": surprise,
        "gain": sum(lagged(gain, position, by) for by in range(1, LATEST + 1)),
    }


class Layer:
    """One tanh layer on standardised columns, and a linear head on it."""

    def __init__(self, columns: np.ndarray) -> None:
        self.block = Standardised(columns)
        self.k = columns.shape[1]

    def _split(self, x: Array) -> tuple[Array, Array, Array, float]:
        n = self.k * HIDDEN_UNITS
        return (x[:n].reshape(self.k, -1), x[n : n + HIDDEN_UNITS], x[n + HIDDEN_UNITS : -1],
                float(x[-1]))  # fmt: skip

    def fit(self, loss_of_d: Loss, l2: float) -> Array:
        def loss(x: Array) -> tuple[float, Array]:
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
        x = np.concatenate((rng.normal(0, 1 / np.sqrt(self.k), n), np.zeros(HIDDEN_UNITS),
                            rng.normal(0, 0.1, HIDDEN_UNITS), [0.0]))  # fmt: skip
        return minimize(loss, x, steps=300)

    def d(self, x: Array, columns: np.ndarray) -> Array:
        first, shift, second, bias = self._split(x)
        standard = (columns - self.block.mean) / self.block.scale
        return np.tanh(standard @ first + shift) @ second + bias


def linear(columns: np.ndarray, loss: Loss, l2: float) -> Callable[[np.ndarray], Array]:
    return Standardised(columns.copy()).fit(loss, l2)


def layered(columns: np.ndarray, loss: Loss, l2: float) -> Callable[[np.ndarray], Array]:
    layer = Layer(columns.copy())
    return partial(layer.d, layer.fit(loss, l2))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("-m", "--model")
    parser.add_argument("-me", "--model-expert")
    parser.add_argument("--data", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("-t", "--threads", type=int, default=0)
    args = parser.parse_args()
    sides = []
    with load(args.model, args.model_expert, "margin", n_threads=args.threads) as pair:
        for name in ("data", "test"):
            documents = tokenized(read_rows(getattr(args, name)), pair)
            scores = score(pair, documents, progress, work=args.work / name)
            sides.append((scores, context(scores, documents)))
    fitted, judged = sides[0][0], sides[1][0]
    lines = np.random.default_rng(0).permutation(np.unique(fitted.line))
    valid = np.isin(fitted.line, lines[: len(lines) // 5])
    base, expert = fitted.base, fitted.expert
    label = (fitted.expert_right & ~fitted.base_right).astype(np.float64)
    losses = {
        "weak": partial(weak_loss, label[~valid]),
        "marginal": partial(marginal_loss, base[~valid], expert[~valid]),
        "budget": partial(budget_loss, (expert - base)[~valid]),
    }

    def columns(side: int, names: tuple[str, ...], extra: tuple[str, ...]) -> np.ndarray:
        scores, more = sides[side]
        parts = [feature_columns(scores, np.arange(len(scores.base)), names)]
        return np.concatenate([*parts, *(more[e][:, None].astype(np.float32) for e in extra)], 1)

    def add_deferrals() -> None:
        """Note, by a first head at a defer rate of 0.2, whether the last token was deferred and how
        long ago the latest deferral was."""
        x = columns(0, FEATURE_SETS["both"], ())
        first = linear(x[~valid], losses["budget"], L2_GRID[-1])
        at = float(np.quantile(first(x[valid]), 0.8))
        for side, (_, more) in enumerate(sides):
            deferred = first(columns(side, FEATURE_SETS["both"], ())) > at
            since = np.zeros(len(deferred))
            for i in range(1, len(since)):
                begun = more["position"][i] == 0
                since[i] = (
                    0 if begun else 1 if deferred[i - 1] else since[i - 1] + (since[i - 1] > 0)
                )
            more["last deferred"] = (since == 1).astype(np.float64)
            more["since"] = np.where(since > 0, 1 / np.maximum(since, 1), 0)

    def hard(d: Array, rows_base: Array, rows_expert: Array) -> list[float]:
        curve = hard_curve(d, rows_base, rows_expert)
        return [float(curve[round(rate * len(d))]) for rate in DEFER_RATES]

    def show(name: str, objective: str, joint: float | None, d: Array) -> None:
        cells = "".join(f" {value:.3f} |" for value in hard(d, judged.base, judged.expert))
        print(f"| {name} | {objective} | {'–' if joint is None else f'{joint:.3f}'} |{cells}",
              flush=True)  # fmt: skip

    oracle = np.maximum(judged.base, judged.expert)
    print(
        f"{len(base):,} tokens to fit on, {len(judged.base):,} to judge by: base "
        f"{-judged.base.mean():.3f}, expert {-judged.expert.mean():.3f}, per-token oracle "
        f"{-oracle.mean():.3f} nats per token\n"
    )
    print("| a switch on | fitted to | joint NLL | hard NLL at 0.1 | at 0.2 | at 0.3 |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    show("nothing: at random", "–", None, np.random.default_rng(1).random(len(judged.base)))
    show("entropy", "–", None, judged.logit_features[:, 0].astype(np.float64))
    show("margin", "–", None, 1 - judged.logit_features[:, 2].astype(np.float64))
    add_deferrals()
    plan = [(name, names, (), linear) for name, names in FEATURE_SETS.items()]
    both = FEATURE_SETS["both"]
    plan += [
        ("both, position", both, ("position",), linear),
        ("both, surprise of the last token", both, ("surprise",), linear),
        ("both, position, surprise", both, ("position", "surprise"), linear),
        ("both, last token deferred, how far back", both, ("last deferred", "since"), linear),
        ("both, the expert's gain on the last three", both, ("gain",), linear),
        (f"both, {HIDDEN_UNITS} hidden units", both, (), layered),
    ]
    for name, names, extra, method in plan:
        x, x_test = columns(0, names, extra), columns(1, names, extra)
        for objective, loss in losses.items():
            found = []
            for l2 in L2_GRID:
                head = method(x[~valid], loss, l2)
                d = head(x[valid])
                joint = marginal_loss(base[valid], expert[valid], d)[0]
                rank = float(np.mean(hard(d, base[valid], expert[valid])))
                found.append((joint if objective == "marginal" else rank, head))
            head = min(found, key=lambda entry: entry[0])[1]
            d, d_test = head(x[~valid]), head(x_test)
            if objective == "budget":  # its d is a ranking: make it the likeliest mixture
                line = Standardised(d[:, None].astype(np.float32)).fit(losses["marginal"], 0.0)
                d_test = line(d_test[:, None].astype(np.float32))
            joint = marginal_loss(judged.base, judged.expert, d_test)[0]
            show(name, objective, joint, d_test)


if __name__ == "__main__":
    main()
