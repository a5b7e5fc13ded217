"""Model and Session: llama.cpp's weights and timelines, as token ids.

A `Model` is a GGUF file: vocabulary at once, weights at the first evaluation. A
`Session` is one timeline of one model and owns its context and KV cache; the
caller hands over the whole token prefix with `sync` and the session works out
what to keep, drop and evaluate.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any

import llama_cpp as llama
import numpy as np
import numpy.typing as npt

from colm_edge.errors import MismatchError, ModelError, PromptError

Floats = npt.NDArray[np.float32]

log = logging.getLogger("colm_edge.llama")

# llama.cpp takes two vocabularies as one when they differ in at most so many rows.
MAX_VOCAB_DIFFERENCE = 128
# Ids below this are special tokens that families of one vocabulary name differently.
FIRST_COMPARED_TOKEN = 5
# Below this size a model is evaluated by one thread.
SMALL_MODEL_BYTES = 32 << 20

FINGERPRINT_PLACES = 1024  # of a model's file, evenly spread
FINGERPRINT_BYTES = 4096  # at each

_LEVELS = {1: logging.DEBUG, 2: logging.INFO, 3: logging.WARNING, 4: logging.ERROR}
_last_errors: list[str] = []


@llama.llama_log_callback  # type: ignore[untyped-decorator]
def _on_log(level: int, text: bytes, _: Any) -> None:
    message = text.decode("utf-8", "replace").rstrip()
    if level == 4:
        _last_errors.append(message)
        del _last_errors[:-4]
    # llama.cpp's errors reach the user as exceptions; its chatter is for those who ask.
    log.log(min(_LEVELS.get(level, logging.DEBUG), logging.INFO), message)


def _start_backend() -> None:
    llama.llama_log_set(_on_log, ctypes.c_void_p(0))
    llama.llama_backend_init()


_start_backend()


@dataclass(frozen=True)
class ContextOptions:
    """How a model is evaluated. Zero means: let colm-edge choose."""

    n_ctx: int = 0
    n_threads: int = 0
    n_batch: int = 512


class Model:
    """A GGUF file. The vocabulary is read at once, the weights at the first `load`.

    lora: a LoRA adapter in GGUF for these weights; every context of the model runs with it.

    Raises ModelError when a file is missing, not a GGUF or truncated, or the model recurrent.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        n_gpu_layers: int = 0,
        lora: str | os.PathLike[str] | None = None,
    ) -> None:
        self.path = Path(path)
        self.lora = None if lora is None else Path(lora)
        self.n_gpu_layers = n_gpu_layers
        self._handle: Any = None
        self._adapter: Any = None  # llama.cpp frees it with the model
        self._loaded = False
        # Loading the weights replaces the handle; others may be asking the vocabulary meanwhile.
        self._lock = threading.RLock()
        for file in self.files:
            _check_gguf(file)
        self._handle = self._open(vocab_only=True)
        handle = self._handle
        if llama.llama_model_is_recurrent(handle) or llama.llama_model_is_hybrid(handle):
            self.close()
            raise ModelError(
                f"{self.path}: a recurrent model cannot drop the end of its state, which "
                "following another model needs; use an attention model"
            )

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that decide what the model says: its weights, and its adapter if any."""
        return (self.path,) if self.lora is None else (self.path, self.lora)

    @cached_property
    def fingerprint(self) -> str:
        """What tells this model, its adapter included, from others."""
        return fingerprint(*self.files)

    def _open(self, vocab_only: bool) -> Any:
        params = llama.llama_model_default_params()
        params.vocab_only = vocab_only
        params.n_gpu_layers = self.n_gpu_layers
        _last_errors.clear()
        handle = llama.llama_model_load_from_file(os.fsencode(self.path), params)
        if not handle:
            reason = next((m for m in _last_errors if "error loading" in m), "")
            reason = reason.split("error loading model: ")[-1] or "llama.cpp refused the file"
            raise ModelError(f"{self.path}: cannot load: {reason}; download or convert it again")
        return handle

    def load(self) -> Any:
        """Return llama.cpp's model, reading the weights on the first call."""
        with self._lock:
            if not self._loaded:
                self._check_open()
                full = self._open(vocab_only=False)
                try:
                    self._adapter = self._open_adapter(full)
                except ModelError:
                    llama.llama_model_free(full)
                    raise
                llama.llama_model_free(self._handle)
                self._handle, self._loaded = full, True
            return self._handle

    def _open_adapter(self, handle: Any) -> Any:
        if self.lora is None:
            return None
        _last_errors.clear()
        adapter = llama.llama_adapter_lora_init(handle, os.fsencode(self.lora))
        if not adapter:
            reason = next((m for m in _last_errors if "lora" in m), "llama.cpp refused the file")
            reason = reason.split("adapter: ", 1)[-1]
            raise ModelError(
                f"{self.lora}: no LoRA adapter for {self.path}: {reason}; expected one that was "
                "trained on this model and written as GGUF"
            )
        return adapter

    def adapt(self, context: Any) -> None:
        """Put the model's adapter, if it has one, on a fresh llama.cpp context of it.

        Raises ModelError when llama.cpp refuses.
        """
        if self._adapter is None:
            return
        adapters = (llama.llama_adapter_lora_p_ctypes * 1)(self._adapter)
        if llama.llama_set_adapters_lora(context, adapters, 1, (ctypes.c_float * 1)(1.0)) != 0:
            raise ModelError(f"{self.lora}: llama.cpp could not use the adapter with {self.path}")

    @property
    def loaded(self) -> bool:
        return self._loaded

    def close(self) -> None:
        """Free the model; its sessions must be closed before it."""
        with self._lock:
            if self._handle is not None:
                llama.llama_model_free(self._handle)
                self._handle, self._adapter, self._loaded = None, None, False

    def __del__(self) -> None:
        if getattr(self, "_handle", None) is not None:
            self.close()

    def _check_open(self) -> Any:
        if self._handle is None:
            raise ModelError(f"{self.path}: the model is closed; load it again")
        return self._handle

    @property
    def _vocab(self) -> Any:
        return llama.llama_model_get_vocab(self._check_open())

    def metadata(self, key: str) -> str | None:
        """Return a GGUF key's value as text, or None."""
        size = 256
        while True:
            buffer = ctypes.create_string_buffer(size)
            with self._lock:
                handle = self._check_open()
                n = llama.llama_model_meta_val_str(handle, key.encode(), buffer, size)
            if n < 0:
                return None
            if n < size:
                return buffer.value.decode("utf-8", "replace")
            size = n + 1

    def _number(self, key: str) -> int:
        arch = self.metadata("general.architecture")
        return int(self.metadata(f"{arch}.{key}") or 0)

    @cached_property
    def n_vocab(self) -> int:
        """Rows of the vocabulary, padding and added tokens included."""
        return int(llama.llama_vocab_n_tokens(self._vocab))

    @cached_property
    def n_embd(self) -> int:
        """Width of the hidden state."""
        return self._number("embedding_length")

    @cached_property
    def n_ctx_train(self) -> int:
        return self._number("context_length")

    @cached_property
    def chat_template(self) -> str | None:
        return self.metadata("tokenizer.chat_template")

    @cached_property
    def _pieces(self) -> dict[int, bytes]:
        return {}

    def piece(self, token: int) -> bytes:
        """Return the bytes a token stands for; a special token's are empty."""
        found = self._pieces.get(token)
        if found is None:
            size = 64
            while True:
                buffer = ctypes.create_string_buffer(size)
                with self._lock:
                    n = llama.llama_token_to_piece(self._vocab, token, buffer, size, 0, False)
                if n >= 0:
                    break
                size = -n
            found = self._pieces[token] = buffer.raw[:n]
        return found

    def token_text(self, token: int) -> str:
        """Return a token as the vocabulary spells it, special tokens included."""
        with self._lock:
            text = llama.llama_vocab_get_text(self._vocab, token)
        return (text or b"").decode("utf-8", "replace")

    def tokenize(self, text: str, *, special: bool = True, bos: bool = True) -> list[int]:
        """Return the token ids of a text.

        special: read the names of special tokens in the text as those tokens.
        bos: put the begin token first, where the vocabulary wants one.
        """
        raw = text.encode("utf-8", "replace")
        size = len(raw) + 8
        while True:
            buffer = (llama.llama_token * size)()
            with self._lock:
                n = llama.llama_tokenize(self._vocab, raw, len(raw), buffer, size, bos, special)
            if n >= 0:
                return list(buffer[:n])
            size = -n

    @cached_property
    def bos_text(self) -> str:
        # Without the key llama.cpp names a default that many vocabularies use otherwise.
        if self.metadata("tokenizer.ggml.bos_token_id") is None:
            return ""
        token = llama.llama_vocab_bos(self._vocab)
        return "" if token < 0 else self.token_text(token)

    @cached_property
    def eos_text(self) -> str:
        token = llama.llama_vocab_eos(self._vocab)
        return "" if token < 0 else self.token_text(token)

    @cached_property
    def end_token(self) -> int:
        """The token that ends a turn (or the text, where turns have no token of their own)."""
        token = int(llama.llama_vocab_eot(self._vocab))
        return token if token >= 0 else int(llama.llama_vocab_eos(self._vocab))

    @cached_property
    def end_tokens(self) -> frozenset[int]:
        """Every token that ends a generation."""
        with self._lock:
            vocab = self._vocab
            return frozenset(i for i in range(self.n_vocab) if llama.llama_vocab_is_eog(vocab, i))

    def token_id(self, text: str) -> int | None:
        """Return the id of a token by its spelling; the added ones stand last."""
        return next((i for i in reversed(range(self.n_vocab)) if self.token_text(i) == text), None)

    def vocab_kind(self) -> tuple[tuple[str, int], ...]:
        """What two vocabularies must have in common besides their tokens."""
        vocab = self._vocab
        add_bos = bool(llama.llama_vocab_get_add_bos(vocab))
        add_eos = bool(llama.llama_vocab_get_add_eos(vocab))
        return (
            ("its type", int(llama.llama_vocab_type(vocab))),
            ("whether a begin token is added", add_bos),
            ("whether an end token is added", add_eos),
            ("the begin token", int(llama.llama_vocab_bos(vocab)) if add_bos else -1),
            ("the end token", int(llama.llama_vocab_eos(vocab)) if add_eos else -1),
        )


