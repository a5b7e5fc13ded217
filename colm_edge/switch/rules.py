"""Switches without a file: untrained rules, and the defer row in a Co-LLM base's vocabulary."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from colm_edge import readout
from colm_edge.arrays import Doubles, Floats
from colm_edge.errors import MismatchError
from colm_edge.switch.reading import N_LOGIT, Base, Reader, sigmoid

DEFER_TOKEN = "<|defer|>"  # the token Co-LLM's training adds; its output row is the switch
# The share of tokens that is deferred where nobody says how many, by a rule that was not fitted to
# the pair: its p_defer says which tokens come first, not how much they would gain.
DEFAULT_RATE = 0.2
# p_defer as a function of the logit feature that the rule is named after: of one number with the
# functions of `math`, of an array with numpy's.
RULES: dict[str, Callable[[Any, ModuleType], Any]] = {
    "margin": lambda margin, maths: 1.0 - margin,  # margin: p1 − p2, of the two likeliest tokens
    "entropy": lambda entropy, maths: -maths.expm1(-entropy),  # 1 − exp(−H), H in nats
}


@dataclass(frozen=True)
class Untrained:
    """A switch that needs no training: one of RULES on the base's uncertainty."""

    name: str
    threshold: float = 0.5
    needs_hidden: bool = False

    def reader(self, base: Base, n_choose: int) -> Reader:
        out = np.empty(N_LOGIT, np.float32)
        rule, column = RULES[self.name], readout.FEATURES.index(self.name)

        def read(logits: Floats, hidden: Floats) -> tuple[float, int, float, int]:
            choice, logsumexp = readout.read_alone(logits, out, n_choose)
            return rule(float(out[column]), math), choice, logsumexp, 0

        return read

    def p_defer(self, logit_features: Floats, hidden: Floats | None) -> Doubles:
        column = logit_features[:, readout.FEATURES.index(self.name)]
        return np.asarray(RULES[self.name](column.astype(np.float64), np))


@dataclass(frozen=True)
class Only:
    """One of several experts writes every token, by its place among them."""

    expert: int
    threshold: float = 0.0
    needs_hidden: bool = False

    @property
    def name(self) -> str:
        return f"only-{self.expert}"

    def reader(self, base: Base, n_choose: int) -> Reader:
        out = np.empty(N_LOGIT, np.float32)

        def read(logits: Floats, hidden: Floats) -> tuple[float, int, float, int]:
            choice, logsumexp = readout.read_alone(logits, out, n_choose)
            return 1.0, choice, logsumexp, self.expert

        return read


@dataclass(frozen=True)
class DeferRow:
    """The row for <|defer|> in the base's own vocabulary: p_defer = σ(its logit)."""

    name: str = "defer-row"
    threshold: float = 0.5
    needs_hidden: bool = False

    def reader(self, base: Base, n_choose: int) -> Reader:
        row = base.token_id(DEFER_TOKEN)
        if row is None:
            raise MismatchError(f"the base's vocabulary has no token {DEFER_TOKEN}")
        out = np.empty(N_LOGIT + 1, np.float32)

        def read(logits: Floats, hidden: Floats) -> tuple[float, int, float, int]:
            choice, logsumexp = readout.read_alone(logits, out, n_choose, row)
            return sigmoid(float(out[N_LOGIT])), choice, logsumexp, 0

        return read
