"""What the benchmarks share: a sample of a method, and how rounds of samples become columns."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, TypeVar

from colm_edge.errors import ColmError

T = TypeVar("T")


@dataclass(frozen=True)
class Sample:
    """One run of one method; None where another program does not report a figure."""

    tokens: int  # written, without the end token
    seconds: float  # with the prompt's
    first_token_seconds: float | None = None
    outside_seconds: float | None = None  # of seconds, spent outside llama.cpp
    expert_calls: int | None = None
    expert_tokens: int | None = None
    deferred: int | None = None  # of the tokens
    text: str = ""

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


def clocked(steps: Iterable[T]) -> tuple[list[T], float, float | None]:
    """Return what an iterator yields, the seconds that it takes, and those until the first."""
    begun, found, first = perf_counter(), list[T](), None
    for step in steps:
        if first is None:
            first = perf_counter() - begun
        found.append(step)
    return found, perf_counter() - begun, first


def chosen(
    ways: Mapping[str, T], only: Collection[str], always: Collection[str] = ()
) -> dict[str, T]:
    """Return the methods of these names, in their own order, and those that are always wanted; all
    of them if no name is given. Raises ColmError for an unknown name."""
    unknown = [name for name in only if name not in ways]
    if unknown:
        raise ColmError(f"no method {unknown[0]!r}; expected some of {', '.join(ways)}")
    return {name: way for name, way in ways.items() if not only or name in {*only, *always}}


def speed_columns(samples: Sequence[Sample]) -> dict[str, Any]:
    """Return the speed of a method, one sample a round: median, slowest and fastest round."""
    speeds = [sample.speed for sample in samples]
    firsts = [s.first_token_seconds for s in samples if s.first_token_seconds is not None]
    return {
        "tokens_per_second": statistics.median(speeds),
        "tokens_per_second_low": min(speeds),
        "tokens_per_second_high": max(speeds),
        "first_token_seconds": statistics.median(firsts) if firsts else None,
    }


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float | None:
    """Return the median quotient of two speeds, a pair of them for each round, so that what
    disturbs a whole round affects both sides; None where there are none to compare with."""
    ratios = (
        [own / other for own, other in zip(ours, theirs, strict=True) if other] if theirs else []
    )
    return statistics.median(ratios) if ratios else None
