"""Model: a GGUF file in llama.cpp.

The vocabulary is read at once, the weights at the first evaluation.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import llama_cpp as llama

from colm_edge.cancel import CancelledError
from colm_edge.errors import ModelError
from colm_edge.files import fingerprint, parts_of
from colm_edge.gguf_header import check_model, read_header
from colm_edge.llama import huge_pages
from colm_edge.llama.backend import gpu_layers, last_errors, model_params
from colm_edge.llama.interrupts import interrupts_noted
from colm_edge.llama.owners import HomeLock
from colm_edge.llama.rpc import check_servers, device_list
from colm_edge.llama.threads import cores
from colm_edge.llama.tokenizer import Tokenizer

PIECES = 32  # tokens whose pieces are read at once
Read = TypeVar("Read")
WAIT = 0.05  # seconds between two checks while another thread reads the weights


class Model:
    """A GGUF file. The vocabulary is read at once, the weights at the first `load`.

    lora: a LoRA adapter in GGUF for these weights; every context of the model uses it.
    rpc: addresses (HOST:PORT) of llama.cpp's RPC servers that hold the layers instead of this
        machine.
    progress: called with the share of the weights that is read; an exception in it ends the load.

    Raises ModelError when a file is missing, not a GGUF or truncated, or the model is recurrent.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        n_gpu_layers: int = 0,
        lora: str | os.PathLike[str] | None = None,
        progress: Callable[[float], None] | None = None,
        rpc: Sequence[str] = (),
    ) -> None:
        self.path = Path(path)
        self.rpc = tuple(rpc)
        if self.rpc:
            check_servers(self.rpc)  # now, not at the first deferral
        self._progress = progress
        self.lora = None if lora is None else Path(lora)
        self.n_gpu_layers = gpu_layers(n_gpu_layers)
        self._handle: Any = None
        self._adapter: Any = None  # llama.cpp frees it with the model
        self._loaded = False
        # Loading the weights replaces the handle, which other threads may be using to tokenize.
        self._lock = HomeLock()
        self._preparing: threading.Thread | None = None
        self._closed = False
        self._n_waiting = 0  # for the weights, which another thread reads
        self._raised: BaseException | None = None  # there, by `progress`
        self._pieces: dict[int, bytes] = {}
        for file in self.files:
            _check_gguf(file)
        self._handle = self._open(vocab_only=True)
        handle = self._handle
        causal = self.metadata(f"{self.metadata('general.architecture')}.attention.causal")
        if causal == "false" or llama.llama_model_has_encoder(handle):
            self.close()
            raise ModelError(f"{self.path}: an encoder writes no text; use a decoder")
        if llama.llama_model_is_recurrent(handle) or llama.llama_model_is_hybrid(handle):
            self.close()
            raise ModelError(
                f"{self.path}: a recurrent model cannot roll back its state, as a collaboration "
                "needs; use an attention model"
            )

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that make up the model: its weights, all parts of them if they are split, and
        its adapter if it has one."""
        weights = [self.path.parent / name for name in parts_of(self.path.name)]
        return tuple(weights) if self.lora is None else (*weights, self.lora)

    @cached_property
    def fingerprint(self) -> str:
        """A hash that identifies the model and its adapter."""
        return fingerprint(*self.files)

    def _open(
        self,
        vocab_only: bool,
        check: Callable[[], None] | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> Any:
        params = model_params()
        params.vocab_only = vocab_only
        params.n_gpu_layers = self.n_gpu_layers
        raised: list[BaseException] = []  # ctypes would print the exception and continue
        devices = None if vocab_only or not self.rpc else device_list(self.rpc)
        if devices is not None:
            params.devices = ctypes.cast(devices, ctypes.c_void_p)
        handle: Any = None
        try:
            with interrupts_noted() as raise_interrupt:
                if not vocab_only:
                    # `params` keeps the callback alive.
                    checks = (raise_interrupt,) if check is None else (raise_interrupt, check)
                    params.progress_callback = _progress_callback(progress, checks, raised)
                last_errors.clear()
                handle = llama.llama_model_load_from_file(os.fsencode(self.path), params)
            if raised:
                raise raised[0]
        except BaseException:  # an interrupt may come when all is read
            if handle:
                llama.llama_model_free(handle)
            raise
        if not handle:
            reason = next((m for m in last_errors if "error loading" in m), "")
            reason = reason.split("error loading model: ")[-1] or "llama.cpp refused the file"
            if "colmswitch" in reason:
                raise ModelError(
                    f"{self.path}: this is a switch; give it with -sw, and models here"
                )
            raise ModelError(f"{self.path}: cannot load: {reason}; download or convert it again")
        return handle

    def prepare(self) -> None:
        """Begin to read the weights on a thread of its own, and return at once; `load` waits for
        it. What goes wrong is raised by `load`, which tries again."""
        if self._loaded or self._preparing is not None or self._closed:
            return
        self._preparing = threading.Thread(target=self._prepare, name="colm-edge-load")
        self._preparing.start()

    def _prepare(self) -> None:
        try:
            with cores().lent(), suppress(ModelError, CancelledError):
                self._load(self._check_wanted, self._tell_who_waits)
        finally:
            self._preparing = None

    def _check_wanted(self) -> None:
        if self._closed:
            raise CancelledError

    def _tell_who_waits(self, share: float) -> None:
        if self._n_waiting and self._progress is not None:
            try:
                self._progress(share)
            except BaseException as e:  # for the caller who waits, in `_load`; this one ends
                self._raised = e
                raise CancelledError from e

    def load(self, check: Callable[[], None] | None = None) -> Any:
        """Return llama.cpp's model, reading the weights on the first call.

        check: called repeatedly during the load; an exception in it ends the load.
        """
        return self._handle if self._loaded else self._load(check, self._progress)

    def _load(
        self, check: Callable[[], None] | None, progress: Callable[[float], None] | None
    ) -> Any:
        self._n_waiting += 1
        try:
            while not self._lock.acquire(timeout=WAIT):
                if check is not None:
                    check()
        finally:
            self._n_waiting -= 1
        try:
            raised, self._raised = self._raised, None
            if raised is not None:
                raise raised
            if not self._loaded:
                self._check_open()
                full = self._open(vocab_only=False, check=check, progress=progress)
                try:
                    self._adapter = self._open_adapter(full)
                except ModelError:
                    llama.llama_model_free(full)
                    raise
                llama.llama_model_free(self._handle)
                self._handle, self._loaded = full, True
            return self._handle
        finally:
            self._lock.release()

    def _open_adapter(self, handle: Any) -> Any:
        if self.lora is None:
            return None
        last_errors.clear()
        adapter = llama.llama_adapter_lora_init(handle, os.fsencode(self.lora))
        if not adapter:
            reason = next((m for m in last_errors if "lora" in m), "llama.cpp refused the file")
            reason = reason.split("adapter: ", 1)[-1]
            raise ModelError(
                f"{self.lora}: not a LoRA adapter for {self.path}: {reason}; expected a GGUF file "
                "with an adapter that was trained on this model"
            )
        return adapter

    def adapt(self, context: Any) -> None:
        """Apply the model's adapter, if it has one, to a new llama.cpp context of the model.

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

    def unload(self) -> None:
        """Free the weights and keep the vocabulary; the next `load` reads the weights again. Free
        the model's contexts first."""
        with self._lock.held():
            if self._loaded:
                vocabulary = self._open(vocab_only=True)
                llama.llama_model_free(self._handle)
                self._handle, self._adapter, self._loaded = vocabulary, None, False

    def close(self) -> None:
        """Free the model. Close its sessions first."""
        self._closed = True
        if not self._lock.home.is_here:  # the parent's
            self._handle = None
            return
        with self._lock.held():
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

    def header(self) -> Any:
        """Return llama.cpp's model whether or not its weights are read: what the file's header
        says is known in any case, such as their number and size."""
        return self._check_open()

    @property
    def _vocab(self) -> Any:
        """llama.cpp's vocabulary; hold the lock while it is read."""
        return llama.llama_model_get_vocab(self._check_open())

    def each_token(self, read: Callable[[Any, int], Read]) -> list[Read]:
        """Return what llama.cpp's vocabulary says of each token, (n_vocab,)."""
        n = self.n_vocab
        with self._lock.held():
            vocab = self._vocab
            return [read(vocab, token) for token in range(n)]

    def read_vocab(self, read: Callable[[Any], Read]) -> Read:
        """Return what a function of llama.cpp's says of the vocabulary."""
        with self._lock.held():
            return read(self._vocab)

    def metadata(self, key: str) -> str | None:
        """Return a GGUF key's value as text, or None."""
        size = 256
        while True:
            buffer = ctypes.create_string_buffer(size)
            with self._lock.held():
                handle = self._check_open()
                n = llama.llama_model_meta_val_str(handle, key.encode(), buffer, size)
            if n < 0:
                return None
            if n < size:
                return buffer.value.decode("utf-8", "replace")
            size = n + 1

    def number(self, key: str) -> int:
        """Return a whole number of the architecture's keys, 0 if it is not a 64-bit integer."""
        found = self.metadata(f"{self.metadata('general.architecture')}.{key}") or ""
        return int(found) if found.isdecimal() and len(found) < 20 else 0

    @cached_property
    def n_vocab(self) -> int:
        """Rows of the vocabulary, padding and added tokens included."""
        return int(self.read_vocab(llama.llama_vocab_n_tokens))

    @cached_property
    def n_embd(self) -> int:
        """Width of the hidden state."""
        return self.number("embedding_length")

    @property
    def n_params(self) -> int:
        """How many weights it has, without an adapter's."""
        return int(llama.llama_model_n_params(self.header()))

    @cached_property
    def n_ctx_train(self) -> int:
        return self.number("context_length")

    @cached_property
    def chat_template(self) -> str | None:
        return self.metadata("tokenizer.chat_template")

    def text(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, special ones by their names."""
        ids = (llama.llama_token * len(tokens))(*tokens)
        size = 64 * len(tokens)
        while True:
            buffer = ctypes.create_string_buffer(size)
            with self._lock.held():
                n = llama.llama_detokenize(self._vocab, ids, len(tokens), buffer, size, False, True)
            if n >= 0:
                return buffer.raw[:n].decode("utf-8", "replace")
            size = -n

    def piece(self, token: int) -> bytes:
        """Return the bytes of a token; a special token has none."""
        if token not in self._pieces:
            self._read_pieces(token // PIECES * PIECES)
        return self._pieces[token]

    def _read_pieces(self, start: int) -> None:
        """Read those of some tokens at once: one by one they take three times as long."""
        size, n_vocab = 256, self.n_vocab
        buffer = ctypes.create_string_buffer(size)
        with self._lock.held():
            vocab = self._vocab
            for token in range(start, min(start + PIECES, n_vocab)):
                n = llama.llama_token_to_piece(vocab, token, buffer, size, 0, False)
                if n < 0:
                    size = -n
                    buffer = ctypes.create_string_buffer(size)
                    n = llama.llama_token_to_piece(vocab, token, buffer, size, 0, False)
                self._pieces[token] = buffer.raw[:n]

    def token_text(self, token: int) -> str:
        """Return a token as the vocabulary spells it, special tokens included."""
        with self._lock.held():
            text = llama.llama_vocab_get_text(self._vocab, token)
        return (text or b"").decode("utf-8", "replace")

    @cached_property
    def vocabulary_hash(self) -> str:
        """A hash that models share whose vocabularies have the same texts."""
        texts = [text or b"" for text in self.each_token(llama.llama_vocab_get_text)]
        return hashlib.sha256(b"\0".join(texts)).hexdigest()

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer(self)

    def tokenize(self, text: str, *, special: bool = True, bos: bool = True) -> list[int]:
        """Return the token ids of a text.

        special: turn the names of control tokens in the text into those tokens, but not where
            `plain` has parted them.
        bos: put the begin token first, if the vocabulary adds one.
        """
        return self._tokenizer.tokens(text, special, bos)

    def plain(self, text: str) -> str:
        """Return a text in which the names of control tokens are parted: `tokenize` then takes them
        for what they are in somebody's words, text."""
        return self._tokenizer.plain(text)

    def fewest_tokens(self, text: str) -> int:
        """Return how many tokens a long text has at least, which is known at once."""
        return self._tokenizer.fewest(text)

    @cached_property
    def bos_text(self) -> str:
        # Without this key llama.cpp returns a default id, which may be an ordinary token here.
        if self.metadata("tokenizer.ggml.bos_token_id") is None:
            return ""
        token = self.read_vocab(llama.llama_vocab_bos)
        return "" if token < 0 else self.token_text(token)

    @cached_property
    def eos_text(self) -> str:
        token = self.read_vocab(llama.llama_vocab_eos)
        return "" if token < 0 else self.token_text(token)

    @cached_property
    def end_token(self) -> int:
        """The token that ends a turn, or the text if the vocabulary has no end-of-turn token.

        llama.cpp guesses the first by its name; where the chat template writes the other, it is
        that.
        """
        ends = (llama.llama_vocab_eot, llama.llama_vocab_eos)
        turn, text = (int(self.read_vocab(end)) for end in ends)
        template = self.chat_template or ""
        writes = [at >= 0 and self.token_text(at) in template for at in (turn, text)]
        return text if turn < 0 or writes == [False, True] else turn

    @cached_property
    def end_tokens(self) -> frozenset[int]:
        """Every token that ends a generation."""
        ends = self.each_token(llama.llama_vocab_is_eog)
        return frozenset(token for token, is_end in enumerate(ends) if is_end)

    def token_id(self, text: str) -> int | None:
        """Return the id of a token by its spelling, or None; added tokens are last, so it searches
        from the end."""
        return next((i for i in reversed(range(self.n_vocab)) if self.token_text(i) == text), None)

    def vocab_kind(self) -> tuple[tuple[str, int], ...]:
        """Return what two vocabularies must have in common besides their tokens."""
        read = self.read_vocab
        add_bos = bool(read(llama.llama_vocab_get_add_bos))
        add_eos = bool(read(llama.llama_vocab_get_add_eos))
        return (
            ("its type", read(llama.llama_vocab_type)),
            ("whether a begin token is added", add_bos),
            ("whether an end token is added", add_eos),
            ("the begin token", read(llama.llama_vocab_bos) if add_bos else -1),
            ("the end token", read(llama.llama_vocab_eos) if add_eos else -1),
        )


def _progress_callback(
    progress: Callable[[float], None] | None,
    checks: Sequence[Callable[[], None]],
    raised: list[BaseException],
) -> Any:
    """Return llama.cpp's callback. It calls `progress` and `checks`, keeps what they raise in
    `raised`, and then ends the load."""
    ask_for_huge_pages: Callable[[], None] | None = huge_pages.watch()

    @llama.llama_progress_callback  # type: ignore[untyped-decorator]
    def on_progress(share: float, _: Any) -> bool:
        nonlocal ask_for_huge_pages
        try:
            # At the first call the buffers of the weights are allocated and still empty.
            if ask_for_huge_pages is not None:
                ask_for_huge_pages()
                ask_for_huge_pages = None
            for check in checks:
                check()
            if progress is not None:
                progress(share)
        except BaseException as e:
            raised.append(e)
        return not raised

    return on_progress


def _check_gguf(path: Path) -> None:
    try:
        check_model(read_header(path))
    except OSError as e:
        raise ModelError(f"{path}: {e.strerror or e}; expected a GGUF file") from e
    except ValueError as e:
        raise ModelError(f"{path}: {e}; download or convert it again") from e
