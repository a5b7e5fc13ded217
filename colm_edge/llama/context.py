"""A llama.cpp context of one or more sequences: decode a batch, read its outputs, and roll back the
KV cache (`Context.drop`).

A session uses one sequence, the server's slots one sequence each, the scorer one per document.
"""

from __future__ import annotations

import ctypes
import logging
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal

import llama_cpp as llama
import numpy as np
import numpy.typing as npt

from colm_edge.arrays import Floats
from colm_edge.cancel import Cancel
from colm_edge.errors import ColmError, ModelError
from colm_edge.llama.account import Account
from colm_edge.llama.backend import last_errors, supports_gpu
from colm_edge.llama.interrupts import interrupts_noted
from colm_edge.llama.memory import cache_bytes, check_room
from colm_edge.llama.model import Model
from colm_edge.llama.owners import Alone, Home
from colm_edge.llama.threads import Cores, cores, n_cores
from colm_edge.options import INT_MAX, check_whole

log = logging.getLogger("colm_edge")

Bytes = npt.NDArray[np.uint8]

# A model smaller than this is evaluated by one thread.
SMALL_MODEL_BYTES = 32 << 20
# The default n_ubatch on a CPU and without flash attention; larger than any draft. Larger ones read
# a prompt no faster (Qwen2.5-Coder-1.5B in Q4_0: 101 to 108 tokens per second in 64, 128 and 512,
# one thread of an AMD EPYC, 2026-11-28), and prompts that begin alike share whole batches only.
SMALL_BATCH = 128
# With so many sequences in one cache, flash attention is faster on a CPU too: 16 answers of 200
# tokens by Qwen2.5-Coder-1.5B in Q4_0 wrote 61 tokens per second with it and 46 without, 8 as many
# either way (2 cores of an AMD EPYC, 2026-11-27).
MANY_SEQUENCES = 8
# Cached views on llama.cpp's outputs; more than any draft has outputs.
MAX_VIEWS = 256

CACHE_TYPES = {
    "f32": 0,
    "f16": 1,
    "bf16": 30,
    "q8_0": 8,
    "q5_1": 7,
    "q5_0": 6,
    "q4_1": 3,
    "q4_0": 2,
}
CACHE_BITS = {  # of a number; those of blocks have a scale, and some an offset, for 32 numbers
    "f32": 32, "f16": 16, "bf16": 16, "q8_0": 8.5, "q5_1": 6, "q5_0": 5.5, "q4_1": 5, "q4_0": 4.5,
}  # fmt: skip
PLAIN_TYPES = ("f32", "f16", "bf16")
_FLASH = {"auto": -1, "off": 0, "on": 1}
_BATCH_FIELDS = dict(llama.llama_batch._fields_)
_NOTHING = np.empty(0, np.float32)
MOST_THREADS = 512  # GGML_MAX_N_THREADS


