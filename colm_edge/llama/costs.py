"""What a decode of k tokens costs, as a table: the batches that cost least, and the speed that a
pair should have.

`measure` fills the table.
"""

from __future__ import annotations

import statistics
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import accumulate

OUTPUTS = (4, 16)  # of the decodes that measure what more than one costs
# llama.cpp's kernels for CPUs multiply four rows of a batch together, and each of the rest alone.
BLOCK = 4
QUICK = 0.001  # seconds of a decode of one token
# The share that another batch size must save: the table is a measurement and may be off.
MARGIN = 0.1
LONGEST_GAP = 256  # tokens between two deferrals, where a speed is predicted


class CostTable:
    """The seconds that one decode takes, by its number of tokens.

    sizes: numbers of tokens, rising. seconds: of each. more: seconds more when a decode of so many
    tokens as OUTPUTS says has as many outputs, instead of one; as far as that was measured.
    """

    def __init__(
        self, sizes: tuple[int, ...], seconds: tuple[float, ...], more: tuple[float, ...] = ()
    ) -> None:
        self.sizes, self.seconds = sizes, seconds
        self.more = tuple(accumulate(more, max))  # measured, so they may fall by chance

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

    def outputs(self, n: float) -> float:
        """Return the seconds that n outputs take more than one: interpolated, and beyond what was
        measured by the last ones. n may be a mean."""
        known = [(1, 0.0), *zip(OUTPUTS, self.more, strict=False)]
        if len(known) == 1:
            return 0.0
        n = max(1.0, n)
        at = min(max(1, bisect_left([k for k, _ in known], n)), len(known) - 1)
        (low, less), (high, more) = known[at - 1 : at + 1]
        return less + (more - less) * (n - low) / (high - low)

    def all_states(self, n: int) -> float:
        """Return the seconds of a decode of n tokens after each of which the state is needed."""
        return self(n) + self.outputs(n)

    def reviewing(self, n: int, n_outputs: float | None = None) -> float:
        """Return the seconds of n tokens in one batch, padded where that is cheaper, after so many
        of which, by default all, the state is needed."""
        return self.whole(n) + self.outputs(n if n_outputs is None else n_outputs)

    @property
    def is_quick(self) -> bool:
        """Whether decodes are so quick that planning cheaper ones takes longer than it saves."""
        return self(1) < QUICK

    def whole(self, n: int) -> float:
        """Return the seconds of n tokens in one batch, which is padded where that is cheaper."""
        filled = self._filled_up
        return filled[n] if n < len(filled) else self(n)

    def best(self, n: int) -> float:
        """Return the seconds of n tokens in the cheapest chunks."""
        plan = self._plan
        return plan[n][0] if n < len(plan) else self(n)

    def chunks(self, n: int, room: int, *, whole: bool = False) -> list[tuple[int, int]]:
        """Return how to evaluate n tokens: a list of (tokens, size of the padded batch), in order.

        room: the largest possible batch. whole: use one chunk, because all outputs are needed.
        """
        plan = self._plan
        if n >= len(plan):
            return [(n, n)]
        if whole:
            return [(n, self.padded(n, room))]
        found = []
        while n:
            chunk = plan[n][1]
            found.append((chunk, self.padded(chunk, room)))
            n, room = n - chunk, room - chunk
        return found

    def padded(self, n: int, room: int, *, all_states: bool = False) -> int:
        """Return the cheapest size to pad a batch of n tokens to, at most room.

        all_states: whether each token's state is computed, those that pad it too.
        """
        cost = self.all_states if all_states else self
        larger = [m for m in self.sizes if n < m <= room]
        best = min(larger, key=cost, default=n)
        return best if cost(best) < (1 - MARGIN) * cost(n) else n

    @cached_property
    def _filled_up(self) -> list[float]:
        return [0.0] + [self(self.padded(n, n + n)) for n in range(1, self.sizes[-1] + 1)]

    @cached_property
    def _plan(self) -> list[tuple[float, int]]:
        """For each n: (seconds, tokens of the first chunk), by dynamic programming."""
        plan, cost = [(0.0, 0)], self._filled_up
        for n in range(1, len(cost)):
            chunk = min(range(1, n + 1), key=lambda k: (cost[k] + plan[n - k][0], -k))
            cut = cost[chunk] + plan[n - chunk][0]
            plan.append((cut, chunk) if cut < (1 - MARGIN) * cost[n] else (cost[n], n))
        return plan


