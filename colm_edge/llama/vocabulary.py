"""A model's vocabulary, spelt in bytes, and whether two models share one."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import llama_cpp as llama

from colm_edge.errors import MismatchError
from colm_edge.llama.model import Model
from colm_edge.llama.tokenizer import PARTED

# llama.cpp's limit: two vocabularies may differ in size by this many rows.
MAX_VOCAB_DIFFERENCE = 128
# Lower ids are special tokens, which models of one vocabulary may name differently.
FIRST_COMPARED_TOKEN = 5


class Vocabulary:
    """The tokens of a model as bytes, for text that another vocabulary wrote (`decode.bridge`)."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self.n_vocab, self.ends, self.end = model.n_vocab, model.end_tokens, model.end_token
        self.piece, self.name = model.piece, model.token_text

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Vocabulary):
            return NotImplemented  # another kind may know
        one, two = self._model, other._model
        return one.path == two.path or (
            one.n_vocab == two.n_vocab
            and one.vocab_kind() == two.vocab_kind()
            and one.vocabulary_hash == two.vocabulary_hash
            and self._kinds == other._kinds
        )

    def __hash__(self) -> int:
        return hash(self.n_vocab)

    @cached_property
    def _kinds(self) -> list[int]:
        """Of each token, whether it is a control token and the like."""
        return self._model.each_token(llama.llama_vocab_get_attr)

    @cached_property
    def begin(self) -> int | None:
        """The token that every text begins with, if the vocabulary has one."""
        empty = self._model.tokenize("", special=False)
        return empty[0] if empty else None

    @cached_property
    def _ids(self) -> dict[bytes, int]:
        found: dict[bytes, int] = {}
        for token in range(self.n_vocab):
            if piece := self.piece(token):
                found.setdefault(piece, token)
        return found

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self._ids))

    @cached_property
    def _controls(self) -> dict[str, int]:
        return {self.name(t): t for t in range(self.n_vocab) if not self.piece(t)}

    def control(self, name: str) -> int | None:
        return self._controls.get(name)

    def first(self, raw: bytes) -> int | None:
        ids = self._ids
        for end in range(min(len(raw), self._longest), 0, -1):
            if (found := ids.get(raw[:end])) is not None:
                return found
        return None

    def encode(self, raw: bytes) -> list[int]:
        """Return tokens whose bytes are these: the tokenizer's, and where it would not give the
        same bytes back, the longest that fit. Raises MismatchError for a byte without a token."""
        tokens = list[int]()
        for part, text in runs_of(raw):
            tokens += self._tokens(part, text) or self._spelt(part)
        return tokens

    def _tokens(self, raw: bytes, text: str | None) -> list[int]:
        """Return the tokenizer's tokens of a text if they spell it, else none."""
        if text is None:
            return []
        for before in ("", PARTED):  # after it no space is put before the beginning of a text
            tokens = self._model.tokenize(before + text, special=False, bos=False)
            if b"".join(map(self.piece, tokens)) == raw:
                return tokens
        return []

    def _spelt(self, raw: bytes) -> Iterator[int]:
        at = 0
        while at < len(raw):
            token = self.first(raw[at : at + self._longest])
            if token is None:
                raise MismatchError(
                    f"the vocabulary of {self._model.path.name} has no token for the byte "
                    f"{raw[at]:#04x}; use another expert"
                )
            yield token
            at += len(self.piece(token))


def runs_of(raw: bytes) -> Iterator[tuple[bytes, str | None]]:
    """Yield bytes in runs, with their text; None for those that are no UTF-8."""
    at = 0
    while at < len(raw):
        try:
            yield raw[at:], raw[at:].decode()
            return
        except UnicodeDecodeError as e:
            if e.start:
                yield raw[at : at + e.start], raw[at : at + e.start].decode()
            yield raw[at + e.start : at + e.end], None
            at += e.end


def shared_vocab(base: Model, expert: Model) -> int:
    """Return how many ids two models share; higher ids belong to one of them only.

    The rule is llama.cpp's for draft models: type, BOS, EOS and add flags agree, sizes differ by
    at most 128, and token texts agree from id 5 on. Raises MismatchError that names the difference.
    """
    names = f"{base.path.name} and {expert.path.name}"
    for (what, ours), (_, theirs) in zip(base.vocab_kind(), expert.vocab_kind(), strict=True):
        if ours != theirs:
            raise MismatchError(
                f"the vocabularies of {names} differ: {what} is {ours} in the base, {theirs} in "
                "the expert; use two of one family, or --bridge"
            )
    if abs(base.n_vocab - expert.n_vocab) > MAX_VOCAB_DIFFERENCE:
        raise MismatchError(
            f"the vocabularies of {names} differ: {base.n_vocab} tokens in the base, "
            f"{expert.n_vocab} in the expert (at most {MAX_VOCAB_DIFFERENCE} more or fewer); "
            "use two of one family, or --bridge"
        )
    n = min(base.n_vocab, expert.n_vocab)
    if base.path == expert.path or base.vocabulary_hash == expert.vocabulary_hash:
        return n
    for i in range(FIRST_COMPARED_TOKEN, n):
        if base.token_text(i) != expert.token_text(i):
            raise MismatchError(
                f"the vocabularies of {names} differ: token {i} is {base.token_text(i)!r} in the "
                f"base, {expert.token_text(i)!r} in the expert; use two of one family, or --bridge"
            )
    return n
