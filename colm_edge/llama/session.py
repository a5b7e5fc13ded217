"""Session: one timeline of one model, as token ids.

The caller passes the whole token prefix to `sync`. The session decides what to keep, roll back and
evaluate, and in which batches.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from colm_edge.arrays import Floats, Tokens
from colm_edge.cancel import Cancel
from colm_edge.errors import ModelError, PromptError
from colm_edge.llama.account import Account
from colm_edge.llama.context import Bytes, Context, ContextOptions
from colm_edge.llama.costs import CostTable
from colm_edge.llama.held import Held, Int32s
from colm_edge.llama.model import Model


class Snapshot(NamedTuple):
    """Tokens (n,), how they were evaluated (stretches, 3), and llama.cpp's state after them."""

    tokens: Tokens
    stretches: Int32s
    state: Bytes


def check_outputs(n_outputs: int, n_batch: int) -> None:
    """Raise ValueError for more outputs than a batch has tokens: their states are read together."""
    if n_outputs > n_batch:
        raise ValueError(f"{n_outputs} outputs, but a batch of at most {n_batch}")


class Chunk(NamedTuple):
    """Tokens start to end of a prefix, evaluated in one batch that is padded to `size`."""

    start: int
    end: int
    size: int


class Session:
    """One timeline of a model. The first `sync` reads the weights and creates the context.

    hidden: whether `state` returns the hidden state as well as the logits.
    costs: what decodes cost here; if set, batches are cut or padded to the cheapest sizes.
    progress: called with the share that is done of a `sync` longer than one batch.
    """

    def __init__(self, model: Model, options: ContextOptions, *, hidden: bool = False) -> None:
        self.model, self.options = model, options
        self.n_ctx = options.n_ctx
        self.account = Account()
        self.costs: CostTable | None = None
        self.progress: Callable[[float], None] | None = None
        self.wants_hidden = hidden
        self._context = self.new_context(self.n_ctx, self.n_batch)
        self._positions: npt.NDArray[np.int32]  # 0, 1, 2 …
        self._held = Held(self.block)
        self._prompt = array("i")  # the last one that it was turned to
        self._torn = False  # a decode was interrupted: the cache may hold more than it says
        self._first_output = 0  # from this token on the states of the last batch can be read
        self._fresh = False  # llama.cpp's outputs belong to the last of these tokens
        self._first = 0  # the position of the first token of the last decode
        self._saved: Snapshot | None = None  # restored when the context is created

    @property
    def created(self) -> bool:
        """Whether the context exists and so takes memory."""
        return self._context.created

    @property
    def n_batch(self) -> int:
        """The most tokens of one decode."""
        return min(self.options.n_batch, self.n_ctx)

    @property
    def n_threads(self) -> int:
        """The threads that evaluate."""
        return self.options.n_threads_of(self.model)

    @property
    def crowded(self) -> bool:
        """Whether other programs wanted the threads' cores at some decode."""
        return self._context.crowded

    @property
    def n_ubatch(self) -> int:
        """The most tokens that llama.cpp evaluates at a time."""
        return self.options.n_ubatch_of(self.model)

    @property
    def block(self) -> int:
        """The tokens of a prompt that are evaluated at a time, wherever it begins."""
        return min(self.n_ubatch, self.n_batch)

    @property
    def flash_attn(self) -> Literal["auto", "on", "off"]:
        """Whether flash attention is used."""
        return self.options.flash_attn_of(self.model)

    # What every kind of expert tells of its model.

    @property
    def name(self) -> str:
        """The path of the model's file."""
        return str(self.model.path)

    @property
    def fingerprint(self) -> str:
        """A hash that identifies the model."""
        return self.model.fingerprint

    @property
    def end_tokens(self) -> frozenset[int]:
        """Every token of the model that ends a generation."""
        return self.model.end_tokens

    def want_hidden(self, wanted: bool) -> bool:
        """Set whether `state` returns the hidden state too; return the previous setting."""
        before, self.wants_hidden = self.wants_hidden, wanted
        if wanted and not before:
            self._fresh = False  # evaluate the last token again, for its hidden state
        return before

    def open(self, cancel: Cancel | None = None) -> None:
        """Read the weights and create the context now instead of at the first `sync`."""
        if self._context.created:
            return
        self._context.open(cancel)
        self._positions = np.arange(self.n_ctx, dtype=np.int32)
        saved, self._saved = self._saved, None
        if saved is not None:
            self._restore(saved)
        self.turn_to(self._prompt)

    def new_context(self, n_ctx: int, n_batch: int, n_sequences: int = 1) -> Context:
        """Return another context of the same model and settings, which shares the account."""
        return Context(self.model, self.options, n_ctx, n_batch, n_sequences, self.account)

    @contextmanager
    def twin(self, n_ctx: int) -> Iterator[Session]:
        """Yield another session of the same model and settings; close it at the end."""
        options = replace(self.options, n_ctx=n_ctx, n_batch=min(self.n_batch, n_ctx))
        twin = Session(self.model, options, hidden=self.wants_hidden)
        try:
            yield twin
        finally:
            twin.close()

    def forget(self) -> None:
        """Empty the KV cache, so that the next `sync` evaluates every token."""
        self._saved = None
        if self._context.created:
            self._drop(0)

    def turn_to(self, prompt: array[int]) -> None:
        """Begin an answer to these tokens: drop what they would not be evaluated into afresh.

        Then an answer does not depend on what was asked before. If the prompt goes on from an
        answer that is held, that is kept as it was written.
        """
        self._prompt = prompt
        if not prompt or not self._context.created:
            return  # `open` does it
        n_held, keep = len(self._held.tokens), self._held.turn_to(prompt)
        if keep < n_held or self._torn:
            self._drop(keep)

    def follow(self, tokens: array[int]) -> None:
        """Do nothing: a session catches up at its next `sync`. `Background` does it earlier."""

    def sync(
        self, tokens: Sequence[int], outputs: Sequence[int] = (), cancel: Cancel | None = None
    ) -> int:
        """Make this timeline equal to `tokens`; return the number of tokens evaluated.

        Keeps the common prefix, rolls back what differs, and evaluates the rest in batches. Where
        the last batch told the state after these tokens, what it has after them is kept too. Then
        `state` returns logits (n_vocab,) and, if wanted, the hidden state (n_embd,): views on
        llama.cpp's memory, valid until the next call.

        outputs: rising positions of the tokens whose states are needed; the last one must be the
            last token's. They are evaluated in one batch. By default the last token only.
        cancel: ends the load of the weights, or a `sync` of several batches between two of them.

        Raises PromptError when the tokens do not fit the context.
        """
        n = len(tokens)
        if not n:
            raise PromptError("nothing to evaluate: the prompt has no tokens")
        if n > self.n_ctx:
            raise PromptError(f"{n} tokens do not fit the context of {self.n_ctx} (-c sets it)")
        if not self._context.created:
            self.open(cancel)
        if not isinstance(tokens, array):
            tokens = array("i", tokens)
        held = self._held.tokens
        if len(held) == n - 1 and held == tokens[:-1] and not outputs and not self._torn:
            return self._append(tokens[-1])
        keep, outputs = self.n_known(tokens), outputs or (n - 1,)
        if keep == n and self._tells(n) and self._first_output <= outputs[0]:
            return 0
        keep = min(keep, outputs[0])
        if keep < len(held) or self._torn:
            self._drop(keep)
        return self._evaluate(tokens, keep, outputs, cancel)

    def knows(self, tokens: array[int]) -> bool:
        """Return whether `sync` of these tokens has nothing to evaluate, because the last batch
        told the state after them."""
        n = len(tokens)
        return self._tells(n) and self._held.tokens[:n] == tokens

    def _tells(self, n: int) -> bool:
        """Return whether the last batch told the state after the first n tokens."""
        return self._first_output < n <= len(self._held.tokens) and self._fresh and not self._torn

    def _append(self, token: int) -> int:
        """Evaluate one more token: the most common case of `sync`, with little Python."""
        context, at = self._context, len(self._held.tokens)
        batch = context.batch
        self._torn, self._fresh = True, False
        batch.token[0], batch.position[0], batch.output[0] = token, at, 1
        context.decode(1, hidden=self.wants_hidden)
        self._first = self._first_output = at
        self._held.tokens.append(token)
        self._torn, self._fresh = False, True
        return 1

    def _evaluate(
        self, tokens: array[int], keep: int, outputs: Sequence[int], cancel: Cancel | None
    ) -> int:
        """Evaluate tokens[keep:]; return how many tokens that took, padding included."""
        n, n_done = len(tokens), 0
        is_long = n - keep > self.n_batch
        self._torn, self._fresh = True, False
        done = list[Chunk]()
        for chunk in self._chunks(n, keep, outputs[0]):
            if is_long and cancel is not None:
                cancel.check()
            n_done += self._decode(tokens, chunk, outputs if chunk.end == n else ())
            done.append(chunk)
            if is_long and self.progress is not None:
                self.progress((chunk.end - keep) / (n - keep))
        self._first = chunk.start
        # Of gaps between outputs nothing is told.
        self._first_output = outputs[0] if n - outputs[0] == len(outputs) else n - 1
        self._held.tokens = tokens[:]
        for chunk in done:
            self._held.evaluated(chunk.start, chunk.end)
        self._torn, self._fresh = False, True
        return n_done

    def _chunks(self, n: int, start: int, first_output: int) -> Iterator[Chunk]:
        """Cut the tokens from start to n into batches, with all outputs in the last one."""
        most = self.n_batch // self.block * self.block
        n_outputs = n - first_output
        check_outputs(n_outputs, self.n_batch)
        # With embeddings on, every token is an output; the others go first, without embeddings.
        ends = [first_output, n] if self.wants_hidden else [n]
        for end in ends:
            tail = n_outputs if end == n else 0
            while end - start > max(most, tail):
                take = most if end - start - most >= tail else end - start - tail
                yield Chunk(start, start + take, take)
                start += take
            if end > start:
                whole = tail > 1 or (end == n and self.wants_hidden)
                for length, size in self._cheapest(end - start, start, whole):
                    yield Chunk(start, start + length, size)
                    start += length

    def _cheapest(self, n: int, start: int, whole: bool) -> list[tuple[int, int]]:
        """Return the cheapest way to evaluate n tokens from `start` on: (tokens, size of the
        batch), in order."""
        costs = self.costs  # another thread may change it
        if costs is None:
            return [(n, n)]
        return costs.chunks(n, min(self.n_batch, self.n_ctx - start), whole=whole)

    def _decode(self, tokens: array[int], chunk: Chunk, outputs: Sequence[int]) -> int:
        """Evaluate a chunk; return how many tokens that took."""
        start, end, size = chunk
        batch, n = self._context.batch, end - start
        block = tokens[start:end]
        if size > n:
            block.extend(block[-1:] * (size - n))
        batch.put(0, block, self._positions[start : start + size], 0)
        for i in outputs:
            batch.output[i - start] = 1
        self._context.decode(size, hidden=self.wants_hidden and bool(outputs))
        if size > n:
            self._context.drop(0, end)
        return size

    def state(self, i: int) -> tuple[Floats, Floats]:
        """Return (logits, hidden) after token i, an output of the last `sync`: views."""
        return self._context.state(i - self._first, hidden=self.wants_hidden)

    @property
    def logits(self) -> Floats:
        """The logits after the last token, (n_vocab,)."""
        return self.state(len(self._held.tokens) - 1)[0]

    @property
    def hidden(self) -> Floats:
        """The hidden state after the last token, (n_embd,), or (0,) if it is not wanted."""
        return self.state(len(self._held.tokens) - 1)[1]

    def n_known(self, tokens: array[int]) -> int:
        """Return how many of these tokens, from the first on, are in the KV cache."""
        return self._held.n_known(tokens)

    def _drop(self, keep: int) -> None:
        """Roll the KV cache back to the first `keep` tokens."""
        self._torn, self._fresh = True, False
        self._held.drop(keep)
        self._context.drop(0, keep)
        self._torn = False

    def snapshot(self) -> Snapshot:
        """Return the tokens of this timeline and llama.cpp's state after them, for `restore`.

        Raises ModelError where the model is closed.
        """
        self.model.header()
        if self._saved is not None:
            return self._saved
        # What was held before an interrupted decode is whole.
        if self._torn and self._context.created:
            self._drop(len(self._held.tokens))
        held = self._held
        if not self._context.created or not held.tokens:
            held, state = Held(self.block), np.empty(0, np.uint8)
        else:
            state = self._context.save(0)
        return Snapshot(np.array(held.tokens, np.int32), held.rows, state)

    def restore(self, snapshot: Snapshot) -> None:
        """Restore a snapshot of a session of the same model and settings: now, or when the context
        is created.

        Raises ModelError when llama.cpp refuses it or it cannot be a snapshot of this model,
        PromptError when it does not fit the context.
        """
        tokens = snapshot.tokens
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < self.model.n_vocab:
            raise self._not_ours()
        if len(tokens) > self.n_ctx:
            raise PromptError(
                f"the saved prompt has {len(tokens)} tokens, the context holds {self.n_ctx}; "
                "raise -c"
            )
        self.forget()
        if not len(tokens):
            return
        if self._context.created:
            self._restore(snapshot)
        else:
            self._saved = snapshot

    def _restore(self, snapshot: Snapshot) -> None:
        self._torn = True
        try:
            self._held.restore(snapshot.tokens, snapshot.stretches)
            accepted = self._context.restore(0, snapshot.state, len(snapshot.tokens))
        except ValueError:
            accepted = False
        if not accepted:
            self._drop(0)
            raise self._not_ours()
        self._torn = False

    def _not_ours(self) -> ModelError:
        return ModelError(f"{self.model.path}: the saved state is not of this model and context")

    def close(self) -> None:
        """Free the context. The session can be used again; it starts empty."""
        self._context.close()
        self._held.clear()
        self._torn, self._fresh = False, False
        self._saved = None
