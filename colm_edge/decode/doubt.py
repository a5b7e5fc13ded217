"""Doubt: the expert's token is undone where it led nowhere.

After a token that the expert wrote against the base's choice, the next tokens are watched. If
neither model finds a good continuation there, the base's token is tried instead. Both continuations
are compared over a short window by what both models together think of them, and the better one
stays. Deferral that can go back is a wish of Co-LLM's authors (arXiv 2403.03870, limitations).
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from colm_edge.decode.loop import Decoder, Follow
from colm_edge.decode.picker import Prediction, Sampler
from colm_edge.decode.policy import BASE
from colm_edge.decode.step import ZERO_PROBABILITY, Drafted, Event, Step
from colm_edge.errors import AbsentExpertError


@dataclass(slots=True)
class Rival:
    """What the base would have written where an expert wrote. after: the sampler's state then.
    gain: by which it goes on better, in nats per token, once that is known."""

    step: Step
    after: Sampler | None
    expert: int
    gain: float = 0.0


@dataclass(slots=True)
class Pending:
    """A token that is not final. rival: of a token of the expert's that may still be doubted."""

    step: Step
    rival: Rival | None = None


class Doubt:
    """A schedule that writes as the sequential one, and takes the expert's tokens back where both
    models doubt them. It hands out a `Step` once it is final; until then it is `Drafted`. Of
    several experts, the likeliest one is asked whether it finds a good continuation, and the one
    that wrote the token compares. They are in this process. It belongs to one answer.

    nats: a continuation is bad if its likeliest token costs more, for both models. window: tokens
    that are watched after a token of the expert's, and compared.
    """

    def __init__(self, nats: float, window: int, follow: Follow | None = None) -> None:
        self._nats, self._window, self._follow = nats, window, follow
        self._held: list[Pending] = []
        self._ready: deque[Event] = deque()

    def next(self, loop: Decoder) -> Event:
        if not self._ready:
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
        reading, logits = loop.read_base(at)
        p_defer, choice, logsumexp, writer, expert = reading
        deferred, best = writer != BASE, float(logits[choice]) - logsumexp
        step, rival = picker.write_own(reading, logits), None
        suspect = self._suspect() if best < -self._nats else None
        if deferred or suspect is not None:
            try:
                loop.evaluate_expert(expert, tokens)
                theirs, likeliest, total = loop.read_expert(expert, at, before=before)
            except AbsentExpertError:  # its context is full, or it has no word (`Bridge`)
                loop.stats.expert_failures += deferred
                deferred, suspect = False, None
        if suspect is not None and float(theirs[likeliest]) - total < -self._nats:
            while suspect is not None:
                if self._is_better(loop, tokens, suspect):
                    return self._go_back(loop, suspect)
                suspect = self._suspect()
            loop.evaluate_base(tokens)  # back to where both were
            # Before the expert: other slots use the base then.
            logits, *_ = loop.predicted_by_base(at)
            loop.evaluate_expert(expert, tokens)
        if deferred:
            guess, after = step, picker.mark()
            picker.rollback(before)
            prediction = loop.read_expert(expert, at, logits, p_defer)
            step = picker.write(loop.sources[expert], p_defer, *prediction)
            if guess.token != step.token and guess.token not in loop.end_tokens:
                rival = Rival(guess, after, expert)
        held.append(Pending(step, rival))
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

    def _is_better(self, loop: Decoder, tokens: array[int], suspect: int) -> bool:
        """Return whether the base's token goes on better than a suspect; both are asked once."""
        one, place = self._held[suspect], len(loop.tokens) + suspect
        assert one.rival is not None
        other = tokens[:place]
        other.append(one.rival.step.token)
        end = min(place + 1 + self._window, loop.end)
        expert = one.rival.expert
        try:
            gain = self._joint(loop, expert, other, place, end)
            gain -= self._joint(loop, expert, tokens[:], place, end)
        except AbsentExpertError:  # as above: one that cannot be compared stays
            gain = 0.0
        if gain > 0:
            one.rival.gain = gain
        else:
            one.rival = None
        return gain > 0

    def _go_back(self, loop: Decoder, suspect: int) -> list[Event]:
        """Put the base's token in the place of a suspect."""
        gone, self._held = self._held[suspect:], self._held[:suspect]
        rival = gone[0].rival
        assert rival is not None
        loop.picker.rollback(rival.after)
        self._held.append(Pending(rival.step))
        steps = [one.step for one in gone]
        undone = loop.undo(len(loop.tokens) + suspect, steps, rival.gain)
        return [undone, Drafted(rival.step)]

    @staticmethod
    def _joint(loop: Decoder, expert: int, tokens: array[int], place: int, end: int) -> float:
        """Return what both models think of the tokens after `place`, in nats per token: the mean
        of their log-probabilities. The base writes those that are missing up to `end`."""
        while len(tokens) < end and tokens[-1] not in loop.end_tokens:
            loop.evaluate_base(tokens)
            tokens.append(loop.predicted_by_base(len(tokens))[1])
        outputs = range(place, len(tokens) - 1)

        def likelihood(predict: Callable[[int], Prediction]) -> float:
            """Return the log-probability of the tokens, by a model's prediction at each length."""
            total = 0.0
            for i in outputs:
                logits, _, logsumexp = predict(i + 1)
                total += max(float(logits[tokens[i + 1]]) - logsumexp, ZERO_PROBABILITY)
            return total

        loop.evaluate_base(tokens[:-1], outputs)
        total = likelihood(loop.predicted_by_base)
        loop.evaluate_expert(expert, tokens[:-1], outputs)
        total += likelihood(partial(loop.predicted_by_expert, expert))
        return total / (2 * len(outputs))
