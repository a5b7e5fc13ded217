"""What an answer may look like: llama.cpp's grammars, and JSON schemas written as such."""

from __future__ import annotations

import ctypes
import json
import os
import re
import tempfile
import threading
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from itertools import accumulate
from typing import Any, Self

import llama_cpp as llama
import numpy as np

from colm_edge.errors import ColmError
from colm_edge.llama.json_schema import Plain
from colm_edge.llama.model import Model

CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
MOST_NESTED = 2000  # parentheses: llama.cpp's parser calls itself at each, to the stack's end
_REFUSED = re.compile(rb"parse: error parsing grammar: ([^\n]*)\n\n")  # and then the grammar
_stderr = threading.Lock()


class Grammar:
    """A grammar in the state after some tokens.

    text: in GBNF, llama.cpp's notation; the answer is one `root`.

    Raises ColmError with llama.cpp's reason where it does not parse.
    """

    def __init__(self, text: str, model: Model) -> None:
        self._one = np.zeros(1, CANDIDATE)
        self._sampler = None
        if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
            raise ColmError("the grammar holds NUL or half a character; expected text")
        if _nesting(text) > MOST_NESTED:
            raise ColmError(f"the grammar is nested deeper than {MOST_NESTED} times; simplify it")
        vocab = llama.llama_model_get_vocab(model.header())
        made, reason = _parsed(vocab, text.encode())
        self._sampler = made if made and text.strip() else None
        if self._sampler is None:
            raise ColmError(f"the grammar is not valid: {reason[:200]}; expected GBNF with a root")

    def allows(self, token: int) -> bool:
        """Return whether a token may be written next."""
        self._one["id"], self._one["logit"] = token, 0.0
        self.mask(array_of(self._one))
        return bool(self._one["logit"][0] > -np.inf)

    def mask(self, candidates: Any) -> None:
        """Set the logits of all tokens that may not be written next to -inf, in llama.cpp's array
        of candidates."""
        llama.llama_sampler_apply(self._sampler, ctypes.byref(candidates))

    def accept(self, token: int) -> None:
        """Go on after a token. Raises ColmError where it is not allowed: llama.cpp would end the
        process."""
        if not self.allows(token):
            raise ColmError("no token of the vocabulary goes on as the grammar says; change it")
        llama.llama_sampler_accept(self._sampler, token)

    def copy(self) -> Self:
        """Return a grammar in the same state."""
        sampler = llama.llama_sampler_clone(self._sampler)
        twin = object.__new__(type(self))  # see ChainSampler.copy
        twin.__dict__.update({**self.__dict__, "_one": self._one.copy(), "_sampler": sampler})
        return twin

    def __del__(self) -> None:
        sampler, self._sampler = getattr(self, "_sampler", None), None
        if sampler is not None:
            llama.llama_sampler_free(sampler)


class Grammars:
    """The grammars of a model's answers; the last one is kept, because most answers share it. Any
    thread may use it."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._last: tuple[str, Grammar] | None = None

    def parsed(self, text: str | None) -> Grammar | None:
        """Return a grammar at its start, None for None. Raises what `Grammar` raises."""
        if text is None:
            return None
        last = self._last
        if last is None or last[0] != text:
            last = self._last = text, Grammar(text, self._model)
        return last[1].copy()


def array_of(candidates: Any) -> Any:
    """Return llama.cpp's array of candidates, a numpy array of type CANDIDATE, none selected."""
    return llama.llama_token_data_array(
        data=candidates.ctypes.data_as(ctypes.POINTER(llama.llama_token_data)),
        size=len(candidates),
        selected=-1,
        sorted=False,
    )


def _nesting(text: str) -> int:
    """Return how deep parentheses are nested, those in texts counted too."""
    steps = (1 if character == "(" else -1 for character in text if character in "()")
    return max(accumulate(steps), default=0)


def grammar_of(schema: str | Mapping[str, Any], *, strict: bool = True) -> str:
    """Return the GBNF of a JSON schema, a text or an object. As in llama.cpp, {} stands for any
    object.

    strict: whether a keyword that cannot be kept to is an error; else it is left out.

    Raises ColmError for what is not JSON, and for a schema that cannot be kept to, with the reason.
    """
    from llama_cpp.llama_grammar import json_schema_to_gbnf

    try:
        wanted = json.loads(schema) if isinstance(schema, str) else schema
        if not isinstance(wanted, Mapping):
            raise ValueError("expected an object")
        plain = Plain(wanted, strict=strict)
        # Its strings may hold line ends and the like, which JSON's may not.
        text = str(json_schema_to_gbnf(json.dumps(plain.schema)))
        text = text.replace(r'[^"\\]', r'[^"\\\x7F\x00-\x1F]')
        for name, rule in plain.rules.items():
            text = text.replace(f'"\\"{name}\\""', rule)
        return text
    except Exception as e:  # it raises anything, for example for a pattern without ^
        reason = " ".join(str(e).split())[:200] or type(e).__name__
        raise ColmError(f"the JSON schema cannot be used: {reason}") from e


def _parsed(vocab: Any, text: bytes) -> tuple[Any, str]:
    """Return llama.cpp's sampler of a grammar, or None, and why it does not parse: that is printed,
    and told nowhere else. What other threads print meanwhile is passed on."""
    with _stderr, ExitStack() as opened:
        try:
            file = opened.enter_context(tempfile.TemporaryFile())
            before = os.dup(2)
        except OSError:  # no folder for it, or no stderr, as in an app without a console
            return llama.llama_sampler_init_grammar(vocab, text, b"root"), "it does not parse"
        try:
            os.dup2(file.fileno(), 2)
            made = llama.llama_sampler_init_grammar(vocab, text, b"root")
        finally:
            os.dup2(before, 2)
            os.close(before)
        file.seek(0)
        printed = file.read()
    reason = "it has no root"
    if refused := _REFUSED.search(printed):
        reason = refused[1].decode("utf-8", "replace").strip()
        printed = printed.replace(refused[0] + text + b"\n", b"")
    with suppress(OSError):
        os.write(2, printed)
    return made, reason
