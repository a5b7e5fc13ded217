"""Kinds of arrays, named by what they hold."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]  # what models and switches compute in: logits, hidden states
Doubles = npt.NDArray[np.float64]  # what is summed or fitted: log-probabilities, losses
Tokens = npt.NDArray[np.int32]
Ints = npt.NDArray[np.int64]  # counts, indices
Bools = npt.NDArray[np.bool_]
