"""Made vocabularies, and models without weights that speak them."""

from __future__ import annotations

import random
from array import array

import numpy as np

from colm_edge.decode.doubt import Doubt
from colm_edge.decode.review import ByRule, Review, Tolerance
from colm_edge.llama.account import Account

ALPHABET = sorted({bytes([byte]) for byte in "ab é€😀".encode()} | {b"\xff", b"\x80"})
END, MARK = "<end>", "<mark>"
SCHEDULES = {
    "sequential": lambda: None,
    "review": lambda: Review(ByRule(Tolerance(2.0)), 6),
    "doubt": lambda: Doubt(0.1, 4),
}


class Spellings:
    """A vocabulary of given pieces; the tokens before them are control tokens."""

    def __init__(self, pieces: list[bytes], controls=(END, MARK), begin: bool = False) -> None:
        self._controls = [*controls, *(["<begin>"] if begin else [])]
        self._pieces = [b""] * len(self._controls) + pieces
        self._ids = {piece: i for i, piece in enumerate(self._pieces) if piece}
        self.n_vocab = len(self._pieces)
        self.end = self._controls.index(END)
        self.ends = frozenset({self.end})
        self.begin = self._controls.index("<begin>") if begin else None

    def piece(self, token: int) -> bytes:
        return self._pieces[token]

    def name(self, token: int) -> str:
        return self._controls[token] if token < len(self._controls) else str(self.piece(token))

    def control(self, name: str) -> int | None:
        return self._controls.index(name) if name in self._controls else None

    def first(self, raw: bytes) -> int | None:
        return next(
            (self._ids[raw[:n]] for n in range(len(raw), 0, -1) if raw[:n] in self._ids), None
        )

    def encode(self, raw: bytes) -> list[int]:
        tokens, at = [], 0
        while at < len(raw):
            tokens.append(self.first(raw[at:]))
            at += len(self.piece(tokens[-1]))
        return tokens


def vocabulary(draw: random.Random, n: int, **more) -> Spellings:
    """All single bytes, and longer pieces that may end inside a character."""
    longer = {b"".join(draw.choices(ALPHABET, k=draw.randint(2, 5))) for _ in range(n)}
    pieces = [*ALPHABET, *longer]
    draw.shuffle(pieces)
    return Spellings(pieces, **more)


class Speaker:
    """A timeline whose logits depend on its own prefix; it keeps the states of its outputs only."""

    n_ctx = 400

    def __init__(self, words: Spellings, seed: int) -> None:
        self.words, self.seed = words, seed
        self.held, self.outputs = array("i"), set()
        self.account = Account()

    def turn_to(self, prompt) -> None:
        pass

    def sync(self, tokens, outputs=(), cancel=None) -> int:
        self.account += Account(0, 1)
        self.held, self.outputs = array("i", tokens), set(outputs) or {len(tokens) - 1}
        return 1

    def state(self, i):
        assert i in self.outputs
        return self.logits(tuple(self.held[: i + 1])), np.array([float(i + 1)])

    def logits(self, prefix):
        draw = np.random.default_rng(abs(hash((self.seed, prefix))) % 2**32)
        logits = draw.normal(0, 3, self.words.n_vocab).astype(np.float32)
        logits[:3] = -30.0  # control tokens are rare
        return logits
