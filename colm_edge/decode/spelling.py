"""One text in the tokens of two vocabularies, kept while it grows and is cut.

The base's tokens are spelt out, and the bytes between two control tokens, a part, are given to the
expert's tokenizer. A part is spelt in windows: the tokens of a window of bytes are settled up to
its last seam that has MARGIN bytes after it, and the next window begins there. A seam is a place
where what follows has the same tokens by itself. So the tokens depend on the bytes alone, not on
how the text came about, and what grows has no more than about a window to spell again. They are the
tokenizer's own of the whole part, as far as a token depends only on what is near.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np

from colm_edge.arrays import Ints, Tokens
from colm_edge.llama.held import common_prefix

WINDOW, MARGIN = 256, 64  # bytes; longer than what decides a token, by far
WINDOW_AWAY = 64 * WINDOW  # each is a request to a server
MOST_SEAMS = 8  # places that are tried as a seam of a window
UNKNOWN = -2  # a target


class Words(Protocol):
    """A vocabulary, its tokens spelt in bytes. Two that are equal are one vocabulary."""

    @property
    def n_vocab(self) -> int:
        """How many tokens it has; 0 where nobody tells."""

    @property
    def begin(self) -> int | None:
        """The token that every text begins with, if the vocabulary has one."""

    @property
    def ends(self) -> frozenset[int]:
        """Every token that ends a generation."""

    @property
    def end(self) -> int:
        """The one of them that ends a turn."""

    def piece(self, token: int) -> bytes:
        """Return a token's bytes; a control token has none."""

    def name(self, token: int) -> str:
        """Return how the vocabulary spells a token."""

    def control(self, name: str) -> int | None:
        """Return the control token of a name."""

    def encode(self, raw: bytes) -> list[int]:
        """Return tokens whose bytes are these, whatever they are."""

    def first(self, raw: bytes) -> int | None:
        """Return the longest token that these bytes begin with."""


class Crossing:
    """Two vocabularies, and what is known of how they meet: the base's and an expert's."""

    def __init__(self, ours: Words, theirs: Words) -> None:
        self.ours, self.theirs = ours, theirs
        self._targets: dict[int, Tokens] = {}  # by the bytes that are there
        self._controls: dict[int, tuple[int, ...]] = {}

    @cached_property
    def is_same(self) -> bool:
        """Whether the two are one vocabulary: the expert then holds the base's own tokens."""
        return self.ours == self.theirs

    @cached_property
    def is_whole(self) -> bool:
        """Whether all of the expert's tokens are known: of a server's, only those that it named."""
        return self.theirs.n_vocab > 0

    def target(self, token: int, n_skipped: int) -> int:
        """Return the base's token for one of the expert's whose first bytes are there already; -1
        for none. An end is the base's end of the same name, or else the one that ends a turn."""
        found: int | None = None
        if token in self.theirs.ends:
            same = self.ours.control(self.theirs.name(token))
            found = same if same in self.ours.ends else self.ours.end
            found = None if n_skipped else found
        elif rest := self.theirs.piece(token)[n_skipped:]:
            found = self.ours.first(rest)
        return -1 if found is None else found

    def targets(self, tokens: Ints, n_skipped: int) -> Tokens:
        """Return what `target` does of tokens, (n,)."""
        if not self.is_whole:
            return np.array([self.target(one, n_skipped) for one in tokens.tolist()], np.int32)
        if n_skipped not in self._targets:
            self._targets[n_skipped] = np.full(self.theirs.n_vocab, UNKNOWN, np.int32)
        known = self._targets[n_skipped]
        for token in tokens[known[tokens] == UNKNOWN].tolist():
            known[token] = self.target(token, n_skipped)
        return known[tokens]

    def controls(self, token: int) -> tuple[int, ...]:
        """Return the expert's tokens for a control token of the base: that of the same name; its
        own end for an end; for others their name as text."""
        if token == self.ours.begin:  # the expert has its own, or none
            return ()
        if token not in self._controls:
            ours, theirs = self.ours, self.theirs
            same = theirs.control(ours.name(token))
            if same is None and token in ours.ends:
                same = theirs.end
            spelt = theirs.encode(ours.name(token).encode()) if same is None else [same]
            self._controls[token] = tuple(spelt)
        return self._controls[token]

    @cached_property
    def _sorted(self) -> tuple[list[bytes], Ints]:
        """The expert's tokens by their bytes, in order."""
        pieces = [self.theirs.piece(token) for token in range(self.theirs.n_vocab)]
        order = sorted(range(len(pieces)), key=pieces.__getitem__)
        return [pieces[token] for token in order], np.array(order, np.int64)

    def longer(self, raw: bytes) -> Ints:
        """Return the expert's tokens that begin with these bytes and go on."""
        pieces, order = self._sorted
        start = bisect_right(pieces, raw)
        return order[start : bisect_right(pieces, raw, start, key=lambda one: one[: len(raw)])]

    def goes_on(self, raw: bytes) -> bool:
        """Return whether one of the expert's tokens may begin with these bytes and go on."""
        return not self.is_whole or len(self.longer(raw)) > 0


