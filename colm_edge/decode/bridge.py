"""An expert that speaks another vocabulary: it keeps its own tokens of the same text.

The loop, the switch and the schedules know the base's tokens alone. A `Bridge` is the timeline of
such an expert towards them. The base's tokens are spelt out, and the expert evaluates the same
bytes in its own tokens (`spelling`). What it would write next becomes a distribution over the
base's tokens: the probability of each of its tokens goes to the longest token of the base that it
begins with. So a deferral still writes one token of the base, and bytes that were handed out never
change.

The end of the text is never settled: the expert might spell its last bytes together with what
follows, as ":" and a new line. So it is asked from the last place before its last token that both
agree on, and what it says is limited to spellings that begin with the bytes that are there (token
healing, github.com/guidance-ai/guidance). Only within one vocabulary there is nothing to heal, nor
after a token that no other one goes on from.

Its likelihoods are approximate: of all spellings of the unsettled bytes, those count that follow
the expert's own tokens and then go on with one that is longer. Tokens more than NEAR_NATS below the
likeliest are left out.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from colm_edge import readout
from colm_edge.arrays import Doubles, Floats, Ints
from colm_edge.cancel import Cancel
from colm_edge.decode.ahead import Away
from colm_edge.decode.spelling import Crossing, Place, Spelling
from colm_edge.decode.timeline import Around, Timeline
from colm_edge.errors import AbsentExpertError, ModelError
from colm_edge.llama.held import common_prefix

NEAR_NATS, MOST = 18.0, 2048  # nats, and tokens, of what an expert says that is looked at
MOST_ROWS = 512  # of its states at once: as many as a batch has tokens
MOST_KEPT = 8  # of its states, each as large as its vocabulary
NO_STATE = np.empty(0, np.float32)  # nobody reads an expert's hidden state


class Said(NamedTuple):
    """Tokens of the expert that begin with the bytes written already and go beyond them, (n,),
    their log-probabilities, and how many such bytes there are."""

    tokens: Ints
    logprobs: Doubles
    n_skipped: int


class Bridge(Around):
    """An expert's timeline, by the base's tokens; for one answer."""

    def __init__(
        self, inner: Timeline, crossing: Crossing, note: Callable[[str], None] | None = None
    ) -> None:
        """note: told why the expert is absent from here on, where its context is full."""
        super().__init__(inner)
        self._crossing, self._note = crossing, note
        self._places: dict[int, Place] = {}  # of the outputs, by the base's positions
        self._said: dict[int, Floats] = {}  # of them, what was read already
        self._ids = array("i")  # the expert's tokens at the last `sync`
        # Of the rows of the last output, the logits: what is asked right after it needs them.
        self._last, self._kept = range(0), dict[int, Floats]()
        self._totals: dict[int, float] = {}  # of the rows that were read
        self._features = np.empty(len(readout.FEATURES), np.float32)

    @cached_property
    def _spelling(self) -> Spelling:
        return Spelling(self._crossing)  # asks what the expert's vocabulary is

    def turn_to(self, prompt: array[int]) -> None:
        self._spelling.turn_to(prompt)
        self._inner.turn_to(self._spelling.ids[:])

    def keeps(self, tokens: Sequence[int], n: int) -> bool:
        spelling = self._spelling
        return spelling.keeps(tokens, n) and len(spelling.ids) <= self.n_ctx

    def sync(
        self, tokens: Sequence[int], outputs: Sequence[int] = (), cancel: Cancel | None = None
    ) -> int:
        """Evaluate the text of these tokens. Raises AbsentExpertError where it is longer than the
        expert's context in its own tokens, and where it is nothing in these."""
        rows = self._spell(tokens, outputs)
        if len(rows) > MOST_ROWS:
            return sum(self._read(i, cancel) for i in self._places)
        return self._inner.sync(self._ids, _unless_last(rows), cancel) if rows else 0

    def begin(
        self, tokens: Sequence[int], outputs: Sequence[int] = (), cancel: Cancel | None = None
    ) -> Future[Any]:
        """Begin what `sync` does, where the expert is `Away`; raises what that raises."""
        rows = self._spell(tokens, outputs)
        if 0 < len(rows) <= MOST_ROWS:
            assert isinstance(self._inner, Away)
            return self._inner.begin(self._ids, _unless_last(rows), cancel)
        done = Future[Any]()  # there is nothing to wait for, or `sync` has to ask in parts
        done.set_result(None)
        return done

    def _spell(self, tokens: Sequence[int], outputs: Sequence[int]) -> range:
        """Spell a text; return the rows that the outputs need, from the first on that is not
        known."""
        wanted, spelling = outputs or (len(tokens) - 1,), self._spelling
        spelling.turn_to(tokens)
        same, n = common_prefix(self._ids, spelling.ids), len(spelling.ids)
        self._ids = spelling.ids[:]
        self._places, self._said = {i: spelling.place(i) for i in wanted}, {}
        self._totals.clear()
        last = self._places[wanted[-1]].rows
        self._last = last if len(last) <= MOST_KEPT else range(0)
        self._kept = {i: one for i, one in self._kept.items() if i < same and i in self._last}
        if not n:  # a begin token alone, which the expert's vocabulary lacks
            raise AbsentExpertError("the text is empty in the expert's tokens")
        if n > self.n_ctx:
            message = f"the text has {n} of the expert's tokens, its context holds {self.n_ctx}"
            if self._note is not None:
                self._note(f"{message}; the base goes on alone.")
                self._note = None
            raise AbsentExpertError(message)
        needed = {row for place in self._places.values() for row in place.rows}
        return range(min(needed - self._kept.keys(), default=n), n)

    def _read(self, i: int, cancel: Cancel | None) -> int:
        """Evaluate the text up to one output and keep what the expert says there; a token of the
        base may be very many of its own."""
        place, n = self._places[i], 0
        if len(place.rows) > MOST_ROWS:
            place = self._places[i] = replace(place, path=None)
        if rows := place.rows:
            n = self._inner.sync(self._ids[: rows.stop], _unless_last(rows), cancel)
        self._said[i] = self._say(i)
        return n

    def state(self, i: int) -> tuple[Floats, Floats]:
        """Return what the expert says follows a token of the base, as log-probabilities over the
        base's vocabulary, (n_vocab,), and an empty array.

        Raises AbsentExpertError where the base has no word for what the expert would write there:
        a control token of its own, or nothing that begins with the bytes that are there; and
        ModelError for NaN and the like.
        """
        if i not in self._said:
            self._said[i] = self._say(i)
        if not len(self._said[i]):
            raise AbsentExpertError("the base has no token for what the expert would write")
        return self._said[i], NO_STATE

    def _say(self, i: int) -> Floats:
        """Return the log-probabilities of `state`, (n_vocab,), or (0,) where it raises."""
        said = list(self._says(self._places[i]))
        best = max((float(one.logprobs.max()) for one in said), default=-math.inf)
        targets, shares = [np.empty(0, np.int32)], [np.empty(0)]
        for one in said:
            near = one.logprobs > best - NEAR_NATS
            targets.append(self._crossing.targets(one.tokens[near], one.n_skipped))
            shares.append(np.exp(one.logprobs[near] - best))
        found, p = np.concatenate(targets), np.concatenate(shares)
        known = found >= 0
        if not known.any():
            return NO_STATE
        ids, at = np.unique(found[known], return_inverse=True)
        total = np.bincount(at, p[known])
        logprobs = np.full(self._crossing.ours.n_vocab, -np.inf, np.float32)
        logprobs[ids] = np.log(total / total.sum())
        return logprobs

    def _says(self, place: Place) -> Iterator[Said]:
        """Yield what the expert says at each row of a place."""
        row, spelt, given = place.row, 0.0, place.given
        for token in (*(place.path or ()), None) if row >= 0 else ():
            ids, logprobs = self._goes_on(row, given)
            if len(ids):
                yield Said(ids, logprobs + spelt, len(given))
            if token is not None:
                spelt += self._logprob(row, token)
                row, given = row + 1, given[len(self._crossing.theirs.piece(token)) :]

    def _goes_on(self, row: int, given: bytes) -> tuple[Ints, Doubles]:
        """Return the likeliest tokens after one of the expert's that begin with what is given and
        go on, and their log-probabilities."""
        logits = self._logits(row)
        ids = self._crossing.longer(given) if given else None
        shared = logits if ids is None else logits[ids]
        near = np.flatnonzero(shared > logits.max() - NEAR_NATS)
        if len(near) > MOST:
            near = near[np.argpartition(-shared[near], MOST)[:MOST]]
        logprobs = shared[near].astype(np.float64) - self._total(row)
        return near if ids is None else ids[near], logprobs

    def _logprob(self, row: int, token: int) -> float:
        """Return how likely a token is after one of the expert's."""
        return float(self._logits(row)[token]) - self._total(row)

    def _total(self, row: int) -> float:
        """Return the log-sum-exp of what the expert says after one of its tokens."""
        if row not in self._totals:
            logits, out = self._logits(row), self._features
            try:
                _, total = readout.read_alone(logits, out, len(logits))
            except ValueError as e:
                raise ModelError(f"the expert is broken: {e}; use another file") from e
            self._totals[row] = total
        return self._totals[row]

    def _logits(self, row: int) -> Floats:
        """Return what the expert says after one of its tokens."""
        if row not in self._kept:
            logits, _ = self._inner.state(row)
            if row not in self._last:
                return logits
            self._kept[row] = logits.copy()
        return self._kept[row]


def _unless_last(rows: range) -> Sequence[int]:
    """Return rows as `sync` takes them most quickly: none stands for the last one."""
    return rows if len(rows) > 1 else ()
