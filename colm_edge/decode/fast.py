"""The fast twin of the sequential schedule: the same text with fewer calls of the expert.

It places one bet, which cannot change the text: *the expert will write the base's choice.* At a
deferral the expert's batch includes that choice. If the expert accepts it, its state after the
choice is already computed: a deferral at the next token needs no call, and a later call is one
token shorter. This is speculative decoding with a draft of one token, only at deferred positions.

Longer drafts and runs of tokens written ahead by the expert were tried as well. On real text, at
defer rates up to 15 %, they save less than 1 %: deferrals are far apart, and at about half of them
the expert writes another token (docs/studies/speed.md).
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Sequence
from time import perf_counter

from colm_edge.decode.loop import Decoder, Follow, Sequential, write_deferred
from colm_edge.decode.planner import Planner
from colm_edge.decode.policy import BASE
from colm_edge.decode.step import Step


class Bets:
    """Where an expert's batch includes the base's choice, and when it is called for a review; for
    one answer.

    planners: one for each expert; None stands for one that no bets are placed on, because its
        server does not tell what its decodes cost. Without planners there are no bets at all.
    """

    def __init__(self, planners: Sequence[Planner | None] = ()) -> None:
        self._planners = dict(enumerate(planners))
        self._expert_at = Counter[int]()  # evaluated and accepted tokens in each one's cache
        self._last = BASE  # the writer of the last token
        self._n_passed = 0  # the base's tokens that stayed since an expert's last

    def possible(self, loop: Decoder) -> bool:
        """Return whether planning can pay; the first time, measure what decodes cost. Several
        experts are measured one by one, at their first calls, which load them."""
        if len(self._planners) > 1:
            return True
        planner = self._planners.get(0)
        return planner is not None and not self._prepared(loop, planner).rests

    def _prepared(self, loop: Decoder, planner: Planner) -> Planner:
        begun = perf_counter()
        try:
            planner.prepare(loop.cancel)
        finally:
            seconds = perf_counter() - begun
            loop.stats.total_seconds -= seconds  # measuring is not part of the answer
        return planner

    def saw(self, writer: int) -> None:
        """Learn from a decision of the switch."""
        for expert, planner in self._planners.items():
            if planner is not None:
                planner.saw_deferral(writer == expert, self._last == expert)
        self._last = writer

    def placed(self, loop: Decoder, writer: int, guess: Step, tokens: array[int]) -> bool:
        """Return whether to bet on `guess`, where the token after these is an expert's."""
        planner, at = self._planners.get(writer), len(tokens)
        if planner is None:
            return False
        if len(self._planners) > 1:
            self._prepared(loop, planner)
        if at + 1 >= loop.end or guess.token in loop.end_tokens:
            return False
        agrees = planner.agrees(math.exp(guess.logprob))
        pays = planner.saves(agrees, at - self._expert_at[writer]) > 0
        return pays and loop.keeps(writer, tokens + array("i", (guess.token,)), at)

    def settle(self, writer: int, guess: Step, step: Step, at: int, placed: bool) -> bool:
        """Learn from an expert's token for position `at`; return whether a bet was won."""
        agreed = step.token == guess.token
        if (planner := self._planners.get(writer)) is not None:
            planner.saw_agreement(math.exp(guess.logprob), agreed)
        self._n_passed = 0
        self.reached(writer, at + 1 if placed and agreed else at)
        return placed and agreed

    def window(self, expert: int, most: int) -> int:
        """Return after how many drafts an expert is called to review them, at most `most`. Of
        several experts it would choose which one is called, and so change the text."""
        planner = self._planners.get(expert)
        return most if planner is None or len(self._planners) > 1 else planner.window(most)

    def drafted(self, expert: int, looked_at: bool) -> None:
        """Learn whether an expert is to look at a token of the base."""
        if (planner := self._planners.get(expert)) is not None:
            planner.looked_at.add(looked_at)

    def reviewed(self, writer: int, n_kept: int, *, undone: bool) -> None:
        """Learn how many of the base's tokens stay, and whether an expert undid the one after
        them."""
        if (planner := self._planners.get(writer)) is not None:
            planner.saw_review(self._n_passed, n_kept, undone)
        self._n_passed = 0 if undone else self._n_passed + n_kept

    def reached(self, writer: int, at: int) -> None:
        """Learn that an expert's cache holds `at` tokens."""
        self._expert_at[writer] = at


class Fast:
    """A schedule that writes the same tokens as `Sequential`, and bets where the planner says so.

    It belongs to one answer. planners: as for `Bets`.
    """

    def __init__(self, planners: Sequence[Planner | None], follow: Follow | None = None) -> None:
        self._bets, self._follow = Bets(planners), follow
        self._one_by_one = Sequential(follow)

    def next(self, loop: Decoder) -> Step:
        if not self._bets.possible(loop):
            return self._one_by_one.next(loop)
        tokens, picker, at = loop.tokens, loop.picker, len(loop.tokens)
        if self._follow is not None:
            self._follow(tokens)
        loop.evaluate_base(tokens)
        reading, logits = loop.read_base(at)
        writer = reading.writer
        self._bets.saw(writer)
        before = picker.mark() if writer != BASE else None
        guess = picker.write_own(reading, logits)
        if writer == BASE:
            return guess
        picker.rollback(before)
        bets = self._bets.placed(loop, writer, guess, tokens)
        step = write_deferred(loop, reading, logits, (guess.token,) if bets else ())
        if step.by_expert:
            self._bets.settle(writer, guess, step, at, bets)
        return step