@dataclass(frozen=True, slots=True)
class Place:
    """Where the expert is asked what follows a token of the base.

    row: of the expert's tokens, the one whose state is read; -1 for none. given: bytes after it
    that are there already. path: the expert's own tokens of these, if they end there.
    """

    row: int
    given: bytes = b""
    path: tuple[int, ...] | None = None

    @property
    def rows(self) -> range:
        """Of the expert's tokens, those whose states are read."""
        return range(max(self.row, 0), self.row + 1 + len(self.path or ()))


@dataclass(frozen=True, slots=True)
class Seam:
    """The end of a settled window: its place in the part, the expert's tokens before it, and how
    many bytes of the part were looked at."""

    end: int
    n_tokens: int
    seen: int


@dataclass(slots=True)
class Part:
    """Text between control tokens, in the tokens of both.

    n_before: the expert's tokens before it. ours, theirs: where their tokens end in it, rising.
    seams: rising. seen: bytes already searched for another seam, in vain.
    """

    n_before: int
    raw: bytearray = field(default_factory=bytearray)
    ours: list[int] = field(default_factory=list)
    theirs: list[int] = field(default_factory=list)
    seams: list[Seam] = field(default_factory=lambda: [Seam(0, 0, 0)])
    seen: int = 0

    def cut(self, end: int) -> None:
        """Take back what follows an end of one of the base's tokens."""
        del self.raw[end:], self.ours[bisect_right(self.ours, end) :]
        self.seen = min(self.seen, end)
        while self.seams[-1].seen > end:
            self.seams.pop()
            self.seen = 0
        del self.theirs[self.seams[-1].n_tokens :]