def fingerprint(*paths: Path) -> str:
    """Tell files apart without reading all of them: by their sizes, and bytes from all over."""
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(str(size).encode())
        with path.open("rb") as file:
            for i in range(FINGERPRINT_PLACES):
                file.seek(size * i // FINGERPRINT_PLACES)
                digest.update(file.read(FINGERPRINT_BYTES))
    return digest.hexdigest()


def _check_gguf(path: Path) -> None:
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as e:
        raise ModelError(f"{path}: {e.strerror or e}; expected a GGUF file") from e
    if magic != b"GGUF":
        raise ModelError(f"{path}: not a GGUF file (starts with {magic!r}, expected b'GGUF')")


def shared_vocab(base: Model, expert: Model) -> int:
    """Return how many ids two models share; ids at or above it belong to one of them alone.

    The rule is llama.cpp's for draft models: type, BOS, EOS and add flags agree, sizes differ by
    at most 128, token texts agree from id 5 on. Raises MismatchError naming what differs.
    """
    names = f"{base.path.name} and {expert.path.name}"
    for (what, ours), (_, theirs) in zip(base.vocab_kind(), expert.vocab_kind(), strict=True):
        if ours != theirs:
            raise MismatchError(
                f"the vocabularies of {names} differ: {what} is {ours} in the base, {theirs} in "
                "the expert; the two must come from one model family"
            )
    if abs(base.n_vocab - expert.n_vocab) > MAX_VOCAB_DIFFERENCE:
        raise MismatchError(
            f"the vocabularies of {names} differ: {base.n_vocab} tokens in the base, "
            f"{expert.n_vocab} in the expert (at most {MAX_VOCAB_DIFFERENCE} more or fewer); "
            "the two must come from one model family"
        )
    n = min(base.n_vocab, expert.n_vocab)
    if base.path == expert.path:
        return n
    for i in range(FIRST_COMPARED_TOKEN, n):
        if base.token_text(i) != expert.token_text(i):
            raise MismatchError(
                f"the vocabularies of {names} differ: token {i} is {base.token_text(i)!r} in the "
                f"base, {expert.token_text(i)!r} in the expert; the two must come from one family"
            )
    return n


class Session:
    """One timeline of a model. The context is created, and weights read, at the first `sync`.

    hidden: whether the last hidden state is wanted beside the logits.
    """

    def __init__(self, model: Model, options: ContextOptions, *, hidden: bool = False) -> None:
        self.model = model
        self.n_ctx = options.n_ctx
        self.n_evaluated = 0  # tokens, whatever became of them
        self.n_calls = 0  # decodes
        self.seconds = 0.0  # inside llama.cpp, what follows included
        self.load_seconds = 0.0  # reading the weights and making the context
        self.logits: Floats = np.empty(0, np.float32)
        self.hidden: Floats = np.empty(0, np.float32)
        self._options = options
        self._wants_hidden = hidden
        self._context: Any = None
        self._memory: Any = None
        self._tokens: list[int] = []  # what the KV cache holds
        self._torn = False  # a decode was interrupted: the cache may hold more than _tokens
        self._fresh = False  # logits and hidden belong to the last of _tokens
        self._embeddings = False
        self._addresses = (0, 0)

    @property
    def created(self) -> bool:
        """Whether the context exists, that is, whether anything was ever evaluated."""
        return self._context is not None

    def want_hidden(self, wanted: bool) -> bool:
        """Set whether `sync` leaves the hidden state beside the logits; return what was set."""
        before, self._wants_hidden = self._wants_hidden, wanted
        if wanted and not before:
            self._fresh = False  # the last token must be evaluated again for its hidden state
        return before

    def open(self) -> None:
        """Read the weights and make the context now rather than at the first `sync`."""
        if self._context is not None:
            return
        begun = perf_counter()
        self._context = self.new_context(self.n_ctx, min(self._options.n_batch, self.n_ctx))
        self._memory = llama.llama_get_memory(self._context)
        took = perf_counter() - begun
        self.load_seconds += took
        self.seconds += took

    def new_context(self, n_ctx: int, n_batch: int, n_sequences: int = 1) -> Any:
        handle = self.model.load()
        params = llama.llama_context_default_params()
        threads = self.n_threads
        params.n_ctx = n_ctx
        params.n_batch = params.n_ubatch = n_batch
        params.n_threads = params.n_threads_batch = threads
        params.n_seq_max, params.kv_unified = n_sequences, n_sequences > 1
        params.no_perf = True
        _last_errors.clear()
        context = llama.llama_init_from_model(handle, params)
        if context:
            self.model.adapt(context)
        else:
            reason = _last_errors[-1] if _last_errors else "llama.cpp gave no reason"
            raise ModelError(
                f"{self.model.path}: no context of {n_ctx} tokens: {reason}; try a smaller one (-c)"
            )
        return context

    @property
    def n_threads(self) -> int:
        """The threads that evaluate; the weights are read to know."""
        return self._options.n_threads or _threads_for(llama.llama_model_size(self.model.load()))

    def forget(self) -> None:
        """Drop every token, so that the next `sync` evaluates all of its own."""
        if self._context is not None:
            self._drop(0)

    def sync(self, tokens: Sequence[int]) -> int:
        """Make this timeline equal to `tokens` and their last logits current.

        Keeps the common prefix, drops what differs, evaluates the rest in batches; returns the
        number of tokens evaluated. Afterwards `logits` (n_vocab,) and, if wanted, `hidden`
        (n_embd,) are views on llama.cpp's own memory, valid until the next call.

        Raises PromptError when the tokens do not fit the context.
        """
        if not tokens:
            raise PromptError("nothing to evaluate: the prompt has no tokens")
        if len(tokens) > self.n_ctx:
            raise PromptError(
                f"{len(tokens)} tokens do not fit the context of {self.n_ctx} (-c sets it)"
            )
        self.open()
        keep = self._common_prefix(tokens)
        if keep == len(tokens):
            if self._fresh and len(self._tokens) == keep and not self._torn:
                return 0
            keep -= 1  # the last token's logits are gone: evaluate it again
        if keep < len(self._tokens) or self._torn:
            self._drop(keep)
        rest = list(tokens[keep:])
        self._torn, self._fresh = True, False
        if self._wants_hidden:
            # With embeddings on every token is an output, so only the last is evaluated so.
            self._decode(rest[:-1], embeddings=False)
            self._decode(rest[-1:], embeddings=True)
        else:
            self._decode(rest, embeddings=False)
        self._view_outputs()
        self._tokens += rest
        self._torn, self._fresh = False, True
        return len(rest)

    def _common_prefix(self, tokens: Sequence[int]) -> int:
        held = self._tokens
        n = min(len(held), len(tokens))
        if held[:n] == list(tokens[:n]):
            return n
        return next(i for i in range(n) if held[i] != tokens[i])

    def _drop(self, keep: int) -> None:
        """Forget every position from `keep` on."""
        self._torn, self._fresh = True, False
        del self._tokens[keep:]
        if not llama.llama_memory_seq_rm(self._memory, 0, keep, -1):
            raise ModelError(f"{self.model.path}: the model cannot drop the end of its state")
        self._torn = False

    def _decode(self, tokens: list[int], *, embeddings: bool) -> None:
        if not tokens:
            return
        if embeddings != self._embeddings:
            llama.llama_set_embeddings(self._context, embeddings)
            self._embeddings = embeddings
        step = self._options.n_batch
        for at in range(0, len(tokens), step):
            block = tokens[at : at + step]
            array = (llama.llama_token * len(block))(*block)
            self.decode_batch(self._context, llama.llama_batch_get_one(array, len(block)))

    def decode_batch(self, context: Any, batch: Any) -> None:
        begun = perf_counter()
        code = llama.llama_decode(context, batch)
        self.seconds += perf_counter() - begun
        if code != 0:
            raise ModelError(
                f"{self.model.path}: llama.cpp could not evaluate {batch.n_tokens} tokens "
                f"(code {code}: {'the context is full' if code == 1 else 'see its log'})"
            )
        self.n_calls += 1
        self.n_evaluated += batch.n_tokens

    def _view_outputs(self) -> None:
        # Wrapping a pointer costs more than the switch itself; llama.cpp seldom moves its
        # buffers, so the views are made again only when the address changes.
        begun = perf_counter()
        logits = llama.llama_get_logits_ith(self._context, -1)  # waits for a GPU
        self.seconds += perf_counter() - begun
        at = ctypes.addressof(logits.contents)
        if at != self._addresses[0]:
            self.logits = np.ctypeslib.as_array(logits, (self.model.n_vocab,))
            self._addresses = (at, self._addresses[1])
        if self._wants_hidden:
            hidden = llama.llama_get_embeddings_ith(self._context, -1)
            at = ctypes.addressof(hidden.contents)
            if at != self._addresses[1]:
                self.hidden = np.ctypeslib.as_array(hidden, (self.model.n_embd,))
                self._addresses = (self._addresses[0], at)

    def close(self) -> None:
        """Free the context; the session can be used again and starts anew."""
        if self._context is not None:
            llama.llama_free(self._context)
            self._context = self._memory = None
        self._tokens, self._torn, self._fresh = [], False, False
        self._embeddings, self._addresses = False, (0, 0)
        self.logits = self.hidden = np.empty(0, np.float32)

    def __del__(self) -> None:
        if getattr(self, "_context", None) is not None:
            self.close()


def _threads_for(n_bytes: int) -> int:
    """Return how many threads evaluate a model: every core, or one for a very small model.

    There a decode takes less than threads need to meet, and where another program wants the cores
    too, waiting for each other at every layer costs hundreds of times the work.
    """
    if n_bytes < SMALL_MODEL_BYTES:
        return 1
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
