"""The fast twin of the sequential schedule: the same text with fewer calls of the expert.

It places one bet, which cannot change the text: *the expert will write the base's choice.* At a
deferral the expert's batch includes that choice. If the expert accepts it, its state after the
choice is already computed: a deferral at the next token needs no call, and a later call is one
token shorter. This is speculative decoding with a draft of one token, only at deferred positions.

Longer drafts and runs of tokens written ahead by the expert were tried as well. On real text, at
defer rates up to 15 %, they save less than 1 %: deferrals are far apart, and at two in five of them
the expert writes another token (docs/speed.md).
"""

from __future__ import annotations

import math
from time import perf_counter

from colm_edge.decode.loop import Decoder, Follow, Sequential
from colm_edge.decode.planner import Planner
from colm_edge.decode.policy import BASE, EXPERT
from colm_edge.decode.step import Step


class Bets:
    """Where the expert's batch includes the base's choice; for one answer."""

    def __init__(self, planner: Planner) -> None:
        self._planner = planner
        self._expert_at = 0  # evaluated and accepted tokens in the expert's cache
        self._after_deferral = False

    def possible(self, loop: Decoder) -> bool:
        """Return whether planning can pay; the first time, measure what decodes cost."""
        begun = perf_counter()
        self._planner.prepare(loop.cancel)
        loop.stats.total_seconds -= perf_counter() - begun  # measuring is not part of the answer
        return not self._planner.rests

    def saw(self, deferred: bool) -> None:
        """Learn from a decision of the switch."""
        self._planner.saw_deferral(deferred, self._after_deferral)
        self._after_deferral = deferred

    def placed(self, loop: Decoder, guess: Step, at: int) -> bool:
        """Return whether to bet on `guess`, where position `at` is deferred."""
        may_go_on = at + 1 < loop.end and guess.token not in loop.end_tokens
        agrees = self._planner.agrees(math.exp(guess.logprob))
        return may_go_on and self._planner.saves(agrees, at - self._expert_at) > 0

    def settle(self, guess: Step, step: Step, at: int, placed: bool) -> bool:
        """Learn from the expert's token for position `at`; return whether a bet was won."""
        agreed = step.token == guess.token
        self._planner.saw_agreement(math.exp(guess.logprob), agreed)
        self._expert_at = at + 1 if placed and agreed else at
        return placed and agreed

    def reached(self, at: int) -> None:
        """Learn that the expert's cache holds `at` tokens, after another call."""
        self._expert_at = at


class Fast:
    """A schedule that writes the same tokens as `Sequential`, and bets where the planner says so.

    It works with one expert, in this process, and belongs to one answer.
    """

    def __init__(self, planner: Planner, follow: Follow | None = None) -> None:
        self._bets, self._follow = Bets(planner), follow
        self._one_by_one = Sequential(follow)

    def next(self, loop: Decoder) -> Step:
        if not self._bets.possible(loop):
            return self._one_by_one.next(loop)
        tokens, picker, at = loop.tokens, loop.picker, len(loop.tokens)
        if self._follow is not None:
            self._follow(tokens)
        loop.evaluate_base(tokens)
        (p_defer, choice, logsumexp, writer), logits = loop.read_base(at)
        deferred = writer != BASE
        self._bets.saw(deferred)
        before = picker.mark() if deferred else None
        guess = picker.write("base", p_defer, logits, choice, logsumexp)
        if not deferred:
            return guess
        picker.rollback(before)
        bets = self._bets.placed(loop, guess, at)
        if bets:
            both = tokens[:]
            both.append(guess.token)
            loop.evaluate_expert(EXPERT, both, (at - 1, at))
        else:
            loop.evaluate_expert(EXPERT, tokens)
        step = picker.write("expert", p_defer, *loop.read_expert(EXPERT, at, logits, p_defer))
        self._bets.settle(guess, step, at, bets)
        return step
