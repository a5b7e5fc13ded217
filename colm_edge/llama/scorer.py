"""A scoring pass: evaluate many documents with one model, several per batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

import numpy as np
import numpy.typing as npt

from colm_edge.arrays import Floats, Ints, Tokens
from colm_edge.llama.session import Session

SCORE_BYTES = 256 << 20  # the most bytes of a batch's logits
SCORE_BATCH = 512  # the tokens of a batch
MAX_SEQUENCES = 64  # the documents that are evaluated together


class Scorer:
    """Evaluates documents in a context of its own; use it in `with`.

    A batch has as many documents as fit, one sequence each: one short document at a time would
    leave the processor idle. The session's timeline does not change; its account counts the tokens.

    n_cells: how many tokens the context holds. hidden: whether to return hidden states as well.
    """

    def __init__(self, session: Session, n_cells: int, *, hidden: bool) -> None:
        self.model, self._hidden = session.model, hidden
        # llama.cpp allows at most as many sequences as a batch has tokens.
        n = max(MAX_SEQUENCES, min(SCORE_BATCH, n_cells))
        self._context = session.new_context(max(n_cells, n), n, MAX_SEQUENCES)
        self._n_outputs = min(n, max(8, SCORE_BYTES // (4 * self.model.n_vocab)))
        self._context.open()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._context.close()

    def score(self, tokens: Tokens, lengths: Ints, starts: Ints) -> Iterator[tuple[Floats, Floats]]:
        """Evaluate documents together; yield the states that predict their scored tokens.

        tokens: the tokens of all documents, concatenated. lengths: (k,), k at most MAX_SEQUENCES,
        their sum at most n_cells. starts: (k,), the first scored token of each, at least 1.
        Yields (logits (n, n_vocab), hidden (n, n_embd) or (0,)) for the next n of the scored
        tokens: views that the next step overwrites.
        """
        context = self._context
        document = np.repeat(np.arange(len(lengths)), lengths)
        begins = np.cumsum(lengths) - lengths
        position = np.arange(len(tokens)) - begins[document]
        # The state at a position predicts the token after it, so the last token is not evaluated.
        # With embeddings on, every token of a batch is an output, so prompts go first, without.
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
    """Split into the fewest batches, all of about one size: a small last one would be slow."""
    return np.array_split(rows, -(-len(rows) // most)) if len(rows) else []