@dataclass(frozen=True)
class ContextOptions:
    """How a model is evaluated; names and values are llama.cpp's. 0 lets colm-edge choose.

    threads_auto: use fewer than n_threads while other programs use the cores; always so if
        colm-edge chooses their number.
    """

    n_ctx: int = 0
    n_threads: int = 0
    n_batch: int = 512
    n_ubatch: int = 0
    flash_attn: Literal["auto", "on", "off"] = "auto"
    cache_type_k: str = "f16"
    cache_type_v: str = "f16"
    threads_auto: bool = False

    def __post_init__(self) -> None:
        for name, most in (("n_ctx", INT_MAX), ("n_threads", MOST_THREADS), ("n_ubatch", 512)):
            check_whole(name, getattr(self, name), 0, most)
        for name, known in (
            ("flash_attn", _FLASH),
            ("cache_type_k", CACHE_TYPES),
            ("cache_type_v", CACHE_TYPES),
        ):
            value = getattr(self, name)
            if value not in known:
                raise ColmError(f"{name} is {value!r}; expected one of {', '.join(known)}")
        if self.flash_attn == "off" and self.cache_type_v not in PLAIN_TYPES:
            raise ColmError(
                f"a value cache in {self.cache_type_v} needs flash attention; leave flash "
                f"attention on, or use one of {', '.join(PLAIN_TYPES)}"
            )

    def flash_attn_of(self, model: Model, n_sequences: int = 1) -> Literal["auto", "on", "off"]:
        """Return whether a model is evaluated with flash attention.

        On a CPU, "auto" means off: flash attention slows decodes of a few tokens by a third or more
        after 500 tokens, and threefold after 2,000 (docs/speed.md). Very small models keep it,
        because with it a token gives the same bits alone and in a batch, and so do the contexts of
        many sequences.
        """
        on_cpu = is_on_cpu(model)
        # llama.cpp needs flash attention for a quantised value cache.
        plain = self.cache_type_v in PLAIN_TYPES
        few = n_sequences < MANY_SEQUENCES
        if self.flash_attn == "auto" and on_cpu and plain and few and not is_small(model):
            return "off"
        return self.flash_attn

    def n_threads_of(self, model: Model) -> int:
        """Return how many threads evaluate a model: by default every core, or one for a very small
        model.

        A decode of a very small model takes less time than its threads need to synchronise. If
        another program uses the cores too, waiting at every layer costs hundreds of times the work.
        """
        return self.n_threads or (1 if is_small(model) else n_cores())

    def cache_bytes(self, model: Model, n_ctx: int) -> int:
        """Return the size of a model's KV cache of n_ctx tokens."""
        bits = CACHE_BITS[self.cache_type_k], CACHE_BITS[self.cache_type_v]
        return cache_bytes(model, n_ctx, *bits)

    @property
    def adapts_threads(self) -> bool:
        """Whether decodes use fewer threads while other programs use the cores."""
        return self.threads_auto or not self.n_threads

    def n_ubatch_of(self, model: Model, n_sequences: int = 1) -> int:
        """Return how many tokens llama.cpp evaluates at a time, at most. The default is lower where
        a CPU evaluates few sequences, and without flash attention, where the attention scores of
        all of them are kept in memory."""
        few = is_on_cpu(model) and n_sequences < MANY_SEQUENCES
        is_lower = few or self.flash_attn_of(model, n_sequences) == "off"
        return self.n_ubatch or (SMALL_BATCH if is_lower else self.n_batch)


def is_on_cpu(model: Model) -> bool:
    """Return whether no layer of a model is on a GPU."""
    return model.n_gpu_layers == 0 or not supports_gpu()


def is_small(model: Model) -> bool:
    """Return whether a model is too small to gain from several threads."""
    return sum(file.stat().st_size for file in model.files) < SMALL_MODEL_BYTES


class Batch:
    """A llama_batch whose fields are numpy arrays, (n,) each."""

    def __init__(self, n: int) -> None:
        self.token, self.position, self.sequence = np.zeros((3, n), np.int32)
        self.output = np.zeros(n, np.int8)
        self._one = np.ones(n, np.int32)
        # llama.cpp expects a pointer to each token's list of sequences.
        first = self.sequence.ctypes.data
        self._pointer = first + np.arange(n, dtype=np.uintp) * self.sequence.itemsize
        self._batch = llama.llama_batch()
        for name, values in (
            ("token", self.token),
            ("pos", self.position),
            ("n_seq_id", self._one),
            ("seq_id", self._pointer),
            ("logits", self.output),
        ):
            setattr(self._batch, name, ctypes.cast(values.ctypes.data, _BATCH_FIELDS[name]))

    def put(self, row: int, tokens: Any, positions: Any, sequences: Any, outputs: Any = 0) -> int:
        """Write tokens (n,) into the rows from `row` on; return the row after them.

        positions, sequences, outputs: arrays (n,), or one number for all. outputs: 1 where the
        state after the token is needed, else 0.
        """
        end = row + len(tokens)
        self.token[row:end] = tokens
        self.position[row:end] = positions
        self.sequence[row:end] = sequences
        self.output[row:end] = outputs
        return end

    def head(self, n: int) -> Any:
        """Return the llama_batch of the first n rows."""
        self._batch.n_tokens = n
        return self._batch


