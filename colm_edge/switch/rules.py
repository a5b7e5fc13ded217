"""Switches without a file: untrained rules, and a Co-LLM base's own defer row."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from colm_edge import readout
from colm_edge.errors import MismatchError, SwitchError
from colm_edge.switch.reading import N_LOGIT, Base, Floats, Reader, sigmoid

DEFER_TOKEN = "<|defer|>"  # the token Co-LLM's training adds; its output row is the switch


@dataclass(frozen=True)
class Untrained:
    """A switch that nobody trained, read off the base's uncertainty.

    margin: p_defer = 1 − (p1 − p2), of the two likeliest tokens.
    entropy: p_defer = 1 − exp(−H), H in nats.
    """

    name: str
    threshold: float = 0.5
    needs_hidden: bool = False

    def reader(self, base: Base, n_choose: int) -> Reader:
        out = np.empty(N_LOGIT, np.float32)
        read_native = readout.read
        column = readout.FEATURES.index(self.name)
        by_entropy = self.name == "entropy"

        def read(logits: Floats, hidden: Floats) -> tuple[float, int, float]:
            choice, logsumexp = read_native(logits, None, None, None, None, out, n_choose, -1)
            value = float(out[column])
            return -math.expm1(-value) if by_entropy else 1.0 - value, choice, logsumexp

        return read

    def threshold_for(self, defer_rate: float) -> float:
        raise SwitchError(f"the untrained {self.name} switch has no calibration; give --threshold")


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
        read_native = readout.read

        def read(logits: Floats, hidden: Floats) -> tuple[float, int, float]:
            choice, logsumexp = read_native(logits, None, None, None, None, out, n_choose, row)
            return sigmoid(float(out[N_LOGIT])), choice, logsumexp

        return read

    def threshold_for(self, defer_rate: float) -> float:
        raise SwitchError("the defer row has no calibration for defer rates; give --threshold")
