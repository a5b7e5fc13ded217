"""Text to token ids, with llama.cpp's tokenizer: which names of control tokens count as such."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cached_property
from typing import Any, Protocol, TypeVar

import llama_cpp as llama

Read = TypeVar("Read")
PARTED = "\ufdd0"  # no character of Unicode, and never will be one
# Pre-tokenizers that llama.cpp has code of its own for; other texts are cut here.
OWN_SPLITS = ("gpt-2", "llama-bpe", "olmo", "qwen2", "smollm")
# Python and C++ agree that these six are spaces, but not on others; nor on what is none.
LONG_RUN = re.compile(r"[^ \t-\r]{4000}|[\s\x00-\x20\x7f-\xa0]{4000}")
CONTROL = llama.LLAMA_TOKEN_ATTR_CONTROL | llama.LLAMA_TOKEN_ATTR_UNKNOWN
# llama.cpp takes the square of the number of names in a text: 2 s for 16,000. In a text of so many
# characters they are not looked for with it.
LONG_TEXT = 20_000


class TokenTable(Protocol):
    """A model's vocabulary; `Model` documents the methods."""

    def metadata(self, key: str) -> str | None: ...
    def piece(self, token: int) -> bytes: ...
    def token_text(self, token: int) -> str: ...
    def each_token(self, read: Callable[[Any, int], Read]) -> list[Read]: ...
    def read_vocab(self, read: Callable[[Any], Read]) -> Read: ...


class Tokenizer:
    """A model's tokenizer; `Model` documents what it does."""

    def __init__(self, model: TokenTable) -> None:
        self._model = model

    def tokens(self, text: str, special: bool, bos: bool) -> list[int]:
        """Return the token ids of a text; special, bos: as for `Model.tokenize`."""
        if not self._splits_long_runs:
            text = LONG_RUN.sub(lambda run: run[0] + PARTED, text)
        first, *others = text.split(PARTED)
        tokens = self._tokenize(first, special, bos)
        for other in others:
            tokens += self._tokens_behind(other, special)
        return tokens

    def plain(self, text: str) -> str:
        """Return a text in which the names of control tokens are parted."""
        text = text.replace(PARTED, "")
        while names := self._names_in(text):
            pattern = "|".join(map(re.escape, sorted(names)))
            text = re.sub(pattern, lambda found: found[0][0] + PARTED + found[0][1:], text)
        return text

    def fewest(self, text: str) -> int:
        """Return how many tokens a text has at least: the names in it, whole and parted."""
        if len(text) < LONG_TEXT:
            return 0
        return text.count(PARTED) + sum(1 for _ in self._any_name.finditer(text))

    def _names_in(self, text: str) -> set[str]:
        """Return the names of control tokens that are such for llama.cpp; in a long text, all that
        there are."""
        if len(text) >= LONG_TEXT:
            return {found[0] for found in self._any_name.finditer(text)}
        tokens = set(self.tokens(text, special=True, bos=False))

        def controls(vocab: Any) -> list[int]:
            return [t for t in tokens if llama.llama_vocab_get_attr(vocab, t) & CONTROL]

        names = map(self._model.token_text, self._model.read_vocab(controls))
        return {name for name in names if len(name) > 1 and name in text}

    @cached_property
    def _any_name(self) -> re.Pattern[str]:
        """The names of all control tokens, of which the longest is found."""
        attributes = self._model.each_token(llama.llama_vocab_get_attr)
        found = (token for token, of_it in enumerate(attributes) if of_it & CONTROL)
        names = {self._model.token_text(token) for token in found}
        names = {name for name in names if len(name) > 1}
        ordered = sorted(names, key=lambda name: (-len(name), name))
        return re.compile("|".join(map(re.escape, ordered)) or r"(?!)")

    @cached_property
    def _splits_long_runs(self) -> bool:
        """Whether llama.cpp splits a text without a regex that calls itself at each character, to
        the stack's end: some 20,000 without a space end the process."""
        byte_pairs = self._model.metadata("tokenizer.ggml.model") == "gpt2"
        return not byte_pairs or self._model.metadata("tokenizer.ggml.pre") in OWN_SPLITS

    def _tokens_behind(self, text: str, special: bool) -> list[int]:
        """Return the tokens of a text that goes on after another, without the space that some
        vocabularies put before the beginning of a text."""
        if self._begins_with_space and text:
            for mark in "\n", "|":  # a token of its own after the space, unless the text joins it
                tokens, length = self._tokenize(mark + text, special, False), 0
                for i, token in enumerate(tokens):
                    if length == len(" " + mark):
                        return tokens[i:]
                    length += len(self._model.piece(token))
        return self._tokenize(text, special, False)

    @cached_property
    def _begins_with_space(self) -> bool:
        pieces = map(self._model.piece, self._tokenize("|", False, False))
        return b"".join(pieces) == b" |"

    def _tokenize(self, text: str, special: bool, bos: bool) -> list[int]:
        raw = text.encode("utf-8", "replace")
        size = len(raw) + 8
        while True:
            buffer = (llama.llama_token * size)()

            def tokenize(vocab: Any, buffer: Any = buffer, size: int = size) -> int:
                return int(llama.llama_tokenize(vocab, raw, len(raw), buffer, size, bos, special))

            n = self._model.read_vocab(tokenize)
            if n >= 0:
                return list(buffer[:n])
            size = -n
