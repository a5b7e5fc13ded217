"""Speculative decoding: the expert alone, with the base as its draft. What others do with two
models of one vocabulary, here to compare with: same sessions, same measured costs."""

from __future__ import annotations

from collections import deque
from typing import Any

from colm_edge.decode.loop import Decoder, Step
from colm_edge.decode.planner import Rate
from colm_edge.llama.costs import CostTable

MAX_DRAFT = 16  # llama.cpp's servers draft as many


class DraftDecoder(Decoder):
    """Write the expert's own greedy text: the base drafts, the expert checks a draft in one batch.

    The length of drafts is the one of the best speed by the models' tables, for the share of
    tokens accepted so far.
    """

    checks_every_token = True

    def __init__(self, *args: Any, tables: tuple[CostTable, CostTable], **options: Any) -> None:
        super().__init__(*args, **options)
        self._costs = tables
        self._accepted = Rate(0.7, 5)
        self._ready: deque[Step] = deque()

    def _length(self) -> int:
        """Tokens of the next draft: with each accepted at rate a, K of them and the expert's own
        next give (1 − a^(K+1)) / (1 − a) tokens for K of the base's decodes and one batch."""
        a = min(self._accepted.value, 0.99)
        base, expert = self._costs

        def price(k: int) -> float:
            several = expert.several if k else 0.0
            return (k * base(1) + expert(k + 1) + several) * (1 - a) / (1 - a ** (k + 1))

        return min(range(MAX_DRAFT + 1), key=price)

    def _step(self) -> Step:
        if not self._ready:
            self._draft()
        return self._ready.popleft()

    def _draft(self) -> None:
        tokens, drafted = self.tokens[:], list[int]()
        at = len(tokens)
        for _ in range(min(self._length(), self._end - at - 1)):
            self._evaluate_base(tokens)
            logits, hidden = self._base.state(len(tokens) - 1)
            _, choice, _ = self._judge(len(tokens), logits, hidden)
            drafted.append(choice)
            tokens.append(choice)
        self._evaluate_expert(tokens, range(at - 1, len(tokens)))
        for i in range(len(drafted) + 1):
            logits, _ = self._expert.state(at + i - 1)
            choice, logsumexp = self._likeliest(at + i, logits)
            self._ready.append(self._write("expert", 1.0, logits, choice, logsumexp))
            if i < len(drafted):
                self._accepted.add(choice == drafted[i])
                if choice != drafted[i]:
                    return
