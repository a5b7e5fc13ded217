"""A scoring pass: many documents of one model, evaluated together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

import numpy as np
import numpy.typing as npt

from colm_edge.llama.context import Floats
from colm_edge.llama.session import Session

Ints = npt.NDArray[np.int64]

# The logits of one batch of a scoring pass are kept under this many bytes.
SCORE_BYTES = 256 << 20
SCORE_BATCH = 512  # its tokens
# Documents that a scoring pass evaluates together.
MAX_SEQUENCES = 64


class Scorer:
    """Many documents of one model, several at a time, in a context of its own; use it in `with`.

    A batch holds as many documents as fit, each a sequence, since short documents one by one would
    leave the processor idle. The session's timeline is left alone, its account is kept.

    n_cells: how many tokens the context holds. hidden: whether the hidden states are wanted too.
    """

    def __init__(self, session: Session, n_cells: int, *, hidden: bool) -> None:
        self.model, self._hidden = session.model, hidden
        # llama.cpp wants no more sequences than a batch has tokens.
        n = max(MAX_SEQUENCES, min(SCORE_BATCH, n_cells))
        self._context = session.new_context(max(n_cells, n), n, MAX_SEQUENCES)
        self._n_outputs = min(n, max(8, SCORE_BYTES // (4 * self.model.n_vocab)))
        self._context.open()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._context.close()

    def score(
        self, tokens: npt.NDArray[np.int32], lengths: Ints, starts: Ints
    ) -> Iterator[tuple[Floats, Floats]]:
        """Evaluate documents together; yield the outputs that predict their scored tokens.

        tokens: those of all documents, one after the other. lengths, starts: (k,), k at most
        MAX_SEQUENCES, starts at least 1; the lengths' sum is at most n_cells.
        Yields (logits (n, n_vocab), hidden (n, n_embd), or (0,) where not wanted) for the next n
        of the scored tokens: views that the next step overwrites.
        """
        context = self._context
        document = np.repeat(np.arange(len(lengths)), lengths)
        begins = np.cumsum(lengths) - lengths
        position = np.arange(len(tokens)) - begins[document]
        # The state at a position predicts the token after it, so the last one is never evaluated,
        # and with embeddings on every token of a batch is an output: prompts go first, without.
        is_prompt = position < starts[document] - 1
        is_last = position == lengths[document] - 1
        context.clear()
        for rows in _in_batches(np.flatnonzero(is_prompt), context.n_batch):
            n = context.batch.put(0, tokens[rows], position[rows], document[rows])
            context.decode(n)
        for rows in _in_batches(np.flatnonzero(~is_prompt & ~is_last), self._n_outputs):
            n = context.batch.put(0, tokens[rows], position[rows], document[rows], 1)
            context.decode(n, hidden=self._hidden)
            yield context.states(n, hidden=self._hidden)


def _in_batches(rows: npt.NDArray[np.intp], most: int) -> list[npt.NDArray[np.intp]]:
    """Split into the fewest batches, of one size: a last one of a few tokens is a slow one."""
    return np.array_split(rows, -(-len(rows) // most)) if len(rows) else []
