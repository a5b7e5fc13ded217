"""What a KV cache holds, and how it was evaluated: how much of it a new prompt may keep.

The same tokens in other batches come out with other last bits, and quantised weights make more of
them. So that an answer depends on its prompt and not on what was asked before, a prompt is always
cut at the same places, and only whole blocks are kept of another one: that much of the cache is bit
for bit what this prompt would have written. A prompt that goes on from an answer written here keeps
the answer, whose tokens were evaluated one by one; the same prompt goes on from the same place.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int32s = npt.NDArray[np.int32]


@dataclass(slots=True)
class Stretch:
    """A prompt and its answer.

    start: what its evaluation went on from: the tokens before are an earlier answer's. n_prompt:
    the tokens of the prompt, those before `start` included. whole: so many tokens, from the first
    of all, are evaluated in whole blocks that are counted from `start`.
    """

    start: int
    n_prompt: int
    whole: int


class Held:
    """The tokens in the cache. block: the tokens that are evaluated at a time, at most."""

    def __init__(self, block: int) -> None:
        self.block = block
        self.tokens = array("i")
        self._stretches: list[Stretch] = []  # each begins inside the answer of the one before

    def n_known(self, tokens: array[int]) -> int:
        """Return how many of these tokens, from the first on, are held."""
        return common_prefix(self.tokens, tokens)

    def turn_to(self, prompt: array[int]) -> int:
        """Turn to a new prompt; return how many of its tokens are kept. Then `drop` the others."""
        keep, stretches = min(self.n_known(prompt), len(prompt) - 1), self._stretches
        while stretches and keep < stretches[-1].start:
            stretches.pop()
        if not stretches:  # nothing is held, or nobody knows how it was evaluated
            stretches.append(Stretch(0, len(prompt), 0))
            return 0
        last = stretches[-1]
        if keep > last.n_prompt:  # it goes on from an answer
            stretches.append(Stretch(keep, len(prompt), keep))
            return keep
        last.n_prompt = len(prompt)
        last.whole = self._rounded(last.start, min(keep, last.whole))
        return last.whole

    def _rounded(self, start: int, end: int) -> int:
        return start + (end - start) // self.block * self.block

    def drop(self, keep: int) -> None:
        """Keep the first tokens only."""
        del self.tokens[keep:]
        stretches = self._stretches
        while stretches and keep < stretches[-1].start:
            stretches.pop()
        if stretches and keep < stretches[-1].whole:
            stretches[-1].whole = self._rounded(stretches[-1].start, keep)

    def evaluated(self, start: int, end: int) -> None:
        """Learn that tokens start to end were evaluated in one decode."""
        if self._stretches and start == self._stretches[-1].whole:
            self._stretches[-1].whole = self._rounded(start, end)

    def evaluated_beside_others(self, end: int) -> None:
        """Learn that what is held goes up to `end` now, in batches with tokens of others: cut
        anywhere, and kept all the same."""
        if self._stretches:
            self._stretches[-1].whole = self._rounded(self._stretches[-1].start, end)

    def clear(self) -> None:
        self.tokens = array("i")
        self._stretches.clear()

    @property
    def rows(self) -> Int32s:
        """How the tokens were evaluated, (stretches, 3), for `restore`."""
        rows = [(one.start, one.n_prompt, one.whole) for one in self._stretches]
        return np.array(rows, np.int32).reshape(-1, 3)

    def restore(self, tokens: Int32s, rows: Int32s) -> None:
        """Hold these tokens. Raises ValueError for rows that cannot be theirs."""
        if rows.ndim != 2 or rows.shape[1] != 3:
            raise ValueError(f"rows of the shape {rows.shape}; expected (stretches, 3)")
        n, stretches = len(tokens), [Stretch(*map(int, row)) for row in rows]
        if not all(0 <= one.start <= one.whole <= n for one in stretches):
            raise ValueError("a stretch outside the tokens")
        self.tokens, self._stretches = array("i", tokens.tolist()), stretches


def common_prefix(one: array[int], other: array[int]) -> int:
    """Return how many tokens two prefixes have in common."""
    n = min(len(one), len(other))
    # Comparing slices is a copy and a memcmp: microseconds for thousands of tokens.
    if one[:n] == other[:n]:
        return n
    low, high = 0, n  # equal before low, different before high
    while high - low > 1:
        middle = (low + high) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle
    return low