class Context:
    """A context of a model. `open` reads the weights and creates it; `close` frees it.

    n_ctx: the size of the KV cache in tokens, shared by all sequences. n_batch: the most tokens of
    one decode. account: where decodes are counted, if several contexts share one account.
    """

    batch: Batch

    def __init__(
        self,
        model: Model,
        options: ContextOptions,
        n_ctx: int,
        n_batch: int,
        n_sequences: int = 1,
        account: Account | None = None,
    ) -> None:
        self.model, self.options = model, options
        self.n_ctx, self.n_batch, self.n_sequences = n_ctx, n_batch, n_sequences
        self.account = account or Account()
        self._alone = Alone()
        self._handle: Any = None
        self._memory: Any = None
        self._embeddings = False
        self._views: dict[int, Floats] = {}
        self._cores: Cores | None = None  # None where one thread, or a GPU, evaluates
        self._n_threads = self._most_threads = 0
        self.crowded = False  # whether other programs wanted the threads' cores at some decode
        # Now: while another thread reads the weights, what the header says would wait for it.
        self._n_bytes = options.cache_bytes(model, n_ctx)

    @property
    def handle(self) -> Any:
        """llama.cpp's own context, or None before `open`."""
        return self._handle

    @property
    def home(self) -> Home:
        """The process that may use it."""
        return self._alone.home

    @property
    def created(self) -> bool:
        """Whether the context exists and so takes memory."""
        return self._handle is not None

    def open(self, cancel: Cancel | None = None) -> None:
        """Create the context if it does not exist yet, reading the weights first if needed.

        Raises ModelError when llama.cpp refuses, CancelledError when `cancel` ends the load.
        """
        self.home.check()
        if self._handle is not None:
            return
        begun = perf_counter()
        self._n_threads = self._most_threads = self.options.n_threads_of(self.model)
        if self._n_threads > 1 and is_on_cpu(self.model):
            self._cores = cores()
        if is_on_cpu(self.model):
            check_room(self.model, self.n_ctx, self._n_bytes)
        model = self.model.load(None if cancel is None else cancel.check)
        last_errors.clear()
        handle: Any = None
        try:
            with interrupts_noted():  # llama.cpp logs, which calls back
                handle = llama.llama_init_from_model(model, self._params())
        except KeyboardInterrupt:
            llama.llama_free(handle)
            raise
        if not handle:
            reason = last_errors[-1] if last_errors else "llama.cpp gave no reason"
            raise ModelError(
                f"{self.model.path}: no context of {self.n_ctx} tokens: {reason}; "
                "try a smaller one (-c)"
            )
        try:
            self.model.adapt(handle)
        except ModelError:
            llama.llama_free(handle)
            raise
        self._handle, self._memory = handle, llama.llama_get_memory(handle)
        self.batch = Batch(self.n_batch)
        took = perf_counter() - begun
        self.account.load_seconds += took
        self.account.seconds += took

    def _params(self) -> Any:
        options, model = self.options, self.model
        params = llama.llama_context_default_params()
        params.n_ctx, params.n_batch = self.n_ctx, self.n_batch
        params.n_ubatch = min(self.n_batch, options.n_ubatch_of(model, self.n_sequences))
        params.n_threads = params.n_threads_batch = self._n_threads
        # The sequences share the cells: a long one may use what short ones leave free.
        params.n_seq_max, params.kv_unified = self.n_sequences, self.n_sequences > 1
        params.flash_attn_type = _FLASH[options.flash_attn_of(model, self.n_sequences)]
        params.type_k = CACHE_TYPES[options.cache_type_k]
        params.type_v = CACHE_TYPES[options.cache_type_v]
        params.swa_full = True  # of layers with a window too; else they could not be rolled back
        params.no_perf = True
        return params

    def decode(self, n: int, *, hidden: bool = False) -> None:
        """Evaluate the first n rows of the batch.

        hidden: compute hidden states as well as logits; llama.cpp then treats every row as an
        output, whatever the batch says. Raises ModelError when llama.cpp cannot evaluate it.
        """
        with self._alone.held():
            if hidden != self._embeddings:
                llama.llama_set_embeddings(self._handle, hidden)
                self._embeddings = hidden
            if self._cores is not None:
                self._share(self._cores)
            account, begun = self.account, perf_counter()
            code = llama.llama_decode(self._handle, self.batch.head(n))
            if self.model.n_gpu_layers:
                llama.llama_synchronize(self._handle)  # a GPU works asynchronously
            account.seconds += perf_counter() - begun
        if code != 0:
            raise ModelError(
                f"{self.model.path}: llama.cpp could not evaluate {n} tokens "
                f"(code {code}: {'the context is full' if code == 1 else 'see its log'})"
            )
        account += Account(n, 1)

    def _share(self, cores: Cores) -> None:
        """Leave cores to other programs, or use them again."""
        n_threads = cores.threads(self._most_threads)
        if n_threads != self._n_threads and self.options.adapts_threads:
            llama.llama_set_n_threads(self._handle, n_threads, n_threads)
            self._n_threads = n_threads
            if not self.crowded:
                log.info(
                    "%s: %d instead of %d threads while other programs use the cores",
                    self.model.path, n_threads, self._most_threads,
                )  # fmt: skip
        self.crowded = self.crowded or n_threads < self._most_threads

    def state(self, row: int, *, hidden: bool) -> tuple[Floats, Floats]:
        """Return (logits (n_vocab,), hidden (n_embd,) or (0,)) after a row of the last batch: views
        on llama.cpp's memory, valid until the next decode."""
        logits = self._view(llama.llama_get_logits_ith(self._handle, row), self.model.n_vocab)
        if not hidden:
            return logits, _NOTHING
        embeddings = llama.llama_get_embeddings_ith(self._handle, row)
        return logits, self._view(embeddings, self.model.n_embd)

    def states(self, n: int, *, hidden: bool) -> tuple[Floats, Floats]:
        """Return (logits (n, n_vocab), hidden (n, n_embd) or (0,)) after the n rows of the last
        batch, which must all be outputs: views, as those of `state`."""
        begun = perf_counter()
        logits = llama.llama_get_logits(self._handle)  # waits for a GPU
        self.account.seconds += perf_counter() - begun
        states = np.ctypeslib.as_array(logits, (n, self.model.n_vocab))
        if not hidden:
            return states, _NOTHING
        embeddings = llama.llama_get_embeddings(self._handle)
        return states, np.ctypeslib.as_array(embeddings, (n, self.model.n_embd))

    def settle(self) -> None:
        """Make the outputs of the last batch safe to read from several threads.

        llama.cpp reorders them at the first read, which two threads must not do at once.
        """
        llama.llama_get_logits(self._handle)

    def _view(self, pointer: Any, n: int) -> Floats:
        # Wrapping a pointer costs more than the switch itself, so views are cached by address.
        at = ctypes.addressof(pointer.contents)
        view = self._views.get(at)
        if view is None or len(view) != n:
            if len(self._views) >= MAX_VIEWS:
                self._views.clear()  # llama.cpp has moved its buffers
            view = self._views[at] = np.ctypeslib.as_array(pointer, (n,))
        return view

    def drop(self, sequence: int, keep: int) -> None:
        """Roll a sequence back to its first `keep` tokens. Raises ModelError when the model cannot
        do that."""
        with self._alone.held():
            dropped = llama.llama_memory_seq_rm(self._memory, sequence, keep, -1)
        if not dropped:
            raise ModelError(f"{self.model.path}: the model cannot roll back its KV cache")

    def clear(self) -> None:
        """Empty the KV cache of every sequence."""
        with self._alone.held():
            llama.llama_memory_clear(self._memory, False)

    def save(self, sequence: int) -> Bytes:
        """Return llama.cpp's state of a sequence, for `restore`."""
        with self._alone.held():
            state = np.empty(llama.llama_state_seq_get_size(self._handle, sequence), np.uint8)
            to = _pointer_to(state)
            n = llama.llama_state_seq_get_data(self._handle, to, len(state), sequence)
        return state[:n]

    def restore(self, sequence: int, state: Bytes, n_tokens: int) -> bool:
        """Replace the state of a sequence; return whether llama.cpp accepted it, as the state after
        so many tokens."""
        state = np.ascontiguousarray(state)
        pointer = _pointer_to(state)
        with self._alone.held():
            n = int(llama.llama_state_seq_set_data(self._handle, pointer, len(state), sequence))
            last = llama.llama_memory_seq_pos_max(self._memory, sequence)
        return 0 < n == len(state) and last == n_tokens - 1

    def close(self) -> None:
        """Free the context; it can be opened again, empty. In a child of fork it is left alone:
        llama.cpp would wait for its threads."""
        if self._handle is not None and self.home.is_here:
            with self._alone.held():
                llama.llama_free(self._handle)
        self._handle = self._memory = None
        self._embeddings, self._views = False, {}

    def __del__(self) -> None:
        if getattr(self, "_handle", None) is not None:
            self.close()


def _pointer_to(values: Bytes) -> Any:
    return values.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
