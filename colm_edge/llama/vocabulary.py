"""A model's vocabulary, spelt in bytes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

from colm_edge.errors import MismatchError
from colm_edge.llama.model import Model


class Vocabulary:
    """The tokens of a model as bytes, for text that another vocabulary wrote (`decode.bridge`)."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self.n_vocab, self.ends, self.end = model.n_vocab, model.end_tokens, model.end_token
        self.piece, self.name = model.piece, model.token_text

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
        ends = range(min(len(raw), self._longest), 0, -1)
        return next((ids[raw[:end]] for end in ends if raw[:end] in ids), None)

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
        for marker in (b"", b"\n"):  # some put a space before the beginning of a text
            tokens = self._model.tokenize(marker.decode() + text, special=False, bos=False)
            end = 0
            for i, token in enumerate([*tokens, None]):
                if marker or i == 0:
                    rest = tokens[i:]
                    if b"".join(map(self.piece, rest)) == raw:
                        return rest
                if token is None or end > 2:
                    break
                end += len(self.piece(token))
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
