"""Traces: which tokens are written, which of them are deferred, where the two models agree.

A trace is imposed on real decodes of real models: both are evaluated and the switch is read as
ever, only the choices are the trace's. So the speed of a pair can be measured whatever its weights
say, and one trace serves every schedule.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from colm_edge.decode.loop import Decoder, Floats, Timeline
from colm_edge.errors import DataError

if TYPE_CHECKING:
    from colm_edge.switch.reading import Reader


SEED = 0
PROMPT_TOKENS = 32  # of a drawn trace
DRAWS = 100
AGREE = 0.6


@dataclass(frozen=True)
class Trace:
    """A prompt, and the tokens written after it; whether each is deferred, and whether base and
    expert would both choose it, (n,) each."""

    prompt: list[int]
    tokens: list[int]
    deferred: list[bool]
    agrees: list[bool]

    @property
    def defer_rate(self) -> float:
        return sum(self.deferred) / len(self.deferred)


@dataclass(frozen=True)
class Process:
    """What traces are drawn from: the defer rate, the probability that the expert repeats the
    base's choice, and the mean run of deferrals (0: every token on its own)."""

    rate: float
    agree: float = AGREE
    run: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Process:
        """Read f=0.2,agree=0.6,run=2. Raises ValueError for anything else."""
        parts = [part.partition("=") for part in text.split(",")]
        values = {name: float(value) for name, _, value in parts}
        rate, agree = values.pop("f", -1.0), values.pop("agree", AGREE)
        run = values.pop("run", 0.0)
        in_range = 0 <= rate <= 1 and 0 <= agree <= 1 and (run == 0 or run >= 1)
        if values or not in_range or len(parts) != len({name for name, _, _ in parts}):
            raise ValueError(text)
        return cls(rate, agree, run)

    def draw(self, n: int, n_vocab: int, seed: int = SEED) -> Trace:
        """Return a trace of n tokens.

        Of DRAWS draws the one whose rate is nearest is taken, so that a short trace too defers as
        often as it says; likewise for the agreements, at deferrals and elsewhere.
        """
        draw, rate = random.Random(seed), self.rate
        stay = 1 - 1 / self.run if self.run else rate
        begin = min(1.0, (1 - stay) * rate / (1 - rate)) if rate < 1 else 1.0

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
        # As many agreements as promised at deferrals, and as many elsewhere, in a drawn order.
        agrees = [False] * n
        for kind in (True, False):
            places = [i for i in range(n) if deferred[i] is kind]
            for i in draw.sample(places, round(self.agree * len(places))):
                agrees[i] = True
        tokens = [draw.randrange(n_vocab) for _ in range(PROMPT_TOKENS + n)]
        return Trace(tokens[:PROMPT_TOKENS], tokens[PROMPT_TOKENS:], deferred, agrees)


def recorded(path: str | os.PathLike[str]) -> Trace:
    """Read what `run --json` printed. What the base would have written at a deferral is not in it,
    so the two never agree there. Raises DataError when the file is not that."""
    try:
        with open(path, encoding="utf-8") as file:
            answer = json.load(file)
        tokens = answer["tokens"]
        deferred = [{"base": False, "expert": True}[token["source"]] for token in tokens]
        trace = Trace(
            [int(token) for token in answer["prompt_tokens"]],
            [int(token["id"]) for token in tokens],
            deferred,
            [not deferred for deferred in deferred],
        )
    except OSError as e:
        raise DataError(f"{path}: {e.strerror or e}; expected what `run --json` printed") from e
    except (ValueError, KeyError, TypeError) as e:
        raise DataError(f"{path}: not what `run --json` printed ({e!r})") from e
    if not trace.prompt or not trace.tokens:
        raise DataError(f"{path}: the answer has no tokens")
    return trace


def replaying(kind: type[Decoder], trace: Trace) -> type[Decoder]:
    """Return a kind of Decoder whose choices are a trace's.

    Where base and expert differ, the base chooses another token, and past it decides as the trace
    does there: deferrals belong to positions.
    """
    start = len(trace.prompt)

    class Replaying(kind):  # type: ignore[misc,valid-type]
        def _judge(self, at: int, logits: Floats, hidden: Floats) -> tuple[float, int, float]:
            _, _, logsumexp = super()._judge(at, logits, hidden)
            i = at - start
            deferred, token = trace.deferred[i], trace.tokens[i]
            differs = not trace.agrees[i] and (deferred or self.checks_every_token)
            return float(deferred), (token + 1) % self._n_choose if differs else token, logsumexp

        def _likeliest(self, at: int, logits: Floats) -> tuple[int, float]:
            _, logsumexp = super()._likeliest(at, logits)
            return trace.tokens[at - start], logsumexp

    return Replaying


def replay(
    kind: type[Decoder],
    base: Timeline,
    expert: Timeline,
    read: Reader,
    trace: Trace,
    threshold: float,
    **options: Any,
) -> Decoder:
    """Return a Decoder of a kind that is about to write a trace's tokens."""
    return replaying(kind, trace)(
        base, expert, read, trace.prompt, threshold=threshold, end_tokens=frozenset(),
        max_tokens=len(trace.tokens), **options,
    )  # fmt: skip
