"""Linear heads on a base's state: d = columns · weight + bias, the logit of p_defer; and their fit
to any loss of d."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from colm_edge.arrays import Doubles, Floats
from colm_edge.errors import ColmError

# A point -> the loss there and its gradient.
Loss = Callable[[Doubles], tuple[float, Doubles]]
Bounds = list[tuple[float | None, float | None]]
CHUNK_ROWS = 1 << 12  # of columns that are copied at once, beside those that are kept
LEAST_SLOPE = 1e-3  # of a head that is rescaled


def check_fit() -> None:
    """Raise ColmError now, rather than after an hour of scoring, when nothing can be fitted."""
    try:
        from scipy import optimize  # noqa: F401
    except ImportError as e:
        raise ColmError(
            "fitting a switch needs scipy; install the extra: pip install 'colm-edge[train]'"
        ) from e


def minimize(loss: Loss, x: Doubles, *, steps: int = 200, bounds: Bounds | None = None) -> Doubles:
    """Return the minimum of a smooth function from x on, by L-BFGS. bounds: of each number.

    Stops where a step no longer lowers the loss by a relative 1e-9. Nothing to tune.
    """
    from scipy import optimize

    options = {"maxiter": steps, "ftol": 1e-9, "gtol": 0.0}
    found = optimize.minimize(loss, x, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    return np.asarray(found.x, np.float64)


@dataclass(frozen=True)
class Head:
    """A linear head on raw (not standardised) columns: d = columns · weight + bias."""

    weight: Doubles
    bias: float

    def __call__(self, columns: Floats) -> Doubles:
        return np.asarray(columns @ self.weight.astype(np.float32), np.float64) + self.bias


class Standardised:
    """Columns (n, k) in units of their deviation about their mean; the given array is changed."""

    def __init__(self, columns: Floats) -> None:
        chunks = [slice(at, at + CHUNK_ROWS) for at in range(0, len(columns), CHUNK_ROWS)]
        total = sum(columns[rows].sum(axis=0, dtype=np.float64) for rows in chunks)
        self.mean: Doubles = np.asarray(total, np.float64) / len(columns)
        spread = sum(((columns[rows] - self.mean) ** 2).sum(axis=0) for rows in chunks)
        deviation = np.sqrt(np.asarray(spread, np.float64) / len(columns))
        self.scale: Doubles = np.maximum(deviation, 1e-6)
        for rows in chunks:
            columns[rows] = (columns[rows] - self.mean) / self.scale
        self.columns = columns

    def fit(
        self, loss_of_d: Loss, l2: float, start: Head | None = None, prior: Head | None = None
    ) -> Head:
        """Fit a head under a loss of d (n,), with l2 · |weight − prior's|² in the standard units.

        prior: the head that a strong l2 holds it to; none stands for zeros. The units are folded
        into the weights that come back.
        """
        centre = self.standard(prior)[:-1]

        def loss(x: Doubles) -> tuple[float, Doubles]:
            weight, bias = x[:-1], x[-1]
            d = np.asarray(self.columns @ weight.astype(np.float32), np.float64) + bias
            value, by_d = loss_of_d(d)
            by_weight = np.asarray(by_d.astype(np.float32) @ self.columns, np.float64)
            off = weight - centre
            by_weight += 2 * l2 * off
            return value + l2 * float(off @ off), np.append(by_weight, by_d.sum())

        return self.raw(minimize(loss, self.standard(start or prior)))

    def raw(self, x: Doubles) -> Head:
        """Return the head of weights and a bias in the standard units, (k + 1,)."""
        weight = x[:-1] / self.scale
        return Head(weight, float(x[-1] - self.mean @ weight))

    def standard(self, head: Head | None) -> Doubles:
        """Return a head's weights and its bias in the standard units, (k + 1,)."""
        if head is None:
            return np.zeros(self.columns.shape[1] + 1)
        return np.append(head.weight * self.scale, head.bias + float(self.mean @ head.weight))

    def d(self, head: Head) -> Doubles:
        """Return d of these columns, (n,)."""
        d = np.asarray(self.columns @ (head.weight * self.scale).astype(np.float32), np.float64)
        return d + head.bias + float(self.mean @ head.weight)

    def rescaled(self, head: Head, loss_of_d: Loss, l2: float) -> Head:
        """Return the head with the lowest loss that ranks these tokens as `head` does: its slope
        stays above 0, though the likeliest mixture may not rise with what decides well.

        Platt scaling (1999) by any loss of d (n,), regularised as in `fit`.
        """
        d = self.d(head)
        penalty = l2 * float(((head.weight * self.scale) ** 2).sum())

        def loss(x: Doubles) -> tuple[float, Doubles]:
            value, by_d = loss_of_d(x[0] * d + x[1])
            gradient = np.array([by_d @ d + 2 * penalty * x[0], by_d.sum()])
            return value + penalty * x[0] ** 2, gradient

        line = minimize(loss, np.array([1.0, 0.0]), bounds=[(LEAST_SLOPE, None), (None, None)])
        return Head(head.weight * line[0], head.bias * line[0] + line[1])
