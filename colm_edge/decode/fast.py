"""The fast twin of the sequential schedule: the same text from fewer, larger batches.

Three bets, none of which can change what is written:

- *The expert will repeat the base's choice.* At a deferral the base goes on with its own choice,
  and the expert verifies several deferrals in one batch. At the first one where it writes something
  else both models roll back to it.
- The same, but the base does not go on. In the batch that verifies, the expert evaluates the base's
  choice as well; if that is accepted and the next token is deferred too, its state is at hand.
- *A run of deferrals goes on.* The expert writes several tokens by itself, and the base reads the
  switch for all of them in one batch. At the first that is not deferred both roll back to it.

The first two are speculative decoding at the deferred positions alone, the third its mirror image.
A `Planner` places a bet only where it promises to pay.
"""

from __future__ import annotations

import math
from array import array
from collections import deque
from dataclasses import dataclass, field
from time import perf_counter

from colm_edge.decode.loop import Decoder, Follow, Sequential
from colm_edge.decode.picker import Sampler
from colm_edge.decode.planner import MAX_DRAFT, Draft, Planner
from colm_edge.decode.policy import BASE
from colm_edge.decode.step import Step

EXPERT = 0  # the one there is: with several, each would verify its own deferrals


@dataclass
class _Pending:
    """A deferral that the base drafted on from: its position, the base's step there, and what the
    picker was before it."""

    at: int
    guess: Step
    before: Sampler | None


@dataclass
class _Drafted:
    """Steps drafted from the first pending deferral on, and which of them are pending."""

    tokens: array[int]  # those written, then those drafted
    steps: list[Step] = field(default_factory=list)
    pending: list[_Pending] = field(default_factory=list)
    all_agree: float = 1.0


class Fast:
    """A schedule that writes token for token what `Sequential` writes, with a planner's bets.

    Steps that depend on a bet come out when it is decided; end tokens, the limit of tokens and the
    end of the context end a draft. For one expert, of this process. It belongs to one answer.
    """

    def __init__(self, planner: Planner, follow: Follow | None = None) -> None:
        self._planner, self._follow = planner, follow
        self._one_by_one = Sequential(follow)
        self._ready: deque[Step] = deque()  # decided, but not handed out
        self._expert_at = 0  # tokens that the expert has evaluated, and that were accepted
        self._after_deferral = False

    def next(self, loop: Decoder) -> Step:
        if not self._ready:
            # A mixture needs the states of both models at once.
            if loop.picker.composes or self._planner.rests:
                return self._one_by_one.next(loop)
            room = loop.end - len(loop.tokens)
            n = min(self._planner.run_ahead(), room) if self._after_deferral else 0
            if n > 1:
                self._run_ahead(loop, n)
            else:
                self._draft(loop)
        return self._ready.popleft()

    def _decide(self, step: Step) -> None:
        """Hand a step out, now that it is certain."""
        self._ready.append(step)
        deferred = step.source == "expert"
        self._planner.saw_deferral(deferred, self._after_deferral)
        self._after_deferral = deferred

    def _draft(self, loop: Decoder) -> None:
        """Go on from the written tokens until at least one more is certain."""
        draft = _Drafted(loop.tokens[:])
        if self._follow is not None:
            self._follow(loop.tokens)
        while True:
            at = len(draft.tokens)
            loop.evaluate_base(draft.tokens)
            (p_defer, choice, logsumexp, writer), logits = loop.read_base(at)
            before = loop.picker.mark() if writer != BASE else None
            step = loop.picker.write("base", p_defer, logits, choice, logsumexp)
            if writer == BASE and not draft.pending:
                self._decide(step)
                return
            draft.steps.append(step)
            if writer != BASE:
                self._prepare(loop)
                draft.pending.append(_Pending(at, step, before))
                draft.all_agree *= self._planner.agrees(_probability(step))
            ends = (
                at - draft.pending[0].at >= MAX_DRAFT - 1
                or at + 1 >= loop.end
                or step.token in loop.end_tokens
            )
            bet = "verify" if ends else self._planner.decide(self._seen(draft, at))
            if bet != "verify":
                draft.tokens.append(step.token)
            if bet != "draft on":
                self._verify(loop, draft, along=bet == "verify along")
                return

    def _prepare(self, loop: Decoder) -> None:
        begun = perf_counter()
        self._planner.prepare()  # where it has to measure, that is no part of the answer
        loop.stats.total_seconds -= perf_counter() - begun

    def _seen(self, draft: _Drafted, at: int) -> Draft:
        """Return what the planner weighs, once `at` is drafted."""
        pending, evaluated = draft.pending, self._expert_at
        if len(pending) > 1:  # the first one's state is wanted again
            evaluated = min(evaluated, pending[0].at - 1)
        last = pending[-1].at
        return Draft(draft.all_agree, len(pending), last - evaluated, at - last)

    def _verify(self, loop: Decoder, draft: _Drafted, *, along: bool) -> None:
        """Let the expert write the pending tokens; keep the draft up to its first other choice.

        along: let it evaluate what was drafted after them as well.
        """
        picker, steps, pending = loop.picker, draft.steps, draft.pending
        first, last = pending[0].at, pending[-1].at
        outputs = [deferral.at - 1 for deferral in pending]
        if along:
            last = len(draft.tokens)
            outputs.append(last - 1)
        loop.evaluate_expert(EXPERT, draft.tokens[:last], outputs)
        self._expert_at, n_kept = last, len(steps)
        for deferral in pending:
            at, guess = deferral.at, deferral.guess
            after = picker.rollback(deferral.before)
            step = picker.write("expert", guess.p_defer, *loop.read_expert(EXPERT, at))
            steps[at - first] = step
            self._planner.saw_agreement(_probability(guess), step.token == guess.token)
            if step.token != guess.token:
                n_kept, self._expert_at = at - first + 1, at
                break
            picker.rollback(after)
        for step in steps[:n_kept]:
            self._decide(step)

    def _run_ahead(self, loop: Decoder, n: int) -> None:
        """Let the expert write n tokens after a deferral and the base check them all at once."""
        at, picker = len(loop.tokens), loop.picker
        tokens, written = loop.tokens[:], list[tuple[Step, Sampler | None]]()
        while len(written) < n:
            loop.evaluate_expert(EXPERT, tokens)
            before = picker.mark()
            step = picker.write("expert", 0.0, *loop.read_expert(EXPERT, len(tokens)))
            written.append((step, before))
            if step.token in loop.end_tokens:
                break
            tokens.append(step.token)
        n = len(written)
        loop.evaluate_base(tokens[: at + n - 1], range(at - 1, at + n - 1))
        for i, (step, before) in enumerate(written):
            self._expert_at = at + i
            (step.p_defer, choice, logsumexp, writer), logits = loop.read_base(at + i)
            if writer == BASE:
                picker.rollback(before)
                self._decide(picker.write("base", step.p_defer, logits, choice, logsumexp))
                return
            self._decide(step)


def _probability(step: Step) -> float:
    return math.exp(step.logprob)
