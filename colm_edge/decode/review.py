"""Review: the expert undoes tokens of the base that it would not have written.

A lazy expert's catch-up evaluates every token that it skipped. For the price of their outputs it
also says what it thinks of each. So at every call the first token that a rule rejects is undone,
with all after it, and the expert's is put there; then the base goes on. The expert is also called
when `window` tokens have not been reviewed, and before the base may end the answer.

Where the switch is sure, the expert hardly ever objects. So a review may look only at tokens whose
p_defer is at least a floor. The outputs of the others need not be computed, and they are final at
once where no token before them waits.

Without tolerance this writes the expert's own text: speculative decoding whose drafts end where the
switch is unsure. With an endless tolerance it is the plain loop. Kin: BiLD (arXiv 2302.07863),
speculative cascades (2405.19261).
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from colm_edge.arrays import Floats
from colm_edge.decode.fast import Bets
from colm_edge.decode.fresh import Drawn, Fresh
from colm_edge.decode.loop import Decoder, Follow
from colm_edge.decode.picker import Picker, Prediction, Sampler, likeliest
from colm_edge.decode.planner import Planner
from colm_edge.decode.policy import BASE, Reading
from colm_edge.decode.step import ZERO_PROBABILITY, Drafted, Event, Source, Step
from colm_edge.errors import AbsentExpertError


class Verdict(NamedTuple):
    """What the expert says of a token that the base wrote."""

    token: int
    logits: Floats  # the expert's, for this position
    choice: int  # their likeliest token
    logsumexp: float

    @property
    def regret(self) -> float:
        """The nats by which the expert prefers its own likeliest token; finite."""
        return min(float(self.logits[self.choice] - self.logits[self.token]), -ZERO_PROBABILITY)


class Rule(Protocol):
    """Says which tokens of the base are undone."""

    def first(self, verdicts: Sequence[Verdict]) -> int:
        """Return the place of the first token to undo, or how many there are if all stay."""


@dataclass(frozen=True)
class Tolerance:
    """Undo a token that the expert regrets by more than so many nats."""

    nats: float

    def first(self, verdicts: Sequence[Verdict]) -> int:
        bad = (i for i, verdict in enumerate(verdicts) if verdict.regret > self.nats)
        return next(bad, len(verdicts))


@dataclass(frozen=True)
class Loose:
    """Let a token pass, although it is not the expert's, where the expert is unsure itself and the
    next tokens are all its own choices: FLy's rule (arXiv 2511.22972). As it looks at later drafts,
    its text depends on when reviews begin: give `Review` no planners.

    entropy: in nats, of the expert's three likeliest tokens; it is unsure from this on. n_next: how
    many tokens must follow its choices, of those that are there.
    """

    entropy: float = 0.3
    n_next: int = 5

    def first(self, verdicts: Sequence[Verdict]) -> int:
        same = [verdict.token == verdict.choice for verdict in verdicts]
        for i, verdict in enumerate(verdicts):
            goes_on = all(same[i + 1 : i + 1 + self.n_next])
            if not same[i] and not (goes_on and top_entropy(verdict) >= self.entropy):
                return i
        return len(verdicts)


def top_entropy(verdict: Verdict, n: int = 3) -> float:
    """Return the entropy, in nats, of the n likeliest tokens alone."""
    p = np.exp([logprob for _, logprob in likeliest(verdict.logits, verdict.logsumexp, n)])
    p /= p.sum()
    return float(-(p * np.log(p)).sum())


@dataclass(slots=True)
class Draft:
    """A token of the base that the expert has not reviewed."""

    step: Step
    mark: Sampler | None  # the sampler's state before it
    drawn_from: Drawn | None  # if the sampler is `Fresh`
    looked_at: bool  # by the expert; else it goes only with one before it


@dataclass(slots=True)
class Deferral:
    """A position that the switch defers to an expert: its reading, the base's own token, and the
    base's logits, (n_vocab,)."""

    reading: Reading
    guess: Step
    logits: Floats


class Reviewer(Protocol):
    """Reviews drafts once an expert has evaluated them."""

    def review(
        self, verdicts: Sequence[Verdict], drafts: Sequence[Draft], picker: Picker, source: Source
    ) -> tuple[int, Step | None]:
        """Return how many drafts stay, and the expert's token for the next one if it is undone.
        Then the picker's sampler is in its state after that token. source: names the expert."""


@dataclass(frozen=True)
class ByRule:
    """Undo what a rule rejects; the expert writes there."""

    rule: Rule

    def review(
        self, verdicts: Sequence[Verdict], drafts: Sequence[Draft], picker: Picker, source: Source
    ) -> tuple[int, Step | None]:
        n = self.rule.first(verdicts)
        if n == len(drafts):
            return n, None
        picker.rollback(drafts[n].mark)
        verdict = verdicts[n]
        return n, picker.write(
            source, drafts[n].step.p_defer, verdict.logits, verdict.choice, verdict.logsumexp
        )


