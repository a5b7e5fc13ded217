"""What both models said of every scored token: what a switch is fitted to and judged by."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from colm_edge.arrays import Bools, Doubles, Floats, Ints, Tokens


@dataclass
class Scores:
    """What both models said of every scored token, one row each."""

    hidden: Floats  # (n, n_embd)
    logit_features: Floats  # (n, 8)
    base: Doubles  # log-probability of the gold token, nats
    expert: Doubles
    best: Doubles  # log-probability of the expert's own likeliest token, by the expert
    choice: Doubles  # of the base's likeliest token, by the expert; NaN where a server is silent
    likeliest: Tokens  # the base's token
    expert_right: Bools  # the gold token is the expert's likeliest
    token: Tokens  # the gold token
    line: Ints
    importance: Doubles  # how many times what the expert regrets counts

    @property
    def tells_regret(self) -> bool:
        """Whether the regret is known: a server's expert does not tell it."""
        return len(self.choice) > 0 and not np.isnan(self.choice[0])

    @property
    def base_right(self) -> Bools:
        """Whether the gold token is the base's likeliest, (n,)."""
        return np.asarray(self.likeliest == self.token, np.bool_)

    def regret(self, rows: Ints) -> Doubles:
        """Return the nats by which the expert prefers its likeliest token to the base's, 0 or more,
        (n,)."""
        return np.maximum(self.best[rows] - self.choice[rows], 0.0)

    def weighed_regret(self, rows: Ints) -> Doubles:
        """Return the regret times the importance, (n,): what a switch is fitted to."""
        return self.regret(rows) * self.importance[rows]
