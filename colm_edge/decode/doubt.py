"""Doubt: the expert's token is undone where it led nowhere.

After a token that the expert wrote against the base's choice, the next tokens are watched. If
neither model finds a good continuation there, the base's token is tried instead. Both continuations
are compared over a short window by what both models together think of them, and the better one
stays. Deferral that can go back is a wish of Co-LLM's authors (arXiv 2403.03870, limitations).
"""

from __future__ import annotations

from array import array
from collections import deque
from dataclasses import dataclass

from colm_edge.decode.loop import Decoder, Follow
from colm_edge.decode.picker import Sampler
from colm_edge.decode.policy import BASE
from colm_edge.decode.step import Drafted, Event, Step, Undone
from colm_edge.errors import AbsentExpertError

EXPERT = 0  # the only one


@dataclass(slots=True)
class Rival:
    """What the base would have written where the expert wrote, and the sampler's state after it."""

    step: Step
    after: Sampler | None


@dataclass(slots=True)
class Held:
    """A token that is not final. rival: of a token of the expert's that may still be doubted."""

    step: Step
    rival: Rival | None = None


class Doubt:
    """A schedule that writes as the sequential one, and takes the expert's tokens back where both
    models doubt them. It hands out a `Step` once it is final; until then it is `Drafted`. It works
    with one expert, in this process, and belongs to one answer.

    nats: a continuation is bad if its likeliest token costs more, for both models. window: tokens
    that are watched behind a token of the expert's, and compared.
    """

    def __init__(self, nats: float, window: int, follow: Follow | None = None) -> None:
        self._nats, self._window, self._follow = nats, window, follow
        self._held: list[Held] = []
        self._ready: deque[Event] = deque()

    def next(self, loop: Decoder) -> Event:
        while not self._ready:
            self._ready.extend(self._go_on(loop))
        return self._ready.popleft()

    def _go_on(self, loop: Decoder) -> list[Event]:
        """Write a token, or go back. Return what has happened."""
        held, tokens, picker = self._held, loop.tokens[:], loop.picker
        tokens.extend(one.step.token for one in held)
        if held and (tokens[-1] in loop.end_tokens or len(tokens) >= loop.end):
            return self._release(len(held))
        if self._follow is not None and not held:
            self._follow(loop.tokens)
        at, before = len(tokens), picker.mark()
        loop.evaluate_base(tokens)
        (p_defer, choice, logsumexp, writer), logits = loop.read_base(at)
        deferred, best = writer != BASE, float(logits[choice]) - logsumexp
        step, rival = picker.write("base", p_defer, logits, choice, logsumexp), None
        suspect = self._suspect() if best < -self._nats else None
        if deferred or suspect is not None:
            try:
                loop.evaluate_expert(EXPERT, tokens)
            except AbsentExpertError:  # a server that fails; the user was warned
                loop.stats.expert_failures += deferred
                deferred, suspect = False, None
        if suspect is not None:
            theirs, likeliest, total = loop.read_expert(EXPERT, at)
            if max(best, float(theirs[likeliest]) - total) < -self._nats:
                picker.rollback(before)
                return self._compare(loop, tokens, suspect)
        if deferred:
            guess, after = step, picker.mark()
            picker.rollback(before)
            told = loop.read_expert(EXPERT, at, logits, p_defer)
            step = picker.write("expert", p_defer, *told)
            if guess.token != step.token and guess.token not in loop.end_tokens:
                rival = Rival(guess, after)
        held.append(Held(step, rival))
        return [Drafted(step), *self._release(self._n_settled())]

    def _suspect(self) -> int | None:
        """Return the place of the last token that can be doubted."""
        places = (i for i in reversed(range(len(self._held))) if self._held[i].rival is not None)
        return next(places, None)

    def _n_settled(self) -> int:
        """Return how many of the first held tokens have nothing before them, or long enough behind
        them, that can change them."""
        watched = (
            i for i, one in enumerate(self._held)
            if one.rival is not None and len(self._held) - i <= self._window
        )  # fmt: skip
        return next(watched, len(self._held))

    def _release(self, n: int) -> list[Event]:
        final, self._held = self._held[:n], self._held[n:]
        return [one.step for one in final]

    def _compare(self, loop: Decoder, tokens: array[int], suspect: int) -> list[Event]:
        """Put the base's token in the place of a suspect, if what follows it is better."""
        held = self._held
        rival, place = held[suspect].rival, len(loop.tokens) + suspect
        assert rival is not None
        held[suspect].rival = None  # whatever comes of it: once a position
        other = tokens[:place]
        other.append(rival.step.token)
        end = min(place + 1 + self._window, loop.end)
        gain = self._joint(loop, other, place, end) - self._joint(loop, tokens[:], place, end)
        if gain <= 0:
            return []
        gone = tuple(one.step for one in held[suspect:])
        loop.picker.rollback(rival.after)
        held[suspect:] = [Held(rival.step)]
        loop.stats.n_undone += len(gone)
        loop.undone.append(Undone(place, gone, gain))
        return [loop.undone[-1]]

    @staticmethod
    def _joint(loop: Decoder, tokens: array[int], place: int, end: int) -> float:
        """Return what both models think of the tokens behind `place`, in nats a token: the mean of
        their log-probabilities. The base writes those that are missing up to `end`."""
        while len(tokens) < end and tokens[-1] not in loop.end_tokens:
            loop.evaluate_base(tokens)
            tokens.append(loop.told_by_base(len(tokens))[1])
        outputs = range(place, len(tokens) - 1)
        loop.evaluate_base(tokens[:-1], outputs)
        loop.evaluate_expert(EXPERT, tokens[:-1], outputs)
        total = 0.0
        for i in outputs:
            for told in (loop.told_by_base(i + 1), loop.read_expert(EXPERT, i + 1)):
                logits, _, logsumexp = told
                total += float(logits[tokens[i + 1]]) - logsumexp
        return total / (2 * len(outputs))
