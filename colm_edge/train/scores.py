"""What both models said of every scored token: what a switch is fitted to and judged by."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


@dataclass
class Scores:
    """What both models said of every scored token, one row each."""

    hidden: npt.NDArray[np.float32]  # (n, n_embd)
    logit_features: npt.NDArray[np.float32]  # (n, 8)
    base: Array  # log-probability of the gold token, nats
    expert: Array
    best: Array  # log-probability of the expert's own likeliest token, by the expert
    choice: Array  # of the base's likeliest token, by the expert; NaN where a server does not tell
    likeliest: npt.NDArray[np.int32]  # the base's token
    expert_right: npt.NDArray[np.bool_]  # the gold token is the expert's likeliest
    token: npt.NDArray[np.int32]  # the gold token
    line: npt.NDArray[np.int64]
    importance: Array  # how many times what the expert regrets counts

    @property
    def tells_regret(self) -> bool:
        """Whether the regret is known: a server's expert does not tell it."""
        return len(self.choice) > 0 and not np.isnan(self.choice[0])

    @property
    def base_right(self) -> npt.NDArray[np.bool_]:
        """Whether the gold token is the base's likeliest, (n,)."""
        return np.asarray(self.likeliest == self.token, np.bool_)

    def regret(self, rows: npt.NDArray[np.int64]) -> Array:
        """Return the nats by which the expert prefers its likeliest token to the base's, 0 or more,
        (n,)."""
        return np.maximum(self.best[rows] - self.choice[rows], 0.0)

    def weighed_regret(self, rows: npt.NDArray[np.int64]) -> Array:
        """Return the regret times the importance, (n,): what a switch is fitted to."""
        return self.regret(rows) * self.importance[rows]
