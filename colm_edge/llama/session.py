"""Session: one timeline of one model, as token ids.

It owns a context and its KV cache; the caller hands over the whole token prefix with `sync` and the
session works out what to keep, drop and evaluate, and in which batches.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from time import perf_counter
from typing import Any, Literal

import llama_cpp as llama
import numpy as np
import numpy.typing as npt

from colm_edge.errors import ModelError, PromptError
from colm_edge.llama.backend import last_errors, supports_gpu
from colm_edge.llama.context import (
    _FLASH,
    CACHE_TYPES,
    PLAIN_TYPES,
    SMALL_BATCH,
    SMALL_MODEL_BYTES,
    Batch,
    ContextOptions,
    Floats,
    _threads_for,
)
from colm_edge.llama.costs import CostTable
from colm_edge.llama.model import Model

# Tokens (n,), and llama.cpp's state of them.
Snapshot = tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]
# Views on llama.cpp's outputs that are kept; more than any batch of a draft has.
MAX_VIEWS = 256
_NOTHING = np.empty(0, np.float32)


class Session:
    """One timeline of a model. The context is created, and weights read, at the first `sync`.

    hidden: whether the last hidden state is wanted beside the logits.
    costs: what decodes cost here; with it, batches are cut, or filled up, to the cheapest sizes.
    check: called before each batch of a `sync` that is longer than one, and while the weights are
        read; what it raises ends either.
    progress: told the share of such a `sync` that is done.
    """

    def __init__(self, model: Model, options: ContextOptions, *, hidden: bool = False) -> None:
        self.model, self.options = model, options
        self.n_ctx = options.n_ctx
        self.costs: CostTable | None = None
        self.check: Callable[[], None] | None = None
        self.progress: Callable[[float], None] | None = None
        self.n_evaluated = 0  # tokens, whatever became of them
        self.n_calls = 0  # decodes
        self.seconds = 0.0  # inside llama.cpp, what follows included
        self.load_seconds = 0.0  # reading the weights and making the context
        self.wants_hidden = hidden
        self._context: Any = None
        self._memory: Any = None
        self._batch: Batch
        self._positions: npt.NDArray[np.int32]  # 0, 1, 2 …
        self._tokens = array("i")  # what the KV cache holds
        self._torn = False  # a decode was interrupted: the cache may hold more than _tokens
        self._fresh = False  # logits and hidden belong to the last of _tokens
        self._embeddings = False
        self._first = 0  # the position of the first token of the last decode
        self._views: dict[int, Floats] = {}
        self._saved: Snapshot | None = None  # taken up when the context is made

    @property
    def created(self) -> bool:
        """Whether the context exists, that is, whether anything was ever evaluated."""
        return self._context is not None

    @property
    def n_batch(self) -> int:
        """The most tokens of one decode."""
        return min(self.options.n_batch, self.n_ctx)

    @property
    def n_ubatch(self) -> int:
        """The most tokens that llama.cpp evaluates at a time. Without flash attention the attention
        scores of that many are kept, so they are fewer there."""
        chosen = SMALL_BATCH if self.flash_attn == "off" else self.options.n_batch
        return self.options.n_ubatch or chosen

    def want_hidden(self, wanted: bool) -> bool:
        """Set whether `sync` leaves the hidden state beside the logits; return what was set."""
        before, self.wants_hidden = self.wants_hidden, wanted
        if wanted and not before:
            self._fresh = False  # the last token must be evaluated again for its hidden state
        return before

    def open(self) -> None:
        """Read the weights and make the context now rather than at the first `sync`."""
        if self._context is not None:
            return
        begun = perf_counter()
        self._context = self.new_context(self.n_ctx, self.n_batch)
        self._memory = llama.llama_get_memory(self._context)
        self._batch = Batch(self.n_batch)
        self._positions = np.arange(self.n_ctx, dtype=np.int32)
        saved, self._saved = self._saved, None
        if saved is not None:
            self._restore(*saved)
        took = perf_counter() - begun
        self.load_seconds += took
        self.seconds += took

    def new_context(self, n_ctx: int, n_batch: int, n_sequences: int = 1) -> Any:
        """Return another llama.cpp context of the same model and settings."""
        handle = self.model.load(self.check)
        options = self.options
        params = llama.llama_context_default_params()
        threads = self.n_threads
        params.n_ctx = n_ctx
        params.n_batch = n_batch
        params.n_threads = params.n_threads_batch = threads
        params.n_seq_max, params.kv_unified = n_sequences, n_sequences > 1
        params.flash_attn_type = _FLASH[self.flash_attn]
        params.n_ubatch = min(n_batch, self.n_ubatch)
        params.type_k = CACHE_TYPES[options.cache_type_k]
        params.type_v = CACHE_TYPES[options.cache_type_v]
        params.no_perf = True
        last_errors.clear()
        context = llama.llama_init_from_model(handle, params)
        if context:
            self.model.adapt(context)
        else:
            reason = last_errors[-1] if last_errors else "llama.cpp gave no reason"
            raise ModelError(
                f"{self.model.path}: no context of {n_ctx} tokens: {reason}; try a smaller one (-c)"
            )
        return context

    @contextmanager
    def twin(self, n_ctx: int) -> Iterator[Session]:
        """Have another session of the same model and settings for a while."""
        options = replace(self.options, n_ctx=n_ctx, n_batch=min(self.n_batch, n_ctx))
        twin = Session(self.model, options, hidden=self.wants_hidden)
        try:
            yield twin
        finally:
            twin.close()

    @property
    def flash_attn(self) -> Literal["auto", "on", "off"]:
        """Whether flash attention is used. Auto is off on a CPU, where it slows decodes of a few
        tokens down: by a third or more behind 500 tokens, threefold behind 2,000 (docs/speed.md).
        Very small models keep it: with it a token by itself and in a batch agree to the last bits.
        """
        options = self.options
        on_cpu = self.model.n_gpu_layers == 0 or not supports_gpu()
        small = self.model.path.stat().st_size < SMALL_MODEL_BYTES
        # llama.cpp needs it for quantised values.
        plain = options.cache_type_v in PLAIN_TYPES
        if options.flash_attn == "auto" and on_cpu and plain and not small:
            return "off"
        return options.flash_attn

    @property
    def n_threads(self) -> int:
        """The threads that evaluate."""
        return self.options.n_threads or _threads_for(self.model.path.stat().st_size)

    def forget(self) -> None:
        """Drop every token, so that the next `sync` evaluates all of its own."""
        self._saved = None
        if self._context is not None:
            self._drop(0)

    def sync(self, tokens: Sequence[int], outputs: Sequence[int] = ()) -> int:
        """Make this timeline equal to `tokens` and its outputs current.

        Keeps the common prefix, drops what differs, evaluates the rest in batches; returns the
        number of tokens evaluated. Afterwards `state` gives logits (n_vocab,) and, if wanted,
        the hidden state (n_embd,): views on llama.cpp's own memory, valid until the next call.

        outputs: rising indexes of tokens whose states are wanted, the last token's among them;
            they are evaluated in one batch, and `state` gives them. By default the last alone.

        Raises PromptError when the tokens do not fit the context.
        """
        n = len(tokens)
        if not n:
            raise PromptError("nothing to evaluate: the prompt has no tokens")
        if n > self.n_ctx:
            raise PromptError(f"{n} tokens do not fit the context of {self.n_ctx} (-c sets it)")
        if self._context is None:
            self.open()
        if not isinstance(tokens, array):
            tokens = array("i", tokens)
        held = self._tokens
        if len(held) == n - 1 and held == tokens[:-1] and not outputs and not self._torn:
            return self._append(tokens[-1])
        keep = self.n_known(tokens)
        if not outputs or outputs[0] == n - 1:
            if keep == n and self._fresh and len(held) == n and not self._torn:
                return 0
            outputs = (n - 1,)
        keep = min(keep, outputs[0])
        if keep < len(held) or self._torn:
            self._drop(keep)
        self._torn, self._fresh = True, False
        n_done, kept, is_long = 0, keep, n - keep > self.n_batch
        for block, padded, is_last in self._blocks(tokens, keep, outputs[0]):
            if is_long and self.check is not None:
                self.check()
            n_done += self._decode(block, keep, padded, outputs if is_last else ())
            keep += len(block)
            if is_long and self.progress is not None:
                self.progress((keep - kept) / (n - kept))
        self._first = n - len(block)
        self._tokens = tokens[:]
        self._torn, self._fresh = False, True
        return n_done

    def _append(self, token: int) -> int:
        """Evaluate one more token: what `sync` does most of the time, in as little of Python."""
        batch, at = self._batch, len(self._tokens)
        self._torn, self._fresh = True, False
        self._switch_embeddings(self.wants_hidden)
        batch.token[0], batch.position[0], batch.output[0] = token, at, 1
        self.decode_batch(self._context, batch.head(1))
        self._first = at
        self._tokens.append(token)
        self._torn, self._fresh = False, True
        return 1

    def state(self, i: int) -> tuple[Floats, Floats]:
        """Return (logits, hidden) after token i of the last `sync`, one of its outputs; views."""
        i -= self._first
        logits = self._view(llama.llama_get_logits_ith(self._context, i), self.model.n_vocab)
        if not self.wants_hidden:
            return logits, _NOTHING
        hidden = llama.llama_get_embeddings_ith(self._context, i)
        return logits, self._view(hidden, self.model.n_embd)

    @property
    def logits(self) -> Floats:
        """The logits after the last token, (n_vocab,)."""
        return self.state(len(self._tokens) - 1)[0]

    @property
    def hidden(self) -> Floats:
        """The hidden state after the last token, (n_embd,), or (0,) where it is not wanted."""
        return self.state(len(self._tokens) - 1)[1]

    def _view(self, pointer: Any, n: int) -> Floats:
        # Wrapping a pointer costs more than the switch itself, so views are kept by address.
        at = ctypes.addressof(pointer.contents)
        view = self._views.get(at)
        if view is None or len(view) != n:
            if len(self._views) >= MAX_VIEWS:
                self._views.clear()  # llama.cpp has moved its buffers
            view = self._views[at] = np.ctypeslib.as_array(pointer, (n,))
        return view

    def n_known(self, tokens: array[int]) -> int:
        """Return how many of these tokens, from the first on, are evaluated already."""
        return common_prefix(self._tokens, tokens)

    def _blocks(
        self, tokens: array[int], start: int, first_output: int
    ) -> Iterator[tuple[array[int], int, bool]]:
        """Cut tokens[start:] into (block, its size when filled up, whether it is the last)."""
        n, most = len(tokens), self.n_batch
        # With embeddings on every token is an output, so what is none goes first by itself.
        ends = [first_output, n] if self.wants_hidden else [n]
        for end in ends:
            tail = end - first_output if end == n else 0  # of one batch
            if tail > most:
                raise ValueError(f"{tail} outputs, but a batch of at most {most}")
            while end - start > most:
                take = most if end - start - most >= tail else end - start - tail
                yield tokens[start : start + take], take, False
                start += take
            cut = [(end - start, end - start)] if end > start else []
            if self.costs is not None and cut:
                whole = tail > 1 or (end == n and self.wants_hidden)
                room = min(most, self.n_ctx - start)
                cut = self.costs.pieces(end - start, room, whole=whole)
            for size, padded in cut:
                start += size
                yield tokens[start - size : start], padded, start == n

    def _drop(self, keep: int) -> None:
        """Forget every position from `keep` on."""
        self._torn, self._fresh = True, False
        del self._tokens[keep:]
        if not llama.llama_memory_seq_rm(self._memory, 0, keep, -1):
            raise ModelError(f"{self.model.path}: the model cannot drop the end of its state")
        self._torn = False

    def _decode(self, block: array[int], at: int, n_padded: int, outputs: Sequence[int]) -> int:
        """Evaluate a block at position `at`, filled up to n_padded; return what was evaluated."""
        n = len(block)
        self._switch_embeddings(self.wants_hidden and bool(outputs))
        batch = self._batch
        batch.token[:n] = block
        batch.position[:n_padded] = self._positions[at : at + n_padded]
        batch.output[:n_padded] = 0
        for i in outputs:
            batch.output[i - at] = 1
        if n_padded > n:
            batch.token[n:n_padded] = block[-1]
        self.decode_batch(self._context, batch.head(n_padded))
        if n_padded > n and not llama.llama_memory_seq_rm(self._memory, 0, at + n, -1):
            raise ModelError(f"{self.model.path}: the model cannot drop the end of its state")
        return n_padded

    def _switch_embeddings(self, wanted: bool) -> None:
        if wanted != self._embeddings:
            llama.llama_set_embeddings(self._context, wanted)
            self._embeddings = wanted

    def decode_batch(self, context: Any, batch: Any) -> None:
        """Evaluate a llama_batch in one of the model's contexts, on this session's account."""
        begun = perf_counter()
        code = llama.llama_decode(context, batch)
        if self.model.n_gpu_layers:
            llama.llama_synchronize(context)  # a GPU is still at work
        self.seconds += perf_counter() - begun
        if code != 0:
            raise ModelError(
                f"{self.model.path}: llama.cpp could not evaluate {batch.n_tokens} tokens "
                f"(code {code}: {'the context is full' if code == 1 else 'see its log'})"
            )
        self.n_calls += 1
        self.n_evaluated += batch.n_tokens

    def snapshot(self) -> Snapshot:
        """Return the tokens of this timeline and llama.cpp's state of them, for `restore`."""
        if self._saved is not None:
            return self._saved
        if self._context is None or self._torn or not self._tokens:
            return np.empty(0, np.int32), np.empty(0, np.uint8)
        state = np.empty(llama.llama_state_seq_get_size(self._context, 0), np.uint8)
        n = llama.llama_state_seq_get_data(self._context, _bytes_of(state), len(state), 0)
        return np.array(self._tokens, np.int32), state[:n]

    def restore(self, snapshot: Snapshot) -> None:
        """Take up a snapshot of a session of the same model and settings; where nothing was
        evaluated yet, at the first evaluation.

        Raises ModelError when llama.cpp refuses it, PromptError when it does not fit the context.
        """
        tokens, _ = snapshot
        if len(tokens) > self.n_ctx:
            raise PromptError(
                f"the saved prompt has {len(tokens)} tokens, the context holds {self.n_ctx}; "
                "raise -c"
            )
        self.forget()
        if not len(tokens):
            return
        if self._context is None:
            self._saved = snapshot
        else:
            self._restore(*snapshot)

    def _restore(self, tokens: npt.NDArray[np.int32], state: npt.NDArray[np.uint8]) -> None:
        self._torn = True
        state = np.ascontiguousarray(state)
        n = llama.llama_state_seq_set_data(self._context, _bytes_of(state), len(state), 0)
        if n != len(state):
            self._drop(0)
            raise ModelError(f"{self.model.path}: the saved state is not of this model and context")
        self._tokens, self._torn = array("i", tokens.tolist()), False

    def close(self) -> None:
        """Free the context; the session can be used again and starts anew."""
        if self._context is not None:
            llama.llama_free(self._context)
            self._context = self._memory = None
        self._tokens, self._torn, self._fresh = array("i"), False, False
        self._embeddings, self._views, self._saved = False, {}, None

    def __del__(self) -> None:
        if getattr(self, "_context", None) is not None:
            self.close()


def common_prefix(one: array[int], other: array[int]) -> int:
    """Return how many tokens two prefixes have in common."""
    n = min(len(one), len(other))
    # Slices are copied and compared as memory: microseconds for thousands of tokens.
    if one[:n] == other[:n]:
        return n
    low, high = 0, n  # equal before low, different before high
    while high - low > 1:
        middle = (low + high) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle
    return low


def _bytes_of(values: npt.NDArray[np.uint8]) -> Any:
    return values.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