class Spelling:
    """A text in the base's tokens, and in an expert's: `ids`."""

    def __init__(self, crossing: Crossing) -> None:
        self._crossing = crossing
        self._window = WINDOW if crossing.is_whole else WINDOW_AWAY
        begin = crossing.theirs.begin
        self.ids = array("i", () if begin is None else (begin,))
        self._n_begin = len(self.ids)
        self._tokens = array("i")
        self._is_whole = True  # `ids` spells all of the tokens
        self._places: list[tuple[Part, int] | int] = []  # of each of them; a row after a control
        self._part: Part | None = None  # that the text ends in

    def turn_to(self, tokens: Sequence[int]) -> None:
        """Spell these tokens of the base, going on from what they share with those before."""
        tokens = tokens if isinstance(tokens, array) else array("i", tokens)
        keep = common_prefix(self._tokens, tokens)
        if self._is_whole and keep == len(tokens) == len(self._tokens):
            return
        self._is_whole = False  # until all is spelt: a server may fail on the way
        self._cut(keep)
        self._tokens = tokens[:keep]
        ours = self._crossing.ours
        for token in tokens[keep:]:
            if raw := ours.piece(token):
                self._append(token, raw)
            else:
                self._close()
                self.ids.extend(self._crossing.controls(token))
                self._places.append(len(self.ids) - 1)
        self._tokens = tokens[:]
        self._spell()
        self._is_whole = True

    def _cut(self, keep: int) -> None:
        """Take back the tokens after the first ones, and the spelling of what may go on."""
        del self._places[keep:]
        last = self._places[-1] if keep else self._n_begin - 1
        if isinstance(last, int):
            self._part = None
            del self.ids[last + 1 :]
        else:
            self._part, end = last
            self._part.cut(end)
            del self.ids[self._part.n_before + len(self._part.theirs) :]

    def _append(self, token: int, raw: bytes) -> None:
        if self._part is None:
            self._part = Part(len(self.ids))
        part = self._part
        part.raw += raw
        part.ours.append(len(part.raw))
        self._places.append((part, len(part.raw)))
        if self._crossing.is_same:
            part.theirs.append(len(part.raw))
            part.seams.append(Seam(len(part.raw), len(part.theirs), len(part.raw)))
            self.ids.append(token)

    def _close(self) -> None:
        self._spell()
        self._part = None

    def _spell(self) -> None:
        """Spell the part that the text ends in, from its last seam on."""
        part = self._part
        if part is None or part.seams[-1].end == len(part.raw):
            return
        while found := self._next_seam(part):
            spelt, seam = found
            self._add(part, spelt)
            part.seams.append(seam)
            part.seen = 0
        self._add(part, self._crossing.theirs.encode(bytes(part.raw[part.seams[-1].end :])))

    def _add(self, part: Part, spelt: Sequence[int]) -> None:
        end = part.seams[-1].end
        for token in spelt:
            end += len(self._crossing.theirs.piece(token))
            part.theirs.append(end)
        self.ids.extend(spelt)

    def _next_seam(self, part: Part) -> tuple[list[int], Seam] | None:
        """Return the tokens up to the next seam of a part and the seam; None where there is none
        yet."""
        last, encode = part.seams[-1], self._crossing.theirs.encode
        start, size = last.end, self._window
        while start + size <= len(part.raw):
            seen = start + size
            if seen > part.seen:
                window = bytes(part.raw[start:seen])
                spelt = encode(window)
                for n, end in self._ends(spelt, window):
                    if encode(window[end:]) == spelt[n:]:
                        return spelt[:n], Seam(start + end, last.n_tokens + n, seen)
                part.seen = seen
            size *= 2
        return None

    def _ends(self, spelt: Sequence[int], window: bytes) -> Iterator[tuple[int, int]]:
        """Yield where a seam of a window may be, the last first: tokens and bytes before it."""
        end, n_left = len(window), MOST_SEAMS
        for n in range(len(spelt) - 1, 0, -1):
            end -= len(self._crossing.theirs.piece(spelt[n]))
            if end <= len(window) - MARGIN and _may_part(window, end):
                yield n, end
                if not (n_left := n_left - 1):
                    return

    def place(self, i: int) -> Place:
        """Return where the expert is asked what follows token i of the base."""
        found = self._places[i]
        if isinstance(found, int):
            return Place(found)
        (part, end), crossing = found, self._crossing
        ends_there = _has(part.theirs, end)
        if ends_there and crossing.is_same:
            return Place(_row(part, end))
        before = bisect_left(part.theirs, end)
        last = part.theirs[before - 1] if before else 0  # where the expert's last token begins
        ours = bisect_right(part.ours, last)
        while ours and not _has(part.theirs, part.ours[ours - 1]):
            ours -= 1
        agreed = part.ours[ours - 1] if ours else 0
        row, given = _row(part, agreed), bytes(part.raw[agreed:end])
        path = tuple(self.ids[row + 1 : _row(part, end) + 1]) if ends_there else None
        # Where no token goes on from what is given, or nothing stands before, the next is as it is.
        while path and (row < 0 or not crossing.goes_on(given)):
            row, given, path = row + 1, given[len(crossing.theirs.piece(path[0])) :], path[1:]
        return Place(row, given, path)

    def keeps(self, tokens: Sequence[int], n: int) -> bool:
        """Return whether the expert's tokens of the first n of these are the first of all."""
        self.turn_to(tokens[:n])
        first = self.ids[:]
        self.turn_to(tokens)
        return self.ids[: len(first)] == first


def _may_part(raw: bytes, end: int) -> bool:
    """Return whether a place may part text: between two characters, but not inside a run of spaces,
    of digits, or of one character, whose tokens depend on the run's length."""
    before = raw[max(end - 4, 0) : end].decode(errors="ignore")[-1:]
    after = raw[end : end + 4].decode(errors="ignore")[:1]
    if not before or not after or before == after or raw[end] & 0xC0 == 0x80:
        return False
    return not (
        (before.isspace() and after.isspace()) or (before.isnumeric() and after.isnumeric())
    )


def _has(ends: Sequence[int], end: int) -> bool:
    at = bisect_left(ends, end)
    return at < len(ends) and ends[at] == end


def _row(part: Part, end: int) -> int:
    """Return the row of the expert's last token before an end of one, or the part's beginning."""
    return part.n_before + bisect_right(part.theirs, end) - 1
