"""An expert that speaks another vocabulary: it keeps its own tokens of the same text.

The loop, the switch and the schedules know the base's tokens alone. A `Bridge` is the timeline of
such an expert towards them. The base's tokens are spelt out, and the expert evaluates the same
bytes in its own tokens. What it would write next becomes a distribution over the base's tokens: the
probability of each of its tokens goes to the longest token of the base that it begins with. So a
deferral still writes one token of the base, and bytes that were handed out never change.

The end of the text is never settled: the expert might spell its last bytes together with what
follows, as ":" and a new line. So it is asked from the last place before its last token that both
agree on, and what it says is limited to spellings that begin with the bytes that are there (token
healing, github.com/guidance-ai/guidance). Only within one vocabulary there is nothing to heal.

Its likelihoods are approximate: of all spellings of the unsettled bytes, those count that follow
the expert's own tokens and then go on with one that is longer. Tokens more than NEAR nats below the
likeliest are left out.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

import numpy as np

from colm_edge.cancel import Cancel
from colm_edge.decode.timeline import Around, Floats, Timeline
from colm_edge.errors import AbsentExpertError

NEAR, MOST = 18.0, 2048  # nats, and tokens, of what an expert says that is looked at
MOST_ROWS = 512  # of its states at once: as many as a batch has tokens
NO_STATE = np.empty(0, np.float32)  # nobody reads an expert's hidden state


class Words(Protocol):
    """A vocabulary, its tokens spelt in bytes."""

    @property
    def n_vocab(self) -> int: ...
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
        self._targets: dict[tuple[int, int], int] = {}
        self._controls: dict[int, tuple[int, ...]] = {}

    @cached_property
    def is_same(self) -> bool:
        """Whether the two are one vocabulary: the expert then holds the base's own tokens."""
        ours, theirs = self.ours, self.theirs
        return ours.n_vocab == theirs.n_vocab and all(
            ours.piece(token) == theirs.piece(token) and ours.name(token) == theirs.name(token)
            for token in range(ours.n_vocab)
        )

    def encode(self, raw: bytes, tokens: Sequence[int]) -> Sequence[int]:
        """Return the expert's tokens of some bytes, which the base spells as `tokens`."""
        return tokens if self.is_same else self.theirs.encode(raw)

    def target(self, token: int, n_skipped: int) -> int:
        """Return the base's token for one of the expert's whose first bytes are there already; -1
        for none."""
        key = token, n_skipped
        if key not in self._targets:
            found: int | None = None
            if token in self.theirs.ends:
                found = None if n_skipped else self.ours.end
            elif rest := self.theirs.piece(token)[n_skipped:]:
                found = self.ours.first(rest)
            self._targets[key] = -1 if found is None else found
        return self._targets[key]

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


@dataclass(slots=True)
class Part:
    """Text between control tokens, in the tokens of both.

    n_before: the expert's tokens before it. tokens: the base's. ours, theirs: where their tokens
    end in it, rising.
    """

    n_before: int
    raw: bytearray = field(default_factory=bytearray)
    tokens: list[int] = field(default_factory=list)
    ours: list[int] = field(default_factory=list)
    theirs: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Place:
    """Where the expert is asked what follows a token of the base.

    row: of the expert's tokens, the one whose state is read; -1 for none. given: bytes after it
    that are there already. path: the expert's own tokens of these, if they end there.
    """

    row: int
    given: bytes = b""
    path: tuple[int, ...] | None = None


