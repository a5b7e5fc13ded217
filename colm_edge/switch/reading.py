"""What every switch has in common: it reads the base's state and returns p_defer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import numpy as np

from colm_edge import readout
from colm_edge.arrays import Doubles, Floats
from colm_edge.errors import MismatchError

# (logits (n_vocab,), hidden (n_embd,)) -> p_defer, likeliest base token, log-sum-exp of the logits,
# and which expert would write the token: the likeliest one, 0 where there is one
Reader = Callable[[Floats, Floats], tuple[float, int, float, int]]
HIDDEN = "hidden"  # stands for the n_embd columns of the last hidden state
N_LOGIT = len(readout.FEATURES)


class Base(Protocol):
    """What a switch asks of the base: a Model, or anything of its shape."""

    @property
    def n_embd(self) -> int: ...
    def token_id(self, text: str) -> int | None: ...


class AnySwitch(Protocol):
    """A switch; `load_switch` knows the kinds that a user can name.

    name: as in messages; of a file, its path. threshold: p_defer above it defers, where nothing
    else is asked for. needs_hidden: whether the reader looks at the hidden state.
    """

    @property
    def name(self) -> str: ...
    @property
    def threshold(self) -> float: ...
    @property
    def needs_hidden(self) -> bool: ...

    def reader(self, base: Base, n_choose: int) -> Reader:
        """Return the function that reads p_defer off a base's state; its likeliest token is the
        one of the ids below n_choose. Raises MismatchError when the base does not fit."""
        ...


@runtime_checkable
class FeatureSwitch(AnySwitch, Protocol):
    """A switch that can be read off the kept features of many tokens, as evaluation does."""

    def p_defer(self, logit_features: Floats, hidden: Floats | None) -> Doubles:
        """Return p_defer of each token, (n,).

        logit_features: (n, 8), readout.FEATURES. hidden: (n, n_embd); may be None where the switch
        does not need it.
        """
        ...


def sigmoid(d: float) -> float:
    """Return σ(d), without overflow for any d."""
    if d >= 0:
        return 1.0 / (1.0 + math.exp(-d))
    e = math.exp(d) if d > -700 else 0.0
    return e / (1.0 + e)


def sigmoids(d: Doubles) -> Doubles:
    """Return σ of every number of an array, without overflow."""
    return np.asarray(np.exp(-np.logaddexp(0, -d)), np.float64)


def log_shares(d: Doubles) -> Doubles:
    """Return the logarithms of the shares of the base and of each expert, the softmax of (0, d),
    (n, 1 + n_experts), from d, (n, n_experts)."""
    logits = np.column_stack([np.zeros(len(d)), d])
    return np.asarray(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True), np.float64)


def check_width(name: str, n_embd: int, base: Base) -> None:
    """Raise MismatchError when a switch reads a hidden state of another width than the base's."""
    if n_embd != base.n_embd:
        raise MismatchError(
            f"{name} reads a hidden state of {n_embd} numbers, the base has {base.n_embd}; use the "
            "base that the switch was trained for"
        )