def seconds_per_token(base: CostTable, experts: Sequence[CostTable], defer_rate: float) -> float:
    """Return what a token costs a pair that defers at random at a rate: the base at every token,
    and at each deferral the expert's batch of the tokens since the last. Several experts are called
    equally often."""
    return base(1) + sum(_calls_per_token(one, defer_rate / len(experts)) for one in experts)


def best_window(
    base: CostTable,
    expert: CostTable,
    deferred: Callable[[int], float],
    undone: Callable[[int], float],
    most: int,
    looked_at: float = 1.0,
) -> int:
    """Return after how many drafts of the base an expert that reviews them is best called: longer
    batches cost less per token, but more of each is thrown away. Fewer than `most` have to
    promise a tenth more tokens per second.

    deferred, undone: how likely a place is deferred, and a draft there undone if it is not, by the
    number of the base's tokens since the expert's last. looked_at: the share of the drafts that is;
    before the first one that is, others pass.
    """
    passing = round(1 / max(looked_at, 1 / most) - 1)

    def reviewing(n: int, n_drafts: int) -> float:
        """Of a batch of n tokens that tells of so many drafts, and of a deferral if n is more."""
        asked = 1 + looked_at * (n_drafts - 1) if n_drafts else 0
        return expert.reviewing(n + passing, asked + (n > n_drafts))

    def speed(window: int) -> float:
        """From one token of the expert's to the next, or to the horizon."""
        tokens = seconds = 0.0
        at, alive = 0, 1.0  # the probability that the expert wrote none yet
        while at < LONGEST_GAP and alive > 0.01:
            drafting = alive  # the probability that none of these places is deferred
            kept, written = 1.0, 0.0  # that no draft is undone, and the tokens that come of them
            tokens += alive * passing
            seconds += alive * passing * base(1)
            at += passing
            for n in range(1, window + 1):
                defers = deferred(at)
                # Of the drafts before, and the token before them; it writes here if they stay.
                share = drafting * defers
                tokens += share * (written + kept)
                seconds += share * (n * base(1) + reviewing(n, n - 1))
                drafting *= 1 - defers
                written += kept
                kept *= 1 - undone(at)
                at += 1
            # The last draft's state is not needed: if it stays, it is in the next batch.
            tokens += drafting * written
            seconds += drafting * (window * base(1) + reviewing(window, window))
            alive = drafting * kept
        return tokens / seconds

    best = max(_windows(most), key=speed)
    return best if speed(best) > (1 + MARGIN) * speed(most) else most


def _windows(most: int) -> Iterator[int]:
    """Yield the windows that are looked at: whole blocks, about a quarter more each time."""
    yield from (n for n in (1, 2, most) if n <= most)
    n = BLOCK
    while n < most:
        yield n
        n += max(1, n // 4 // BLOCK) * BLOCK


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
    if seconds_per_token(base, [expert], high) <= expert(1):
        return None
    for _ in range(20):
        middle = (low + high) / 2
        slower = seconds_per_token(base, [expert], middle) > expert(1)
        low, high = (low, middle) if slower else (middle, high)
    return low


def slowness_note(
    base: CostTable | None, expert: CostTable | None, defer_rate: float | None
) -> str:
    """Return a line that says so if the pair is slower than its expert alone; "" if it is not, is
    too fast for anybody to wait, or something is not known."""
    if base is None or expert is None or defer_rate is None or base.is_quick:
        return ""
    together = seconds_per_token(base, [expert], defer_rate)
    if together <= expert(1):
        return ""
    return (
        f"this pair is slower here than its expert alone: {1 / together:.3g} tokens per second at "
        f"{defer_rate:.0%} deferred, {1 / expert(1):.3g} alone; `colm-edge info` says what would "
        "help"
    )