class Exact:
    """Review of drawn tokens after which the text is distributed as the expert's own, by the rule
    of speculative sampling (arXiv 2211.17192). The sampler has to be `Fresh`.

    A token x that the base drew with probability q(x) stays with probability min(1, p(x)/q(x)),
    where p is the expert's; otherwise one is drawn from max(0, p − q).
    """

    def review(
        self, verdicts: Sequence[Verdict], drafts: Sequence[Draft], picker: Picker, source: Source
    ) -> tuple[int, Step | None]:
        for n, (verdict, draft) in enumerate(zip(verdicts, drafts, strict=True)):
            before = draft.mark
            assert isinstance(before, Fresh)
            assert draft.drawn_from is not None
            ids, p = before.probabilities(verdict.logits)
            q = np.zeros(len(verdict.logits))
            q[draft.drawn_from[0]] = draft.drawn_from[1]
            p_token = float(p[ids == verdict.token].sum())
            if before.uniform() * q[verdict.token] < p_token:
                continue
            picker.rollback(before)
            rest = np.maximum(p - q[ids], 0.0)
            token = before.draw(ids, rest if rest.any() else p)
            return n, picker.tell(
                token, source, draft.step.p_defer, verdict.logits, verdict.logsumexp
            )
        return len(drafts), None


