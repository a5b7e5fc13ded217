"""Cut tokens into the batches that cost least, by a table of what a decode of k tokens costs.

`measure` fills the table.
"""

from __future__ import annotations

import statistics
from bisect import bisect_left
from collections.abc import Sequence
from functools import cached_property

SEVERAL = 4  # outputs of the decode that measures what more than one costs
# llama.cpp's kernels for CPUs multiply four rows of a batch together, and each of the rest alone.
BLOCK = 4
QUICK = 0.001  # seconds of a decode of one token
# The share that another batch size must save: the table is a measurement and may be off.
MARGIN = 0.1
LONGEST_GAP = 256  # tokens between two deferrals, where a speed is predicted


class CostTable:
    """The seconds that one decode takes, by its number of tokens.

    sizes: numbers of tokens, rising. seconds: of each. several: seconds more when a decode of
    SEVERAL tokens has as many outputs, instead of one.
    """

    def __init__(
        self, sizes: tuple[int, ...], seconds: tuple[float, ...], several: float = 0.0
    ) -> None:
        self.sizes, self.seconds, self.several = sizes, seconds, several

    def __call__(self, n: int) -> float:
        """Return the seconds of a decode of n tokens. Between measured sizes they are interpolated,
        but no less than those of whole blocks and of single tokens besides; above the largest they
        are proportional to n."""
        known = self._known
        return known[n] if n < len(known) else self.seconds[-1] * n / self.sizes[-1]

    @cached_property
    def _known(self) -> list[float]:
        single, known = self._single(), [0.0]
        for n in range(1, self.sizes[-1] + 1):
            blocks = max(1, n // BLOCK * BLOCK)
            least = self._between(blocks) + (n - blocks) * single if n not in self.sizes else 0.0
            known.append(max(self._between(n), least))
        return known

    def _single(self) -> float:
        """Return the seconds of a token that fills no block, 0 if none was measured."""
        found = []
        for n, taken in zip(self.sizes, self.seconds, strict=True):
            blocks = max(1, n // BLOCK * BLOCK)
            if n > blocks and blocks in self.sizes:
                found.append((taken - self._between(blocks)) / (n - blocks))
        return statistics.median_low(found) if found else 0.0

    def _between(self, n: int) -> float:
        at = bisect_left(self.sizes, n)
        if self.sizes[at] == n or at == 0:
            return self.seconds[at]
        low, high = self.sizes[at - 1], self.sizes[at]
        share = (n - low) / (high - low)
        return self.seconds[at - 1] * (1 - share) + self.seconds[at] * share

    def all_states(self, n: int) -> float:
        """Return the seconds of a decode of n tokens after each of which the state is needed."""
        return self(n) + self.several * (n - 1) / (SEVERAL - 1)

    def reviewing(self, n: int) -> float:
        """Return the seconds of n tokens in one batch, the state after each of which is needed."""
        return self.whole(n) + self.all_states(n) - self(n)

    @property
    def is_quick(self) -> bool:
        """Whether decodes are so quick that planning cheaper ones takes longer than it saves."""
        return self(1) < QUICK

    def whole(self, n: int) -> float:
        """Return the seconds of n tokens in one batch, which is padded where that is cheaper."""
        filled = self._filled_up
        return filled[n] if n < len(filled) else self(n)

    def best(self, n: int) -> float:
        """Return the seconds of n tokens in the cheapest pieces."""
        plan = self._plan
        return plan[n][0] if n < len(plan) else self(n)

    def pieces(self, n: int, room: int, *, whole: bool = False) -> list[tuple[int, int]]:
        """Return how to evaluate n tokens: a list of (tokens, size of the padded batch), in order.

        room: the largest possible batch. whole: use one piece, because all outputs are needed.
        """
        plan = self._plan
        if n >= len(plan):
            return [(n, n)]
        if whole:
            return [(n, self._filled(n, room))]
        found = []
        while n:
            piece = plan[n][1]
            found.append((piece, self._filled(piece, room)))
            n, room = n - piece, room - piece
        return found

    def _filled(self, n: int, room: int) -> int:
        """Return the cheapest size to pad a batch of n tokens to, at most room."""
        larger = [m for m in self.sizes if n < m <= room]
        best = min(larger, key=self, default=n)
        return best if self(best) < (1 - MARGIN) * self(n) else n

    @cached_property
    def _filled_up(self) -> list[float]:
        return [0.0] + [self(self._filled(n, n + n)) for n in range(1, self.sizes[-1] + 1)]

    @cached_property
    def _plan(self) -> list[tuple[float, int]]:
        """For each n: (seconds, tokens of the first piece), by dynamic programming."""
        plan, cost = [(0.0, 0)], self._filled_up
        for n in range(1, len(cost)):
            piece = min(range(1, n + 1), key=lambda k: (cost[k] + plan[n - k][0], -k))
            cut = cost[piece] + plan[n - piece][0]
            plan.append((cut, piece) if cut < (1 - MARGIN) * cost[n] else (cost[n], n))
        return plan


def seconds_per_token(base: CostTable, expert: CostTable, defer_rate: float) -> float:
    """Return what a token costs a pair that defers at random at a rate: the base at every token,
    and at each deferral the expert's batch of the tokens since the last."""
    return base(1) + _calls_per_token(expert, defer_rate)


def team_seconds_per_token(
    base: CostTable, experts: Sequence[CostTable], defer_rate: float
) -> float:
    """Return the same of several experts that are called equally often, and defer_rate of all
    tokens together."""
    return base(1) + sum(_calls_per_token(one, defer_rate / len(experts)) for one in experts)


def best_window(
    base: CostTable, expert: CostTable, defer_rate: float, undone: float, most: int
) -> int:
    """Return after how many drafts of the base an expert that reviews them is best called, at most
    `most`: longer batches are cheaper by the token, and more of them is for nothing.

    defer_rate: of drafts, at which it is called in any case. undone: the share of drafts it undoes.
    """
    found, fastest = most, 0.0
    unsure = 1.0  # the probability that nothing was deferred yet
    kept, written = 1.0, 0.0  # that no draft is undone, and the tokens that come of them
    tokens = seconds = 0.0  # of the calls at earlier deferrals
    for n in range(1, most + 1):
        batch = expert.reviewing(n)  # at a deferral, of n - 1 drafts and the token before them
        tokens += unsure * defer_rate * (written + kept)
        seconds += unsure * defer_rate * (n * base(1) + batch)
        unsure *= 1 - defer_rate
        written += kept
        kept *= 1 - undone
        # The last draft's state is not needed: if it stays, it is in the next batch.
        speed = (tokens + unsure * written) / (seconds + unsure * (n * base(1) + batch))
        if speed > fastest:
            found, fastest = n, speed
    return found


def _calls_per_token(expert: CostTable, defer_rate: float) -> float:
    if defer_rate <= 0:
        return 0.0
    batch, still = 0.0, 1.0  # the mean batch's seconds, and the share of gaps at least this long
    for n in range(1, LONGEST_GAP):
        batch += still * defer_rate * expert.best(n)
        still *= 1 - defer_rate
    batch += still * expert.best(LONGEST_GAP)
    return defer_rate * batch


def break_even(base: CostTable, expert: CostTable) -> float | None:
    """Return the defer rate above which a pair writes more slowly than its expert alone: 0 where
    it always does, None where it never does."""
    if base(1) >= expert(1):
        return 0.0
    low, high = 0.0, 1.0
    if seconds_per_token(base, expert, high) <= expert(1):
        return None
    for _ in range(20):
        middle = (low + high) / 2
        slower = seconds_per_token(base, expert, middle) > expert(1)
        low, high = (low, middle) if slower else (middle, high)
    return low


def slower(base: CostTable | None, expert: CostTable | None, defer_rate: float | None) -> str:
    """Return a line that says so if the pair is slower than its expert alone; "" if it is not, is
    too fast for anybody to wait, or something is not known."""
    if base is None or expert is None or defer_rate is None or base.is_quick:
        return ""
    together = seconds_per_token(base, expert, defer_rate)
    if together <= expert(1):
        return ""
    return (
        f"this pair is slower here than its expert alone: {1 / together:.3g} tokens a second at "
        f"{defer_rate:.0%} deferred, {1 / expert(1):.3g} alone; `colm-edge info` says what would "
        "help"
    )
