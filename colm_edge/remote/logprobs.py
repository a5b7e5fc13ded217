"""What a server says of the likelihood of tokens, checked, and as logits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np

from colm_edge.arrays import Floats


def logits_of(top: Mapping[int, float], n_vocab: int) -> Floats:
    """Return log-probabilities (n_vocab,): those given; the others share the rest evenly.

    Raises ValueError as `likely` does.
    """
    known = likely(top, n_vocab)
    left = 1 - math.fsum(math.exp(x) for x in known.values())
    n_others = n_vocab - len(known)
    # Sums of rounded numbers are off by about 1e-6, so less than that is nothing.
    rest = math.log(left / n_others) if left > 1e-6 and n_others else -math.inf
    logits = np.full(n_vocab, rest, np.float32)
    logits[list(known)] = list(known.values())
    return logits


def likely(top: Mapping[int, float], n_vocab: int) -> dict[int, float]:
    """Return the log-probabilities of the ids that the vocabulary has.

    Raises ValueError where that is nothing, or not log-probabilities.
    """
    known = {token: x for token, x in top.items() if 0 <= token < n_vocab}
    if not known:
        raise ValueError(f"it tells of no token below {n_vocab}")
    check_logprobs(known.values())
    return known


def check_logprobs(values: Iterable[float]) -> None:
    """Raise ValueError for what is not a log-probability."""
    for x in values:
        if math.isnan(x) or x > 1e-3:  # rounded numbers are off by less
            raise ValueError(f"{x} is not a log-probability")
