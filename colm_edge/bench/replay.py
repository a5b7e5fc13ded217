"""Traces: which tokens are written, which of them are deferred, and where the two models agree.

A replay evaluates both real models and reads the switch as usual, but takes the choices from the
trace. So the speed of a pair does not depend on what its weights would say, and every schedule
writes the same tokens.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from colm_edge.arrays import Floats
from colm_edge.decode.loop import Decoder, Schedule
from colm_edge.decode.picker import Picker
from colm_edge.decode.policy import BASE, Policy, Reading
from colm_edge.decode.timeline import Timeline
from colm_edge.errors import DataError
from colm_edge.journal import is_count

if TYPE_CHECKING:
    from colm_edge.switch.reading import Reader


SEED = 0
PROMPT_TOKENS = 32  # the prompt of a drawn trace
DRAWS = 100
AGREE = 0.6


@dataclass(frozen=True)
class Trace:
    """A prompt and the tokens written after it, (n,); for each, whether it is deferred and whether
    base and expert would both choose it. is_text: whether that is a text, and not drawn."""

    prompt: list[int]
    tokens: list[int]
    deferred: list[bool]
    agrees: list[bool]
    is_text: bool = False

    @property
    def defer_rate(self) -> float:
        return sum(self.deferred) / len(self.deferred)


@dataclass(frozen=True)
class Process:
    """The distribution of traces: the defer rate, the probability that the expert repeats the
    base's choice, and the mean length of runs of deferrals (0: each token is independent)."""

    rate: float
    agree: float = AGREE
    run: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Process:
        """Parse a text like f=0.2,agree=0.6,run=2. Raises ValueError for anything else."""
        parts = [part.partition("=") for part in text.split(",")]
        values = {name: float(value) for name, _, value in parts}
        rate, agree = values.pop("f", -1.0), values.pop("agree", AGREE)
        run = values.pop("run", 0.0)
        # Between two runs of deferrals stands at least one token of the base.
        most = run / (run + 1) if run else 1.0
        in_range = 0 <= rate <= most and 0 <= agree <= 1 and (run == 0 or run >= 1)
        if values or not in_range or len(parts) != len({name for name, _, _ in parts}):
            raise ValueError(text)
        return cls(rate, agree, run)

    def draw(self, n: int, n_vocab: int, seed: int = SEED) -> Trace:
        """Return a trace of n tokens.

        It takes the one of DRAWS draws whose defer rate is nearest, so that the rate of a short
        trace is right too. The share of agreements is exact, at deferrals and elsewhere.
        """
        draw, rate = random.Random(seed), self.rate
        stay = 1 - 1 / self.run if self.run else rate
        begin = (1 - stay) * rate / (1 - rate) if rate < 1 else 1.0

        def deferrals() -> list[bool]:
            found: list[bool] = []
            for i in range(n):
                p = rate if i == 0 else stay if found[-1] else begin
                found.append(draw.random() < p)
            return found

        def nearest(draws: Iterator[list[bool]], share: float) -> list[bool]:
            best: list[bool] = next(draws)
            for found in draws:
                if abs(sum(found) - share * n) < abs(sum(best) - share * n):
                    best = found
            return best

        deferred = nearest((deferrals() for _ in range(DRAWS)), rate)
        # The same share of agreements at deferrals and elsewhere, at drawn places.
        agrees = [False] * n
        for kind in (True, False):
            places = [i for i in range(n) if deferred[i] is kind]
            for i in draw.sample(places, round(self.agree * len(places))):
                agrees[i] = True
        tokens = [draw.randrange(n_vocab) for _ in range(PROMPT_TOKENS + n)]
        return Trace(tokens[:PROMPT_TOKENS], tokens[PROMPT_TOKENS:], deferred, agrees)


def recorded(path: str | os.PathLike[str]) -> Trace:
    """Return the trace of an answer that `run --json` printed. The base's choices at deferrals are
    not in it, so the models never agree there. A token that review has put in the place of another
    is not deferred. Raises DataError for any other file."""
    try:
        with open(path, encoding="utf-8") as file:
            answer = json.load(file)
        tokens = answer["tokens"]
        by_expert = [{"base": False, "expert": True}[token["source"]] for token in tokens]
        prompt, ids = list(answer["prompt_tokens"]), [token["id"] for token in tokens]
        undone = {one["at"] for one in answer.get("withdrawn", ())}
        if not all(map(is_count, (*prompt, *ids, *undone))):
            raise ValueError("a token or place that is not a count")
        trace = Trace(
            prompt,
            ids,
            [expert and i not in undone for i, expert in enumerate(by_expert)],
            [not expert for expert in by_expert],
            is_text=True,
        )
    except OSError as e:
        raise DataError(f"{path}: {e.strerror or e}; expected what `run --json` printed") from e
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise DataError(f"{path}: not what `run --json` printed ({e!r})") from e
    if not trace.prompt or not trace.tokens:
        raise DataError(f"{path}: the answer has no tokens")
    return trace


class ReplayPolicy(Policy):
    """Reads the switch as usual, then returns the trace's decision and token instead.

    Where the models do not agree, the base chooses another token than the trace's. Decisions depend
    on the position only, so they also hold after a token that differs.

    everywhere: the models may also disagree at tokens that are not deferred.
    """

    def __init__(
        self, read: Reader, threshold: float, trace: Trace, n_choose: int, *, everywhere: bool
    ) -> None:
        super().__init__(read, threshold)
        self._trace, self._n_choose, self._everywhere = trace, n_choose, everywhere

    def read(self, at: int, logits: Floats, hidden: Floats) -> Reading:
        logsumexp = super().read(at, logits, hidden).logsumexp
        trace, i = self._trace, at - len(self._trace.prompt)
        deferred, token = trace.deferred[i], trace.tokens[i]
        if not trace.agrees[i] and (deferred or self._everywhere):
            token = (token + 1) % self._n_choose
        p_defer = float(deferred)
        return Reading(p_defer, token, logsumexp, 0 if self.defers(p_defer) else BASE, 0)


class ReplayPicker(Picker):
    """Takes the trace's tokens as the expert's likeliest ones."""

    def __init__(self, n_choose: int, trace: Trace) -> None:
        super().__init__(n_choose)
        self._trace = trace

    def read(self, at: int, logits: Floats, *, of_base: bool = False) -> tuple[int, float]:
        _, logsumexp = super().read(at, logits, of_base=of_base)
        return self._trace.tokens[at - len(self._trace.prompt)], logsumexp


def replay(
    base: Timeline,
    expert: Timeline,
    read: Reader,
    trace: Trace,
    threshold: float,
    n_choose: int,
    schedule: Schedule | None = None,
    *,
    everywhere: bool = False,
) -> Decoder:
    """Return a Decoder that will write a trace's tokens. everywhere: as for `ReplayPolicy`."""
    return Decoder(
        base,
        [expert],
        ReplayPolicy(read, threshold, trace, n_choose, everywhere=everywhere),
        ReplayPicker(n_choose, trace),
        trace.prompt,
        end_tokens=frozenset(),
        max_tokens=len(trace.tokens),
        schedule=schedule,
    )
