"""Speculative decoding, for comparison: the expert alone, with the base as its draft model.

It uses the same loop, sessions and measured costs as the collaboration, in other batches.
"""

from __future__ import annotations

from collections import deque

from colm_edge.decode.loop import Decoder
from colm_edge.decode.planner import Rate
from colm_edge.decode.step import Step
from colm_edge.llama.costs import CostTable

MAX_DRAFT = 16  # as in llama.cpp's server
EXPERT = 0


class Speculative:
    """A schedule that writes the expert's own greedy text: the base drafts, and the expert verifies
    a draft in one batch. It needs a policy that always defers.

    The length of a draft is the fastest one by the models' cost tables and the acceptance rate so
    far.
    """

    def __init__(self, tables: tuple[CostTable, CostTable]) -> None:
        self._costs = tables
        self._acceptance = Rate(0.7, 5)
        self._ready: deque[Step] = deque()

    def next(self, loop: Decoder) -> Step:
        if not self._ready:
            self._draft(loop)
        return self._ready.popleft()

    def _length(self) -> int:
        """Return the length of the next draft. At acceptance rate a, a draft of K tokens and the
        bonus token give (1 − a^(K+1)) / (1 − a) tokens for K decodes of the base and one batch."""
        a = min(self._acceptance.value, 0.99)
        base, expert = self._costs

        def price(k: int) -> float:
            return (k * base(1) + expert.reviewing(k + 1)) * (1 - a) / (1 - a ** (k + 1))

        return min(range(MAX_DRAFT + 1), key=price)

    def _draft(self, loop: Decoder) -> None:
        tokens, drafted = loop.tokens[:], list[int]()
        at = len(tokens)
        for _ in range(min(self._length(), loop.end - at - 1)):
            loop.evaluate_base(tokens)
            reading, _ = loop.read_base(len(tokens))
            drafted.append(reading.choice)
            tokens.append(reading.choice)
        loop.evaluate_expert(EXPERT, tokens, range(at - 1, len(tokens)))
        for i in range(len(drafted) + 1):
            step = loop.picker.write(loop.sources[EXPERT], 1.0, *loop.read_expert(EXPERT, at + i))
            self._ready.append(step)
            if i < len(drafted):
                self._acceptance.add(step.token == drafted[i])
                if step.token != drafted[i]:
                    return
