"""The fast twin of the sequential loop: the same text from fewer, larger batches."""

from __future__ import annotations

import math
from array import array
from collections import deque
from time import perf_counter
from typing import Any

from colm_edge.decode.loop import Decoder, Sampler, Step
from colm_edge.decode.planner import MAX_DRAFT, Planner


class FastDecoder(Decoder):
    """A Decoder that writes token for token what its parent writes, with a planner's bets.

    Steps that depend on a bet come out when it is decided; end tokens, the limit of tokens and the
    end of the context end a draft.
    """

    def __init__(self, *args: Any, planner: Planner, **options: Any) -> None:
        super().__init__(*args, **options)
        self._planner = planner
        self._ready: deque[Step] = deque()  # decided, but not handed out
        self._expert_at = 0  # tokens that the expert has evaluated, and that were right
        self._after_deferral = False

    def _step(self) -> Step:
        if not self._ready:
            # A mixture needs the states of both models at once.
            if self._compose or self._planner.rests:
                return super()._step()
            room = self._end - len(self.tokens)
            n = min(self._planner.run_ahead(), room) if self._after_deferral else 0
            if n > 1:
                self._run_ahead(n)
            else:
                self._draft()
        return self._ready.popleft()

    def _decide(self, step: Step) -> None:
        """Hand a step out, now that it is certain."""
        self._ready.append(step)
        deferred = step.source == "expert"
        self._planner.saw_deferral(deferred, self._after_deferral)
        self._after_deferral = deferred

    def _draft(self) -> None:
        """Go on from the written tokens until at least one more is certain."""
        planner = self._planner
        tokens, drafted = self.tokens[:], list[Step]()
        pending: list[tuple[int, Step, Sampler | None]] = []
        all_agree, before = 1.0, None
        self._work_ahead(tokens)
        while True:
            at = len(tokens)
            self._evaluate_base(tokens)
            logits, hidden = self._base.state(at - 1)
            p_defer, choice, logsumexp = self._judge(at, logits, hidden)
            defers = self._defers(p_defer)
            if defers and self._sample is not None:
                before = self._sample.copy()  # should the expert choose otherwise
            step = self._write("base", p_defer, logits, choice, logsumexp)
            if not defers and not pending:
                self._decide(step)
                return
            drafted.append(step)
            if defers:
                begun = perf_counter()
                planner.prepare()  # where it has to measure, that is no part of the answer
                self.stats.total_seconds -= perf_counter() - begun
                pending.append((at, step, before))
                all_agree *= planner.agrees(_probability(step))
            # Right after a deferral the next is near, if deferrals come in runs.
            beyond = at - pending[-1][0]
            evaluated = self._expert_at
            if len(pending) > 1:  # the first one's state is wanted again
                evaluated = min(evaluated, pending[0][0] - 1)
            seen = all_agree, len(pending), pending[-1][0] - evaluated, beyond
            ends = (
                at - pending[0][0] >= MAX_DRAFT - 1
                or at + 1 >= self._end
                or step.token in self._end_tokens
            )
            if ends or (beyond < 2 and not planner.goes_on(*seen)):
                along = not ends and planner.saved_along(*seen) > 0
                if along:
                    tokens.append(step.token)
                self._verify(tokens, drafted, pending, along)
                return
            tokens.append(step.token)

    def _verify(
        self,
        tokens: array[int],
        drafted: list[Step],
        pending: list[tuple[int, Step, Sampler | None]],
        along: bool,
    ) -> None:
        """Let the expert write the pending tokens, and evaluate all others too if it goes along;
        keep the draft up to its first other choice."""
        planner = self._planner
        first, last = pending[0][0], pending[-1][0]
        outputs = [at - 1 for at, _, _ in pending]
        if along:
            last = len(tokens)
            outputs.append(last - 1)
        self._evaluate_expert(tokens[:last], outputs)
        self._expert_at, n_kept = last, len(drafted)
        for at, guess, before in pending:
            logits, _ = self._expert.state(at - 1)
            choice, logsumexp = self._likeliest(at, logits)
            after, self._sample = self._sample, before
            step = self._write("expert", guess.p_defer, logits, choice, logsumexp)
            drafted[at - first] = step
            planner.saw_agreement(_probability(guess), step.token == guess.token)
            if step.token != guess.token:
                n_kept, self._expert_at = at - first + 1, at
                break
            self._sample = after
        for step in drafted[:n_kept]:
            self._decide(step)

    def _run_ahead(self, n: int) -> None:
        """Let the expert write n tokens after a deferral and the base check them all at once."""
        at = len(self.tokens)
        tokens, written = self.tokens[:], list[tuple[Step, Sampler | None]]()
        while len(written) < n:
            self._evaluate_expert(tokens)
            before = self._sample.copy() if self._sample is not None else None
            logits, _ = self._expert.state(len(tokens) - 1)
            choice, logsumexp = self._likeliest(len(tokens), logits)
            step = self._write("expert", 0.0, logits, choice, logsumexp)
            written.append((step, before))
            if step.token in self._end_tokens:
                break
            tokens.append(step.token)
        n = len(written)
        self._evaluate_base(tokens[: at + n - 1], range(at - 1, at + n - 1))
        for i, (step, before) in enumerate(written):
            self._expert_at = at + i
            logits, hidden = self._base.state(at + i - 1)
            step.p_defer, choice, logsumexp = self._judge(at + i, logits, hidden)
            if not self._defers(step.p_defer):
                self._sample = before
                self._decide(self._write("base", step.p_defer, logits, choice, logsumexp))
                return
            self._decide(step)


def _probability(step: Step) -> float:
    return math.exp(step.logprob)