class Review:
    """A schedule that writes what remains of the base's tokens after review, and the expert's.

    It hands out a `Step` only when it is final; until then it is `Drafted`. Of several experts, the
    one that is called reviews; at the end and when the window is full, the likeliest one is called.
    It works with experts in this process, and belongs to one answer.

    window: the most tokens that wait for review. planners: of bets as in the fast schedule, if they
    are to be placed; they may have reviews begin sooner, where shorter batches pay. floor: only
    tokens whose p_defer is at least this are looked at, and those that may end the answer; 0 for
    reviewers that need every token, as `Exact` and `Loose`.
    """

    def __init__(
        self,
        reviewer: Reviewer,
        window: int,
        follow: Follow | None = None,
        planners: Sequence[Planner | None] = (),
        floor: float = 0.0,
    ) -> None:
        self._reviewer, self._window, self._floor = reviewer, window, floor
        self._follow, self._bets, self._no_bets = follow, Bets(planners), Bets()
        self._drafts: list[Draft] = []
        self._expert = 0  # the likeliest one at the last draft
        self._ready: deque[Event] = deque()  # what is to be handed out
        # An expert, and its logits after all that is final, if a bet was won.
        self._known: tuple[int, Prediction] | None = None

    def next(self, loop: Decoder) -> Event:
        if not self._ready:
            self._ready.extend(self._go_on(loop))
        return self._ready.popleft()

    def _go_on(self, loop: Decoder) -> list[Event]:
        """Let the base write a token, or have the expert called: at a deferral, when the window is
        full, and before the answer may end. Return what has happened."""
        picker, drafts, tokens = loop.picker, self._drafts, loop.tokens[:]
        tokens.extend(draft.step.token for draft in drafts)
        # What a won bet tells is kept without the base's share of a mixture.
        may_bet = not picker.composes and self._bets.possible(loop)
        bets = self._bets if may_bet else self._no_bets
        if drafts:
            may_end = tokens[-1] in loop.end_tokens or len(tokens) >= loop.end
            most = self._window
            # Their number would change later ones where a sample's random number is used once, and
            # where the policy remembers what was undone.
            if not isinstance(picker.sampler, Fresh) and not loop.policy.remembers:
                most = bets.window(self._expert, most)
            if may_end or len(drafts) >= most:
                return self._call(loop, tokens[:-1], bets, None)
        elif self._follow is not None:
            self._follow(loop.tokens)
        loop.evaluate_base(tokens)
        reading, logits = loop.read_base(len(tokens))
        p_defer, writer, self._expert = reading.p_defer, reading.writer, reading.expert
        bets.saw(writer)
        mark = picker.mark()
        guess = picker.write_own(reading, logits)
        if writer != BASE:
            picker.rollback(mark)
            return self._call(loop, tokens, bets, Deferral(reading, guess, logits))
        looked_at = p_defer >= self._floor or guess.token in loop.end_tokens
        bets.drafted(self._expert, looked_at)
        if not drafts and not looked_at:
            self._known = None  # it was of this place
            bets.reviewed(self._expert, 1, undone=False)
            return [guess]
        drawn_from = picker.sampler.drawn_from if isinstance(picker.sampler, Fresh) else None
        drafts.append(Draft(guess, mark, drawn_from, looked_at))
        return [Drafted(guess)]

    def _call(
        self, loop: Decoder, tokens: array[int], bets: Bets, deferral: Deferral | None
    ) -> list[Event]:
        """Have an expert review the drafts, and write a deferred token; return what is final.

        tokens: to evaluate: without the last draft, whose state only matters if it stays.
        """
        drafts, self._drafts = self._drafts, []
        writer = self._expert if deferral is None else deferral.reading.writer
        known = self._known[1] if self._known is not None and self._known[0] == writer else None
        self._known = None
        written: list[Event] = [draft.step for draft in drafts]
        start, at = len(loop.tokens), len(loop.tokens) + len(drafts)
        places = [i for i, draft in enumerate(drafts, start) if draft.looked_at]
        if deferral is None:
            del tokens[places[-1] :]  # nothing is asked of the drafts after them
        if known is not None and not loop.keeps(writer, tokens, start):
            known = None
        placed = deferral is not None and bets.placed(loop, writer, deferral.guess, tokens)
        if deferral is not None and placed:
            tokens.append(deferral.guess.token)
        predicted_at = places if deferral is None else [*places, at, *([at + 1] if placed else [])]
        # Something is asked of the first place: it is looked at, or deferred.
        if outputs := [place - 1 for place in predicted_at[known is not None :]]:
            try:
                loop.evaluate_expert(writer, tokens, outputs)
            except AbsentExpertError:  # its context is full of its own tokens (`Bridge`)
                loop.stats.expert_failures += deferral is not None
                return written if deferral is None else [*written, self._own(loop, deferral)]
        predictions = {} if known is None or not drafts else {start: known}
        for place in places[len(predictions) :]:
            predictions[place] = self._prediction(loop, writer, place, drafts[place - start])
        n, instead = self._judge(loop, writer, drafts, predictions)
        bets.reviewed(writer, n, undone=instead is not None)
        if instead is not None:
            bets.reached(writer, start + n)
            return [loop.undone[-1], *written[:n], instead]
        if deferral is None:
            bets.reached(writer, len(tokens))
            return written
        theirs = known if not drafts else None
        try:
            theirs = theirs or loop.read_expert(writer, at, deferral.logits, deferral.guess.p_defer)
        except AbsentExpertError:
            loop.stats.expert_failures += 1
            return [*written, self._own(loop, deferral)]
        step = loop.picker.write(loop.sources[writer], deferral.guess.p_defer, *theirs)
        if bets.settle(writer, deferral.guess, step, at, placed):
            with suppress(AbsentExpertError):
                logits, choice, logsumexp = loop.read_expert(writer, at + 1)
                self._known = writer, (logits.copy(), choice, logsumexp)
        return [*written, step]

    @staticmethod
    def _prediction(loop: Decoder, writer: int, at: int, draft: Draft) -> Prediction:
        """Return what an expert says in the place of a draft; where it has no word for the base, it
        agrees."""
        try:
            return loop.read_expert(writer, at, before=draft.mark)
        except AbsentExpertError:
            logits = np.full(loop.picker.n_choose, -np.inf, np.float32)
            logits[draft.step.token] = 0.0
            return logits, draft.step.token, 0.0

    def _judge(
        self,
        loop: Decoder,
        writer: int,
        drafts: Sequence[Draft],
        predictions: Mapping[int, Prediction],
    ) -> tuple[int, Step | None]:
        """Return how many drafts stay, and the expert's token for the next if it is undone."""
        start = len(loop.tokens)
        seen = [drafts[place - start] for place in predictions]
        verdicts = [
            Verdict(draft.step.token, logits, self._best(draft, logits, choice), logsumexp)
            for draft, (logits, choice, logsumexp) in zip(seen, predictions.values(), strict=True)
        ]
        n, instead = self._reviewer.review(verdicts, seen, loop.picker, loop.sources[writer])
        loop.stats.n_reviewed += len(seen) if instead is None else n + 1
        if instead is None:
            return len(drafts), None
        place = list(predictions)[n]
        gone = [draft.step for draft in drafts[place - start :]]
        loop.undo(place, gone, verdicts[n].regret)
        return place - start, instead

    @staticmethod
    def _own(loop: Decoder, deferral: Deferral) -> Step:
        """Return what the base writes itself where no expert can."""
        return loop.picker.write_own(deferral.reading, deferral.logits)

    @staticmethod
    def _best(draft: Draft, logits: Floats, choice: int) -> int:
        """Return the expert's likeliest token in the place of a draft, of those that a grammar
        allows there."""
        before = draft.mark
        return before.likeliest(logits, choice) if isinstance(before, Fresh) else choice
