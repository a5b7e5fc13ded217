"""Columns of scores, one row for each scored token, and what they may hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Columns = dict[str, npt.NDArray[Any]]
LOGPROBS = ("logprob", "best", "choice")
STATES = ("hidden", "features")
CHECK_ROWS = 1 << 14
# The bounds of what is believed, in nats and in a model's own units; a probability may be rounded.
LEAST_NATS, ROUNDING, LARGEST = -1e6, 1e-4, 1e9


def check_columns(columns: Columns, n_choose: int | None = None) -> None:
    """Raise ValueError for what no model says, and what would spoil a fit: NaN, infinities,
    likelihoods above 1, invalid tokens.

    n_choose: the size of the vocabulary that the base chooses from, if its choices are checked.
    """
    for name in LOGPROBS:
        if name in columns and not (name != "logprob" and _untold(columns[name])):
            _check_range(name, columns[name], LEAST_NATS, ROUNDING)
    for name in STATES:
        if name in columns:
            _check_range(name, columns[name], -LARGEST, LARGEST)
    if "likeliest" in columns and n_choose is not None:
        _check_range("likeliest", columns["likeliest"], 0, n_choose - 1)
    if "right" in columns:
        _check_range("right", columns["right"].view(np.uint8), 0, 1)


def _untold(values: npt.NDArray[Any]) -> bool:
    """Whether they are what a server does not tell: NaN throughout."""
    return bool(np.isnan(values).all())


def _check_range(name: str, values: npt.NDArray[Any], low: float, high: float) -> None:
    for at in range(0, len(values), CHECK_ROWS):
        rows = values[at : at + CHECK_ROWS]
        inside = (rows >= low) & (rows <= high)  # NaN is neither
        if not inside.all():
            raise ValueError(
                f"{name} holds {rows[~inside][0]}, expected numbers from {low:g} to {high:g}"
            )
