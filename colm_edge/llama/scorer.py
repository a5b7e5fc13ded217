"""A scoring pass: many documents of one model, evaluated together."""

from __future__ import annotations

from collections.abc import Iterator
from time import perf_counter
from typing import Any, Self

import llama_cpp as llama
import numpy as np
import numpy.typing as npt

from colm_edge.llama.context import Batch
from colm_edge.llama.session import Session

Floats = npt.NDArray[np.float32]
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
        self.model, self._session, self._hidden = session.model, session, hidden
        # llama.cpp wants no more sequences than a batch has tokens.
        n = self._n_batch = max(MAX_SEQUENCES, min(SCORE_BATCH, n_cells))
        self._context = session.new_context(max(n_cells, n), n, MAX_SEQUENCES)
        self._memory = llama.llama_get_memory(self._context)
        self._n_outputs = min(n, max(8, SCORE_BYTES // (4 * self.model.n_vocab)))
        self._batch = Batch(n)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        llama.llama_free(self._context)
        self._context = self._memory = None

    def score(
        self, tokens: npt.NDArray[np.int32], lengths: Ints, starts: Ints
    ) -> Iterator[tuple[Floats, Floats]]:
        """Evaluate documents together; yield the outputs that predict their scored tokens.

        tokens: those of all documents, one after the other. lengths, starts: (k,), k at most
        MAX_SEQUENCES, starts at least 1; the lengths' sum is at most n_cells.
        Yields (logits (n, n_vocab), hidden (n, n_embd), or (0,) where not wanted) for the next n
        of the scored tokens: views that the next step overwrites.
        """
        document = np.repeat(np.arange(len(lengths)), lengths)
        begins = np.cumsum(lengths) - lengths
        position = np.arange(len(tokens)) - begins[document]
        # The state at a position predicts the token after it, so the last one is never evaluated,
        # and with embeddings on every token of a batch is an output: prompts go first, without.
        is_prompt = position < starts[document] - 1
        is_last = position == lengths[document] - 1
        where = (tokens, position, document)
        llama.llama_memory_clear(self._memory, False)
        llama.llama_set_embeddings(self._context, False)
        prompts = np.flatnonzero(is_prompt)
        for chosen in _in_batches(prompts, self._n_batch):
            self._decode(where, chosen, 0)
        llama.llama_set_embeddings(self._context, self._hidden)
        scored = np.flatnonzero(~is_prompt & ~is_last)
        for chosen in _in_batches(scored, self._n_outputs):
            self._decode(where, chosen, 1)
            yield self._outputs(len(chosen))

    def _decode(
        self, where: tuple[npt.NDArray[Any], ...], chosen: npt.NDArray[np.intp], output: int
    ) -> None:
        n, batch = len(chosen), self._batch
        fields = (batch.token, batch.position, batch.sequence)
        for field, values in zip(fields, where, strict=True):
            field[:n] = values[chosen]
        batch.output[:n] = output
        self._session.decode_batch(self._context, batch.head(n))

    def _outputs(self, n: int) -> tuple[Floats, Floats]:
        begun = perf_counter()
        logits = llama.llama_get_logits(self._context)  # waits for a GPU
        self._session.seconds += perf_counter() - begun
        hidden = np.empty(0, np.float32)
        if self._hidden:
            embeddings = llama.llama_get_embeddings(self._context)
            hidden = np.ctypeslib.as_array(embeddings, (n, self.model.n_embd))
        return np.ctypeslib.as_array(logits, (n, self.model.n_vocab)), hidden


def _in_batches(values: npt.NDArray[np.intp], most: int) -> list[npt.NDArray[np.intp]]:
    """Split into the fewest batches, of one size: a last one of a few tokens is a slow one."""
    return np.array_split(values, -(-len(values) // most)) if len(values) else []
