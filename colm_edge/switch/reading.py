"""What every switch has in common: it reads the base's state and returns p_defer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from colm_edge import readout

Floats = npt.NDArray[np.float32]
# (logits (n_vocab,), hidden (n_embd,)) -> p_defer, likeliest base token, log-sum-exp of the logits
Reader = Callable[[Floats, Floats], tuple[float, int, float]]
HIDDEN = "hidden"  # stands for the n_embd columns of the last hidden state
N_LOGIT = len(readout.FEATURES)


def sigmoid(d: float) -> float:
    """Return σ(d), without overflow for any d."""
    if d >= 0:
        return 1.0 / (1.0 + math.exp(-d))
    e = math.exp(d) if d > -700 else 0.0
    return e / (1.0 + e)


class Base(Protocol):
    """What a switch asks of the base: a Model, or anything of its shape."""

    @property
    def n_embd(self) -> int: ...
    def token_id(self, text: str) -> int | None: ...
