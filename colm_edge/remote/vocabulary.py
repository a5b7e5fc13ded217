"""The vocabulary of an expert on a server, for text that another vocabulary wrote
(`decode.bridge`).

It is learnt as far as it is needed: each token comes with its bytes, when a text is tokenized there
or when the expert names it as likely. Its control tokens are those whose names the server turns
into one token.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

from colm_edge.llama.vocabulary import Vocabulary, runs_of
from colm_edge.remote.dialect import Spelt
from colm_edge.remote.speller import Speller, check_piece

# Names of tokens that end a text, those of a turn first. llama.cpp knows most of them by name, too.
ENDS = (
    "<|eot_id|>", "<|im_end|>", "<|return|>", "<|end|>", "<end_of_turn>", "<turn|>",
    "<end_of_utterance>", "<|end_of_turn|>", "<|END_OF_TURN_TOKEN|>", "<|eom_id|>", "<EOT>",
    "_<EOT>", "[EOT]", "<|call|>", "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]",
    "<｜end▁of▁sentence｜>", "<|endofturn|>", "<|end▁of▁sentence|>",
)  # fmt: skip
# Control tokens may have any name, but look so where a server does not tell them from text.
LIKE_A_NAME = re.compile(rb"<\S+>|\[\S+\]")
SURELY_A_NAME = re.compile(rb"<\|\S*\|>|<\xef\xbd\x9c\S*\xef\xbd\x9c>|</?s>")
MARKER = "\n"  # before a text, for tokenizers that put a space before its beginning
MOST_KEPT = 8 << 20  # bytes of texts and their tokens that are kept
MOST_PARTS = 256  # of a text, each a request, where names in it are not to be read as such
MOST_PIECES = 64 << 20  # bytes of all tokens that were learnt
# Characters that hardly a tokenizer has a token for, so that it spells them in bytes; and some that
# it may spell in parts.
RARE = "".join(
    [chr(0x80 + 8 * i + j) for i in range(240) for j in (0, 5)]
    + [chr(code) for code in range(0x800, 0x10000, 251) if not 0xD800 <= code < 0xE000]
    + [chr(code) for code in range(0x10000, 0x110000, 4093)]
    + [chr(0x10FF00 + i) for i in range(64)]
    + [chr(0x1F300 + i) for i in range(0, 0x400, 2)]
)


class _Controls(NamedTuple):
    """begin, end: as `spelling.Words` has them. names: of the tokens that end a text."""

    begin: int | None
    end: int
    ends: dict[str, int]


class RemoteVocabulary:
    """A vocabulary for a `spelling.Crossing`; any thread may use it. Its methods ask the server
    where something is not known yet, except for `piece`.

    Raises AbsentExpertError where the server fails, or cannot spell a text.
    """

    def __init__(self, asked: Speller, ours: Vocabulary) -> None:
        self._asked, self._ours = asked, ours
        self._pieces: dict[int, bytes] = {}
        self._guesses: dict[int, bytes] = {}  # that may lack a space
        self._n_bytes = 0
        self._names: dict[str, int | None] = {}
        self._control_ids = set[int]()
        self._marker = ""
        self._lock = threading.Lock()
        self._texts = OrderedDict[bytes, list[int]]()
        self._n_kept = 0

    def __eq__(self, other: object) -> bool:
        return other is self or (other == self._ours and self._asked.is_same())

    def __hash__(self) -> int:
        return hash(self._ours)

    @property
    def n_vocab(self) -> int:
        """The base's where the vocabularies are the same, else 0: nobody tells the whole."""
        return self._ours.n_vocab if self._asked.is_same() else 0

    @property
    def begin(self) -> int | None:
        return self._ours.begin if self._asked.is_same() else self._controls.begin

    @property
    def ends(self) -> frozenset[int]:
        if self._asked.is_same():
            return self._ours.ends
        return frozenset(self._controls.ends.values())

    @property
    def end(self) -> int:
        return self._ours.end if self._asked.is_same() else self._controls.end

    @property
    def parting(self) -> tuple[str, int]:
        """The name and the id of a control token."""
        return next(iter(self._controls.ends.items()))

    @cached_property
    def _controls(self) -> _Controls:
        first, *rest = self._asked.spelt("a", begin=True)
        # A begin token, and the text after it, which may have a space put before it.
        begins = bool(rest) and b"".join(piece for _, piece in rest).strip() == b"a"
        names = dict.fromkeys((*ENDS, *map(self._ours.name, sorted(self._ours.ends))))
        names = dict.fromkeys((self._asked.end_name(), *names))
        names.pop("", None)
        found = self._find(list(names))
        if not self._asked.keeps_names() and any(name.startswith("<|") for name in found):
            # Such a vocabulary may have "</s>" as a word.
            found = {name: token for name, token in found.items() if name[1] in "|｜"}
        if not found:
            self._asked.refuse("none of its tokens is known to end a text")
        end = next((found[name] for name in (*ENDS, *names) if name in found), -1)
        return _Controls(first[0] if begins else None, end, found)

    def _find(self, names: Sequence[str]) -> dict[str, int]:
        """Return those that are names of control tokens: one token if names are read as such, and
        several otherwise."""
        text = "\n".join(names)
        spelt = self._asked.spelt(text, special=True)
        found = {piece.decode("utf-8", "replace"): token for token, piece in spelt}
        if self._asked.keeps_names():
            plain = {token for token, _ in self._asked.spelt(text)}
            found = {name: token for name, token in found.items() if token not in plain}
        self._control_ids |= {found[name] for name in names if name in found}
        return {name: found[name] for name in names if name in found}

    def name(self, token: int) -> str:
        """Return how the vocabulary spells a token, where it is the base's or ends a text."""
        if self._asked.is_same():
            return self._ours.name(token)
        return next((name for name, end in self._controls.ends.items() if end == token), "")

    def control(self, name: str) -> int | None:
        if self._asked.is_same():
            return self._ours.control(name)
        if name not in self._names:
            self._names[name] = (self._controls.ends | self._find([name])).get(name)
        return self._names[name]

    def piece(self, token: int) -> bytes:
        """Return a token's bytes, none if it is a control token or not known."""
        if self._asked.is_same():
            return self._ours.piece(token)
        if token in self._control_ids:
            return b""
        return self._pieces.get(token) or self._guesses.get(token, b"")

    def know(self, tokens: Iterable[int]) -> None:
        """Learn what tokens spell, as far as the server can tell."""
        if self._asked.is_same():
            return
        known = (self._pieces, self._guesses, self._control_ids)
        missing = [t for t in dict.fromkeys(tokens) if not any(t in some for some in known)]
        if missing:
            self._asked.pieces(missing, self.parting, self.learn)
            if any(self._guesses.get(token) == b"" for token in missing):
                _ = self._bytes  # a part of a character, which a text cannot tell

    def learn(self, pieces: Iterable[tuple[int, bytes]], is_exact: bool = True) -> None:
        """Take over what a server says that tokens spell.

        Raises ValueError for what no vocabulary has, and for what it has said otherwise before.
        """
        for token, piece in pieces:
            check_piece(token, piece)
            known = self._pieces if is_exact else self._guesses
            is_new = token not in known
            before = known.setdefault(token, piece)  # whichever thread learns it first
            if before != piece:
                raise ValueError(f"token {token} is {before[:40]!r} and {piece[:40]!r}")
            if is_new:
                self._n_bytes += len(piece)
                if not self._asked.keeps_names() and SURELY_A_NAME.fullmatch(piece):
                    self._control_ids.add(token)
            if self._n_bytes > MOST_PIECES:
                raise ValueError(f"more than {MOST_PIECES >> 20} MB of tokens")

    def first(self, raw: bytes) -> int | None:
        """Return the token of the first byte alone, if there is one."""
        return self._bytes.get(raw[0])

    @cached_property
    def _bytes(self) -> dict[int, int]:
        """The tokens of single bytes that are no text."""
        spelt = self._asked.spelt(RARE, self.learn)
        return {piece[0]: token for token, piece in spelt if len(piece) == 1 and piece[0] > 0x7F}

    def encode(self, raw: bytes) -> list[int]:
        """Return tokens whose bytes are these: the server's tokens of the text in them, and those
        of single bytes for what is no text, which JSON cannot carry."""
        tokens = list[int]()
        for run, text in runs_of(raw):
            if text is not None:
                tokens += self._spelling(run, text)
                continue
            for i in range(len(run)):
                token = self.first(run[i:])
                if token is None:
                    self._asked.refuse(f"no token is known for the byte {run[i]:#04x}")
                tokens.append(token)
        return tokens

    def _spelling(self, raw: bytes, text: str) -> list[int]:
        with self._lock:
            if raw in self._texts:
                self._texts.move_to_end(raw)
                return self._texts[raw]
        spelling = self._asked_for(raw, text)
        with self._lock:
            if raw not in self._texts:
                self._texts[raw] = spelling
                self._n_kept += _size(raw, spelling)
            while self._n_kept > MOST_KEPT and len(self._texts) > 1:
                self._n_kept -= _size(*self._texts.popitem(last=False))
        return spelling

    def _asked_for(self, raw: bytes, text: str, most: int = MOST_PARTS) -> list[int]:
        """Return the server's tokens of a text if they spell it, in at most so many parts."""
        for marker in dict.fromkeys((self._marker, MARKER)):
            spelt = self._asked.spelt(marker + text, self.learn)
            if parts := self._parted(spelt, text):
                different = dict.fromkeys(parts)
                if len(different) > most:
                    break
                most //= len(different)  # which ends it, however the server goes on
                found = {part: self._asked_for(part.encode(), part, most) for part in different}
                return [one for part in parts for one in found[part]]
            for i in range(len(marker) + 2 if marker else 1):
                if b"".join(piece for _, piece in spelt[i:]) == raw:
                    self._marker = marker
                    return [token for token, _ in spelt[i:]]
        self._asked.refuse(f"its tokens do not spell {text[:20]!r}")

    def _parted(self, spelt: Spelt, text: str) -> list[str]:
        """Return a text in parts where the server has read names in it as control tokens: each is
        cut after its first character."""
        if self._asked.keeps_names():
            return []
        pieces = {
            piece.decode("utf-8", "replace").strip()
            for token, piece in spelt
            if token in self._control_ids or LIKE_A_NAME.fullmatch(piece.strip())
        }
        names = sorted((name for name in pieces if len(name) > 1), key=len, reverse=True)
        if not names:
            return []
        places = [found.start() + 1 for found in re.finditer("|".join(map(re.escape, names)), text)]
        return [text[a:b] for a, b in pairwise([0, *places, len(text)])] if places else []


def _size(raw: bytes, tokens: list[int]) -> int:
    return len(raw) + 40 * len(tokens)