class Bridge(Around):
    """An expert's timeline, by the base's tokens; for one answer."""

    def __init__(self, inner: Timeline, crossing: Crossing) -> None:
        super().__init__(inner)
        self._crossing = crossing
        self._places: dict[int, Place] = {}  # of the outputs, by the base's positions
        self._told: dict[int, Floats] = {}  # of them, what was read already
        self._ids = array("i")

    def turn_to(self, prompt: array[int]) -> None:
        ids, _ = spell(self._crossing, prompt, [])
        self._inner.turn_to(ids)

    def sync(
        self, tokens: Sequence[int], outputs: Sequence[int] = (), cancel: Cancel | None = None
    ) -> int:
        """Evaluate the text of these tokens. Raises AbsentExpertError where it is longer than the
        expert's context in its own tokens, and where it is nothing in these."""
        wanted = list(outputs) or [len(tokens) - 1]
        self._ids, places = spell(self._crossing, tokens, wanted)
        self._places, self._told = dict(zip(wanted, places, strict=True)), {}
        if not self._ids:  # a begin token alone, which the expert's vocabulary lacks
            raise AbsentExpertError("the text is empty in the expert's tokens")
        if len(self._ids) > self._inner.n_ctx:
            raise AbsentExpertError(
                f"the text has {len(self._ids)} of the expert's tokens, its context holds "
                f"{self._inner.n_ctx}"
            )
        first = min((place.row for place in places if place.row >= 0), default=len(self._ids) - 1)
        if len(self._ids) - first > MOST_ROWS:
            return sum(self._read(i, cancel) for i in wanted)
        return self._inner.sync(self._ids, range(first, len(self._ids)), cancel)

    def _read(self, i: int, cancel: Cancel | None) -> int:
        """Evaluate the text up to one output and keep what the expert says there; a token of the
        base may be very many of its own."""
        place, n = self._places[i], 0
        if place.path is not None and len(place.path) >= MOST_ROWS:
            place = self._places[i] = replace(place, path=None)
        if place.row >= 0:
            end = place.row + 1 + len(place.path or ())
            n = self._inner.sync(self._ids[:end], range(place.row, end), cancel)
        self._told[i] = self._say(i)
        return n

    def state(self, i: int) -> tuple[Floats, Floats]:
        """Return what the expert says follows a token of the base, as logits over the base's
        vocabulary, (n_vocab,), and an empty array.

        Raises AbsentExpertError where the base has no word for what the expert would write there:
        a control token of its own, or nothing that begins with the bytes that are there.
        """
        logits = self._told[i] if i in self._told else self._say(i)
        if not len(logits):
            raise AbsentExpertError("the base has no token for what the expert would write")
        return logits, NO_STATE

    def _say(self, i: int) -> Floats:
        """Return the logits of `state`, (n_vocab,), or (0,) where it raises."""
        place, n = self._places[i], self._crossing.ours.n_vocab
        p = np.zeros(n)
        if place.row >= 0:
            row, spelt, given = place.row, 0.0, place.given
            for token in place.path or ():
                self._add(p, row, spelt, given)
                spelt += self._logprob(row, token)
                row, given = row + 1, given[len(self._crossing.theirs.piece(token)) :]
            self._add(p, row, spelt, given)
        if not p.any():
            return NO_STATE
        with np.errstate(divide="ignore"):
            return np.log(p).astype(np.float32)

    def _add(self, p: np.ndarray, row: int, log_weight: float, given: bytes) -> None:
        """Add what the expert says after one of its tokens, of tokens that begin with what is
        given and are longer."""
        logits, _ = self._inner.state(row)
        best = float(logits.max())
        near = np.flatnonzero(logits > best - NEAR)
        if given:
            piece = self._crossing.theirs.piece
            near = np.array([t for t in near.tolist() if piece(t).startswith(given)], np.int64)
        if len(near) > MOST:
            near = near[np.argpartition(-logits[near], MOST)[:MOST]]
        if not len(near):
            return
        total = best + math.log(float(np.exp(logits - best, dtype=np.float64).sum()))
        target = self._crossing.target
        targets = np.array([target(t, len(given)) for t in near.tolist()], np.int64)
        shares = np.exp(logits[near].astype(np.float64) - total + log_weight)
        known = targets >= 0
        np.add.at(p, targets[known], shares[known])

    def _logprob(self, row: int, token: int) -> float:
        logits = self._inner.state(row)[0].astype(np.float64)
        best = logits.max()
        return float(logits[token] - best - math.log(np.exp(logits - best).sum()))


def spell(
    crossing: Crossing, tokens: Sequence[int], wanted: Sequence[int]
) -> tuple[array[int], list[Place]]:
    """Return the expert's tokens of the base's, and the places of the wanted positions."""
    ours, theirs = crossing.ours, crossing.theirs
    ids = array("i", () if theirs.begin is None else (theirs.begin,))
    parts: list[tuple[Part, int] | Place] = []  # of each token of the base
    part: Part | None = None

    def close() -> None:
        nonlocal part
        if part is not None:
            spelt, end = crossing.encode(bytes(part.raw), part.tokens), 0
            for token in spelt:
                end += len(theirs.piece(token))
                part.theirs.append(end)
            ids.extend(spelt)
            part = None

    for token in tokens:
        if raw := ours.piece(token):
            part = part or Part(len(ids))
            part.raw += raw
            part.tokens.append(token)
            part.ours.append(len(part.raw))
            parts.append((part, len(part.raw)))
        else:
            close()
            ids.extend(crossing.controls(token))
            parts.append(Place(len(ids) - 1))
    close()
    return ids, [_place(parts[i], ids, crossing) for i in wanted]


def _place(found: tuple[Part, int] | Place, ids: array[int], crossing: Crossing) -> Place:
    """Return where the expert is asked for what follows so many bytes of a part."""
    if isinstance(found, Place):
        return found
    part, end = found
    ends_there = _has(part.theirs, end)
    if ends_there and crossing.is_same:
        return Place(_row(part, end))
    before = bisect_left(part.theirs, end)
    last = part.theirs[before - 1] if before else 0  # where the expert's last token begins
    starts = part.ours[: bisect_left(part.ours, end)]
    agreed = next((at for at in reversed(starts) if at <= last and _has(part.theirs, at)), 0)
    row, given = _row(part, agreed), bytes(part.raw[agreed:end])
    path = tuple(ids[row + 1 : _row(part, end) + 1]) if ends_there else None
    if row < 0 and path:  # there is nothing before it: its first token is as it is
        return Place(0, given[len(crossing.theirs.piece(path[0])) :], path[1:])
    return Place(row, given, path)


def _has(ends: Sequence[int], end: int) -> bool:
    at = bisect_left(ends, end)
    return at < len(ends) and ends[at] == end


def _row(part: Part, end: int) -> int:
    """Return the row of the expert's last token before an end of one, or the part's beginning."""
    return part.n_before + bisect_right(part.theirs, end) - 1
