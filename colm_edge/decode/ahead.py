"""The base goes on while the expert is away: on a server, or on a device of its own.

At a deferral the base bets that the expert will write the base's own choice, and evaluates what
would follow, token by token, until the expert's token is there. Where the bet is won, these states
are known already; where it is lost, they are dropped. The text does not change: every token is
still read off the same states by the same switch. It costs nothing but the rest of a decode that
the expert's answer has to wait for, so a decode begins where it promises to save more than that.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from concurrent.futures import Future
from time import perf_counter
from typing import Any, Protocol, runtime_checkable

import numpy as np

from colm_edge.arrays import Floats
from colm_edge.cancel import Cancel
from colm_edge.decode.planner import Rate
from colm_edge.decode.timeline import Around, Timeline
from colm_edge.llama.account import Account

MOST = 32  # tokens; each takes a copy of the logits
AGREES, GOES_ON = 0.5, 0.9  # before anything is known: of the first token, and of each one behind
RECENT = 0.3  # weight of the last observation in a mean of seconds


@runtime_checkable
class Away(Timeline, Protocol):
    """The timeline of an expert that evaluates while the caller does something else."""

    def begin(
        self, tokens: Sequence[int], outputs: Sequence[int] = (), cancel: Cancel | None = None
    ) -> Future[Any]:
        """Begin what `sync` does, and return at once; a `sync` of the same tokens waits for it."""


class Mean:
    """A mean of seconds in which old observations fade; None before the first."""

    value: float | None = None

    def add(self, seconds: float) -> None:
        before = seconds if self.value is None else self.value
        self.value = before + RECENT * (seconds - before)


class Ahead(Around):
    """A base's timeline that also knows what was evaluated ahead; for one answer.

    end_tokens: nothing is evaluated after them. n_choose, defer_row: as for `Picker`.
    """

    def __init__(
        self, base: Timeline, end_tokens: frozenset[int], n_choose: int, defer_row: int = -1
    ) -> None:
        super().__init__(base)
        self._base, self._end_tokens = base, end_tokens
        self._n_choose, self._defer_row = n_choose, defer_row
        self._last = array("i")  # of the last `sync`, if its last state can be read
        self._path = array("i")  # what was evaluated ahead, and all before it
        self._from = 0  # its first token that was a bet
        self._states: dict[int, tuple[Floats, Floats]] = {}  # by place in the path
        self._ahead = Account()  # of what was evaluated ahead, not counted until the next `sync`
        self._agrees, self._goes_on = Rate(AGREES, 4), Rate(GOES_ON, 8)
        self._decode, self._reply = Mean(), Mean()
        self.n_ahead = self.n_won = 0  # tokens evaluated ahead, and those that were written

    @property
    def account(self) -> Account:
        return self._base.account - self._ahead

    def sync(
        self, tokens: Sequence[int], outputs: Sequence[int] = (), cancel: Cancel | None = None
    ) -> int:
        n, n_done = len(tokens), self._ahead.n_evaluated or 0
        self._ahead, self._last = Account(), array("i")
        if not outputs and isinstance(tokens, array):
            self._learn(tokens)
            self._last = tokens[:]
            if n - 1 in self._states and tokens == self._path[:n]:
                self._states.pop(n - 2, None)
                self.n_won += 1
                return n_done
        self._states.clear()
        self._path = array("i")
        return n_done + self._base.sync(tokens, outputs, cancel)

    def state(self, i: int) -> tuple[Floats, Floats]:
        # Copies, which whoever waits for the expert can read while the base goes on.
        if i not in self._states:
            logits, hidden = self._base.state(i)
            self._states[i] = logits.copy(), hidden.copy()
        return self._states[i]

    def _learn(self, tokens: array[int]) -> None:
        """Learn from the last of these tokens whether a bet was won."""
        at, path = len(tokens) - 1, self._path
        if self._from <= at < len(path) and tokens[:at] == path[:at]:
            rate = self._agrees if at == self._from else self._goes_on
            rate.add(tokens[at] == path[at])

    def go_on(self, tokens: Sequence[int], reply: Future[Any], cancel: Cancel | None) -> None:
        """Evaluate ahead until the expert's reply to `tokens` is there."""
        begun, asked = perf_counter(), array("i", tokens)
        n = self._from = len(self._last)
        # The expert may be asked about the base's choice as well.
        if not n or self._last != asked[:n] or len(asked) - n > 1:
            return
        if self._path[: len(asked)] != asked:
            self._path = asked
            self._states = {i: state for i, state in self._states.items() if i < n}
        if len(self._path) == n:
            self._path.append(self._choice(n - 1))
        path, most = self._path, min(self.n_ctx, n + MOST)
        p = self._agrees.value * self._goes_on.value ** (len(path) - 1 - n)
        while len(path) <= most and path[-1] not in self._end_tokens and not reply.done():
            if not self._pays(p, perf_counter() - begun):
                break
            if cancel is not None:
                cancel.check()
            begun_at, before = perf_counter(), self._base.account.copy()
            self._base.sync(path, (), cancel)
            self._ahead += self._base.account - before
            self._decode.add(perf_counter() - begun_at)
            self.n_ahead += 1
            path.append(self._choice(len(path) - 1))
            p *= self._goes_on.value

    def _choice(self, i: int) -> int:
        logits = self.state(i)[0][: self._n_choose]
        choice = int(logits.argmax())
        if choice == self._defer_row:  # which is the switch and never written
            others = logits.copy()
            others[choice] = -np.inf
            choice = int(others.argmax())
        return choice

    def _pays(self, p: float, waited: float) -> bool:
        """Return whether to begin a decode: p is the probability that its token will be written."""
        decode, reply = self._decode.value, self._reply.value
        if decode is None or reply is None:
            return True
        late = max(0.0, waited + decode - reply)
        return p * decode > (1 - p) * late

    def replied(self, seconds: float) -> None:
        """Learn how long the expert took."""
        self._reply.add(seconds)


class Awaited(Around):
    """The timeline of an expert that is away: while it evaluates, the base goes on."""

    def __init__(self, expert: Away, base: Ahead) -> None:
        super().__init__(expert)
        self._expert, self._base = expert, base

    def sync(
        self, tokens: Sequence[int], outputs: Sequence[int] = (), cancel: Cancel | None = None
    ) -> int:
        begun = perf_counter()
        reply = self._expert.begin(tokens, outputs, cancel)
        reply.add_done_callback(lambda _: self._base.replied(perf_counter() - begun))
        self._base.go_on(tokens, reply, cancel)
        return self._expert.sync(tokens, outputs, cancel)
